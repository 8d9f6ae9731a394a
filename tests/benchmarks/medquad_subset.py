"""A part of a BEIR folder, written anew: what some queries need of it, and other passages up to a number."""

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Judgements = dict[str, list[str]]


@dataclass(frozen=True)
class Beir:
    """A BEIR folder in memory: benchmarks use small ones."""

    passages: dict[str, dict[str, Any]]
    queries: dict[str, str]
    qrels: dict[str, Judgements]
    """Positives by query, by split."""


def read_beir(folder: Path) -> Beir:
    """Reads corpus, queries, and the splits train and test."""
    qrels: dict[str, Judgements] = {}
    for split in ("train", "test"):
        judged: Judgements = {}
        for line in (folder / "qrels" / f"{split}.tsv").read_text().splitlines()[1:]:
            query, passage, grade = line.split("\t")
            if int(grade) > 0:
                judged.setdefault(query, []).append(passage)
        qrels[split] = judged
    passages = {row["_id"]: row for row in _lines(folder / "corpus.jsonl")}
    queries = {row["_id"]: row["text"] for row in _lines(folder / "queries.jsonl")}
    return Beir(passages, queries, qrels)


def choose(beir: Beir, split: str, number: int, seed: int) -> list[str]:
    """Query ids of a split, all different."""
    return random.Random(f"{seed} {split}").sample(sorted(beir.qrels[split]), number)


def passages_for(beir: Beir, judged: Mapping[str, Sequence[str]], number: int | None, seed: int) -> list[str]:
    """All positives of some queries, and others up to `number` passages (None: no others); in the corpus's order.

    Raises:
        ValueError: the positives alone are more.
    """
    wanted = {passage for own in judged.values() for passage in own}
    number = len(wanted) if number is None else number
    if len(wanted) > number:
        raise ValueError(
            f"{len(judged)} queries have {len(wanted)} positives, more than {number} passages; ask for more"
        )
    others = [name for name in beir.passages if name not in wanted]
    wanted |= set(random.Random(f"{seed} passages").sample(others, min(number - len(wanted), len(others))))
    return [name for name in beir.passages if name in wanted]


def full_text(passage: Mapping[str, Any]) -> str:
    """Title and text as one, as every tool then reads it."""
    return f"{passage.get('title') or ''} {passage['text']}".strip()


def write_beir(folder: Path, beir: Beir, names: Sequence[str], qrels: Mapping[str, Judgements]) -> None:
    """Writes a BEIR folder of some passages and judgements."""
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    queries = sorted({query for judged in qrels.values() for query in judged})
    write_lines(folder / "corpus.jsonl", [beir.passages[name] for name in names])
    write_lines(folder / "queries.jsonl", [{"_id": query, "text": beir.queries[query]} for query in queries])
    for split, judged in qrels.items():
        lines = [f"{query}\t{passage}\t1" for query, own in judged.items() for passage in own]
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *lines]) + "\n")


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes jsonl."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _lines(path: Path) -> list[dict[str, Any]]:
    with path.open() as file:
        return [json.loads(line) for line in file]


def main() -> None:
    """Writes test queries of a BEIR folder and a part of its corpus, for a smaller evaluation."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--queries", type=int, required=True)
    parser.add_argument("--passages", type=int, required=True)
    parser.add_argument("--seed", type=int, default=42)
    options = parser.parse_args()
    beir = read_beir(options.source)
    judged = {query: beir.qrels["test"][query] for query in choose(beir, "test", options.queries, options.seed)}
    write_beir(options.target, beir, passages_for(beir, judged, options.passages, options.seed), {"test": judged})


if __name__ == "__main__":
    main()
