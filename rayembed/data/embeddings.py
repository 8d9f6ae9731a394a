"""Files of given embeddings: what they hold, told by their headers alone, and their vectors a block at a time.

Parquet has columns id and vector (or embedding). A .npy file [n, D] has a JSON list of ids beside it (x.npy and
x.ids.json), or its rows are those of the texts, in their order.
"""

import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import fs

from rayembed.config.uris import public_name, split_options
from rayembed.config.wording import counted
from rayembed.data import storage
from rayembed.data.problems import DataError
from rayembed.data.storage import exists, is_folder, open_input

SUFFIXES = (".parquet", ".npy")
VECTOR_COLUMNS = ("vector", "embedding")
ALLOWED = "float16, float32 or float64"
BLOCK_BYTES = 32 << 20  # of float64, whatever is in the file: what a reader holds at once
READ_BYTES = 4 << 20
CHARACTERS = 1 << 20
SHOWN = 5  # files named in one error
UNIT_TOLERANCE = 1e-6  # vectors this near to length 1 are normalised already, and keep their last bit
PARQUET, NPY_WITH_IDS, NPY_IN_ORDER = "parquet", "npy with ids beside", "npy without ids"

_ID = re.compile(r'\s*("(?:[^"\\]|\\.)*"|-?\d+)\s*([,\]])', re.DOTALL)  # an element of a JSON list, and what follows it

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class EmbeddingFile:
    """What the header of one file says."""

    path: str
    kind: str
    beside: str
    """In parquet the column of the vectors, with npy the file of the ids; empty without ids."""

    groups: tuple[int, ...]
    """Rows of each row group; an npy file is one group."""

    dimension: int

    @property
    def num_rows(self) -> int:
        """Rows of all groups."""
        return sum(self.groups)


@dataclass(frozen=True)
class Block:
    """Some rows of a file."""

    first_row: int
    ids: list[str]
    vectors: Floats


def embedding_paths(paths: Sequence[str], *, setting: str) -> list[str]:
    """The files of given embeddings: those of each path in the order of their names, the paths in their order.

    Local ones are absolute: the workers that read them run in folders of their own.

    Raises:
        DataError: a path names no file.
    """
    found = [file for path in paths for file in _expand(path, setting)]
    return [file if "://" in file else storage.identity(file) for file in found]


def ids_path(path: str) -> str | None:
    """The file of ids beside an .npy file. None: there is none."""
    written, options = split_options(path)
    beside = written.removesuffix(".npy") + ".ids.json" + options
    return beside if written.endswith(".npy") and exists(beside) else None


def read_headers(paths: Sequence[str], *, setting: str) -> list[EmbeddingFile]:
    """What every file holds; files of no rows are left out.

    Args:
        paths: files, folders or globs.
        setting: where the paths are from, for messages.

    Raises:
        DataError: a file is not of a form that can be used, or the files do not fit together.
    """
    files: list[EmbeddingFile] = []
    problems: list[str] = []
    for path in embedding_paths(paths, setting=setting):
        try:
            files.append(_header(path))
        except DataError as error:
            problems.append(f"{public_name(path)}: {error}")
    if problems:
        more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        listed = "\n  ".join(problems[:SHOWN])
        raise DataError(f"{setting}: these files cannot be used, so nothing was started:\n  {listed}{more}")
    files = [file for file in files if file.num_rows]
    if not files:
        raise DataError(f"{setting}: its files hold no vector; set it to files that do, or remove it")
    for what, values in (("forms", [f.kind for f in files]), ("dimensions", [str(f.dimension) for f in files])):
        if len(set(values)) > 1:
            other = next(i for i, value in enumerate(values) if value != values[0])
            raise DataError(
                f"{setting}: files of different {what}: {public_name(files[0].path)} ({values[0]}) and "
                f"{public_name(files[other].path)} ({values[other]}); allowed: one for all"
            )
    if files[0].kind == NPY_IN_ORDER:
        _check_order(paths, setting)
    return files


def check_count(files: Sequence[EmbeddingFile], rows: int, *, setting: str, ids_unique: bool) -> None:
    """Refuses files that cannot hold a vector for every text.

    Args:
        files: of one form.
        rows: how many texts there are.
        setting: where the files are named, for messages.
        ids_unique: no two texts have one id.

    Raises:
        DataError: npy without ids must have exactly so many rows, other forms at least, where ids are unique.
    """
    found, exact = sum(file.num_rows for file in files), files[0].kind == NPY_IN_ORDER
    if found == rows if exact else found >= rows or not ids_unique:
        return
    allowed = "exactly as many, in the order of the texts" if exact else "at least as many"
    raise DataError(
        f"{setting}: {counted(len(files), 'file')} with {found:,} vectors for {rows:,} texts; allowed: {allowed}. "
        "Set it to all files of these texts, or remove it"
    )


def read_blocks(file: EmbeddingFile, first_group: int, last_group: int, *, normalize: bool) -> Iterator[Block]:
    """Ids and vectors of row groups `first_group` to `last_group` - 1, some rows at a time.

    Raises:
        DataError: a vector is not finite or of another length, or there are more or fewer ids than vectors.
    """
    if file.kind == PARQUET:
        return _parquet_blocks(file, first_group, last_group, normalize)
    return _npy_blocks_with_ids(file, normalize)


def read_rows(file: EmbeddingFile, first: int, last: int, *, normalize: bool) -> Iterator[tuple[int, Floats]]:
    """Vectors of rows `first` to `last` - 1 of an npy file, some at a time, each time with the first one's row.

    Raises:
        DataError: a vector is not finite.
    """
    with open_input(file.path) as opened:
        _, dtype = _npy_header(opened)
        start, row_bytes = opened.tell(), file.dimension * dtype.itemsize
        opened.seek(start + first * row_bytes)
        for row in range(first, last, _block_rows(file)):
            count = min(_block_rows(file), last - row)
            vectors = np.frombuffer(opened.read(count * row_bytes), dtype).reshape(count, file.dimension)
            yield row, _usable(vectors, file, row, normalize)


def unit_length(vectors: Floats) -> Floats:
    """Vectors [N, D] scaled to length 1, in float32; those that have it, to float32 rounding, stay as they are."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    lengths[np.abs(lengths - 1) <= UNIT_TOLERANCE] = 1
    scaled: Floats = vectors / np.maximum(lengths, np.float32(1e-12))
    return scaled


def _expand(path: str, setting: str) -> list[str]:
    if is_folder(path):
        found = _list(path, ["*"])
        found = [name for name in found if _base_name(name).startswith("part-")] or found
    elif exists(path):
        found = [path]
    else:
        base, pattern = storage._glob_base(path)
        found = _list(base, pattern) if pattern else []
    if not found:
        raise DataError(
            f"{setting}: {public_name(path)!r} names no file; allowed are a file, a folder or a glob of "
            f"{', '.join(SUFFIXES)}"
        )
    return found


def _list(base: str, pattern: list[str]) -> list[str]:
    """As storage lists files of texts, but of the forms of embeddings."""
    written, options = split_options(base)
    filesystem, inner = storage._locate(base or ".")
    inner = inner.rstrip("/")
    selector = fs.FileSelector(inner or "/", allow_not_found=True, recursive=len(pattern) > 1 or pattern == ["**"])
    found = []
    for info in filesystem.get_file_info(selector):
        known = info.base_name.endswith(SUFFIXES) and not info.base_name.startswith((".", "_"))
        relative = info.path[len(inner) :].lstrip("/")
        if info.type == fs.FileType.File and known and storage._matches(relative.split("/"), pattern):
            found.append(quote(relative) if "://" in base else relative)
    return [(f"{written.rstrip('/')}/{name}" if written else name) + options for name in sorted(found)]


def _base_name(path: str) -> str:
    return split_options(path)[0].rsplit("/", 1)[-1]


def _check_order(paths: Sequence[str], setting: str) -> None:
    """Refuses names whose order as texts is not that of their numbers: vectors would belong to other texts."""
    for path in paths:
        names = [_base_name(file) for file in _expand(path, setting)]
        numbered = sorted(names, key=lambda name: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)])
        if names != numbered:
            wrong = next(i for i, name in enumerate(names) if name != numbered[i])
            raise DataError(
                f"{setting}: files without ids are read in the order of their names, in which {names[wrong]} comes "
                f"before {numbered[wrong]}; write the numbers with zeros before them, or list the files one by one"
            )


def _header(path: str) -> EmbeddingFile:
    suffix = next((suffix for suffix in SUFFIXES if split_options(path)[0].endswith(suffix)), None)
    if suffix is None:
        raise DataError(f"unknown format; allowed are {', '.join(SUFFIXES)}")
    with open_input(path) as file:
        if suffix == ".parquet":
            return _parquet_header(path, file)
        shape, dtype = _npy_header(file)
        missing = file.tell() + shape[0] * shape[1] * dtype.itemsize - file.seek(0, io.SEEK_END)
    if missing > 0:
        raise DataError(f"it ends {missing:,} bytes early; write or copy it again")
    beside = ids_path(path)
    kind = NPY_IN_ORDER if beside is None else NPY_WITH_IDS
    return EmbeddingFile(path, kind, beside or "", (shape[0],), shape[1])


def _npy_header(file: BinaryIO) -> tuple[tuple[int, int], np.dtype[Any]]:
    """Shape and type of an npy file that can be used; the file is then at its first number."""
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
    except ValueError as error:
        raise DataError(f"not readable as npy ({error})") from error
    _check_type(str(dtype.newbyteorder("=")))
    if len(shape) != 2 or fortran:
        found = "columns one after the other (fortran_order)" if fortran else f"an array of shape {list(shape)}"
        raise DataError(f"found {found}, allowed: [vectors, dimensions], row after row")
    return (shape[0], shape[1]), dtype


def _parquet_header(path: str, file: BinaryIO) -> EmbeddingFile:
    try:
        opened = pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise DataError(f"not readable as parquet ({error})") from error
    schema, metadata = opened.schema_arrow, opened.metadata
    column = next((name for name in VECTOR_COLUMNS if name in schema.names), None)
    if column is None or "id" not in schema.names:
        raise DataError(f"found the columns {', '.join(schema.names)}; allowed: id, and {' or '.join(VECTOR_COLUMNS)}")
    if not _is_id(schema.field("id").type):
        raise DataError(f"column id holds {schema.field('id').type}, allowed: texts or whole numbers")
    kind = schema.field(column).type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        raise DataError(f"column {column} holds {kind}, allowed: lists of {ALLOWED}")
    _check_type(
        {"halffloat": "float16", "float": "float32", "double": "float64"}.get(
            str(kind.value_type), str(kind.value_type)
        )
    )
    dimensions = set()
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        columns = (group.column(i) for i in range(group.num_columns))
        values = next(c.num_values for c in columns if c.path_in_schema.split(".")[0] == column)
        if group.num_rows:
            dimensions.add(values / group.num_rows)
    if len(dimensions) > 1 or any(dimension != int(dimension) for dimension in dimensions):
        raise DataError(f"the lists of column {column} are not all of one length")
    groups = tuple(metadata.row_group(index).num_rows for index in range(metadata.num_row_groups))
    return EmbeddingFile(path, PARQUET, column, groups, int(next(iter(dimensions), 0)))


def _is_id(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind))


def _check_type(name: str) -> None:
    if name in ("float16", "float32", "float64"):
        return
    quantised = "int8" in name  # uint8 holds the bits of binary vectors
    reason = "; quantised vectors give other scores: encode with encode.output_dtype float32 or float16"
    raise DataError(f"found numbers of type {name}, allowed: {ALLOWED}{reason if quantised else ''}")


def _block_rows(file: EmbeddingFile) -> int:
    return max(1, BLOCK_BYTES // (8 * file.dimension))


def _parquet_blocks(file: EmbeddingFile, first_group: int, last_group: int, normalize: bool) -> Iterator[Block]:
    row = sum(file.groups[:first_group])
    with open_input(file.path) as opened:
        # Page by page: else a row group is in memory as a whole, and some writers make one of millions of rows.
        parquet = pq.ParquetFile(opened, buffer_size=READ_BYTES, pre_buffer=False)
        batches = parquet.iter_batches(
            _block_rows(file), row_groups=range(first_group, last_group), columns=["id", file.beside], use_threads=False
        )
        for batch in batches:
            ids, lists = batch.column("id").cast(pa.string()), batch.column(file.beside)
            if ids.null_count:
                raise DataError(f"{_place(file, row, ids.is_null().to_numpy(zero_copy_only=False))} has no id")
            lengths = np.where(lists.is_null(), 0, pc.list_value_length(lists).fill_null(0))
            if (lengths != file.dimension).any():
                other = lengths != file.dimension
                found = int(lengths[np.argmax(other)])
                raise DataError(f"{_place(file, row, other)} has {found} numbers, others have {file.dimension}")
            vectors = lists.flatten().to_numpy(zero_copy_only=False).reshape(len(ids), file.dimension)
            yield Block(row, ids.to_pylist(), _usable(vectors, file, row, normalize))
            row += len(ids)


def _npy_blocks_with_ids(file: EmbeddingFile, normalize: bool) -> Iterator[Block]:
    ids, name = _read_ids(file.beside), public_name(file.beside)
    for row, vectors in read_rows(file, 0, file.num_rows, normalize=normalize):
        own = [found for _, found in zip(range(len(vectors)), ids, strict=False)]
        if len(own) < len(vectors):
            raise DataError(f"{name} holds {row + len(own):,} ids for {file.num_rows:,} vectors")
        yield Block(row, own, vectors)
    if next(ids, None) is not None:
        raise DataError(f"{name} holds more ids than the {file.num_rows:,} vectors beside it")


def _read_ids(path: str) -> Iterator[str]:
    """Elements of a JSON list of texts or whole numbers, without all of them in memory."""
    with open_input(path) as file, io.TextIOWrapper(file, "utf-8-sig") as text:
        rest, at, number, after = text.read(CHARACTERS).lstrip(), 1, 0, ","
        if not rest.startswith("["):
            raise DataError(f"{public_name(path)} is not a JSON list; allowed: a list of ids")
        while after == ",":
            found = _ID.match(rest, at)
            if found is None:
                more = text.read(CHARACTERS)
                if not more:
                    raise DataError(f"{public_name(path)}: id {number} (counted from 0) is no text or whole number")
                rest, at = rest[at:] + more, 0
                continue
            yield str(json.loads(found[1]))
            at, after, number = found.end(), found[2], number + 1


def _usable(vectors: NDArray[Any], file: EmbeddingFile, first_row: int, normalize: bool) -> Floats:
    with np.errstate(over="ignore"):
        floats: Floats = vectors.astype(np.float32)
    wrong: NDArray[np.bool_] = ~np.all(np.isfinite(floats), axis=1)
    if wrong.any():
        raise DataError(f"{_place(file, first_row, wrong)} has a number that is not finite in float32 (NaN, infinite)")
    return unit_length(floats) if normalize else floats


def _place(file: EmbeddingFile, first_row: int, wrong: NDArray[np.bool_]) -> str:
    """The first row that is wrong."""
    return f"{public_name(file.path)}: row {first_row + int(np.argmax(wrong))} (counted from 0)"
