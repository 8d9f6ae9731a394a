"""The model card's snippets, run as they stand: other libraries score and encode by them as training did."""

import ast
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import decoders
from transformers import AutoTokenizer

from rayembed.config import Experiment
from rayembed.config.score import ScoreConfig
from rayembed.data.prompts import passage_text, query_text
from rayembed.jobs.export import card
from rayembed.models.pairs import PROMPT, trained_reading
from rayembed.models.rerankers import load_reranker
from rayembed.models.trained import build_tokenizer
from tests.jobs.conftest import MakeExperiment
from tests.jobs.reference_ranking import vectors
from tests.small_models import decoder_folder

TRAINED = {"query_max_len": 8, "passage_max_len": 20}
KEPT = (8 + 20 // 4, 20 + 8 // 2, 28)  # of a query, of a passage, of a pair
INSTRUCTIONS = {
    "query_instruction_for_retrieval": "find",
    "query_instruction_format": "{} {}\\nend",
    "passage_instruction_for_retrieval": "read",
    "passage_instruction_format": "{} {} so",
}
NO_INSTRUCTIONS = {"query_instruction_format": "<{}> {}", "passage_instruction_format": "<{}> {}"}


def card_of(experiment: Experiment, folder: Path) -> str:
    """Of a run folder with no more than the card needs."""
    out = Path(experiment.output_dir)
    (out / "train").mkdir(parents=True)
    (out / "train" / "metrics.jsonl").write_text("")
    shutil.copytree(folder, out / "model")
    tokenizer = build_tokenizer(experiment)
    tokenizer.backend_tokenizer.decoder = decoders.WordPiece()  # FlagEmbedding makes texts of tokens again
    tokenizer.save_pretrained(out / "model")
    return card(replace(experiment, train=None), out, "well")


def call(text: str, name: str) -> ast.Call:
    """The one call of a function or method in the card's Python."""
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    nodes = [node for block in blocks for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)]
    (found,) = (node for node in nodes if ast.unparse(node.func).split(".")[-1] == name)
    return found


def keywords(text: str, name: str) -> dict[str, Any]:
    """What the card tells a function by name."""
    return {str(word.arg): ast.literal_eval(word.value) for word in call(text, name).keywords}


@pytest.mark.parity
@pytest.mark.parametrize("instructions", [NO_INSTRUCTIONS, INSTRUCTIONS], ids=["bare", "instructed"])
@pytest.mark.parametrize("family", ["reranker-encoder", "reranker-decoder"])
def test_by_the_card_flagembedding_reads_no_more_than_was_trained(
    family: str,
    instructions: dict[str, str],
    make_experiment: MakeExperiment,
    tiny_reranker: Path,
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    """Long pairs too are scored alike, but where a passage's own limit is the one that cuts."""
    from FlagEmbedding import FlagLLMReranker, FlagReranker

    decoder = family == "reranker-decoder"
    folder = decoder_folder(tmp_path / "llama", "llama", "[CLS]") if decoder else tiny_reranker
    lengths = {"query_max_len": 100, "passage_max_len": 300} if decoder else TRAINED
    own = {"name_or_path": str(folder), "family": family, "pooling": None, **instructions}
    made = make_experiment(tmp_path / "run", model=own, data=lengths, evaluate={"retriever": str(tiny_model)})
    text, model = card_of(made, folder), str(tmp_path / "run" / "model")
    theirs: Any = FlagLLMReranker if decoder else FlagReranker
    told = keywords(text, "FlagLLMReranker" if decoder else "FlagReranker")
    prompt = len(AutoTokenizer.from_pretrained(folder)(PROMPT, add_special_tokens=False)["input_ids"])
    kept = (175, 350, 400) if decoder else KEPT
    assert told["query_max_length"] == kept[0]
    assert told["max_length"] == kept[2] - (2 * prompt if decoder else 0)
    assert re.search("a query keeps {} tokens, a passage {}, and both together, .* {}\\.".format(*kept), text)

    pairs = [("ab" * n, "cd" * m) for n in (2, 50, 120) for m in (2, 30, 240)]
    pairs = pairs if decoder else pairs[3:]  # a passage after a short query is cut by its own limit
    found = theirs(model, use_fp16=False, devices="cpu", **told).compute_score(pairs, batch_size=4)
    kind = "decoder-reranker" if decoder else "reranker"
    config = ScoreConfig(model=model, kind=kind)  # type: ignore[arg-type] # one of the kinds
    ours = load_reranker(config, kind, device=torch.device("cpu"), reading=trained_reading(made))
    put = [(query_text(made.model, query), passage_text(made.model, passage)) for query, passage in pairs]
    np.testing.assert_allclose(found, ours.score(put, tokens_per_batch=4096, dtype=torch.float32), atol=1e-4)


def test_a_cross_encoder_is_shown_texts_with_their_instructions(
    make_experiment: MakeExperiment, tiny_reranker: Path, tiny_model: Path, tmp_path: Path
) -> None:
    sections: dict[str, Any] = {"data": TRAINED, "evaluate": {"retriever": str(tiny_model)}}
    own = {"name_or_path": str(tiny_reranker), "family": "reranker-encoder", "pooling": None}
    for name, instructions in (("bare", NO_INSTRUCTIONS), ("instructed", INSTRUCTIONS)):
        made = make_experiment(tmp_path / name, model={**own, **instructions}, **sections)
        text = card_of(made, tiny_reranker)
        (shown,) = ast.literal_eval(call(text, "predict").args[0])
        assert shown == (query_text(made.model, "a query"), passage_text(made.model, "a passage"))
        assert ("`predict` puts no instruction" in text) == (name == "instructed")
        assert "append it yourself" not in text


@pytest.mark.parity
def test_by_the_card_flagembedding_encodes_as_was_trained(
    make_experiment: MakeExperiment, tiny_model: Path, tmp_path: Path
) -> None:
    from FlagEmbedding import FlagAutoModel

    for name, instructions in (("bare", NO_INSTRUCTIONS), ("instructed", INSTRUCTIONS)):
        made = make_experiment(tmp_path / name, model=instructions)
        text, model = card_of(made, tiny_model), tmp_path / name / "model"
        told = keywords(text, "from_finetuned")
        theirs = FlagAutoModel.from_finetuned(str(model), use_fp16=False, devices="cpu", **told)
        found = theirs.encode_queries(["a query"]), theirs.encode_corpus(["a passage"])
        for vector, put in zip(
            found, (query_text(made.model, "a query"), passage_text(made.model, "a passage")), strict=True
        ):
            np.testing.assert_allclose(vector, vectors(model, [put], 128), atol=1e-5)
