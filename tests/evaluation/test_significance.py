"""The paired test against an enumeration of all sign flips, the interval against its theory."""

import itertools
import math
import random
import time
import warnings

import numpy as np
import pytest

from rayembed.evaluation.significance import bootstrap_interval, compare, randomisation_p_value

TEN = [0.30, -0.10, 0.05, 0.22, 0.0, 0.41, -0.07, 0.13, 0.02, -0.20]


def exact_p_value(differences: list[float]) -> float:
    """Share of the 2^n sign flips whose mean is at least as far from 0 as the one seen."""
    seen = abs(sum(differences))
    sums = [
        abs(sum(sign * value for sign, value in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    return sum(value >= seen - 1e-9 for value in sums) / len(sums)


def two_models(differences: list[float]) -> tuple[dict[str, float], dict[str, float]]:
    base = {f"q{number}": 0.4 for number in range(len(differences))}
    return base, {f"q{number}": 0.4 + value for number, value in enumerate(differences)}


def test_few_queries_get_the_exact_p_value() -> None:
    p_value = randomisation_p_value(np.array(TEN), num_permutations=10_000, seed=0)
    assert p_value == pytest.approx(exact_p_value(TEN), abs=1e-12)


def test_sampled_flips_come_close_to_the_exact_p_value() -> None:
    p_value = randomisation_p_value(np.array(TEN), num_permutations=1000, seed=0)  # 1000 < 2^10: sampled
    exact = exact_p_value(TEN)
    assert p_value == pytest.approx(exact, abs=5 * math.sqrt(exact * (1 - exact) / 1000))


def test_two_sided_and_never_zero() -> None:
    generator = np.random.default_rng(3)
    better = generator.normal(0.2, 0.1, size=200)
    p_values = [randomisation_p_value(side, num_permutations=500, seed=0) for side in (better, -better)]
    assert p_values == [pytest.approx(2 / 501)] * 2


def test_result_counts_and_signs() -> None:
    result = compare("ndcg@10", *two_models(TEN), num_permutations=10_000, seed=0)
    assert (result["metric"], result["num_queries"]) == ("ndcg@10", 10)
    assert (result["wins"], result["ties"], result["losses"]) == (6, 1, 3)
    assert result["base"] == pytest.approx(0.4)
    assert result["difference"] == pytest.approx(sum(TEN) / 10)
    assert result["tuned"] == pytest.approx(0.4 + sum(TEN) / 10)
    assert result["ci95"][0] < result["difference"] < result["ci95"][1]
    assert result["p_value"] == pytest.approx(exact_p_value(TEN), abs=1e-12)


def test_queries_are_paired_by_id_not_by_order() -> None:
    base, tuned = two_models(TEN)
    shuffled = dict(random.Random(0).sample(sorted(tuned.items()), len(tuned)))
    assert compare("m", base, shuffled, num_permutations=1000, seed=1) == compare(
        "m", base, tuned, num_permutations=1000, seed=1
    )


def test_interval_has_the_width_of_the_normal_one() -> None:
    differences = np.random.default_rng(0).normal(0.02, 0.3, size=2000)
    low, high = bootstrap_interval(differences, num_resamples=4000, seed=0)
    half = 1.96 * differences.std() / math.sqrt(2000)
    assert (low, high) == pytest.approx((differences.mean() - half, differences.mean() + half), abs=0.1 * half)


@pytest.mark.parametrize("number", [1, 30])
def test_equal_models_give_p_one_without_warnings(number: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = compare("m", *two_models([0.0] * number), num_permutations=1000, seed=0)
    assert (result["p_value"], result["ci95"], result["ties"]) == (1.0, [0.0, 0.0], number)


def test_one_query_that_differs_gives_p_one_and_no_width() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = compare("m", *two_models([0.25]), num_permutations=1000, seed=0)
    assert result["p_value"] == 1.0  # one sign flip of two is as extreme as the other
    assert result["ci95"] == pytest.approx([0.25, 0.25])


def test_rounding_noise_is_a_tie() -> None:
    base, tuned = {"a": 0.3, "b": 0.5}, {"a": 0.1 + 0.2, "b": 0.5}
    assert tuned["a"] != base["a"]
    result = compare("m", base, tuned, num_permutations=1000, seed=0)
    assert (result["wins"], result["ties"], result["losses"], result["p_value"]) == (0, 2, 0, 1.0)


def test_same_seed_same_result_and_another_seed_another() -> None:
    base, tuned = two_models(np.random.default_rng(1).normal(0.02, 0.2, size=60).tolist())
    first, again, other = (compare("m", base, tuned, num_permutations=500, seed=seed) for seed in (7, 7, 8))
    assert first == again
    assert first["ci95"] != other["ci95"]
    assert first["p_value"] != other["p_value"]


def test_refuses_different_queries() -> None:
    with pytest.raises(ValueError, match="base has 2 queries, tuned 2, 1 in common"):
        compare("m", {"a": 1.0, "b": 1.0}, {"a": 1.0, "c": 1.0}, num_permutations=100, seed=0)


def test_a_thousand_queries_take_seconds() -> None:
    base, tuned = two_models(np.random.default_rng(1).normal(0.01, 0.2, size=1000).tolist())
    started = time.process_time()
    compare("m", base, tuned, num_permutations=10_000, seed=0)
    assert time.process_time() - started < 10  # about 1; a Python loop over flips takes minutes
