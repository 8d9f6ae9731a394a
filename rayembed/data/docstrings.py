"""A retrieval data set without a download: the docstrings of installed packages as a BEIR folder.

The summary line asks, the body answers: 'Sort an array along an axis' has one passage that it was written for. Such
pairs are what rayembed trains on, and the same four steps make them from documents of your own:

1. find the pieces of text that somebody wrote as question and answer, heading and section, title and abstract;
2. drop what is short, and queries that several passages answer (a second right answer would be trained as a wrong one);
3. split by the source of a pair (a module here; a document, a product, a patient there), never by single pairs, so that
   no test passage has a near-copy in training;
4. write corpus.jsonl, queries.jsonl and qrels/{train,dev,test}.tsv as `_write` does, and point data.train,
   data.corpus and data.evaluation of the experiment at the folder.
"""

import hashlib
import json
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rayembed.config.jobs import HarvestConfig
from rayembed.data.docstring_pairs import Pair, make_pair
from rayembed.data.docstring_sources import find_packages, package_versions, read_docstrings
from rayembed.data.mirror import remove
from rayembed.data.storage import publish_folder, working_folder

SPLITS = ("train", "dev", "test")
STATS_FILE = "harvest.json"

# Runs of this many words, within what a model of 256 tokens reads, tell a near-copy from a common turn of phrase.
_RUN_WORDS = 8
_WORDS_COMPARED = 160
_MAX_SHARED_RUNS = 0.5

# Raise it when a rule of the harvest changes, so that folders of the old rules are not taken for current.
RULES_VERSION = 1

_LETTERS = re.compile(r"[^\W\d_]+")


def harvest(config: HarvestConfig) -> dict[str, Any]:
    """Write the BEIR folder `config.output` and say what is in it and what was dropped.

    The same installed packages and settings give the same bytes. A folder that is there already is replaced.

    Returns:
        What harvest.json holds: fingerprint, pairs, pairs by split and by package, docstrings, and dropped by reason.

    Raises:
        ValueError: a named package is not installed, no pair is left, or the shares leave nothing for training.
    """
    if config.test_share + config.dev_share >= 1:
        raise ValueError(
            f"harvest.test_share {config.test_share} and harvest.dev_share {config.dev_share} leave nothing for "
            "training; together they must be below 1"
        )
    dropped: Counter[str] = Counter()
    found: list[Pair] = []
    docstrings = 0
    for package, places in find_packages(config.packages).items():
        for docstring in read_docstrings(package, places, dropped):
            docstrings += 1
            pair = make_pair(
                docstring, min_query_words=config.min_query_words, min_passage_words=config.min_passage_words
            )
            if isinstance(pair, str):
                dropped[pair] += 1
            else:
                found.append(pair)
    unique = _without_duplicates(found, dropped)
    splits = {pair.name: split_of(pair.module, config.dev_share, config.test_share) for pair in unique}
    pairs = _limit(_without_leaks(unique, splits, dropped), config.max_pairs, dropped)
    if not pairs:
        raise ValueError(
            f"no pair is left of {docstrings} docstrings (dropped: {dict(dropped)}); name more packages in "
            "harvest.packages, or lower harvest.min_query_words or harvest.min_passage_words"
        )
    stats: dict[str, Any] = {
        "fingerprint": fingerprint(config),
        "pairs": len(pairs),
        "docstrings": docstrings,
        "splits": {split: sum(splits[pair.name] == split for pair in pairs) for split in SPLITS},
        "packages": dict(sorted(Counter(pair.package for pair in pairs).items())),
        "dropped": dict(sorted(dropped.items())),
    }
    _write(Path(config.output), pairs, splits, stats)
    return stats


def fingerprint(config: HarvestConfig) -> dict[str, Any]:
    """What the pairs depend on: settings (but not the folder), rules, and versions of the packages that are read."""
    settings = {name: value for name, value in asdict(config).items() if name != "output"}
    versions = package_versions(list(find_packages(config.packages)))
    return {"rules": RULES_VERSION, "settings": settings, "versions": versions}


def group_of(module: str) -> str:
    """The unit that is never split: the two top components of a module's dotted name.

    Classes are near-copied and re-exported inside a subpackage (torch.nn.functional and torch.nn.modules), seldom
    between subpackages.
    """
    return ".".join(module.split(".")[:2])


def split_of(module: str, dev_share: float, test_share: float) -> str:
    """The split of all pairs of a module, by a hash of its group: train, dev or test.

    Adding a package or changing `max_pairs` moves no pair to another split.
    """
    position = _position(group_of(module))
    if position < test_share:
        return "test"
    return "dev" if position < test_share + dev_share else "train"


def _position(text: str) -> float:
    """A number in [0, 1) that depends on the text alone, on every machine and in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def _without_duplicates(pairs: Iterable[Pair], dropped: Counter[str]) -> list[Pair]:
    """Sorted by name; each query asks for one passage, and no two passages say the same.

    Passages are the same when they differ only in digits, punctuation and words with inner capitals (ClassNames):
    sibling classes share such text, and a test passage would be answered by its copy in training.
    """
    by_name: dict[str, Pair] = {}
    for pair in pairs:
        if by_name.setdefault(pair.name, pair) is not pair:
            dropped["name defined twice"] += 1
    keys = {name: _same_text(pair.passage) for name, pair in by_name.items()}
    passages_of: defaultdict[str, set[str]] = defaultdict(set)
    for name, pair in by_name.items():
        passages_of[_query_key(pair.query)].add(keys[name])
    kept: list[Pair] = []
    seen: dict[str, str] = {}
    for name, pair in sorted(by_name.items()):
        key = keys[name]
        if len(passages_of[_query_key(pair.query)]) > 1:
            dropped["query fits several passages"] += 1
        elif key in seen:
            dropped["duplicate passage" if seen[key] == pair.passage else "near-copy of a passage"] += 1
        else:
            seen[key] = pair.passage
            kept.append(pair)
    return kept


def _without_leaks(pairs: Sequence[Pair], splits: dict[str, str], dropped: Counter[str]) -> list[Pair]:
    """Without the dev and test pairs of which half the passage, in runs of 8 words, is in some training passages."""
    held_out = {pair.name: _runs(pair.passage) for pair in pairs if splits[pair.name] != "train"}
    wanted = set().union(*held_out.values())
    trained: set[str] = set()
    for pair in pairs:
        if splits[pair.name] == "train":
            trained.update(wanted.intersection(_runs(pair.passage)))
    kept = []
    for pair in pairs:
        runs = held_out.get(pair.name, set())
        if len(runs & trained) > _MAX_SHARED_RUNS * len(runs):
            dropped["dev or test passage is partly in training"] += 1
        else:
            kept.append(pair)
    return kept


def _runs(passage: str) -> set[str]:
    words = passage.lower().split()[:_WORDS_COMPARED]
    return {" ".join(words[start : start + _RUN_WORDS]) for start in range(len(words) - _RUN_WORDS + 1)}


def _query_key(query: str) -> str:
    return " ".join(query.lower().rstrip(".").split())


def _same_text(passage: str) -> str:
    words = _LETTERS.findall(passage)
    return " ".join(word.lower() for word in words if len(word) == 1 or word[1:].islower())


def _limit(pairs: Sequence[Pair], max_pairs: int | None, dropped: Counter[str]) -> list[Pair]:
    if max_pairs is None or len(pairs) <= max_pairs:
        return list(pairs)
    dropped["over max_pairs"] = len(pairs) - max_pairs
    chosen = sorted(pairs, key=lambda pair: (_position(pair.name), pair.name))[:max_pairs]
    return sorted(chosen, key=lambda pair: pair.name)


def _write(final: Path, pairs: Sequence[Pair], splits: dict[str, str], stats: dict[str, Any]) -> None:
    folder = working_folder(final)
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "qrels").mkdir(parents=True)
    corpus = ({"_id": pair.name, "title": pair.name, "text": pair.passage} for pair in pairs)
    _write_lines(folder / "corpus.jsonl", (json.dumps(row, ensure_ascii=False) for row in corpus))
    queries = ({"_id": f"q-{pair.name}", "text": pair.query} for pair in pairs)
    _write_lines(folder / "queries.jsonl", (json.dumps(row, ensure_ascii=False) for row in queries))
    for split in SPLITS:
        rows = (f"q-{pair.name}\t{pair.name}\t1" for pair in pairs if splits[pair.name] == split)
        _write_lines(folder / "qrels" / f"{split}.tsv", ("query-id\tcorpus-id\tscore", *rows))
    (folder / STATS_FILE).write_text(json.dumps(stats, indent=2) + "\n", encoding="utf-8")
    if final.exists():
        remove(final)  # only now, so that a harvest that fails leaves the old one
    publish_folder(final)


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(line + "\n" for line in lines)
