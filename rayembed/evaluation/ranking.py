"""Ranking metrics through pytrec_eval, its traps closed: ties, queries without a ranking, MRR without a cut-off."""

import logging
from collections.abc import Sequence

import pytrec_eval

from rayembed.config.wording import counted

log = logging.getLogger(__name__)

# Our name -> trec_eval's measure, taken on the ranking cut at k. Cutting first gives recip_rank the k that trec_eval
# does not offer for it, and changes none of the others: they look at the first k anyway.
METRICS = {
    "ndcg": "ndcg_cut_{k}",
    "map": "map_cut_{k}",
    "recall": "recall_{k}",
    "precision": "P_{k}",
    "mrr": "recip_rank",
}


def evaluate_rankings(
    rankings: dict[str, list[str]], qrels: dict[str, dict[str, int]], k_values: Sequence[int]
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Every metric of METRICS at every cut-off, as means and a query.

    Gains of nDCG are the judgements themselves; the other metrics count a judgement of 1 or more as relevant. Recall
    and MAP divide by all relevant passages of the query, precision by k. A query without a ranking counts 0; queries
    without a positive judgement are left out of the means. `query_counts` tells how many there are of each.

    Args:
        rankings: passage ids a query, best first.
        qrels: judgements by query and passage id; 0 or less is not relevant.
        k_values: cut-offs, each at least 1.

    Returns:
        Means over the judged queries and the same values by query id, both in [0, 1] under keys like `ndcg@10`.

    Raises:
        ValueError: no query has a positive judgement, a cut-off is below 1, or a ranking names a passage twice.
    """
    if not k_values or min(k_values) < 1:
        raise ValueError(f"k_values is {list(k_values)}; give at least one cut-off, each 1 or more (evaluate.k_values)")
    judged = judged_queries(qrels)
    if not judged:
        raise ValueError(
            f"none of the {counted(len(qrels), 'query')} of the qrels has a positive judgement; check the qrels file"
        )
    for query_id in judged:
        _check_unique(query_id, rankings.get(query_id, []))
    _log_counts(query_counts(rankings, qrels))
    relevant = {query_id: qrels[query_id] for query_id in judged}
    per_query: dict[str, dict[str, float]] = {query_id: {} for query_id in judged}
    for k in sorted(set(k_values)):
        at_k = _evaluate_cut(rankings, relevant, k)
        for query_id in judged:
            per_query[query_id] |= at_k[query_id]
    names = per_query[judged[0]]
    means = {name: sum(values[name] for values in per_query.values()) / len(judged) for name in names}
    return means, per_query


def judged_queries(qrels: dict[str, dict[str, int]]) -> list[str]:
    """Ids of the queries with a positive judgement, in the order of the qrels: those that means are over."""
    return [query_id for query_id, judgements in qrels.items() if any(value > 0 for value in judgements.values())]


def query_counts(rankings: dict[str, list[str]], qrels: dict[str, dict[str, int]]) -> dict[str, int]:
    """How many queries count, and how many of them are special.

    Returns:
        `num_queries` that means are over; `without_ranking`, those among them that count 0; `without_positive`, queries
        of the qrels that are left out; `without_judgement`, ranked queries that the qrels do not have.
    """
    judged = judged_queries(qrels)
    return {
        "num_queries": len(judged),
        "without_ranking": sum(not rankings.get(query_id) for query_id in judged),
        "without_positive": len(qrels) - len(judged),
        "without_judgement": len(rankings.keys() - qrels.keys()),
    }


def _evaluate_cut(
    rankings: dict[str, list[str]], relevant: dict[str, dict[str, int]], k: int
) -> dict[str, dict[str, float]]:
    measures = {f"{name}@{k}": measure.format(k=k) for name, measure in METRICS.items()}
    runs = {}
    for query_id in relevant:
        top = rankings.get(query_id, [])[:k]
        # pytrec_eval sorts by score and breaks ties by id: strictly decreasing scores keep the order we were given.
        runs[query_id] = {passage_id: float(len(top) - rank) for rank, passage_id in enumerate(top)}
    results = pytrec_eval.RelevanceEvaluator(relevant, set(measures.values())).evaluate(runs)
    return {
        query_id: {name: float(results[query_id][measure]) for name, measure in measures.items()}
        for query_id in relevant
    }


def _check_unique(query_id: str, ranking: list[str]) -> None:
    if len(set(ranking)) < len(ranking):
        twice = next(passage_id for passage_id in ranking if ranking.count(passage_id) > 1)
        raise ValueError(f"the ranking of query {query_id!r} names passage {twice!r} twice; a passage has one rank")


def _log_counts(counts: dict[str, int]) -> None:
    meanings = {
        "without_ranking": "without a ranking, counted as 0",
        "without_positive": "of the qrels without a positive judgement, left out",
        "without_judgement": "with a ranking, but not in the qrels, left out",
    }
    for name, meaning in meanings.items():
        if counts[name]:
            log.warning("%s %s", counted(counts[name], "query"), meaning)
