"""What finds candidates among some passages: exactly by FAISS or torch, approximately by FAISS's IVF and HNSW.

To add a backend: a function that makes an `Index`, and a row in BACKENDS. The scores of an exact one may err by
rounding alone; `top_k` scores what it finds again, so that every exact backend gives the same result.
"""

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import faiss as _faiss
import numpy as np
from numpy.typing import NDArray

from rayembed.config.search import SearchConfig

faiss: Any = _faiss  # its types leave out much of what it has
Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Search = Callable[[Floats, int], tuple[Floats, Ints]]
GPU_MOST = 2048  # FAISS on a GPU finds no more than this many a query
TRAINING_PASSAGES = 39  # of a list of an ivf index, at least; below it FAISS warns that the lists mean little
SCORE_BLOCK_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
"""Largest block of scores that the torch backend holds at once, by kind of device."""


@dataclass(frozen=True)
class Index:
    """Some passages [P, D], ready to be searched."""

    search: Search
    """Of queries [Q, D] and k, at most P: scores and rows [Q, k] in descending order; row -1 where it found too few."""

    exact: bool
    """Whether it leaves out nothing that scores more than what it gives, rounding aside."""

    most: int | None = None
    """Largest k. None: P."""


@dataclass(frozen=True, kw_only=True)
class Backend:
    """A way to search."""

    exact: bool
    on_gpu: bool
    open: Callable[[Floats], Index] | None = None
    """Makes an index of passages that are in memory. None: it is built, saved and loaded, see `build`."""

    build: Callable[[Floats, SearchConfig, int], Any] | None = None
    """Makes a FAISS index of passages, settings and a seed; the same one every time."""

    parameters: Callable[[SearchConfig, int], Any] | None = None
    """How a built index is searched for k passages."""

    built_with: tuple[str, ...] = ()
    """Settings of the search that `build` reads."""

    searched_with: tuple[str, ...] = ()
    """Settings of the search that `parameters` reads."""


def is_exact(config: SearchConfig) -> bool:
    """Whether an exact search is asked for, wherever it will run."""
    return config.backend == "auto" or BACKENDS[config.backend].exact


def resolve_backend(config: SearchConfig, *, use_gpu: bool, exact: bool = False, k: int = 1) -> str:
    """The row of BACKENDS that is used in this process.

    Args:
        config: `backend` is what is asked for.
        use_gpu: whether this process has a GPU to search on.
        exact: an exact one is needed; where an approximate one is asked for, as if it said auto.
        k: passages that are searched for; FAISS on a GPU cannot find more than 2048.

    Raises:
        ValueError: torch is to search on a GPU and sees none.
    """
    asked = config.backend
    if not is_exact(config) and not exact:
        return asked
    if not use_gpu:
        return "torch" if asked == "torch" else "flat"
    if asked != "torch" and hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() and k <= GPU_MOST:
        return "flat-gpu"
    if asked == "flat":
        return "flat"
    import torch

    if not torch.cuda.is_available():
        raise ValueError(
            "a GPU is to search the corpus, but neither faiss-gpu nor torch finds one here; set "
            "mine.use_gpu_for_searching: false"
        )
    return "torch-gpu"


def open_index(name: str, passages: Floats) -> Index:
    """An index of an exact backend; `passages` [P, D] must stay as they are while it is used."""
    opened = BACKENDS[name].open
    assert opened is not None, f"{name} is built and loaded"
    return opened(np.ascontiguousarray(passages, np.float32))


def build_index(name: str, passages: Floats, config: SearchConfig, seed: int, path: Path) -> None:
    """Writes an index of an approximate backend, whole or not at all; the same bytes for the same arguments.

    One thread builds it: FAISS does not promise that several link the passages of hnsw alike, or add the centres of
    ivf's lists up alike.
    """
    build = BACKENDS[name].build
    assert build is not None, f"{name} is not built"
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        index = build(np.ascontiguousarray(passages, np.float32), config, seed)
    finally:
        faiss.omp_set_num_threads(threads)
    working = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.partial")  # nobody else's
    try:
        faiss.write_index(index, str(working))
        working.replace(path)
    finally:
        working.unlink(missing_ok=True)


def load_index(name: str, path: Path, config: SearchConfig) -> Index:
    """What `build_index` wrote."""
    parameters = BACKENDS[name].parameters
    assert parameters is not None, f"{name} is not built"
    return Index(partial(_search_built, faiss.read_index(str(path)), partial(parameters, config)), exact=False)


def device_name(name: str) -> str:
    """Library and device that a backend runs on here, for the record."""
    if name.startswith("torch"):
        import torch

        return f"torch {torch.__version__}, {torch.cuda.get_device_name() if BACKENDS[name].on_gpu else 'cpu'}"
    return f"faiss {faiss.__version__}, {'gpu' if BACKENDS[name].on_gpu else 'cpu'}"


def _flat(passages: Floats) -> Index:
    """FAISS over the array itself; IndexFlatIP would copy it."""

    def search(queries: Floats, k: int) -> tuple[Floats, Ints]:
        scores, rows = faiss.knn(queries, passages, k, metric=faiss.METRIC_INNER_PRODUCT)
        return scores, rows

    return Index(search, exact=True)


def _flat_gpu(passages: Floats) -> Index:
    resources = faiss.StandardGpuResources()
    index = faiss.GpuIndexFlatIP(resources, passages.shape[1])
    index.add(passages)

    def search(queries: Floats, k: int) -> tuple[Floats, Ints]:
        assert resources is not None, "lives as long as the index"
        scores, rows = index.search(queries, k)
        return scores, rows

    return Index(search, exact=True, most=GPU_MOST)


def _torch(device: str, passages: Floats, *, block_bytes: int | None = None) -> Index:
    """Matrix products and top-k; the passages are moved once, and no block of scores is larger than `block_bytes`."""
    import torch

    moved = torch.from_numpy(passages).to(device)
    most_scores = (block_bytes or SCORE_BLOCK_BYTES[device]) // 4

    def search(queries: Floats, k: int) -> tuple[Floats, Ints]:
        asked = torch.from_numpy(np.ascontiguousarray(queries, np.float32)).to(device)
        step = max(most_scores // max(len(asked), 1), 1)
        scores = torch.empty((len(asked), 0), device=device)
        rows = torch.empty((len(asked), 0), dtype=torch.int64, device=device)
        for first in range(0, len(moved), step):
            block = asked @ moved[first : first + step].T
            best, places = block.topk(min(k, block.shape[1]), dim=1)
            scores, rows = torch.cat([scores, best], dim=1), torch.cat([rows, places + first], dim=1)
            scores, places = scores.topk(min(k, scores.shape[1]), dim=1)
            rows = rows.gather(1, places)
        return scores.cpu().numpy(), rows.cpu().numpy()

    return Index(partial(_in_full_float32, search), exact=True)


def _in_full_float32(search: Search, queries: Floats, k: int) -> tuple[Floats, Ints]:
    """TF32 keeps 10 bits of 23: candidates that it loses are lost, and the bound of rounding would not hold."""
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        return search(queries, k)
    finally:
        torch.set_float32_matmul_precision(before)


def _ivf(passages: Floats, config: SearchConfig, seed: int) -> Any:  # noqa: ANN401 - FAISS has no types
    wanted = config.ivf_lists or round(4 * len(passages) ** 0.5)
    lists = max(min(wanted, len(passages) // TRAINING_PASSAGES), 1)
    dimension = passages.shape[1]
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dimension), dimension, lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed = seed % 2**31
    index.cp.min_points_per_centroid = 1  # a single list of fewer is what it is
    index.train(passages)
    index.add(passages)
    return index


def _hnsw(passages: Floats, config: SearchConfig, seed: int) -> Any:  # noqa: ANN401 - FAISS has no types
    index = faiss.IndexHNSWFlat(passages.shape[1], config.hnsw_neighbors, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = config.hnsw_ef_construction
    index.hnsw.rng = faiss.RandomGenerator(seed % 2**31)
    index.add(passages)
    return index


def _ivf_parameters(config: SearchConfig, k: int) -> Any:  # noqa: ANN401 - FAISS has no types
    return faiss.SearchParametersIVF(nprobe=config.ivf_probes)


def _hnsw_parameters(config: SearchConfig, k: int) -> Any:  # noqa: ANN401 - FAISS has no types
    return faiss.SearchParametersHNSW(efSearch=max(config.hnsw_ef_search or 2 * k, k))


def _search_built(index: Any, parameters: Callable[[int], Any], queries: Floats, k: int) -> tuple[Floats, Ints]:  # noqa: ANN401
    """One query at a time where FAISS would take them together: which lists are looked into must not depend on that."""
    before = faiss.cvar.distance_compute_blas_threshold
    faiss.cvar.distance_compute_blas_threshold = 2**31 - 1
    try:
        scores, rows = index.search(queries, k, params=parameters(k))
    finally:
        faiss.cvar.distance_compute_blas_threshold = before
    return scores, rows


BACKENDS = {
    "flat": Backend(exact=True, on_gpu=False, open=_flat),
    "flat-gpu": Backend(exact=True, on_gpu=True, open=_flat_gpu),
    "torch": Backend(exact=True, on_gpu=False, open=partial(_torch, "cpu")),
    "torch-gpu": Backend(exact=True, on_gpu=True, open=partial(_torch, "cuda")),
    "ivf": Backend(
        exact=False,
        on_gpu=False,
        build=_ivf,
        parameters=_ivf_parameters,
        built_with=("ivf_lists",),
        searched_with=("ivf_probes",),
    ),
    "hnsw": Backend(
        exact=False,
        on_gpu=False,
        build=_hnsw,
        parameters=_hnsw_parameters,
        built_with=("hnsw_neighbors", "hnsw_ef_construction"),
        searched_with=("hnsw_ef_search",),
    ),
}
