"""Base and tuned model on the full corpus of the evaluation set, by the same encoding and search as mining."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayembed.config import Experiment
from rayembed.config.jobs import EvaluateConfig
from rayembed.config.uris import public_name
from rayembed.data.prepare import Evaluation
from rayembed.data.storage import write_atomic
from rayembed.data.store import Store
from rayembed.evaluation.distributions import similarity_summary
from rayembed.evaluation.ranking import evaluate_rankings, query_counts
from rayembed.evaluation.significance import compare
from rayembed.evaluation.trec import write_run
from rayembed.jobs.evaluate_heads import evaluate_heads, heads_of
from rayembed.jobs.ranking import ShardTops, search_shards
from rayembed.jobs.rerank import pair_scores, retriever
from rayembed.jobs.vectors import Wanted, encode_stores
from rayembed.search.merge import Top

Ranking = list[tuple[str, float]]


@dataclass(frozen=True)
class Judged:
    """One model on the evaluation set."""

    rankings: dict[str, Ranking]
    means: dict[str, float]
    per_query: dict[str, dict[str, float]]
    scores: Callable[[Sequence[tuple[int, str]]], NDArray[np.float32]]
    """Of (row of a query, id of a passage)."""


def evaluate_retrieval(
    experiment: Experiment, config: EvaluateConfig, evaluation: Evaluation, models: Mapping[str, str], folder: Path
) -> dict[str, Any]:
    """Ranks the whole corpus for every query, and writes rankings, similarities and results by query into `folder`.

    Args:
        experiment: model, prompts, lengths, resources.
        config: its section evaluate.
        evaluation: corpus, queries and qrels.
        models: folder or hub id of "base" and, if there is one, "tuned".
        folder: takes base.trec, tuned.trec, similarities.json and per_query.jsonl.

    Returns:
        What metrics.json says of retrieval.
    """
    judged = {name: _judge(experiment, config, evaluation, model) for name, model in models.items()}
    heads = {
        name: evaluate_heads(experiment, config, evaluation, judged[name].rankings, model, _cut_offs(config))
        for name, model in models.items()
        if heads_of(experiment, model)
    }
    further: dict[str, Any] = {"heads": heads} if heads else {}
    if experiment.trains_reranker():
        further["rerank_top_k"] = config.rerank_top_k
        if models["base"] == config.retriever:
            further["base_is"] = f"{public_name(models['base'])} alone, what it finds first"
    return _write(config, evaluation, judged, folder, experiment.seed) | further


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
) -> dict[str, Any]:
    metric = config.significance_metric
    metrics: dict[str, Any] = {name: model.means for name, model in judged.items()}
    metrics |= {
        "metric": metric,
        **query_counts(_ranked(judged["base"].rankings), evaluation.qrels),
        "num_passages": evaluation.corpus.num_rows,
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
    return metrics


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
