"""The job `evaluate`: base and tuned model on the full corpus, by the same encoding and search as mining."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayembed.config import Experiment
from rayembed.config.jobs import EvaluateConfig
from rayembed.data.prepare import Evaluation, prepare
from rayembed.data.storage import fingerprint, write_atomic
from rayembed.data.store import Store
from rayembed.evaluation.distributions import similarity_summary
from rayembed.evaluation.ranking import evaluate_rankings, query_counts
from rayembed.evaluation.significance import compare
from rayembed.evaluation.trec import write_run
from rayembed.jobs import estimates
from rayembed.jobs.evaluate_heads import evaluate_heads, heads_of
from rayembed.jobs.folders import Reads, state, written_once
from rayembed.jobs.ranking import ShardTops, search_shards
from rayembed.jobs.rerank import pair_scores, retriever
from rayembed.jobs.session import ray_session
from rayembed.jobs.vectors import Wanted, encode_stores, encoding_reads
from rayembed.models.export import max_seq_length
from rayembed.models.loading import teacher_kind
from rayembed.search.merge import Top

logger = logging.getLogger(__name__)
Ranking = list[tuple[str, float]]


@dataclass(frozen=True)
class Judged:
    """One model on the evaluation set."""

    rankings: dict[str, Ranking]
    means: dict[str, float]
    per_query: dict[str, dict[str, float]]
    scores: Callable[[Sequence[tuple[int, str]]], NDArray[np.float32]]
    """Of (row of a query, id of a passage)."""


def run(experiment: Experiment, *, overwrite: bool = False) -> Path:
    """Evaluates the base model and, where OUTPUT_DIR/model is there, the tuned one.

    Args:
        experiment: sections evaluate, data, model.
        overwrite: replace a folder that was evaluated from something else.

    Returns:
        OUTPUT_DIR/evaluate: metrics.json, similarities.json, per_query.jsonl, base.trec, tuned.trec.
    """
    config = _section(experiment)
    evaluation = _data(experiment)
    final = Path(experiment.output_dir) / "evaluate"

    def write(folder: Path) -> None:
        with ray_session(experiment.ray):
            models = _models(experiment)
            judged = {name: _judge(experiment, config, evaluation, model) for name, model in models.items()}
            heads = {
                name: evaluate_heads(experiment, config, evaluation, judged[name].rankings, model, _cut_offs(config))
                for name, model in models.items()
                if heads_of(experiment, model)
            }
        _write(config, evaluation, judged, folder, experiment.seed, heads)

    reads = _reads(experiment, config, evaluation)
    written = written_once(final, reads, write, overwrite=overwrite, experiment=experiment)
    logger.info("evaluate: %s", summary(written))
    for line in head_lines(json.loads((written / "metrics.json").read_text())):
        logger.info("evaluate: %s", line)
    return written


def plan(experiment: Experiment) -> str:
    """What `run` would do."""
    config, evaluation = _section(experiment), _data(experiment)
    if experiment.train is not None and not (Path(experiment.output_dir) / "model").is_dir():
        names, where = "base and (after train) tuned", "would be written"
    else:
        names = " and ".join(_models(experiment))
        where = state(Path(experiment.output_dir) / "evaluate", _reads(experiment, config, evaluation))
    return (
        f"evaluate: {evaluation.queries.num_rows:,} queries against {evaluation.corpus.num_rows:,} passages, "
        f"{names}; "
        f"{estimates.encoding(experiment, evaluation.queries, 'text', evaluation.corpus)} a model; {where}"
    )


def summary(folder: Path) -> str:
    """The result in one line."""
    metrics = json.loads((folder / "metrics.json").read_text())
    found = metrics.get("significance")
    if found is None:
        name = metrics["metric"]
        return f"base {name} {metrics['base'][name]:.4f} (no tuned model yet)"
    return (
        f"{found['metric']} {found['base']:.4f} -> {found['tuned']:.4f} ({found['difference']:+.4f}, "
        f"p = {found['p_value']:.4g}; won {found['wins']}, tied {found['ties']}, lost {found['losses']} of "
        f"{found['num_queries']} queries)"
    )


def head_lines(metrics: dict[str, Any]) -> list[str]:
    """What each of BGE-M3's representations is worth, a line a model."""
    name = metrics["metric"]
    return [
        f"{model}, {name} by " + ", ".join(f"{head} {means[name]:.4f}" for head, means in heads.items())
        for model, heads in metrics.get("heads", {}).items()
    ]


def _section(experiment: Experiment) -> EvaluateConfig:
    return experiment.evaluate or EvaluateConfig()


def _data(experiment: Experiment) -> Evaluation:
    prepared = prepare(experiment, rows=False, corpus=False)
    prepared.report.raise_if_errors()
    if prepared.evaluation is None:
        raise ValueError("evaluate needs an evaluation set; set data.evaluation to a BEIR folder")
    return prepared.evaluation


def _models(experiment: Experiment) -> dict[str, str]:
    tuned = Path(experiment.output_dir) / "model"
    base, remote = experiment.model.name_or_path, experiment.model.trust_remote_code
    if experiment.trains_reranker() and not _is_reranker(base, remote=remote):
        base = _section(experiment).retriever or base  # what a reranker is to make better
    models = {"base": base}
    if tuned.is_dir():
        models["tuned"] = str(tuned)
    elif experiment.train is not None:
        raise ValueError(
            f"{tuned} is not there, and the experiment has a section train; run `rayembed train` first (or "
            "`rayembed run`), or remove the section to evaluate the base model alone"
        )
    return models


def _is_reranker(name: str, *, remote: bool) -> bool:
    return "reranker" in teacher_kind(name, trust_remote_code=remote)


def _reads(experiment: Experiment, config: EvaluateConfig, evaluation: Evaluation) -> Reads:
    models = _models(experiment)
    encoding = encoding_reads(experiment, *models.values())
    return {
        **encoding,
        "weights": dict(zip(models, encoding["weights"], strict=True)),
        **(_reads_of_reranker(experiment) if experiment.trains_reranker() else {}),
        **({"m3": asdict(experiment.m3)} if experiment.m3 is not None else {}),
        "queries": evaluation.queries.fingerprint,
        "corpus": evaluation.corpus.fingerprint,
        "qrels": fingerprint(evaluation.qrels),
        "evaluate": asdict(config),
        "seed": experiment.seed,
    }


def _reads_of_reranker(experiment: Experiment) -> Reads:
    found = retriever(experiment)
    return {
        "max_len": max_seq_length(experiment),
        "reranker": None if experiment.reranker is None else asdict(experiment.reranker),
        "retriever": encoding_reads(found, found.model.name_or_path),
    }


def _judge(experiment: Experiment, config: EvaluateConfig, evaluation: Evaluation, model: str) -> Judged:
    if experiment.trains_reranker() and model != config.retriever:
        return _judge_reranker(experiment, config, evaluation, model)
    asked = retriever(experiment) if experiment.trains_reranker() else experiment
    wanted = [Wanted(evaluation.queries, "query"), Wanted(evaluation.corpus, "passage")]
    queries, passages = encode_stores(asked, wanted, model=model)
    k = max(*config.k_values, _metric_k(config), config.rerank_top_k if _reorders(experiment) else 1)
    tops = ShardTops(
        search_shards(asked, queries, passages, k, use_gpu=asked.ray.use_gpu, exact=True), evaluation.corpus
    )
    merged = [
        ranking
        for part in evaluation.queries.parts
        for ranking in tops.merged(part.first_row, part.first_row + part.num_rows, k)
    ]

    def scores(pairs: Sequence[tuple[int, str]]) -> NDArray[np.float32]:
        found = passages.take(evaluation.corpus.find_ids([passage_id for _, passage_id in pairs]))
        products: NDArray[np.float32] = np.sum(queries.take(np.array([row for row, _ in pairs])) * found, axis=1)
        return products

    return _judged(config, evaluation, merged, scores)


def _reorders(experiment: Experiment) -> bool:
    """Whether more passages are to be found than the metrics look at, for others to order."""
    return experiment.trains_reranker() or experiment.model.family == "m3"


def _judge_reranker(experiment: Experiment, config: EvaluateConfig, evaluation: Evaluation, model: str) -> Judged:
    """The retriever's best passages in the order of the reranker; the others are in no ranking."""
    assert config.retriever is not None
    found, corpus = _judge(experiment, config, evaluation, config.retriever), evaluation.corpus
    ids = _all_ids(evaluation)
    best = [[name for name, _ in found.rankings[query_id][: config.rerank_top_k]] for query_id in ids]
    ask = partial(pair_scores, experiment, model, evaluation.queries, corpus)
    rows_of = [corpus.find_ids(names) for names in best]
    merged = []
    for rows, own in zip(rows_of, ask(rows_of), strict=True):
        order = np.argsort(-own, kind="stable")  # ties stay in the retriever's order
        merged.append((own[order], rows[order]))

    def scores(pairs: Sequence[tuple[int, str]]) -> NDArray[np.float32]:
        asked: list[list[int]] = [[] for _ in ids]
        for place, (row, _) in enumerate(pairs):
            asked[row].append(place)
        rows = corpus.find_ids([passage_id for _, passage_id in pairs])
        answers = np.empty(len(pairs), np.float32)
        answers[np.concatenate(asked).astype(np.int64)] = np.concatenate(ask([rows[places] for places in asked]))
        return answers

    return _judged(config, evaluation, merged, scores)


def _judged(
    config: EvaluateConfig,
    evaluation: Evaluation,
    merged: Sequence[Top],
    scores: Callable[[Sequence[tuple[int, str]]], NDArray[np.float32]],
) -> Judged:
    rankings: dict[str, Ranking] = {}
    for query_id, (best, rows) in zip(_all_ids(evaluation), merged, strict=True):
        passage_ids = evaluation.corpus.take(rows, ["id"]).column("id").to_pylist()
        rankings[query_id] = list(zip(passage_ids, best.tolist(), strict=True))
    means, per_query = evaluate_rankings(_ranked(rankings), evaluation.qrels, _cut_offs(config))
    return Judged(rankings, means, per_query, scores)


def _similarities(evaluation: Evaluation, judged: dict[str, Judged]) -> dict[str, Any] | None:
    """Distributions of every model's scores over the same pairs, so that before and after can be compared.

    Positives are the judged ones; negatives are what either model ranks best without being one, as many a query, a
    model, as it has positives. None where every passage of the corpus is a positive.
    """
    rows = {query_id: row for row, query_id in enumerate(_all_ids(evaluation))}
    pairs: dict[str, list[tuple[int, str]]] = {"positives": [], "negatives": []}
    for query_id in judged["base"].per_query:
        own = [passage_id for passage_id, grade in evaluation.qrels[query_id].items() if grade > 0]
        others = set()
        for model in judged.values():
            others.update([i for i, _ in model.rankings[query_id] if i not in own][: len(own)])
        pairs["positives"] += [(rows[query_id], passage_id) for passage_id in own]
        pairs["negatives"] += [(rows[query_id], passage_id) for passage_id in sorted(others)]

    if not pairs["negatives"]:
        return None

    return {
        name: similarity_summary(model.scores(pairs["positives"]), model.scores(pairs["negatives"]))
        for name, model in judged.items()
    }


def _ranked(rankings: dict[str, Ranking]) -> dict[str, list[str]]:
    return {query_id: [passage_id for passage_id, _ in ranking] for query_id, ranking in rankings.items()}


def _cut_offs(config: EvaluateConfig) -> list[int]:
    return [*config.k_values, _metric_k(config)]


def _metric_k(config: EvaluateConfig) -> int:
    return int(config.significance_metric.split("@")[1])


def _all_ids(evaluation: Evaluation) -> list[str]:
    return [str(i) for table in evaluation.queries.iter_parts(["id"]) for i in table.column("id").to_pylist()]


def _write(
    config: EvaluateConfig,
    evaluation: Evaluation,
    judged: dict[str, Judged],
    folder: Path,
    seed: int,
    heads: dict[str, dict[str, dict[str, float]]],
) -> None:
    metric = config.significance_metric
    metrics: dict[str, Any] = {name: model.means for name, model in judged.items()}
    metrics |= {
        "metric": metric,
        **query_counts(_ranked(judged["base"].rankings), evaluation.qrels),
        "num_passages": evaluation.corpus.num_rows,
        **({"heads": heads} if heads else {}),
    }
    for name, model in judged.items():
        write_run(folder / f"{name}.trec", model.rankings, tag=f"rayembed-{name}")
    if "tuned" in judged:
        base, tuned = (
            {query_id: values[metric] for query_id, values in judged[name].per_query.items()}
            for name in ("base", "tuned")
        )
        metrics["significance"] = compare(metric, base, tuned, num_permutations=config.num_permutations, seed=seed)
        lines = _per_query(evaluation, judged, base, tuned)
        write_atomic(folder / "per_query.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    similarities = _similarities(evaluation, judged)
    if similarities is not None:
        write_atomic(folder / "similarities.json", json.dumps(similarities).encode())
    write_atomic(folder / "metrics.json", json.dumps(metrics, indent=1).encode())


def _per_query(
    evaluation: Evaluation, judged: dict[str, Judged], base: dict[str, float], tuned: dict[str, float]
) -> list[dict[str, Any]]:
    queries = dict(zip(_all_ids(evaluation), _texts(evaluation.queries), strict=True))

    def passages(ids: Sequence[str]) -> list[str]:
        rows = evaluation.corpus.find_ids(ids)
        return [str(text) for text in evaluation.corpus.take(rows, ["text"]).column("text").to_pylist()]

    lines = []
    for query_id, value in base.items():
        relevant = [passage_id for passage_id, grade in evaluation.qrels[query_id].items() if grade > 0]
        line = {
            "query_id": query_id,
            "query": queries[query_id],
            "base": value,
            "tuned": tuned[query_id],
            "positives": passages(relevant),
        }
        for name in ("base", "tuned"):
            top, score = judged[name].rankings[query_id][0]
            line[f"{name}_top"] = {"id": top, "text": passages([top])[0], "score": score, "relevant": top in relevant}
        lines.append(line)
    return lines


def _texts(store: Store) -> list[str]:
    return [str(text) for table in store.iter_parts(["text"]) for text in table.column("text").to_pylist()]
