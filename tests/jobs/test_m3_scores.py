"""Scores of BGE-M3's heads over parts of a corpus are those of each pair by itself."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rayembed.data.store import PASSAGES, QUERIES, StoreWriter
from rayembed.jobs.m3_scores import HEADS, head_scores
from rayembed.models.chunks import pad_chunks
from rayembed.models.encoding import tokenize
from rayembed.models.m3 import M3Embedder
from rayembed.models.similarity import SIMILARITIES
from rayembed.models.trained import build_model, build_tokenizer
from tests.jobs.conftest import MakeExperiment
from tests.jobs.toy_data import read_texts
from tests.jobs.without_ray import do_units_here


@pytest.mark.parametrize("cut", [7, 200])
def test_scores_are_those_of_each_pair(
    cut: int,
    make_experiment: MakeExperiment,
    tiny_model: Path,
    beir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    do_units_here(monkeypatch)
    made = make_experiment(
        tmp_path / "run",
        model={"family": "m3", "query_instruction_for_retrieval": "find "},
        encode={"tokens_per_batch": 300},
    )
    texts = {name: list(read_texts(beir / f"{name}.jsonl").values()) for name in ("queries", "corpus")}
    stores = []
    for name, schema, few in (("queries", QUERIES, 9), ("corpus", PASSAGES, 60)):
        writer = StoreWriter(tmp_path / name, schema, cut)
        for i, text in enumerate(texts[name][:few]):
            writer.add({"id": str(i), "text": text})
        stores.append(writer.finish())
    rng = np.random.default_rng(0)
    candidates = [rng.choice(60, size, replace=False) for size in (5, 0, 60, 1, 7, 7, 3, 20, 2)]
    found = head_scores(made, str(tiny_model), *stores, candidates)
    model, tokenizer = build_model(made), build_tokenizer(made)
    assert isinstance(model, M3Embedder)

    def represent(text: str, length: int) -> dict[str, torch.Tensor]:
        assert isinstance(model, M3Embedder)
        return model.represent(pad_chunks(tokenize(tokenizer, [text], length), pad_token=0, padding_side="right"))

    with torch.inference_mode():
        for i, rows in enumerate(candidates):
            assert {*found[i]} == {*HEADS}
            query = represent(f"find {texts['queries'][i]}", 24)
            for place, row in enumerate(rows.tolist()):
                passage = represent(texts["corpus"][row], 48)
                for head, similarity in SIMILARITIES.items():
                    assert found[i][head][place] == pytest.approx(float(similarity.paired(query, passage)), abs=1e-5)
    again = head_scores(replace(made, seed=made.seed), str(tiny_model), *stores, candidates)
    assert all(
        np.array_equal(one[head], other[head]) for one, other in zip(found, again, strict=True) for head in HEADS
    )
