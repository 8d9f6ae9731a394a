"""Metrics of tasks against slow ones, and what they refuse."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from rayembed.evaluation.tasks import (
    check_classes,
    check_labels,
    check_scores,
    cosines,
    right_answers,
    spearman,
    spearman_interval,
    v_measure,
)

Vectors = NDArray[np.float32]


def groups(seed: int, spread: float, number: int = 60) -> tuple[Vectors, list[str]]:
    """Vectors of length 0.5 to 2 around four directions, and the names of these, most frequent first."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(4, 8))
    of = rng.choice(4, number, p=[0.4, 0.3, 0.2, 0.1])
    vectors = centres[of] + rng.normal(scale=spread, size=(number, 8))
    lengths = rng.uniform(0.5, 2, (number, 1))
    directions = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return (directions * lengths).astype(np.float32), ["wxyz"[i] for i in of]


def slow_ranks(values: Sequence[float]) -> list[float]:
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2 for value in values
    ]


def slow_spearman(first: Sequence[float], second: Sequence[float]) -> float:
    one, two = slow_ranks(first), slow_ranks(second)
    middle = (len(one) + 1) / 2
    above = sum((a - middle) * (b - middle) for a, b in zip(one, two, strict=True))
    return above / math.sqrt(sum((a - middle) ** 2 for a in one) * sum((b - middle) ** 2 for b in two))


def slow_cosine(one: Vectors, other: Vectors) -> float:
    products = [float(a) * float(b) for a, b in zip(one, other, strict=True)]
    lengths = [math.sqrt(sum(float(a) ** 2 for a in vector)) for vector in (one, other)]
    return sum(products) / (lengths[0] * lengths[1])


def slow_v_measure(labels: Sequence[str], clusters: Sequence[int]) -> float:
    def entropy(values: Sequence[object], given: Sequence[object]) -> float:
        both, whole = Counter(zip(values, given, strict=True)), Counter(given)
        return -sum(count / len(values) * math.log(count / whole[g]) for (_, g), count in both.items())

    nothing = [0] * len(labels)
    homogeneity = 1 - entropy(labels, clusters) / entropy(labels, nothing)
    completeness = 1 - entropy(clusters, labels) / entropy(clusters, nothing)
    return 2 * homogeneity * completeness / (homogeneity + completeness)


def test_cosines_are_those_of_directions() -> None:
    first, second = groups(1, 1.0)[0], groups(2, 1.0)[0]
    assert cosines(first, second) == pytest.approx([slow_cosine(a, b) for a, b in zip(first, second, strict=True)])


def test_spearman_is_the_correlation_of_ranks_with_ties_shared() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 5, 40).astype(np.float64)
    values = np.round(scores + rng.normal(scale=2, size=40), 0)
    assert len(set(values)) < 40
    expected = slow_spearman(values.tolist(), scores.tolist())
    assert 0.1 < expected < 0.9
    assert spearman(values, scores) == pytest.approx(expected)
    assert spearman(np.exp(values / 9), scores) == pytest.approx(expected), "ranks alone count"
    assert spearman(-scores, scores) == pytest.approx(-1)


def test_the_interval_of_a_difference_is_that_of_slow_draws() -> None:
    rng = np.random.default_rng(1)
    scores = rng.normal(size=50)
    base, tuned = scores + rng.normal(scale=2, size=50), scores + rng.normal(scale=0.5, size=50)
    low, high = spearman_interval(base, tuned, scores, seed=3)
    found = []
    for _ in range(600):
        drawn = rng.integers(0, 50, 50)
        before, after = (slow_spearman(values[drawn].tolist(), scores[drawn].tolist()) for values in (base, tuned))
        found.append(after - before)
    assert 0 < low < spearman(tuned, scores) - spearman(base, scores) < high
    assert (low, high) == pytest.approx(np.percentile(found, [2.5, 97.5]).tolist(), abs=0.06)
    assert spearman_interval(base, tuned, scores, seed=3) == (low, high), "the seed decides"
    assert spearman_interval(base, tuned, scores, seed=4) != (low, high)
    assert spearman_interval(base, base, scores, seed=3) == (0, 0)


def test_batches_of_draws_are_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    base, tuned, scores = rng.normal(size=(3, 30))
    whole = spearman_interval(base, tuned, scores, seed=3)
    monkeypatch.setattr("rayembed.evaluation.tasks.ELEMENTS_PER_BATCH", 30 * 7)
    assert spearman_interval(base, tuned, scores, seed=3) == whole


def test_draws_of_one_pair_alone_do_not_count() -> None:
    base, tuned, scores = np.array([0.1, 0.2]), np.array([0.2, 0.1]), np.array([0.0, 1.0])
    assert spearman_interval(base, tuned, scores, seed=0) == pytest.approx((-2, -2))


def test_knn_is_the_majority_of_the_five_nearest_by_cosine() -> None:
    train, test = groups(3, 1.2), groups(4, 1.2)
    expected = []
    for vector, label in zip(*test, strict=True):
        order = sorted(range(len(train[0])), key=lambda i: -slow_cosine(vector, train[0][i]))
        votes = Counter(train[1][i] for i in order[:5])
        expected.append(min(votes, key=lambda name: (-votes[name], name)) == label)
    assert 0.3 < sum(expected) / len(expected) < 0.95
    assert right_answers(train, test, classifier="knn").tolist() == expected


def test_knn_of_fewer_rows_than_neighbors_asks_all() -> None:
    rows = np.array([[1, 0], [0, 1], [0.1, 1]], np.float32), ["a", "b", "b"]
    assert right_answers(rows, rows, classifier="knn").tolist() == [False, True, True]


def test_logistic_regression_learns_what_can_be_told_apart() -> None:
    train, test = groups(5, 0.2, 200), groups(6, 0.2)
    assert right_answers(train, test, classifier="logistic_regression").mean() > 0.95
    shuffled = [*train[1][1:], train[1][0]]
    assert right_answers((train[0], shuffled), test, classifier="logistic_regression").mean() < 0.6
    noisy = groups(7, 1.0, 200), groups(8, 1.0)
    plain = right_answers(*noisy, classifier="logistic_regression").tolist()
    longer = right_answers((noisy[0][0] * 9, noisy[0][1]), noisy[1], classifier="logistic_regression").tolist()
    assert plain == longer, "lengths do not count"


def test_v_measure_is_the_formula_of_entropies() -> None:
    rng = np.random.default_rng(0)
    labels = [f"l{i}" for i in rng.integers(0, 3, 90)]
    clusters = rng.integers(0, 3, 90)  # corners so far from one another that k-means can but find them
    vectors = np.eye(3, dtype=np.float32)[clusters] + rng.normal(scale=1e-3, size=(90, 3)).astype(np.float32)
    vectors[:45] *= 7
    mixed = [f"l{c}" if i % 3 else label for i, (c, label) in enumerate(zip(clusters, labels, strict=True))]
    for names in (labels, mixed):
        assert v_measure(vectors, names, seed=1) == pytest.approx(slow_v_measure(names, clusters.tolist()))
    assert slow_v_measure(mixed, clusters.tolist()) > 0.2
    assert v_measure(vectors, [f"l{c}" for c in clusters], seed=1) == pytest.approx(1)


def test_clusters_depend_on_the_seed_alone() -> None:
    vectors = np.random.default_rng(0).normal(size=(80, 12)).astype(np.float32)
    labels = [str(i % 9) for i in range(80)]
    found = [v_measure(vectors, labels, seed=seed) for seed in (1, 2, 3, 4, 2**40 + 1)]
    assert len(set(found)) > 1
    assert v_measure(vectors, labels, seed=1) == found[0] == found[-1]


def test_scores_that_are_all_the_same_have_no_rank_correlation() -> None:
    values, same = np.arange(4.0), np.ones(4)
    with pytest.raises(ValueError, match=r"scores of its 4 pairs are all 1, .* needs two that differ"):
        check_scores(same)
    with pytest.raises(ValueError, match="scores of its 4 pairs are all 1"):
        spearman(values, same)
    with pytest.raises(ValueError, match="cosines of all 4 pairs are 1: the model gives every text the same vector"):
        spearman(same, values)


def test_one_label_alone_is_refused() -> None:
    vectors = np.eye(4, dtype=np.float32)
    with pytest.raises(ValueError, match="all 4 rows have the label 'a', and two are needed"):
        check_labels(["a"] * 4)
    with pytest.raises(ValueError, match="all 4 rows have the label 'a'"):
        v_measure(vectors, ["a"] * 4, seed=0)
    with pytest.raises(ValueError, match="all 2 rows have the label 'a'"):
        check_classes(["a", "a"], ["a"])


def test_labels_that_the_classifier_never_saw_are_refused() -> None:
    vectors, message = np.eye(4, dtype=np.float32), "lack 2 labels that 3 test rows have, the first of them 'c'; add"
    train, test = ["a", "b", "a", "b"], ["a", "d", "c", "c"]
    with pytest.raises(ValueError, match=message):
        check_classes(train, test)
    with pytest.raises(ValueError, match=message):
        right_answers((vectors, train), (vectors, test), classifier="knn")
