"""The job `split`: the rows of data.train in a file for each range of lengths (see rayembed/data/length_split.py).

One process that streams: no Ray here.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from transformers import PreTrainedTokenizerBase

from rayembed.config import Experiment
from rayembed.config.jobs import SplitConfig
from rayembed.config.wording import counted
from rayembed.data.beir import corpus_path, is_beir, qrels_path, queries_path
from rayembed.data.length_split import check_bounds, file_stem, range_name, split_by_length, written_names
from rayembed.data.prepare import prepare, prepare_rows
from rayembed.data.problems import Report
from rayembed.data.readers import read_records
from rayembed.data.rows import parse_row
from rayembed.data.storage import expand, identity, stamp, write_atomic
from rayembed.data.store import Row
from rayembed.jobs.folders import Reads, state, written_once
from rayembed.jobs.passed_through import row_line
from rayembed.jobs.run_folder import beside_run_folder, in_run_folder
from rayembed.models.loading import tokenizer_fingerprint
from rayembed.models.trained import build_tokenizer
from rayembed.tracking.progress import Progress

LINE = "line"  # column of what is written of a row, beside those that are read
logger = logging.getLogger(__name__)


@in_run_folder
def run(experiment: Experiment, *, overwrite: bool = False) -> Path:
    """Writes every row of data.train, with all its columns, to the file of its range.

    Args:
        experiment: sections split, data, model (its tokenizer alone).
        overwrite: replace a folder that was split from something else.

    Returns:
        OUTPUT_DIR/split: STEM_len-LEAST-LIMIT.jsonl of every file (and BEIR folder) that has rows of that length, and
        stats.json.

    Raises:
        ValueError: the data have errors, the ranges are none, or the folder was split from something else.
    """
    sources, total = _sources(experiment)

    def write(folder: Path) -> None:
        _split(experiment, sources, total, folder)

    final = Path(experiment.output_dir) / "split"
    return written_once(final, _reads(experiment, sources), write, overwrite=overwrite, experiment=experiment)


@beside_run_folder
def plan(experiment: Experiment, *, overwrite: bool = False) -> str:
    """What `run` would do."""
    sources, total = _sources(experiment)
    bounds = _section(experiment).length_list
    where = state(Path(experiment.output_dir) / "split", _reads(experiment, sources), overwrite=overwrite)
    ranges = ", ".join(range_name(place, bounds) for place in range(len(bounds)))
    return f"split: {counted(total, 'row')} of {counted(len(sources), 'file')} into ranges of {ranges} tokens; {where}"


def _section(experiment: Experiment) -> SplitConfig:
    return experiment.split or SplitConfig()


def _sources(experiment: Experiment) -> tuple[list[str], int]:
    """The files and BEIR folders of data.train, and how many rows they have, all checked."""
    check_bounds(_section(experiment).length_list)
    prepared = prepare(experiment, corpus=False, evaluation=False)
    prepared.report.raise_if_errors()
    if prepared.rows is None:
        raise ValueError("split needs training rows; set data.train to files, folders or globs")
    sources = [path for each in experiment.data.train for path in ([each] if is_beir(each) else expand(each))]
    written_names(sources)
    return sources, prepared.report.counts["rows"]


def _reads(experiment: Experiment, sources: Sequence[str]) -> Reads:
    files = [
        [identity(path), stamp(path)]
        for source in sources
        for path in (
            [corpus_path(source), queries_path(source), qrels_path(source, "train")] if is_beir(source) else [source]
        )
    ]
    return {
        "files": files,
        "length_list": _section(experiment).length_list,
        "tokenizer": tokenizer_fingerprint(experiment.model.name_or_path),
        "family": experiment.model.family,
        "new_tokens": experiment.model.additional_special_tokens,
        "min_grade": experiment.data.min_grade,
    }


def _split(experiment: Experiment, sources: Sequence[str], total: int, folder: Path) -> None:
    bounds, names, tokenizer = _section(experiment).length_list, written_names(sources), build_tokenizer(experiment)
    for path in folder.glob("*.jsonl"):
        path.unlink()  # of a run that was killed: files are written on, not anew
    progress = Progress("split", total, unit="rows")
    written: Counter[str] = Counter()
    ranges: Counter[str] = Counter()

    def count_tokens(texts: Sequence[str]) -> list[int]:
        return _tokens(tokenizer, texts)

    for source in sources:
        with ExitStack() as opened:
            files: dict[int, IO[str]] = {}
            for place, row in split_by_length(_rows(experiment, source), count_tokens, bounds):
                stem = file_stem(names[source], place, bounds)
                if place not in files:
                    files[place] = opened.enter_context((folder / f"{stem}.jsonl").open("a", encoding="utf-8"))
                files[place].write(row[LINE] + "\n")
                written[f"{stem}.jsonl"] += 1
                ranges[range_name(place, bounds)] += 1
                progress.add(1)
    in_order = {name: ranges[name] for name in (range_name(i, bounds) for i in range(len(bounds))) if ranges[name]}
    stats = {"rows": ranges.total(), "ranges": in_order, "files": dict(written)}
    write_atomic(folder / "stats.json", json.dumps(stats, indent=1, ensure_ascii=False).encode())
    each = ", ".join(f"{name} tokens {count:,}" for name, count in in_order.items())
    logger.info("split: %s of %s: %s", counted(ranges.total(), "row"), counted(len(sources), "file"), each)


def _tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[int]:
    """Tokens of each text, special ones included, nothing cut off."""
    ids: list[list[int]] = tokenizer(
        list(texts), return_attention_mask=False, return_token_type_ids=False, truncation=False, verbose=False
    )["input_ids"]
    return [len(own) for own in ids]


def _rows(experiment: Experiment, source: str) -> Iterator[Row]:
    """Rows of one file or BEIR folder, each with what is written of it: of a file, the record as it is."""
    report = Report()
    if is_beir(source):
        per_part, grade = experiment.encode.queries_per_unit, experiment.data.min_grade
        rows = prepare_rows([source], Path(experiment.cache()), per_part, report, min_grade=grade)
        for part in rows.iter_parts():
            yield from ({**row, LINE: row_line(row)} for row in part.to_pylist())
        return
    for record in read_records(source, report):
        row = parse_row(record, report)
        if row is not None:
            yield {**row, LINE: _json(record.value)}
    report.raise_if_errors()  # it had none before, so it was changed meanwhile


def _json(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, default=str)  # columns of parquet may hold dates
