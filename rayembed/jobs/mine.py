"""The job `mine`: hard negatives for every training row, as rows in the training format.

Passes, each resumable: vectors of queries and corpus, the ranks of every shard, pools of filtered candidates, the
teacher's judgement of them (mine.denoise), the choice, the rows with their audit. The result depends on seed, model,
corpus and rows alone: the draws of a query are seeded by its id.
"""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rayembed.config import Experiment
from rayembed.config.mine import MineConfig
from rayembed.config.wording import counted
from rayembed.data.mirror import remove
from rayembed.data.prepare import prepare
from rayembed.data.storage import fingerprint, write_atomic
from rayembed.data.store import Store
from rayembed.jobs import estimates
from rayembed.jobs.choice import choose_all
from rayembed.jobs.embeddings import check_given, given_vectors, reads_of_embeddings
from rayembed.jobs.folders import Reads, state, written_once
from rayembed.jobs.judging import judge
from rayembed.jobs.mined_rows import write_rows
from rayembed.jobs.miner import miner
from rayembed.jobs.passed_through import in_words, passed_through, retrieval_rows
from rayembed.jobs.pools import Mining, absent_positives, make_pools, window
from rayembed.jobs.ranking import search_shards
from rayembed.jobs.recall import measure_recall
from rayembed.jobs.run_folder import beside_run_folder, in_run_folder
from rayembed.jobs.session import check_gpus, ray_session
from rayembed.jobs.teacher import check_teacher, teacher_reads
from rayembed.jobs.vector_files import Vectors
from rayembed.jobs.vectors import Wanted, encode_stores, encoding_reads
from rayembed.mining.audit import figures, table
from rayembed.mining.selection import Uses
from rayembed.models.loading import check_length
from rayembed.search.backends import BACKENDS, is_exact
from rayembed.search.planned import Planned, planned_memory

MOST_USED = 20
CHOSEN = "chosen"  # folder that is gone at the end
logger = logging.getLogger(__name__)
MARGINS = ("absolute_margin", "relative_margin")
NOT_THE_RESULT = (  # of section mine: the model by its weights, embeddings by their files, where it is searched
    *("model", "pooling", "query_instruction_for_retrieval", "passage_instruction_for_retrieval"),
    *("corpus_embeddings", "query_embeddings", "use_gpu_for_searching", "rounds"),
)


@dataclass(frozen=True)
class Data:
    """What is mined: for which rows, in which corpus."""

    everything: Store
    """All training rows, in their order."""

    rows: Store
    """Those of retrieval; the others pass through."""

    corpus: Store

    passed: dict[str, int]
    """How many rows of each dataset pass through."""


@in_run_folder
def run(experiment: Experiment, *, overwrite: bool = False) -> Path:
    """Mines hard negatives; rows of types sts and class pass through.

    Args:
        experiment: sections mine, data, model, search; section score for a teacher that denoises and audits.
        overwrite: replace a folder that was mined from something else.

    Returns:
        OUTPUT_DIR/mine: part-*.jsonl in the training format, stats.json, and audit.html to look at.

    Raises:
        ValueError: the data have errors, or the folder was mined from something else.
    """
    config = _section(experiment)
    data = _data(experiment)
    final = Path(experiment.output_dir) / "mine"

    def write(folder: Path) -> None:
        logger.info("%s", _planned(experiment, data).in_words())
        with ray_session(experiment):
            if config.use_gpu_for_searching:
                check_gpus(experiment.ray, "mine.use_gpu_for_searching")
            _mine(experiment, config, data, folder)

    depends_on = _reads(experiment, config, data)
    # Half of an audit by one teacher is not gone on with by another; a finished one stays, the rows are the same.
    layout = [*data.rows.layout, int(fingerprint(_judge_of_audit(experiment, config)), 16)]
    return written_once(final, depends_on, write, overwrite=overwrite, experiment=experiment, layout=layout)


@beside_run_folder
def plan(experiment: Experiment, *, overwrite: bool = False) -> str:
    """What `run` would do."""
    config = _section(experiment)
    data = _data(experiment)
    rows, corpus = data.rows, data.corpus
    where = state(Path(experiment.output_dir) / "mine", _reads(experiment, config, data), overwrite=overwrite)
    others = f"{in_words(data.passed)}; " if data.passed else ""
    return (
        f"mine: {counted(rows.num_rows, 'query')} against {counted(corpus.num_rows, 'passage')} in "
        f"{counted(len(corpus.parts), 'unit')}, "
        f"{counted(config.negative_number, 'negative')} a query from ranks {config.range_for_sampling}; "
        f"{_to_encode(experiment, config, rows, corpus)}; {_planned(experiment, data).in_words()}; {others}{where}"
    )


def reads(experiment: Experiment) -> Reads:
    """What the result depends on.

    Raises:
        ValueError: the data have errors.
    """
    return _reads(experiment, _section(experiment), _data(experiment))


def _to_encode(experiment: Experiment, config: MineConfig, rows: Store, corpus: Store) -> str:
    if config.corpus_embeddings:
        return "the vectors of the corpus are given"
    return f"encoding: {estimates.encoding(miner(experiment), rows, 'query', corpus)}"


def _section(experiment: Experiment) -> MineConfig:
    return experiment.mine or MineConfig()


def _data(experiment: Experiment) -> Data:
    prepared = prepare(experiment, evaluation=False)
    prepared.report.raise_if_errors()
    if prepared.rows is None or prepared.corpus is None:
        raise ValueError("mine needs training rows; set data.train")
    config = _section(experiment)
    if config.rounds > 1:
        raise ValueError(
            f"mine.rounds is {config.rounds}: rounds are of `rayembed run`, which trains between them; set "
            "mine.rounds=1 to mine once"
        )
    passed = passed_through(prepared.rows, "mine")
    rows = retrieval_rows(prepared.rows, Path(experiment.cache()), experiment.encode.queries_per_unit)
    corpus = prepared.corpus
    check_window(config, corpus)
    check_given(experiment, rows, corpus)
    _check_models(experiment, config)
    margins = [f"mine.{name}" for name in MARGINS if getattr(config, name) is not None]
    if margins and config.corpus_embeddings and (absent := absent_positives(experiment, rows, corpus)):
        raise ValueError(
            f"{margins[0]} needs the scores of all positives, but {absent.num_rows:,} of them are not in data.corpus, "
            "by id or by text, and mine.corpus_embeddings is given in place of a model: add them to data.corpus (a "
            "positive is found by its text with the title before it, where the passage has one), or remove either "
            "setting"
        )
    return Data(prepared.rows, rows, corpus, passed)


def check_window(config: MineConfig, corpus: Store) -> None:
    """Refuses a window that no passage is in.

    Raises:
        ValueError: names the ranks and the size of the corpus.
    """
    first, last = window(config)
    if first >= corpus.num_rows:
        raise ValueError(
            f"mine.range_for_sampling is {first}-{last}, and the corpus has {corpus.num_rows:,} passages: no rank is "
            "in it, and no negative would be found; lower its first rank"
        )


def _check_models(experiment: Experiment, config: MineConfig) -> None:
    """Refuses lengths and a teacher that would stop the job after hours."""
    own = miner(experiment)
    for side, given in (("query", config.query_embeddings), ("passage", config.corpus_embeddings)):
        if not given:
            remote = own.model.trust_remote_code
            setting = f"encode.{side}_max_len"
            check_length(own.model.name_or_path, own.max_len(side), setting, trust_remote_code=remote)
    if _judge_of_audit(experiment, config) is not None:
        check_teacher(experiment)


def _judge_of_audit(experiment: Experiment, config: MineConfig) -> dict[str, Any] | None:
    """What the teacher's part of the audit depends on; None where no teacher is asked."""
    asked = experiment.score is not None and (config.denoise or config.audit_queries > 0)
    return teacher_reads(experiment) if asked else None


def _reads(experiment: Experiment, config: MineConfig, data: Data) -> Reads:
    own = miner(experiment)
    reads = {
        "rows": data.everything.fingerprint,
        "corpus": data.corpus.fingerprint,
        **encoding_reads(own),
        "mine": {key: value for key, value in asdict(config).items() if key not in _without_effect(config)},
        "seed": experiment.seed,
    }
    if not is_exact(experiment.search):
        kind = BACKENDS[experiment.search.backend]
        names = ("backend", "passages_per_index", *kind.built_with, *kind.searched_with)
        reads["search"] = {name: getattr(experiment.search, name) for name in names}
    if config.corpus_embeddings or config.query_embeddings:
        reads["embeddings"] = [
            reads_of_embeddings(paths) for paths in (config.corpus_embeddings, config.query_embeddings)
        ]
    if config.denoise:
        reads["teacher"] = teacher_reads(experiment)
    return reads


def _without_effect(config: MineConfig) -> set[str]:
    """Settings that the result does not depend on, or not with the others as they are."""
    names = set(NOT_THE_RESULT)
    if not config.denoise:
        names |= {"denoise_margin", "denoise_max_score", "denoise_candidates"}
    margins = [getattr(config, name) for name in MARGINS] + [config.denoise_margin if config.denoise else None]
    if all(margin is None for margin in margins):
        names.add("margin_positive")
    return names


def _planned(experiment: Experiment, data: Data) -> Planned:
    rows, corpus = data.rows, data.corpus
    return planned_memory(
        passages=corpus.num_rows,
        queries=rows.num_rows,
        dimension=check_given(experiment, rows, corpus),
        k=window(_section(experiment))[1],
        search=experiment.search,
        merge_queries=max(rows.layout),
    )


def _mine(experiment: Experiment, config: MineConfig, data: Data, folder: Path) -> None:
    rows, corpus = data.rows, data.corpus
    queries, passages, absent = _vectors(experiment, config, rows, corpus)
    ranks, use_gpu = window(config)[1], config.use_gpu_for_searching
    tops = search_shards(experiment, queries, passages, ranks, use_gpu=use_gpu)
    recall = measure_recall(experiment, queries, passages, tops, ranks, use_gpu=use_gpu)
    mining = Mining(experiment, config, rows, corpus, queries, passages, absent, tops)
    pools = make_pools(mining)
    judged, teacher = judge(mining, pools) if config.denoise else (None, None)
    uses = choose_all(mining, pools, judged, folder / CHOSEN)
    audit, counts = write_rows(mining, pools, folder / CHOSEN, folder, everything=data.everything, teacher=teacher)
    remove(folder / CHOSEN)
    counts_of = figures(audit)
    stats = {
        "queries": rows.num_rows,
        "passages": corpus.num_rows,
        **counts_of,
        **counts,
        "range_for_sampling": config.range_for_sampling,
        "teacher": experiment.score.model if experiment.score is not None and counts_of["judged_pairs"] else None,
        "search": recall,
        "uses": uses.summary(),
        "passed_through": data.passed,
    }
    write_atomic(folder / "stats.json", json.dumps(stats, indent=1).encode())
    if counts["given_negatives_replaced"]:
        logger.warning(
            "mine: %d negatives that the rows brought are replaced by mined ones", counts["given_negatives_replaced"]
        )
    _write_audit(folder / "audit.html", mining, stats, audit, _most_used(uses, corpus))
    for line in [*table(stats, audit).splitlines(), in_words(data.passed)]:
        if line:
            logger.info("mine: %s", line)


def _vectors(
    experiment: Experiment, config: MineConfig, rows: Store, corpus: Store
) -> tuple[Vectors, Vectors, Vectors | None]:
    """Of the queries, the corpus, and the positives that the corpus lacks."""
    own, absent = miner(experiment), None if config.corpus_embeddings else absent_positives(experiment, rows, corpus)
    wanted = {
        "queries": None if config.query_embeddings else Wanted(rows, "query"),
        "passages": None if config.corpus_embeddings else Wanted(corpus, "passage"),
        "absent": None if absent is None else Wanted(absent, "passage"),
    }
    asked = {name: one for name, one in wanted.items() if one is not None}
    found = dict(zip(asked, encode_stores(own, list(asked.values())), strict=True)) if asked else {}
    if config.query_embeddings:
        found["queries"] = given_vectors(
            experiment, rows, config.query_embeddings, setting="mine.query_embeddings", id_of="query_id"
        )
    if config.corpus_embeddings:
        found["passages"] = given_vectors(
            experiment, corpus, config.corpus_embeddings, setting="mine.corpus_embeddings"
        )
    return found["queries"], found["passages"], found.get("absent")


def _most_used(uses: Uses, corpus: Store) -> list[dict[str, Any]]:
    """The passages that serve most queries, with their texts."""
    rows, counts = uses.most_used(MOST_USED)
    passages = corpus.take(rows, ["id", "text"]).to_pylist()
    return [{**passage, "uses": count} for passage, count in zip(passages, counts.tolist(), strict=True)]


def _write_audit(
    path: Path, mining: Mining, stats: dict[str, Any], audit: dict[str, Any], often: list[dict[str, Any]]
) -> None:
    from rayembed.report import audit_page  # workers import this module too, and have no use for plots

    title = f"{Path(mining.experiment.output_dir).name}: mined negatives"
    page = audit_page(title, stats, audit, often, window=window(mining.config))
    write_atomic(path, page.encode())
