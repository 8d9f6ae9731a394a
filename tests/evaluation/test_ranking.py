"""evaluate_rankings against each metric's definition in plain Python, and the queries that other tools miscount."""

import logging
import math
import random

import pytest

from rayembed.evaluation.ranking import METRICS, evaluate_rankings, query_counts

K_VALUES = [1, 3, 5, 10, 100]


def reference(ranking: list[str], judgements: dict[str, int], k: int) -> dict[str, float]:
    """The definitions, one query at a time; gains below 0 count as 0."""
    gains = [max(0, judgements.get(passage_id, 0)) for passage_id in ranking[:k]]
    ideal = sorted((max(0, value) for value in judgements.values()), reverse=True)[:k]
    relevant = sum(value > 0 for value in judgements.values())
    hits = [rank for rank, gain in enumerate(gains, start=1) if gain > 0]

    def dcg(values: list[int]) -> float:
        return sum(value / math.log2(rank + 1) for rank, value in enumerate(values, start=1))

    return {
        f"ndcg@{k}": dcg(gains) / dcg(ideal),
        f"map@{k}": sum(found / rank for found, rank in enumerate(hits, start=1)) / relevant,
        f"recall@{k}": len(hits) / relevant,
        f"precision@{k}": len(hits) / k,
        f"mrr@{k}": 1 / hits[0] if hits else 0.0,
    }


def random_case(seed: int) -> tuple[dict[str, list[str]], dict[str, dict[str, int]]]:
    """30 queries over 60 passages, judged from -1 to 3; rankings of 0 to 40 passages."""
    generator = random.Random(seed)
    passages = [f"p{number}" for number in range(60)]
    rankings, qrels = {}, {}
    for number in range(30):
        rankings[f"q{number}"] = generator.sample(passages, generator.randint(0, 40))
        judged = generator.sample(passages, generator.randint(1, 20))
        qrels[f"q{number}"] = {passage_id: generator.randint(-1, 3) for passage_id in judged} | {"p0": 1}
    return rankings, qrels


@pytest.mark.parametrize("seed", range(5))
def test_every_metric_matches_its_definition(seed: int) -> None:
    rankings, qrels = random_case(seed)
    means, per_query = evaluate_rankings(rankings, qrels, K_VALUES)
    expected = {
        query_id: {
            name: value for k in K_VALUES for name, value in reference(rankings[query_id], judgements, k).items()
        }
        for query_id, judgements in qrels.items()
    }
    assert per_query.keys() == expected.keys()
    for query_id, values in expected.items():
        assert per_query[query_id] == pytest.approx(values, abs=1e-9)
    for name in (f"{metric}@{k}" for metric in METRICS for k in K_VALUES):
        assert means[name] == pytest.approx(sum(values[name] for values in expected.values()) / len(expected), abs=1e-9)
    assert len(means) == len(METRICS) * len(K_VALUES)


@pytest.mark.parametrize("order", [["a", "z"], ["z", "a"]])
def test_the_order_given_is_the_order_judged_whatever_the_ids(order: list[str]) -> None:
    # trec_eval puts the larger id first among equal scores; a and z in both orders would show it
    means, _ = evaluate_rankings({"q": order}, {"q": {order[0]: 1}}, [1])
    assert means == {"ndcg@1": 1.0, "map@1": 1.0, "recall@1": 1.0, "precision@1": 1.0, "mrr@1": 1.0}


def test_order_holds_deep_in_a_long_ranking() -> None:
    ranking = [f"p{number % 7}-{number}" for number in range(5000)]
    _, per_query = evaluate_rankings({"q": ranking}, {"q": {ranking[4321]: 1}}, [5000])
    assert per_query["q"]["mrr@5000"] == pytest.approx(1 / 4322)


def test_mrr_sees_nothing_below_the_cut() -> None:
    _, per_query = evaluate_rankings({"q": ["x", "y", "a"]}, {"q": {"a": 1}}, [2, 3])
    assert per_query["q"]["mrr@2"] == 0.0
    assert per_query["q"]["mrr@3"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("missing", [{}, {"lost": []}])
def test_a_query_without_a_ranking_counts_zero_in_every_metric(
    missing: dict[str, list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    qrels = {"found": {"a": 1}, "lost": {"b": 1}}
    with caplog.at_level(logging.WARNING):
        means, per_query = evaluate_rankings({"found": ["a"]} | missing, qrels, [1])
    assert set(means.values()) == {0.5}
    assert set(per_query["lost"].values()) == {0.0}
    assert "1 query without a ranking, counted as 0" in caplog.text


def test_queries_that_do_not_count_are_left_out_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    rankings = {"good": ["a"], "zero": ["b"], "stranger": ["c"], "other": ["d"]}
    qrels = {"good": {"a": 2}, "zero": {"b": 0}, "negative": {"b": -1}}
    with caplog.at_level(logging.WARNING):
        means, per_query = evaluate_rankings(rankings, qrels, [1])
    assert means["ndcg@1"] == 1.0
    assert per_query.keys() == {"good"}
    assert query_counts(rankings, qrels) == {
        "num_queries": 1,
        "without_ranking": 0,
        "without_positive": 2,
        "without_judgement": 2,
    }
    assert "2 queries of the qrels without a positive judgement" in caplog.text
    assert "2 queries with a ranking, but not in the qrels" in caplog.text


def test_refuses_qrels_without_a_positive() -> None:
    with pytest.raises(ValueError, match="none of the 1 query of the qrels has a positive judgement"):
        evaluate_rankings({"q": ["a"]}, {"q": {"a": 0}}, [1])


def test_refuses_a_passage_ranked_twice() -> None:
    with pytest.raises(ValueError, match="query 'q' names passage 'a' twice"):
        evaluate_rankings({"q": ["a", "b", "a"]}, {"q": {"a": 1}}, [1])


@pytest.mark.parametrize("k_values", [[], [0, 10]])
def test_refuses_cut_offs_below_one(k_values: list[int]) -> None:
    with pytest.raises(ValueError, match=r"evaluate\.k_values"):
        evaluate_rankings({"q": ["a"]}, {"q": {"a": 1}}, k_values)


@pytest.mark.parity
@pytest.mark.parametrize("seed", range(3))
def test_metrics_are_flag_embeddings_where_every_query_has_a_ranking_without_ties(seed: int) -> None:
    from FlagEmbedding.abc.evaluation.utils import evaluate_metrics, evaluate_mrr

    rankings, qrels = random_case(seed)
    whole = {query_id: ranking or ["p0"] for query_id, ranking in rankings.items()}
    counted = {query_id: judged for query_id, judged in qrels.items() if max(judged.values()) > 0}
    scores = {query_id: {name: -float(i) for i, name in enumerate(whole[query_id])} for query_id in counted}
    found, _ = evaluate_rankings({query_id: whole[query_id] for query_id in counted}, counted, K_VALUES)
    theirs = {}
    for values in (*evaluate_metrics(counted, scores, K_VALUES), evaluate_mrr(counted, scores, K_VALUES)):
        theirs.update({name.lower().replace("_at_", "@").removeprefix("p@"): value for name, value in values.items()})
    named = {name.removeprefix("precision@"): value for name, value in found.items()}
    assert theirs.keys() == named.keys()
    assert named == pytest.approx(theirs, abs=1e-5), "it rounds to 5 digits"
