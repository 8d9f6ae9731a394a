"""Similarities against sets of grams made by hand, and that those that are not compared could not reach the bound."""

import random
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from rayembed.mining import near_duplicates as module
from rayembed.mining.near_duplicates import grams, near_duplicates, similarities


def reference(positives: Sequence[str], texts: Sequence[str]) -> list[float]:
    """For texts of lower-case words with blanks between."""

    def sets(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return {tuple(words[i : i + 3]) for i in range(len(words) - 2)} if len(words) > 2 else {tuple(words)} - {()}

    def jaccard(one: set[tuple[str, ...]], other: set[tuple[str, ...]]) -> float:
        return len(one & other) / len(one | other) if one or other else 0.0

    return [max((jaccard(sets(text), sets(positive)) for positive in positives), default=0.0) for text in texts]


def edited(rng: random.Random, text: str, changes: int) -> str:
    """The text with some words put in, left out or replaced."""
    words = text.split()
    for _ in range(changes):
        at = rng.randrange(len(words) + 1)
        words[at : at + rng.randrange(2)] = [rng.choice(["new", "word", "w1"])] * rng.randrange(2)
    return " ".join(words)


def corpus(seed: int, length: int) -> tuple[list[str], list[str]]:
    """Positives, and texts from equal to entirely different; few words, so that grams repeat."""
    rng = random.Random(seed)
    positives = [" ".join(rng.choices([f"w{i}" for i in range(12)], k=rng.randint(1, length))) for _ in range(3)]
    texts = [edited(rng, rng.choice(positives), rng.randrange(8)) for _ in range(60)]
    return positives, [*texts, *(" ".join(reversed(text.split())) for text in positives), "", "w1", "w1 w2"]


@pytest.mark.parametrize(("seed", "length"), [(0, 2), (1, 3), (2, 12), (3, 60), (4, 60), (5, 300)])
def test_similarities_are_those_of_sets(seed: int, length: int) -> None:
    positives, texts = corpus(seed, length)
    found = similarities(positives, texts)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, reference(positives, texts), rtol=1e-6)


@pytest.mark.parametrize("bound", [0.01, 0.25, 0.5, 2 / 3, 0.8, 0.9, 0.99, 1.0])
@pytest.mark.parametrize(("seed", "length"), [(0, 3), (1, 12), (2, 30), (3, 150)])
def test_near_duplicates_are_those_that_reach_the_bound(seed: int, length: int, bound: float) -> None:
    positives, texts = corpus(seed, length)
    expected = np.array(reference(positives, texts), np.float32) >= np.float32(bound)
    np.testing.assert_array_equal(near_duplicates(positives, texts, bound), expected)
    assert expected.any()


@pytest.mark.parametrize("size", [10, 20, 100])
def test_a_similarity_of_exactly_the_bound_is_near(size: int) -> None:
    """The text has 9 of 10 grams of the positive, but none of the longest, which are looked for first."""
    words = [f"w{i}" + "x" * i for i in range(size + 2)]
    part = words[: size * 9 // 10 + 2]
    found = near_duplicates([" ".join(words)], [" ".join(part), " ".join(part[1:])], 0.9)
    assert found.tolist() == [True, False]


def test_only_texts_that_can_reach_the_bound_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str] = []

    def noted(positives: Sequence[str], texts: Sequence[str]) -> NDArray[np.float32]:
        compared.extend(texts)
        return similarities(positives, texts)

    monkeypatch.setattr(module, "similarities", noted)
    rng = random.Random(0)
    vocabulary = [f"w{i}w" for i in range(500)]
    positive, *others = [" ".join(rng.choices(vocabulary, k=150)) for _ in range(100)]
    assert near_duplicates([positive], [*others, positive], 0.9).tolist() == [False] * 99 + [True]
    assert positive in compared
    assert len(compared) < 30


def test_what_a_gram_is() -> None:
    assert grams("Rain, Rain -- go away!") == ["rain rain go", "rain go away"]
    assert grams("Rain  (cold)") == ["rain cold"]
    assert grams("?") == grams("") == []
    assert grams("東京タワー") == ["東 京 タ", "京 タ ワ", "タ ワ ー"]
    assert grams("ﬁne CAFÉ e\u0301t") == ["fine café ét"]


def test_case_and_compatible_characters_are_no_difference() -> None:
    texts = ["Rain: falls, \ufb01ne and COLD", "rain falls fine and old"]
    assert near_duplicates(["RAIN FALLS FINE and cold"], texts, 1.0).tolist() == [True, False]


def test_nothing_to_compare_is_no_similarity() -> None:
    assert similarities([], ["a b c"]).tolist() == [0.0]
    assert similarities(["a b c"], []).tolist() == []
    assert similarities(["!", "?"], ["!", "a"]).tolist() == [0.0, 0.0]
    assert near_duplicates([], ["a b c"], 0.9).tolist() == [False]
    assert near_duplicates(["a b c"], [], 0.9).tolist() == []
    assert near_duplicates(["!"], ["!"], 0.9).tolist() == [False]


def test_the_highest_of_several_positives_counts() -> None:
    assert similarities(["a b c", "a b c d", "x"], ["a b c d", "x", "y"]).tolist() == [1.0, 1.0, 0.0]
