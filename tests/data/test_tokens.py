"""Rows come back from the token files as they went in, prompts applied, scores beside their passages."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from rayembed.config.model import ModelConfig
from rayembed.data.store import ROWS
from rayembed.data.tokens import TokenRow, TokenStore, write_tokens

ROW: dict[str, Any] = {"query_id": "q", "dataset": "d", "neg": []}
FIRST = [
    ROW
    | {"query": "what", "pos": ["a", "shared"], "neg": ["shared", "bb"], "pos_scores": [1, 2], "neg_scores": [3, 4]},
    ROW | {"query": "shared", "prompt": "row: ", "pos": ["a"]},
    ROW | {"query": "empty prompt", "prompt": "", "pos": ["a long passage"], "neg": ["bb"], "pos_scores": [0.5]},
]
SECOND = [ROW | {"query": "last", "pos": ["z"], "neg": ["y", "x"], "neg_scores": [-1.5, 1e-9]}]
PLAIN = ModelConfig(name_or_path="none")


def letters(texts: Sequence[str], max_len: int) -> list[list[int]]:
    return [[ord(letter) for letter in text][:max_len] for text in texts]


def write(folder: Path, part: str, rows: list[dict[str, Any]], model: ModelConfig = PLAIN) -> dict[str, int]:
    table = pa.Table.from_pylist(rows, schema=ROWS)
    return write_tokens(table, folder, part, model=model, tokenize=letters, query_max_len=20, passage_max_len=8)


def words(texts: list[Any]) -> list[str]:
    return ["".join(map(chr, text)) for text in texts]


def contents(row: TokenRow) -> tuple[list[str], list[str], list[str], list[float] | None, list[float] | None]:
    scores = [None if side is None else side.tolist() for side in (row.pos_scores, row.neg_scores)]
    return words([row.query]), words(row.pos), words(row.neg), scores[0], scores[1]


def test_rows_of_all_parts_come_back(tmp_path: Path) -> None:
    for part, rows in (("00000", FIRST), ("00001", []), ("00002", SECOND)):
        write(tmp_path, part, rows)
    store = TokenStore(tmp_path, ["00000", "00001", "00002"])
    assert len(store) == 4
    assert [contents(store.row(i)) for i in (3, 0, 1, 2)] == [
        (["last"], ["z"], ["y", "x"], None, [-1.5, 1e-9]),
        (["what"], ["a", "shared"], ["shared", "bb"], [1.0, 2.0], [3.0, 4.0]),
        (["row: shared"], ["a"], [], None, None),
        (["empty prompt"], ["a long p"], ["bb"], [0.5], None),
    ]
    assert store.row(0).query.dtype == np.int32


def test_a_text_is_kept_once_on_each_side_and_counted(tmp_path: Path) -> None:
    counts = write(tmp_path, "0", FIRST)
    queries, passages = ["what", "row: shared", "empty prompt"], ["a", "shared", "bb", "a long p"]
    assert counts == {
        "rows": 3,
        "texts": len(queries) + len(passages),
        "tokens": sum(map(len, queries)) + sum(map(len, passages)),
        "full_queries": 0,
        "full_passages": 1,
    }


def test_instructions_go_before_texts_and_a_rows_own_prompt_wins(tmp_path: Path) -> None:
    model = ModelConfig(
        name_or_path="none",
        query_instruction_for_retrieval="find",
        query_instruction_format="{}\\n{}",
        passage_instruction_for_retrieval="p",
        passage_instruction_format="{}:{}",
    )
    write(tmp_path, "0", FIRST, model)
    store = TokenStore(tmp_path, ["0"])
    assert [words([store.row(i).query])[0] for i in range(3)] == ["find\nwhat", "row: \nshared", "find\nempty prompt"]
    assert words(store.row(0).pos + store.row(0).neg) == ["p:a", "p:shared", "p:shared", "p:bb"]


def test_rows_are_views_of_the_memory_map(tmp_path: Path) -> None:
    write(tmp_path, "0", FIRST)
    before = pa.total_allocated_bytes()
    store = TokenStore(tmp_path, ["0"])
    assert not store.row(0).query.flags.owndata
    assert pa.total_allocated_bytes() - before < 1000


def test_a_half_written_part_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", broken)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, "0", FIRST)
    assert not list(tmp_path.glob("*.arrow"))


def test_the_length_of_a_row_is_that_of_its_longest_text(tmp_path: Path) -> None:
    none = ROW | {"query": "labelled", "pos": [], "type": "class", "label": "x"}
    longest = ROW | {"query": "q", "pos": ["pp", "p"], "neg": ["n", "nnn"]}
    for part, rows in (("0", FIRST), ("1", []), ("2", [*SECOND, none, longest])):
        write(tmp_path, part, rows)
    store = TokenStore(tmp_path, ["0", "1", "2"])
    expected = [max(len(t) for t in (r.query, *r.pos, *r.neg)) for r in map(store.row, range(6))]
    assert store.lengths().tolist() == expected == [6, 11, 12, 4, 8, 3]
    assert store.lengths().dtype == np.int32


def test_passages_of_symmetric_types_have_the_rows_prompt(tmp_path: Path) -> None:
    row = {"query": "a", "prompt": "p:", "pos": ["b"], "neg": ["c"]}
    write(tmp_path, "0", [ROW | row | {"type": "symmetric_sts"}, ROW | row])
    store = TokenStore(tmp_path, ["0"])
    assert [contents(store.row(i))[:3] for i in range(2)] == [(["p:a"], ["p:b"], ["p:c"]), (["p:a"], ["b"], ["c"])]


def test_scored_pairs_and_labelled_texts_have_no_instruction_for_retrieval(tmp_path: Path) -> None:
    model = ModelConfig(name_or_path="none", query_instruction_for_retrieval="find ")
    pair, text = {"query": "a", "pos": ["b"], "type": "sts", "pos_scores": [1.0]}, {"query": "a", "type": "class"}
    rows: list[dict[str, Any]] = [pair, pair | {"prompt": "p:"}, text | {"pos": []}, {"query": "a", "pos": ["b"]}]
    write(tmp_path, "0", [ROW | row for row in rows], model)
    store = TokenStore(tmp_path, ["0"])
    assert [contents(store.row(i))[:2] for i in range(4)] == [
        (["a"], ["b"]),
        (["p:a"], ["p:b"]),
        (["a"], []),
        (["find a"], ["b"]),
    ]
