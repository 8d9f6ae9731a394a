"""A BEIR folder of 120 passages of made-up words, small enough for a job in a test, with what real ones surprise with.

Every query is three words of its passage. Passages 100 to 109 read like passages 0 to 9 under another id and are not
judged, passage 110 reads like the query of passage 20, every tenth query has two positives, and half of the passages
have a title.
"""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

NUM_PASSAGES = 120
NUM_TRAIN = 80
NUM_TEST = 20
SYLLABLES = [first + second for first in "bdfgklmnprst" for second in "aeiou"]


def write_beir(folder: Path) -> Path:
    """Writes corpus.jsonl, queries.jsonl and qrels/{train,test}.tsv; the same texts at every call."""
    words = [first + second for first in SYLLABLES for second in SYLLABLES]
    rng = random.Random(0)
    passages = [rng.sample(words, 8) for _ in range(NUM_PASSAGES)]
    queries = [rng.sample(words, 3) for words in passages[: NUM_TRAIN + NUM_TEST]]
    passages[100:110] = passages[:10]
    passages[110] = queries[20]
    (folder / "qrels").mkdir(parents=True)
    _write_lines(folder / "corpus.jsonl", [_passage(i, own) for i, own in enumerate(passages)])
    _write_lines(
        folder / "queries.jsonl", [{"_id": f"q{i:03d}", "text": " ".join(own)} for i, own in enumerate(queries)]
    )
    splits = {"train": range(NUM_TRAIN), "test": range(NUM_TRAIN, NUM_TRAIN + NUM_TEST)}
    for split, numbers in splits.items():
        judged = [(i, i) for i in numbers] + [(i, i + 1) for i in numbers if i % 10 == 0]
        lines = [f"q{query:03d}\tp{passage:03d}\t1" for query, passage in judged]
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *lines]) + "\n")
    return folder


def write_rows(beir: Path, file: Path) -> Path:
    """Writes the training queries as rows with one positive and four negatives."""
    passages, queries = read_texts(beir / "corpus.jsonl"), read_texts(beir / "queries.jsonl")
    rng = random.Random(1)
    rows = []
    for i in range(NUM_TRAIN):
        others = rng.sample([j for j in range(NUM_TRAIN) if j != i], 4)
        texts = [passages[f"p{j:03d}"] for j in others]
        rows.append({"query": queries[f"q{i:03d}"], "pos": [passages[f"p{i:03d}"]], "neg": texts})
    _write_lines(file, rows)
    return file


def _passage(number: int, words: list[str]) -> dict[str, str]:
    titled = number % 100 % 2 == 0 and len(words) > 3  # a copy has its title where the original has it
    title, text = (words[:2], words[2:]) if titled else ([], words)
    return {"_id": f"p{number:03d}", "title": " ".join(title), "text": " ".join(text)}


def _write_lines(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_texts(path: Path) -> dict[str, str]:
    """Text by id of a corpus or query file, the title before the text."""
    return {row["_id"]: " ".join(filter(None, [row.get("title"), row["text"]])) for row in read_lines(path)}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a jsonl file, or of all part files of a folder in their order."""
    files = sorted(path.glob("part-*.jsonl")) if path.is_dir() else [path]
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]
