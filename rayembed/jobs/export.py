"""The job `export`: the check that the exported folder gives the trained vectors, the model card, other formats."""

import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from jinja2 import Environment, PackageLoader
from numpy.typing import NDArray

from rayembed import __version__
from rayembed.config import Experiment
from rayembed.config.jobs import ExportConfig
from rayembed.config.uris import public_name
from rayembed.data.copies import shown
from rayembed.data.mirror import all_here, folder_here
from rayembed.data.prompts import passage_text, query_text
from rayembed.data.storage import write_atomic
from rayembed.jobs.folders import RECORD, written_once
from rayembed.jobs.run_folder import beside_run_folder, in_run_folder
from rayembed.models.encoding import DTYPES
from rayembed.models.export import max_seq_length, prompt_suffix, prompts
from rayembed.models.families import FAMILIES
from rayembed.models.in_context import icl_section
from rayembed.models.loading import load_tokenizer, pooling_of, weights_fingerprint
from rayembed.models.pairs import layout_of, trained_reading
from rayembed.models.probe import least_cosine, read_probe, reranker_section
from rayembed.models.rerankers import load_reranker

logger = logging.getLogger(__name__)
LEAST_COSINE = 0.9999
FLAG_POOLINGS = ("cls", "mean")  # FlagEmbedding's encoder class never returns with last_token
LEAST_COSINE_HALF = 0.999  # weights rounded to 16 bits
LARGEST, LARGEST_HALF = 1e-4, 0.05  # difference of a reranker's scores, as a share of the largest of them


class ExportError(RuntimeError):
    """The exported folder does not give the vectors of training."""


@in_run_folder
def run(experiment: Experiment, *, overwrite: bool = False) -> Path:
    """Checks OUTPUT_DIR/model against the vectors of training and writes its card and other formats.

    Args:
        experiment: section export.
        overwrite: write the formats anew where they were made from other weights.

    Returns:
        OUTPUT_DIR/model.

    Raises:
        ValueError: there is no model yet.
        ExportError: a vector's cosine to that of training is below 0.9999.
    """
    config = experiment.export or ExportConfig()
    out = Path(experiment.output_dir)
    model = out / "model"
    if not model.is_dir():
        raise ValueError(f"{shown(model)} is not there; run `rayembed train` first")
    folder_here(model)
    all_here(out / "train" / name for name in ("probe.json", "probe.npy", "metrics.jsonl"))
    agreement = check(experiment, model)
    logger.info("export: %s gives what training gave, %s", shown(model), agreement)
    write_atomic(model / "README.md", card(experiment, out, agreement).encode())
    for name in config.formats:

        def write(folder: Path, name: str = name) -> None:
            _write_format(experiment, model, folder, DTYPES[name])
            check(experiment, folder, half=True)

        written_once(out / f"model-{name}", {"weights": weights_fingerprint(str(model))}, write, overwrite=overwrite)
    return model


@beside_run_folder
def plan(experiment: Experiment, *, overwrite: bool = False) -> str:
    """What `run` would do."""
    config = experiment.export or ExportConfig()
    formats = ", ".join(("sentence-transformers", *config.formats))
    return f"export: check of {Path(experiment.output_dir) / 'model'}, model card, formats {formats}"


def check(experiment: Experiment, folder: Path, *, half: bool = False) -> str:
    """How well an exported folder agrees with training, in words.

    Args:
        experiment: its family says what is compared: vectors in sentence-transformers, or scores.
        folder: the model.
        half: its weights were rounded to 16 bits.

    Raises:
        ExportError: it does not agree.
    """
    pairs, trained = read_probe(Path(experiment.output_dir) / "train")
    if experiment.trains_reranker():
        difference = _check_scores(experiment, folder, pairs, trained, LARGEST_HALF if half else LARGEST)
        return f"largest difference of a score {difference:.2g}"
    least = LEAST_COSINE_HALF if half else LEAST_COSINE
    return f"least cosine {check_vectors(folder, pairs, trained, least):.6f}"


def _check_scores(
    experiment: Experiment, folder: Path, pairs: list[tuple[str, str]], trained: NDArray[np.float32], largest: float
) -> float:
    config = reranker_section(experiment, str(folder))
    reading = trained_reading(experiment)
    reranker = load_reranker(config, config.kind, device=torch.device("cpu"), reading=reading)
    found = reranker.score(pairs, tokens_per_batch=4096, dtype=torch.float32)
    difference = float(np.abs(found - trained).max() / max(1.0, float(np.abs(trained).max())))
    if math.isnan(difference) or difference > largest:
        raise ExportError(
            f"{folder}: its scores differ from those of training by up to {difference:.2g} of the largest, above "
            f"{largest}; the export is wrong, do not use it (and report this)"
        )
    return difference


def check_vectors(folder: Path, pairs: list[tuple[str, str]], trained: NDArray[np.float32], least: float) -> float:
    """The smallest cosine between the vectors of training and those that sentence-transformers gives on a folder.

    Raises:
        ExportError: it is below `least`.
    """
    cosine = least_cosine(trained, sentence_transformers_vectors(folder, [text for pair in pairs for text in pair]))
    if math.isnan(cosine) or cosine < least:
        raise ExportError(
            f"{folder}: the least cosine between its vectors in sentence-transformers and those of training is "
            f"{cosine:.6f}, below {least}; the export is wrong, do not use it (and report this)"
        )
    return cosine


def sentence_transformers_vectors(folder: Path, texts: list[str]) -> NDArray[np.float32]:
    """What a user of sentence-transformers gets: vectors [N, D] of texts without prompts."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    vectors: NDArray[np.float32] = model.encode(texts, prompt="", convert_to_numpy=True, show_progress_bar=False)
    return vectors


def _write_format(experiment: Experiment, model: Path, folder: Path, dtype: torch.dtype) -> None:
    for path in sorted(model.iterdir()):
        if path.suffix != ".safetensors":
            if path.is_dir():
                shutil.copytree(path, folder / path.name, dirs_exist_ok=True)  # a killed run left some
            else:
                shutil.copy2(path, folder / path.name)
    auto_class = getattr(transformers, FAMILIES[experiment.model.family].backbone)
    remote = experiment.model.trust_remote_code
    auto_class.from_pretrained(str(model), dtype=dtype, trust_remote_code=remote).save_pretrained(folder)


def card(experiment: Experiment, out: Path, agreement: str) -> str:
    """The model card: what it is, what it was trained on and how, what was measured."""
    steps = (out / "train" / "metrics.jsonl").read_text().splitlines()
    metrics = _metrics(out)
    environment = Environment(
        loader=PackageLoader("rayembed.models", "templates"), autoescape=False, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["public_name"] = public_name
    return environment.get_template("card.md.j2").render(
        name=out.name,
        version=__version__,
        experiment=experiment,
        pooling=pooling_of(experiment.model),
        prompts=prompts(experiment.model),
        example={
            "query": query_text(experiment.model, "a query"),
            "passage": passage_text(experiment.model, "a passage"),
        },
        prompt_suffix=prompt_suffix(experiment.model),
        max_seq_length=max_seq_length(experiment),
        flag_loads=_flag_loads(experiment),
        icl=_icl_facts(experiment),
        flag_model_class=FAMILIES[experiment.model.family].flag_model_class,
        metrics=metrics,
        measured_tasks={name: task for name, task in metrics.get("tasks", {}).items() if "tuned" in task},
        steps=len(steps),
        last=json.loads(steps[-1]) if steps else {},
        negatives=" or ".join(map(str, sorted({json.loads(step).get("negatives_per_query", "") for step in steps}))),
        agreement=agreement,
        reads_pairs=experiment.trains_reranker(),
        reranker=_reranker_facts(experiment, out / "model") if experiment.trains_reranker() else {},
    )


def _reranker_facts(experiment: Experiment, folder: Path) -> dict[str, Any]:
    """Prompt and lengths of pairs, and one for FlagEmbedding, which counts a prompt twice beyond max_length."""
    reading, decoder = trained_reading(experiment), FAMILIES[experiment.model.family].causal
    tokenizer = load_tokenizer(
        str(folder), padding_side="right", trust_remote_code=experiment.model.trust_remote_code, causal=decoder
    )
    layout = layout_of(tokenizer, reading, decoder=decoder)
    beyond = 2 * len(layout.around[2]) if decoder else 0
    return {"prompt": reading.prompt, "layout": layout, "flag_max_length": max(layout.max_len - beyond, 16)}


def _flag_loads(experiment: Experiment) -> bool:
    """Whether FlagEmbedding has the model's pooling; its class for decoders has last_token alone."""
    decoder = FAMILIES[experiment.model.family].causal
    return pooling_of(experiment.model) in (("last_token",) if decoder else FLAG_POOLINGS)


def _icl_facts(experiment: Experiment) -> dict[str, Any] | None:
    """Suffix and examples as FlagEmbedding's class is told them; None for other families."""
    section, model = icl_section(experiment), experiment.model
    if section is None:
        return None
    suffix = section.icl_suffix_str.replace("\\n", "\n")
    examples = [  # with the instruction in the query: its class puts a format around none too
        {"instruct": "", "query": query_text(model, one.query, one.instruct), "response": one.response}
        for one in section.examples_for_task
    ]
    return {"suffix": suffix, "examples": examples, "format": "{}{}" + suffix + "{}"}


def _metrics(out: Path) -> dict[str, Any]:
    """What evaluate measured, if it was on these very weights."""
    folder = out / "evaluate"
    if not (folder / RECORD).is_file():
        return {}
    judged = json.loads((folder / RECORD).read_text())["weights"].get("tuned")
    if judged != weights_fingerprint(str(out / "model")):
        logger.warning("export: %s is of other weights; `rayembed evaluate --overwrite` measures these", folder)
        return {}
    metrics: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return metrics
