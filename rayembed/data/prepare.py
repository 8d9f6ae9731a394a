"""The data of an experiment as stores on disk, read once: later calls reuse what is under OUTPUT_DIR/cache.

A store's folder is named by a fingerprint of what it is made of (paths, sizes and times of the files, settings that
matter), and holds the report of the reading, so that reuse tells the same warnings again. What has errors is read anew.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from rayembed.config import Experiment
from rayembed.config.data import DataConfig
from rayembed.config.uris import public_name
from rayembed.config.wording import counted
from rayembed.data import beir, mirror
from rayembed.data.copies import shown
from rayembed.data.names import dataset_names, note_absent_positives, source_names, with_ids_of
from rayembed.data.passages import Parse, parse_passage, parse_query, read_texts, renamed, unique
from rayembed.data.problems import Problem, Report
from rayembed.data.readers import Record, read_records
from rayembed.data.rows import parse_rows, survey
from rayembed.data.storage import expand, fingerprint, identity, is_folder, stamp, write_atomic
from rayembed.data.store import PASSAGES, QUERIES, ROWS, Row, Store, StoreWriter, chunks
from rayembed.data.tasks import OF_OWN_KIND, rows_of_type
from rayembed.data.used_rows import Small, drawn, settled

VERSION = 5  # raise it when the same files give other stores, so that caches of older code are not used

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """An evaluation set: all its passages, the queries that are judged, and the score of each judged pair."""

    corpus: Store
    queries: Store
    qrels: dict[str, dict[str, int]]


@dataclass(frozen=True)
class Prepared:
    """Stores of an experiment. None: not asked for, or the experiment names no data for it."""

    rows: Store | None
    corpus: Store | None
    evaluation: Evaluation | None
    report: Report


def prepare(experiment: Experiment, *, rows: bool = True, corpus: bool = True, evaluation: bool = True) -> Prepared:
    """Read and check everything that the experiment's data section names.

    Errors do not stop the reading; call report.raise_if_errors() before the stores are used.
    """
    data, encode = experiment.data, experiment.encode
    cache = Path(experiment.cache())
    report = Report()
    row_store = corpus_store = None
    if data.train and (rows or (corpus and not data.corpus)):
        row_store = prepare_rows(
            data.train,
            cache,
            encode.queries_per_unit,
            report,
            passages_per_part=experiment.passages_per_unit(),
            max_rows=data.max_example_num_per_dataset,
            seed=experiment.seed,
            min_grade=data.min_grade,
        )
        row_store = _settled(row_store, data, cache, encode.queries_per_unit, report)
    if corpus and data.corpus:
        corpus_store = prepare_corpus(data.corpus, cache, experiment.passages_per_unit(), report)
    elif corpus and row_store is not None:
        corpus_store = corpus_of_rows(row_store, cache, experiment.passages_per_unit(), report)
    if rows and row_store is not None and corpus_store is not None:
        row_store = _joined(row_store, corpus_store, data.corpus, cache, encode.queries_per_unit, report)
    return Prepared(
        rows=row_store if rows else None,
        corpus=corpus_store,
        evaluation=_prepare_evaluation(experiment, cache, report) if evaluation and data.evaluation else None,
        report=report,
    )


def prepare_rows(
    sources: Sequence[str],
    cache: Path,
    rows_per_part: int,
    report: Report,
    *,
    passages_per_part: int | None = None,
    max_rows: int | None = None,
    seed: int = 0,
    min_grade: int = 1,
    row_type: str | None = None,
    setting: str = "data.train",
) -> Store:
    """Training rows of files, folders, globs and BEIR folders (their qrels/train.tsv), in the order of `sources`.

    Args:
        sources: paths; each file, and each BEIR folder, is one dataset unless its rows name theirs. It is called by
            the end of its path, and query ids need be unique within it alone.
        cache: folder of the stores.
        rows_per_part: rows in one part of the store.
        report: takes what is found.
        passages_per_part: passages in one part of the store of a BEIR folder's corpus. None: rows_per_part.
        max_rows: rows kept of each dataset, drawn with the seed, in their order. None: all.
        seed: decides which rows are drawn.
        min_grade: least score of a positive in qrels.
        row_type: what all rows have to be of, others are errors. None: anything.
        setting: that names the sources, for errors.
    """
    per_part = passages_per_part or rows_per_part
    files = [file for source in sources for file in _source_files(source, "train")]
    joined = {source: _beir_stores(source, cache, per_part, report) for source in sources if beir.is_beir(source)}

    datasets = dataset_names([path for each in sources for path in ([each] if each in joined else _expanded(each))])

    def read(own: Report) -> Iterator[Row]:
        found = (
            pair
            for source in sources
            for pair in _rows_of(source, datasets, joined.get(source), min_grade, own, setting=setting)
        )
        yield from survey(found if row_type is None else rows_of_type(found, row_type, own), own)
        if "rows" not in own.counts and own.errors.total == 0:
            names = ", ".join(map(public_name, sources))
            low = own.counts.get(beir.BELOW_MIN_GRADE)
            message = "holds no training row" + (f"; {low:,} judgements are below data.min_grade" if low else "")
            own.error("no rows", Problem(names, None, setting, message))

    key = [_stamps(files), [identity(source) for source in joined], list(map(public_name, sources)), min_grade]
    key += [] if row_type is None else [row_type]
    store = _cached(cache, "rows", key, ROWS, rows_per_part, read, report)
    if max_rows is None:
        return store
    key = ["drawn", store.fingerprint, max_rows, seed]
    return _cached(cache, "rows", key, ROWS, rows_per_part, lambda own: drawn(store, max_rows, seed, own), report)


def prepare_corpus(sources: Sequence[str], cache: Path, rows_per_part: int, report: Report) -> Store:
    """Passages of files, folders, globs and BEIR folders, each id once, in the order of `sources`.

    An id that stands for one text in one source and for another in a later one gets the later one's name before it.
    """
    names = source_names(sources) if len(sources) > 1 else dict.fromkeys(sources, "")
    source_of = {file: names[source] for source in reversed(sources) for file in _corpus_files(source)}
    files = [file for source in sources for file in _corpus_files(source)]

    def read(own: Report) -> Iterator[Row]:
        yield from _texts(files, parse_passage, "passages", own, sources=source_of)

    key = [_stamps(files), [source_of[file] for file in files]]
    return _cached(cache, "passages", key, PASSAGES, rows_per_part, read, report)


def corpus_of_rows(rows: Store, cache: Path, rows_per_part: int, report: Report) -> Store:
    """Every positive and negative of the rows of retrieval, each id once; their datasets are its sources."""

    def passages() -> Iterator[tuple[Problem, str, Row]]:
        number = 0
        for part in rows.iter_parts(["pos", "pos_ids", "neg", "neg_ids", "dataset", "type"]):
            for row in part.to_pylist():
                number += 1
                if row["type"] in OF_OWN_KIND:
                    continue
                for side in ("pos", "neg"):
                    place = Problem("training rows", number, side, "")
                    for name, text in zip(row[f"{side}_ids"], row[side], strict=True):
                        yield place, row["dataset"], {"id": name, "text": text}

    def read(own: Report) -> Iterator[Row]:
        found = unique(passages(), "passages of the rows", own)
        yield from found
        # A passage that many rows share is what one expects here, not something to look at.
        own.warnings.drop("repeated passages of the rows, dropped")

    return _cached(cache, "passages", ["rows", rows.fingerprint], PASSAGES, rows_per_part, read, report)


def _joined(
    rows: Store, corpus: Store, sources: Sequence[str], cache: Path, rows_per_part: int, report: Report
) -> Store:
    """The rows, with the ids that the corpus has for their passages; `sources` are those of data.corpus."""
    if renamed("passages") in report.warnings.counts or renamed("passages of the rows") in report.warnings.counts:
        names = list(source_names(sources).values())

        def read(_: Report) -> Iterator[Row]:
            for part in rows.iter_parts():
                yield from with_ids_of(corpus, part.to_pylist(), names)

        key = ["joined", rows.fingerprint, corpus.fingerprint, names]
        rows = _cached(cache, "rows", key, ROWS, rows_per_part, read, report)
    if sources:
        path = cache / f"positives-{fingerprint([VERSION, rows.fingerprint, corpus.fingerprint])}.json"
        if not path.exists():
            own = Report()
            note_absent_positives(rows, corpus, own)
            write_atomic(path, own.to_json())
        report.merge(Report.from_json(path.read_bytes()), path.name)
    return rows


def _prepare_evaluation(experiment: Experiment, cache: Path, report: Report) -> Evaluation | None:
    folder = experiment.data.evaluation
    assert folder is not None
    if not beir.is_beir(folder):
        message = "is not a BEIR folder: it must hold corpus.jsonl, queries.jsonl and qrels/"
        report.error("no evaluation set", Problem(public_name(folder), None, "data.evaluation", message))
        return None
    encode = experiment.encode
    corpus, queries = _beir_stores(folder, cache, experiment.passages_per_unit(), report)
    path = beir.qrels_path(folder, experiment.data.evaluation_split)
    read_report = Report()
    judgements = beir.read_qrels(path, read_report)
    if judgements and all(judgement.score <= 0 for judgement in judgements):
        message = "no judgement is above 0; allowed: at least one positive"
        read_report.error("no positive judgement", Problem(public_name(path), None, "score", message))
    report.merge(read_report, f"qrels {identity(path)}")

    def read(own: Report) -> Iterator[Row]:
        _check_ids(judgements, path, folder, corpus, queries, own)
        wanted = queries.find_ids(list(dict.fromkeys(judgement.query_id for judgement in judgements)))
        wanted = wanted[wanted >= 0]
        wanted.sort()
        own.count("evaluation queries", len(wanted))
        for some in chunks(wanted, encode.queries_per_unit):
            yield from queries.take(np.array(some)).to_pylist()

    key = ["judged", _stamps([path]), corpus.fingerprint, queries.fingerprint]
    judged = _cached(cache, "queries", key, QUERIES, encode.queries_per_unit, read, report)
    qrels: dict[str, dict[str, int]] = {}
    for judgement in judgements:
        qrels.setdefault(judgement.query_id, {})[judgement.passage_id] = judgement.score
    return Evaluation(corpus, judged, qrels)


def _rows_of(
    source: str,
    names: Mapping[str, str],
    stores: tuple[Store, Store] | None,
    min_grade: int,
    report: Report,
    *,
    setting: str,
) -> Iterator[tuple[Record, Row]]:
    """Rows of one source with their places; `stores` are the passages and queries of a BEIR folder."""
    if stores is not None:
        path = beir.qrels_path(source, "train")
        judgements = beir.read_qrels(path, report)
        corpus, queries = stores
        _check_ids(judgements, path, source, corpus, queries, report)
        dataset = names[source]
        yield from beir.training_rows(
            judgements,
            path,
            dataset=dataset,
            corpus=corpus,
            queries=queries,
            min_grade=min_grade,
            report=report,
        )
        return
    for file in _found(_expanded(source), setting, report):
        yield from parse_rows(read_records(file, report), report, dataset=names[file])


def _check_ids(
    judgements: Sequence[beir.Judgement], path: str, folder: str, corpus: Store, queries: Store, report: Report
) -> None:
    file = public_name(beir.corpus_path(folder))
    beir.check_ids(judgements, path, corpus=corpus, queries=queries, corpus_file=file, report=report)


def _beir_stores(folder: str, cache: Path, rows_per_part: int, report: Report) -> tuple[Store, Store]:
    """All passages and all queries of a BEIR folder."""
    corpus = prepare_corpus([folder], cache, rows_per_part, report)
    path = beir.queries_path(folder)

    def read(own: Report) -> Iterator[Row]:
        return _texts([path], parse_query, "queries", own)

    return corpus, _cached(cache, "queries", _stamps([path]), QUERIES, rows_per_part, read, report)


def _texts(
    files: Sequence[str], parse: Parse, noun: str, report: Report, *, sources: Mapping[str, str] | None = None
) -> Iterator[Row]:
    """As read_texts; files that are not there, or hold nothing altogether, are errors."""
    any_row = False
    for row in read_texts(_found(files, "data.corpus", report), parse, noun, report, sources=sources):
        any_row = True
        yield row
    if not any_row and report.errors.total == 0:
        report.error(f"no {noun}", Problem(", ".join(map(public_name, files)), None, "", f"no {noun} in it"))


def _settled(rows: Store, data: DataConfig, cache: Path, rows_per_part: int, report: Report) -> Store:
    """The rows without datasets that are too small, with the prompts of section data."""
    prompts = [entry for entry in data.datasets if entry.prompt is not None]
    if not prompts and not data.small_threshold:
        return rows
    names = dataset_names([path for each in data.train for path in ([each] if beir.is_beir(each) else _expanded(each))])
    folders = [source for source in data.train if is_folder(source) and not beir.is_beir(source)]
    small = Small(
        {names[file]: name for folder, name in source_names(folders).items() for file in _expanded(folder)},
        data.small_threshold,
        data.drop_threshold,
    )
    key = ["settled", rows.fingerprint, *small, [[entry.name, entry.prompt] for entry in prompts]]
    return _cached(cache, "rows", key, ROWS, rows_per_part, lambda own: settled(rows, small, prompts, own), report)


def _cached(
    cache: Path,
    kind: str,
    key: object,
    schema: pa.Schema,
    rows_per_part: int,
    read: Callable[[Report], Iterable[Row]],
    report: Report,
) -> Store:
    """The store of this key: opened if it is there, else written from `read`; its report joins `report`.

    One whose report has errors is written anew, once for each `report`: what stood in the way may be gone.
    """
    folder = cache / f"{kind}-{fingerprint([VERSION, key, rows_per_part])}"
    if (folder / "store.json").exists() and not report.took(folder.name) and _report_of(folder).errors.total:
        mirror.remove(folder)
    if not (folder / "store.json").exists():
        own = Report()
        writer = StoreWriter(folder, schema, rows_per_part)
        for row in read(own):
            writer.add(row)
        write_atomic(writer.working / "report.json", own.to_json())
        store = writer.finish()
        logger.info("%s: %s in %s", shown(folder), counted(store.num_rows, "row"), counted(len(store.parts), "part"))
    report.merge(_report_of(folder), folder.name)
    return Store.open(folder)


def _report_of(folder: Path) -> Report:
    return Report.from_json((folder / "report.json").read_bytes())


def _stamps(files: Iterable[str]) -> list[list[str]]:
    return [[identity(file), stamp(file)] for file in files]


def _source_files(source: str, split: str) -> list[str]:
    """Files that decide what the rows of a source are."""
    if beir.is_beir(source):
        return [beir.corpus_path(source), beir.queries_path(source), beir.qrels_path(source, split)]
    return _expanded(source)


def _corpus_files(source: str) -> list[str]:
    return [beir.corpus_path(source)] if beir.is_beir(source) else _expanded(source)


def _expanded(source: str) -> list[str]:
    """Files of a source; the source itself where there are none, to be reported when it is read."""
    try:
        return expand(source)
    except FileNotFoundError:
        return [source]


def _found(files: Iterable[str], field: str, report: Report) -> Iterator[str]:
    """Files that exist; each that does not is an error."""
    for file in files:
        if stamp(file) == "missing":
            message = "there is no such file, no folder with data files, and no file that matches"
            report.error("no such file", Problem(public_name(file), None, field, message))
        else:
            yield file
