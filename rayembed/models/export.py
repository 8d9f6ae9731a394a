"""A trained embedder as a folder for transformers, sentence-transformers and FlagEmbedding."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from rayembed.config import Experiment
from rayembed.config.model import ModelConfig
from rayembed.models.embedder import Embedder
from rayembed.models.in_context import icl_section
from rayembed.models.loading import POOLING_FLAGS, dropout_keys, load_config
from rayembed.models.pair_scorer import PairScorer
from rayembed.models.settings_file import write_settings


def max_seq_length(experiment: Experiment) -> int:
    """Tokens that the exported model keeps of a text, or of a pair: the longest it was trained or evaluated with."""
    if experiment.trains_reranker():
        return experiment.data.query_max_len + experiment.data.passage_max_len
    query = max(experiment.data.query_max_len, experiment.max_len("query"))
    icl = icl_section(experiment)
    if icl is not None and (icl.max_examples or icl.examples_for_task):
        query += icl.examples_max_len
    return max(query, experiment.data.passage_max_len, experiment.max_len("passage"))


def save_embedder(
    model: Embedder,
    tokenizer: PreTrainedTokenizerBase,
    experiment: Experiment,
    folder: Path,
    *,
    further: Callable[[Path], None] | None = None,
) -> None:
    """Writes weights, tokenizer, rayembed.json and the sentence-transformers files; the folder appears whole.

    Args:
        model: with all its weights in this process.
        tokenizer: of the model.
        experiment: pooling, normalisation, prompts and lengths.
        folder: is replaced if it is there.
        further: writes more into the folder before it appears. None: there is no more.
    """
    backbone: Any = model.backbone
    dimension = int(backbone.config.hidden_size)
    files = sentence_transformers_files(model, experiment, dimension=dimension)
    _save(backbone, tokenizer, experiment, folder, files, further)


def save_reranker(model: PairScorer, tokenizer: PreTrainedTokenizerBase, experiment: Experiment, folder: Path) -> None:
    """Writes weights, tokenizer and rayembed.json; the folder appears whole.

    Args:
        model: with all its weights in this process.
        tokenizer: of the model.
        experiment: instructions, prompt and lengths.
        folder: is replaced if it is there.
    """
    _save(model.backbone, tokenizer, experiment, folder, {})


def _save(
    backbone: Any,  # noqa: ANN401 - of transformers
    tokenizer: PreTrainedTokenizerBase,
    experiment: Experiment,
    folder: Path,
    files: dict[str, Any],
    further: Callable[[Path], None] | None = None,
) -> None:
    """The folder of a model of transformers, with further JSON files."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if experiment.model.dropout is not None:  # the experiment's dropout is for training; the checkpoint's stays its own
        original = load_config(experiment.model.name_or_path, trust_remote_code=experiment.model.trust_remote_code)
        for key in dropout_keys(original):
            setattr(backbone.config, key, getattr(original, key))
    backbone.save_pretrained(partial)
    tokenizer.model_max_length = max_seq_length(experiment)
    tokenizer.save_pretrained(partial)
    for name, content in files.items():
        path = partial / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n")
    write_settings(experiment, partial)
    if further is not None:
        further(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)


def sentence_transformers_files(model: Embedder, experiment: Experiment, *, dimension: int) -> dict[str, Any]:
    """The json files from which sentence-transformers learns pooling, normalisation, prompts and length."""
    kinds = ["Transformer", "Pooling", *(["Normalize"] if model.normalize else [])]
    modules = [
        {
            "idx": index,
            "name": str(index),
            "path": "" if index == 0 else f"{index}_{kind}",
            "type": f"sentence_transformers.models.{kind}",
        }
        for index, kind in enumerate(kinds)
    ]
    pooling = {flag: name == model.pooling for name, flag in POOLING_FLAGS.items()}
    return {
        "modules.json": modules,
        "1_Pooling/config.json": {"word_embedding_dimension": dimension, **pooling, "include_prompt": True},
        **({"2_Normalize/config.json": {}} if model.normalize else {}),
        "sentence_bert_config.json": {"max_seq_length": max_seq_length(experiment), "do_lower_case": False},
        "config_sentence_transformers.json": {
            "prompts": prompts(experiment.model),
            "default_prompt_name": None,
            "similarity_fn_name": "cosine" if model.normalize else "dot",
        },
    }


def prompts(model: ModelConfig) -> dict[str, str]:
    """What sentence-transformers puts before a query and a document.

    It knows prefixes alone: a format with text after the query cannot be told to it (see `prompt_suffix`).
    """

    def prefix(form: str, instruction: str | None) -> str:
        return form.replace("\\n", "\n").format(instruction, "\0").split("\0")[0] if instruction else ""

    return {
        "query": prefix(model.query_instruction_format, model.query_instruction_for_retrieval),
        "document": prefix(model.passage_instruction_format, model.passage_instruction_for_retrieval),
    }


def prompt_suffix(model: ModelConfig) -> bool:
    """Whether a format in force puts text after the query or passage, which sentence-transformers cannot do."""
    forms = (
        (model.query_instruction_format, model.query_instruction_for_retrieval),
        (model.passage_instruction_format, model.passage_instruction_for_retrieval),
    )
    return any(instruction and not form.endswith("{}") for form, instruction in forms)
