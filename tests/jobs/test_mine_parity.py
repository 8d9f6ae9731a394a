"""The candidates that mining leaves before it draws, against FlagEmbedding: its encoder, and the rules of its miner.

`scripts/hn_mine.py` is in its repository only, not in the package: its rules are written down in the reference below
(encode everything, one IndexFlatIP, ranks of the window, minus the positives' texts and the query's).
"""

import json
from pathlib import Path

import faiss
import numpy as np
import pytest

from rayembed.jobs import mine
from tests.jobs.conftest import MakeExperiment
from tests.jobs.toy_data import NUM_TRAIN, read_lines, read_texts

pytestmark = [pytest.mark.ray, pytest.mark.parity, pytest.mark.usefixtures("local_ray")]
FIRST, LAST = 2, 25


def candidates_of_flag_embedding(
    model: Path, queries: list[str], positives: list[list[str]], pool: list[str]
) -> list[list[str]]:
    from FlagEmbedding import FlagModel

    peer = FlagModel(
        str(model), pooling_method="mean", use_fp16=False, devices="cpu", query_max_length=24, passage_max_length=48
    )
    passages, asked = peer.encode_corpus(pool), peer.encode_queries(queries)
    index = faiss.IndexFlatIP(passages.shape[1])
    index.add(np.asarray(passages, np.float32))
    _, found = index.search(np.asarray(asked, np.float32), LAST)
    kept = []
    for query, own, rows in zip(queries, positives, found, strict=True):
        window = [pool[row] for row in rows[FIRST:LAST] if row != -1]
        kept.append([text for text in window if text not in own and text != query])
    return kept


def test_candidates_before_the_draw_are_those_of_flag_embeddings_miner(
    make_experiment: MakeExperiment, beir: Path, tiny_model: Path, tmp_path: Path
) -> None:
    passages, queries = read_texts(beir / "corpus.jsonl"), read_texts(beir / "queries.jsonl")
    pool = list(dict.fromkeys(passages.values()))  # its pool is a set of texts
    rows = [
        {"query": queries[f"q{i:03d}"], "pos": [passages[f"p{i:03d}"], passages[f"p{(i + 7) % 100:03d}"]], "neg": []}
        for i in range(NUM_TRAIN)
    ]
    for name, lines in (("rows", rows), ("pool", [{"text": text} for text in pool])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    expected = candidates_of_flag_embedding(
        tiny_model, [row["query"] for row in rows], [row["pos"] for row in rows], pool
    )
    everything = {
        "range_for_sampling": f"{FIRST}-{LAST}",
        "negative_number": LAST - FIRST,
        "sampling_strategy": "top",
        "fill_up": False,
        "near_duplicate": None,  # which its miner has not
    }
    data = {"train": [str(tmp_path / "rows.jsonl")], "corpus": [str(tmp_path / "pool.jsonl")]}
    found = read_lines(mine.run(make_experiment(tmp_path / "run", data=data, mine=everything)))
    assert [row["neg"] for row in found] == expected
    assert min(map(len, expected)) < LAST - FIRST, "the data must show what is tested"
    with_query = [row["query"] in pool for row in rows]
    assert any(with_query), "the data must show what is tested"
