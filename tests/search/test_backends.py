"""What each backend finds and says of itself; approximate ones are built alike every time, and quietly."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from rayembed.config.search import SearchConfig
from rayembed.search import backends
from rayembed.search.backends import BACKENDS, build_index, is_exact, load_index, open_index, resolve_backend

Floats = NDArray[np.float32]
APPROXIMATE = [name for name, backend in BACKENDS.items() if not backend.exact]


def clustered(rows: int, dimension: int = 32, seed: int = 0) -> Floats:
    """Unit vectors in 40 clusters, as topics are; the clusters are the same for every seed."""
    centres = np.random.default_rng(99).standard_normal((40, dimension))
    rng = np.random.default_rng(seed)
    vectors = centres[rng.integers(40, size=rows)] + 0.7 * rng.standard_normal((rows, dimension))
    scaled: Floats = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return scaled


def recall(found: NDArray[np.int64], queries: Floats, passages: Floats) -> float:
    k = found.shape[1]
    best = np.argsort(-(queries @ passages.T), axis=1)[:, :k]
    return float(np.mean([len(set(a) & set(b)) / k for a, b in zip(found.tolist(), best.tolist(), strict=True)]))


def built(name: str, passages: Floats, folder: Path, config: SearchConfig | None = None, seed: int = 1) -> Path:
    path = folder / "x.faiss"
    build_index(name, passages, config or SearchConfig(), seed, path)
    assert [file.name for file in folder.iterdir()] == ["x.faiss"]
    return path


@pytest.mark.parametrize("name", ["flat", "torch"])
def test_exact_backends_find_the_best(name: str) -> None:
    passages, queries = clustered(2000), clustered(30, seed=1)
    scores, rows = open_index(name, passages).search(queries, 15)
    assert recall(rows, queries, passages) == 1
    np.testing.assert_allclose(scores, np.take_along_axis(queries @ passages.T, rows, axis=1), atol=1e-6)
    assert bool((np.diff(scores) <= 0).all())


def test_flat_does_not_copy_the_passages() -> None:
    code = """
import numpy as np
from rayembed.search.backends import open_index

def peak():  # of this program; ru_maxrss counts from that of the process that started it
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024

passages = np.ones((400_000, 128), np.float32)
before = peak()
open_index("flat", passages).search(passages[:4], 3)
print((peak() - before) / passages.nbytes)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(found.stdout) < 0.3


def test_torch_holds_no_larger_block_of_scores_than_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    topk = torch.Tensor.topk

    def watched(scores: torch.Tensor, k: int, dim: int) -> object:
        sizes.append(scores.numel() * scores.element_size())
        return topk(scores, k, dim=dim)

    monkeypatch.setattr(torch.Tensor, "topk", watched)
    passages, queries = clustered(1000), clustered(10, seed=1)
    index = backends._torch("cpu", passages, block_bytes=4000)
    _, rows = index.search(queries, 8)
    assert len(sizes) >= 10
    assert max(sizes) <= 4000
    assert recall(rows, queries, passages) == 1


def test_torch_searches_in_full_float32_and_leaves_the_setting_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, topk = [], torch.Tensor.topk

    def watched(scores: torch.Tensor, k: int, dim: int) -> object:
        seen.append(torch.get_float32_matmul_precision())
        return topk(scores, k, dim=dim)

    monkeypatch.setattr(torch.Tensor, "topk", watched)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        open_index("torch", clustered(10)).search(clustered(2), 3)
        assert set(seen) == {"highest"}
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(("name", "least"), [("ivf", 0.8), ("hnsw", 0.95)])
def test_approximate_backends_find_most(name: str, least: float, tmp_path: Path) -> None:
    passages, queries = clustered(4000), clustered(50, seed=1)
    config = SearchConfig()
    _, rows = load_index(name, built(name, passages, tmp_path), config).search(queries, 20)
    assert least <= recall(rows, queries, passages) <= 1


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("ivf", {"ivf_probes": 1}, {"ivf_probes": 60}),
        ("ivf", {"ivf_lists": 100, "ivf_probes": 4}, {"ivf_lists": 7, "ivf_probes": 4}),
        ("hnsw", {"hnsw_ef_search": 20}, {"hnsw_ef_search": 400}),
        ("hnsw", {"hnsw_neighbors": 2}, {"hnsw_neighbors": 32}),
        ("hnsw", {"hnsw_ef_construction": 2}, {"hnsw_ef_construction": 80}),
    ],
)
def test_settings_have_their_effect(name: str, low: dict[str, int], high: dict[str, int], tmp_path: Path) -> None:
    passages, queries = clustered(4000), clustered(50, seed=1)
    fixed = {"hnsw_ef_search": 20}
    found = []
    for settings in (low, high):
        config = SearchConfig(**{**fixed, **settings})  # type: ignore[arg-type]
        index = load_index(name, built(name, passages, tmp_path, config), config)
        found.append(recall(index.search(queries, 20)[1], queries, passages))
    assert found[1] > found[0], found


@pytest.mark.parametrize("name", APPROXIMATE)
def test_an_index_is_the_same_every_time_and_another_with_another_seed(name: str, tmp_path: Path) -> None:
    """Whatever the number of threads, which stays as it was."""
    passages = clustered(3000)
    threads = faiss.omp_get_max_threads()
    files = []
    for number, seed in ((1, 7), (2, 7), (1, 8)):
        faiss.omp_set_num_threads(number)
        files.append(built(name, passages, tmp_path, seed=seed).read_bytes())
        assert faiss.omp_get_max_threads() == number
    faiss.omp_set_num_threads(threads)
    assert files[0] == files[1]
    assert files[0] != files[2]


@pytest.mark.parametrize("name", APPROXIMATE)
def test_what_a_query_finds_does_not_depend_on_the_queries_beside_it(name: str, tmp_path: Path) -> None:
    passages = np.repeat(clustered(300), 10, axis=0)
    passages += np.random.default_rng(2).uniform(-1e-7, 1e-7, passages.shape).astype(np.float32)
    queries = clustered(300, seed=1)
    config = SearchConfig(ivf_probes=3)
    index = load_index(name, built(name, passages, tmp_path), config)
    scores, rows = index.search(queries, 10)
    for i in range(0, 300, 7):
        alone = index.search(queries[i : i + 1], 10)
        assert (alone[0][0].tolist(), alone[1][0].tolist()) == (scores[i].tolist(), rows[i].tolist())


def test_built_indexes_are_searched_without_the_arithmetic_for_many_queries() -> None:
    """FAISS multiplies matrices where there are more queries than a setting says, with other last bits."""
    before, seen = faiss.cvar.distance_compute_blas_threshold, list[int]()

    def search(queries: Floats, k: int, params: object) -> tuple[Floats, NDArray[np.int64]]:
        seen.append(faiss.cvar.distance_compute_blas_threshold)
        return queries, np.zeros((1, k), np.int64)

    backends._search_built(SimpleNamespace(search=search), lambda k: None, np.zeros((1, 1), np.float32), 1)
    assert seen == [2**31 - 1]
    assert faiss.cvar.distance_compute_blas_threshold == before


def test_one_thread_builds_an_index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[int] = []

    def build(passages: Floats, config: SearchConfig, seed: int) -> object:
        seen.append(faiss.omp_get_max_threads())
        return faiss.IndexFlatIP(2)

    monkeypatch.setitem(BACKENDS, "ivf", replace(BACKENDS["ivf"], build=build))
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(2)
    built("ivf", np.zeros((1, 2), np.float32), tmp_path)
    assert faiss.omp_get_max_threads() == 2
    faiss.omp_set_num_threads(threads)
    assert seen == [1]


@pytest.mark.parametrize(("number", "lists"), [(38, 1), (100, 2), (3000, 76), (10_000, 256)])
def test_an_ivf_index_has_no_more_lists_than_can_be_trained(number: int, lists: int, tmp_path: Path) -> None:
    config = SearchConfig(ivf_lists=256)
    index: Any = faiss.read_index(str(built("ivf", clustered(number, 4), tmp_path, config)))
    assert index.nlist == lists


@pytest.mark.parametrize("number", [1, 2, 38, 39, 100, 400])
@pytest.mark.parametrize("name", APPROXIMATE)
def test_few_passages_are_indexed_without_a_word(
    name: str, number: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    passages = clustered(number)
    index = load_index(name, built(name, passages, tmp_path), SearchConfig())
    _, rows = index.search(passages, 1)
    assert np.mean(rows[:, 0] == np.arange(number)) >= 0.99
    assert capfd.readouterr() == ("", "")


def test_copies_of_one_passage_are_indexed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    passages = np.repeat(clustered(1), 500, axis=0)
    for name in APPROXIMATE:
        _, rows = load_index(name, built(name, passages, tmp_path), SearchConfig()).search(passages[:2], 5)
        assert bool((rows[:, 0] >= 0).all())
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("backend", "exact", "expected"),
    [
        ("auto", False, "flat"),
        ("flat", False, "flat"),
        ("torch", False, "torch"),
        ("ivf", False, "ivf"),
        ("hnsw", False, "hnsw"),
        ("ivf", True, "flat"),
        ("hnsw", True, "flat"),
        ("torch", True, "torch"),
    ],
)
def test_backend_of_a_process_without_a_gpu(backend: str, exact: bool, expected: str) -> None:
    config = SearchConfig(backend=backend)  # type: ignore[arg-type]
    assert resolve_backend(config, use_gpu=False, exact=exact) == expected
    assert is_exact(config) == (backend not in APPROXIMATE)


@pytest.mark.parametrize(
    ("backend", "with_faiss", "k", "expected"),
    [
        ("auto", True, 2048, "flat-gpu"),
        ("auto", True, 2049, "torch-gpu"),
        ("auto", False, 10, "torch-gpu"),
        ("flat", True, 10, "flat-gpu"),
        ("flat", True, 2049, "flat"),
        ("flat", False, 10, "flat"),
        ("torch", True, 10, "torch-gpu"),
        ("ivf", True, 10, "ivf"),
    ],
)
def test_backend_of_a_process_with_a_gpu(
    backend: str, with_faiss: bool, k: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = SimpleNamespace(get_num_gpus=lambda: 1, **({"StandardGpuResources": object} if with_faiss else {}))
    monkeypatch.setattr(backends, "faiss", fake)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_backend(SearchConfig(backend=backend), use_gpu=True, k=k) == expected  # type: ignore[arg-type]
    assert BACKENDS[expected].on_gpu == expected.endswith("-gpu")


def test_a_gpu_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"set mine\.use_gpu_for_searching: false"):
        resolve_backend(SearchConfig(), use_gpu=True)
