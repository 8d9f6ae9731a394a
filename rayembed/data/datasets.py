"""What the training rows are made up of: which row is of which dataset, and how each dataset is trained on."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rayembed.config import Experiment
from rayembed.data.names import says_no_in_batch_neg
from rayembed.data.store import Store
from rayembed.data.tasks import CLASS, STS
from rayembed.data.used_rows import entry_of

Int32s = NDArray[np.int32]
SCORED_LOSSES = ("cosent", "angle")
OWN_BATCHES = ("batch_size", "train_group_size", "loss", "weight", "no_in_batch_neg")  # settings of a batch as a whole


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """How one dataset is trained on."""

    name: str
    """Empty: all rows are in the same batches."""

    type: str | None
    """What its rows say. None: nothing, or normal."""

    num_rows: int
    """Rows that can be in a batch."""

    left_out: int = 0
    """Rows that cannot: labelled texts that are alone with their label."""

    batch_sizes: tuple[tuple[int | None, int], ...]
    """Queries of a batch over all workers: (tokens of the longest text at most, queries), the last without a limit."""

    group_size: int
    """Passages a query."""

    loss: str
    """One of config.data.DatasetLoss."""

    no_in_batch_neg: bool
    """Whether a query competes within its own group alone."""

    weight: float
    """What its share of the batches is multiplied by."""

    @property
    def batch_size(self) -> int:
        """Queries of a batch of the longest texts."""
        return self.batch_sizes[-1][1]


@dataclass(frozen=True)
class Datasets:
    """The datasets of the training rows."""

    items: tuple[Dataset, ...]

    dataset_of_row: Int32s
    """[N] place in `items`; -1: the row can be in no batch."""

    labels: Int32s
    """[N] labels of type class as numbers, no two datasets sharing one; -1: none."""


@dataclass
class _Columns:
    """What is read of the rows."""

    names: list[str]
    dataset: Int32s
    types: list[set[str]]  # of each dataset
    labels: Int32s
    least_negatives: list[int]  # of each dataset's rows that have some; 0: none has


def read_datasets(rows: Store, experiment: Experiment) -> Datasets:
    """The datasets of the rows, by their names and types and by data.datasets.

    Args:
        rows: training rows.
        experiment: sections data, train and ray.

    Raises:
        ValueError: types or settings of a dataset do not go together, an entry of data.datasets is of none, or a
            dataset of labelled texts has nothing to compare.
    """
    columns = _read(rows)
    _check_entries(columns.names, experiment)
    types = [_type(name, found) for name, found in zip(columns.names, columns.types, strict=True)]
    if not _own_batches(columns.names, types, experiment):
        whole = _dataset("", None, rows.num_rows, 0, experiment)
        nothing = np.full(rows.num_rows, -1, np.int32)
        return Datasets((whole,), np.zeros(rows.num_rows, np.int32), nothing)
    alone = _alone(columns, types)
    dataset_of_row = np.where(alone, np.int32(-1), columns.dataset)
    used = np.bincount(dataset_of_row[~alone], minlength=len(types))
    left_out = np.bincount(columns.dataset[alone], minlength=len(types))
    items = [
        _dataset(name, kind, int(used[i]), columns.least_negatives[i], experiment, left_out=int(left_out[i]))
        for i, (name, kind) in enumerate(zip(columns.names, types, strict=True))
    ]
    return Datasets(tuple(items), dataset_of_row, columns.labels)


def _read(rows: Store) -> _Columns:
    names: dict[str, int] = {}
    labels: dict[str, int] = {}
    datasets, label_codes = [], []
    types: dict[int, set[str]] = {}
    least: dict[int, int] = {}
    for part in rows.iter_parts(["dataset", "type", "label", "neg"]):
        dataset = _codes(part.column("dataset"), names)
        types_here: dict[str, int] = {}
        kind = _codes(part.column("type"), types_here)
        type_names = list(types_here)
        for pair in np.unique(dataset.astype(np.int64) << 32 | (kind + 1)).tolist():
            found = types.setdefault(pair >> 32, set())
            found.add(type_names[(pair & 0xFFFFFFFF) - 1] if pair & 0xFFFFFFFF else "normal")
        number = pc.list_value_length(part.column("neg")).to_numpy()
        for place in np.unique(dataset[number > 0]).tolist():
            fewest = int(number[(dataset == place) & (number > 0)].min())
            least[place] = min(least.get(place, fewest), fewest)
        datasets.append(dataset)
        of_class = pc.if_else(pc.equal(part.column("type"), CLASS), part.column("label"), None)
        label_codes.append(_codes(of_class, labels))
    dataset = np.concatenate(datasets) if datasets else np.empty(0, np.int32)
    code = np.concatenate(label_codes) if label_codes else np.empty(0, np.int32)
    pairs = np.where(code < 0, -1, dataset.astype(np.int64) << 32 | code)
    unique, numbered = np.unique(pairs, return_inverse=True)
    first = -1 if len(unique) and unique[0] == -1 else 0  # -1 sorts first
    return _Columns(
        list(names),
        dataset,
        [types[i] for i in range(len(names))],
        np.asarray(numbered + first, np.int32),
        [least.get(i, 0) for i in range(len(names))],
    )


def _codes(column: pa.ChunkedArray, known: dict[str, int]) -> Int32s:
    """[N] number of each value, by the order in which they are met; -1: null."""
    array = column.combine_chunks()
    encoded = array.dictionary_encode() if isinstance(array, pa.Array) else array.chunk(0).dictionary_encode()
    numbers = np.array([known.setdefault(v, len(known)) for v in encoded.dictionary.to_pylist()], np.int32)
    indices = pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False)
    found: Int32s = np.append(numbers, np.int32(-1))[indices].astype(np.int32)
    return found


def _type(dataset: str, found: set[str]) -> str | None:
    """The one type of a dataset's rows."""
    if len(found) > 1:
        raise ValueError(
            f"dataset {dataset!r} has rows of the types {', '.join(sorted(found))}; allowed: one type a dataset, as "
            "its batches are of one kind. Put them into files of their own, or name their datasets in the rows"
        )
    (kind,) = found
    return None if kind == "normal" else kind


def _check_entries(names: Sequence[str], experiment: Experiment) -> None:
    for entry in experiment.data.datasets:
        if not any(fnmatchcase(name, entry.name) for name in names):
            near = get_close_matches(entry.name, names, n=1, cutoff=0.5) or names[:1]
            raise ValueError(
                f"data.datasets has an entry for {entry.name!r}, which is no dataset of the training rows; they are "
                f"{', '.join(map(repr, names[:20]))}" + (f"; did you mean {near[0]!r}?" if near else "")
            )


def _own_batches(names: Sequence[str], types: Sequence[str | None], experiment: Experiment) -> bool:
    """Whether each batch is of one dataset: asked for, or needed by what some dataset is."""
    data = experiment.data
    return (
        data.same_dataset_within_batch
        or experiment.model.family == "icl"  # examples are of the query's own task
        or any(kind is not None for kind in types)
        or any(says_no_in_batch_neg(name) for name in names)
        or any(getattr(entry, setting) is not None for entry in data.datasets for setting in OWN_BATCHES)
    )


def _alone(columns: _Columns, types: Sequence[str | None]) -> NDArray[np.bool_]:
    """[N] whether a row is of type class and the only one of its label."""
    labelled = columns.labels >= 0
    counts = np.bincount(columns.labels[labelled], minlength=1)
    alone = labelled & (counts[columns.labels] < 2)
    for i, kind in enumerate(types):
        if kind == CLASS:
            kept = columns.labels[(columns.dataset == i) & ~alone]
            if len(np.unique(kept)) < 2:
                raise ValueError(
                    f"dataset {columns.names[i]!r} has fewer than two labels with two texts each, so there is nothing "
                    "to compare; add rows, or remove it from data.train"
                )
    return alone


def _dataset(
    name: str, kind: str | None, num_rows: int, least_negatives: int, experiment: Experiment, *, left_out: int = 0
) -> Dataset:
    train = experiment.train
    assert train is not None

    def own(setting: str) -> Any:  # noqa: ANN401 (each setting has its own type)
        return entry_of(experiment.data.datasets, name, setting) if name else None

    marked = True if says_no_in_batch_neg(name) else train.no_in_batch_neg
    no_in_batch_neg: bool = marked if own("no_in_batch_neg") is None else own("no_in_batch_neg")
    if experiment.ray.elastic and not (no_in_batch_neg or train.negatives_cross_device or experiment.trains_reranker()):
        raise ValueError(
            f"dataset {name!r} has in-batch negatives, of which a query would have more on fewer workers; set "
            "train.negatives_cross_device: true, or ray.num_workers to one number"
        )
    return Dataset(
        name=name,
        type=kind,
        num_rows=num_rows,
        left_out=left_out,
        batch_sizes=_batch_sizes(name, kind, own("batch_size"), experiment),
        group_size=_group_size(name, kind, own("train_group_size"), least_negatives, experiment),
        loss=_loss(name, kind, own("loss"), experiment),
        no_in_batch_neg=no_in_batch_neg,
        weight=own("weight") or 1.0,
    )


def _batch_sizes(
    name: str, kind: str | None, own: int | None, experiment: Experiment
) -> tuple[tuple[int | None, int], ...]:
    """See Dataset.batch_sizes. Half for symmetric types is FlagEmbedding's rule; 1 stays 1 here."""
    train, data = experiment.train, experiment.data
    assert train is not None
    if own is not None:
        sizes: list[tuple[int | None, int]] = [(None, own)]
    else:
        whole = train.global_batch_size or train.per_device_train_batch_size
        sizes = [*((entry.max_len, entry.batch_size) for entry in data.batch_size_by_length), (None, whole)]
        if kind is not None and kind.startswith("symmetric"):
            sizes = [(limit, max(1, size // 2)) for limit, size in sizes]
    if train.global_batch_size is None:
        return tuple((limit, size * experiment.ray.most_workers) for limit, size in sizes)
    for _, size in sizes:
        if size % experiment.batch_step():
            raise ValueError(
                f"dataset {name!r} has batches of {size} queries, not a multiple of {_workers(experiment)}; give it a "
                f"batch_size in data.datasets that is ({experiment.nearest_batch_size(size)}), or change "
                "train.global_batch_size or data.batch_size_by_length"
            )
    return tuple(sizes)


def _workers(experiment: Experiment) -> str:
    fewest, most = experiment.ray.fewest_workers, experiment.ray.most_workers
    if fewest == most:
        return f"ray.num_workers {most}"
    return f"{experiment.batch_step()}, which ray.num_workers [{fewest}, {most}] needs"


def _group_size(name: str, kind: str | None, own: int | None, least_negatives: int, experiment: Experiment) -> int:
    whole = experiment.data.train_group_size
    if kind == STS:
        if own not in (None, 1):
            raise ValueError(
                f"dataset {name!r} is of scored pairs, which have no negatives; remove its train_group_size"
            )
        return 1
    if own is not None:
        return own
    if kind == "symmetric_class" and least_negatives:
        # FlagEmbedding looks at the first row of each worker's batch instead, so that two workers may differ
        return min(least_negatives + 1, whole)
    return 2 if kind == "only_1neg" else whole


def _loss(name: str, kind: str | None, own: str | None, experiment: Experiment) -> str:
    assert experiment.train is not None
    scored = kind == STS
    loss = own or ("cosent" if scored else experiment.train.loss_type)
    if (loss in SCORED_LOSSES) != scored:
        allowed = " or ".join(SCORED_LOSSES) if scored else "a loss that compares passages, as info_nce"
        raise ValueError(
            f"dataset {name!r} of type {kind or 'normal'} has the loss {loss} in data.datasets; allowed: {allowed}"
        )
    return loss
