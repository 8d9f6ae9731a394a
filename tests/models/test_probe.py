"""The probe comes back as it was kept, and the least cosine is that of the worst text."""

from pathlib import Path

import numpy as np
import pytest

from rayembed.models.probe import least_cosine, read_probe, write_probe


def test_a_probe_comes_back(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)
    write_probe(tmp_path, [("a", "ü \n b"), ("c", "d")], vectors)
    pairs, back = read_probe(tmp_path)
    assert pairs == [("a", "ü \n b"), ("c", "d")]
    np.testing.assert_array_equal(back, vectors)


def test_no_probe_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_probe(tmp_path)


def test_the_worst_text_decides() -> None:
    first = np.array([[1, 0], [3, 0], [0, 2]], np.float32)
    second = np.array([[5, 0], [1, 1], [0, 1]], np.float32)
    assert least_cosine(first, second) == pytest.approx(np.sqrt(0.5))
    assert least_cosine(first, -first) == pytest.approx(-1)
