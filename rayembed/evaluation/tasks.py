"""Metrics of vectors beside retrieval: scored pairs, classification and clustering. All look at directions alone."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import v_measure_score
from sklearn.neighbors import KNeighborsClassifier

from rayembed.evaluation.significance import CONFIDENCE

NEIGHBORS = 5
ITERATIONS = 1000  # of logistic regression, which has settled long before
STARTS = 10  # of k-means; the one with the least distances counts
RESAMPLES = 1000  # of the bootstrap, each of which ranks all pairs anew
ELEMENTS_PER_BATCH = 500_000  # values that a batch of resamples holds

Values = NDArray[np.float64]


def check_scores(scores: Values) -> None:
    """Refuses scores whose ranks say nothing.

    Raises:
        ValueError: all are equal, or there is one.
    """
    if np.unique(scores).size < 2:
        raise ValueError(
            f"the scores of its {scores.size:,} pairs are all {scores[0]:g}, and a rank correlation needs two that "
            "differ; give evaluate.tasks rows with other scores"
        )


def check_labels(labels: Sequence[str]) -> None:
    """Refuses labels that tell nothing apart.

    Raises:
        ValueError: there is one label alone.
    """
    if len(set(labels)) < 2:
        raise ValueError(
            f"all {len(labels):,} rows have the label {labels[0]!r}, and two are needed to tell texts apart; give "
            "evaluate.tasks rows with more labels"
        )


def check_classes(train_labels: Sequence[str], test_labels: Sequence[str]) -> None:
    """Refuses test rows that no classifier could get right.

    Raises:
        ValueError: the train rows have one label alone, or lack a label of the test rows.
    """
    check_labels(train_labels)
    unknown = sorted(set(test_labels) - set(train_labels))
    if unknown:
        number = sum(label in unknown for label in test_labels)
        raise ValueError(
            f"its train rows lack {len(unknown):,} labels that {number:,} test rows have, the first of them "
            f"{unknown[0]!r}; add rows with it to train of evaluate.tasks, or remove these test rows"
        )


def cosines(first: NDArray[np.float32], second: NDArray[np.float32]) -> Values:
    """Cosines [N] of the rows of two arrays [N, D], in float64."""
    wide = first.astype(np.float64), second.astype(np.float64)
    lengths = np.linalg.norm(wide[0], axis=1) * np.linalg.norm(wide[1], axis=1)
    products: Values = np.einsum("nd,nd->n", *wide) / np.maximum(lengths, np.finfo(np.float64).tiny)
    return products


def spearman(values: Values, scores: Values) -> float:
    """Rank correlation of two arrays [N], in [-1, 1]; equal values share the mean of their ranks.

    Raises:
        ValueError: either is constant, and the correlation undefined.
    """
    check_scores(scores)
    if np.unique(values).size < 2:
        raise ValueError(
            f"the cosines of all {values.size:,} pairs are {values[0]:g}: the model gives every text the same vector"
        )
    return float(_correlations(stats.rankdata(values)[None], stats.rankdata(scores)[None])[0])


def spearman_interval(base: Values, tuned: Values, scores: Values, *, seed: int) -> tuple[float, float]:
    """95% interval of the difference of two models' rank correlations, tuned minus base.

    The percentile bootstrap over pairs, the same pairs for both models; draws of pairs that are all equal, for which
    no correlation is defined, do not count.

    Args:
        base: cosines [N] of one model.
        tuned: cosines [N] of the other.
        scores: what both are compared with [N].
        seed: of the draws.
    """
    rng, found = np.random.default_rng(seed), list[Values]()
    batch = max(1, ELEMENTS_PER_BATCH // scores.size)
    for start in range(0, RESAMPLES, batch):
        drawn = rng.integers(0, scores.size, (min(batch, RESAMPLES - start), scores.size))
        before, after, wanted = (stats.rankdata(values[drawn], axis=1) for values in (base, tuned, scores))
        found.append(_correlations(after, wanted) - _correlations(before, wanted))
    differences = np.concatenate(found)
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(differences[~np.isnan(differences)], [tail, 100 - tail])
    return float(low), float(high)


def right_answers(
    train: tuple[NDArray[np.float32], Sequence[str]],
    test: tuple[NDArray[np.float32], Sequence[str]],
    *,
    classifier: Literal["logistic_regression", "knn"],
) -> NDArray[np.bool_]:
    """Which test rows [N] a classifier of the train rows gives their label; the mean is the accuracy.

    Args:
        train: vectors [M, D] and labels.
        test: vectors [N, D] and labels.
        classifier: logistic_regression (L2, C = 1), or knn: the most frequent label among the 5 nearest rows by
            cosine; of labels that are equally frequent, the first in the alphabet.

    Raises:
        ValueError: the train rows have one label alone, or lack a label of the test rows.
    """
    check_classes(train[1], test[1])
    model = (
        LogisticRegression(max_iter=ITERATIONS)
        if classifier == "logistic_regression"
        else KNeighborsClassifier(min(NEIGHBORS, len(train[1])), algorithm="brute", metric="cosine")
    )
    model.fit(_directions(train[0]), np.array(train[1]))
    right: NDArray[np.bool_] = model.predict(_directions(test[0])) == np.array(test[1])
    return right


def v_measure(vectors: NDArray[np.float32], labels: Sequence[str], *, seed: int) -> float:
    """How well k-means finds the labels, in [0, 1]: the harmonic mean of homogeneity and completeness.

    Args:
        vectors: [N, D].
        labels: N; there are as many clusters as different labels.
        seed: of the centres that k-means begins with.

    Raises:
        ValueError: there is one label alone.

    Source: V-Measure, Rosenberg and Hirschberg, EMNLP 2007.
    """
    check_labels(labels)
    means = KMeans(
        len(set(labels)),
        n_init=STARTS,
        random_state=seed % 2**32,  # numpy's seeds end there
        copy_x=False,
    )
    return float(v_measure_score(labels, means.fit_predict(_directions(vectors))))


def _directions(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """A copy of the vectors, of length 1; sklearn computes in float32 where it is given that."""
    lengths = np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64))[:, None]
    directions: NDArray[np.float32] = vectors / np.maximum(lengths, np.finfo(np.float32).tiny).astype(np.float32)
    return directions


def _correlations(first: Values, second: Values) -> Values:
    """Pearson's correlation of each row of two arrays [R, N]; nan where a row is constant."""
    first = first - first.mean(axis=1, keepdims=True)
    second = second - second.mean(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):
        found: Values = np.sum(first * second, axis=1) / np.sqrt(np.sum(first**2, axis=1) * np.sum(second**2, axis=1))
    return found
