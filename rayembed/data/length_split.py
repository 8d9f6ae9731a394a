"""Rows by the length of their longest text, a file for each range: FlagEmbedding's split_data_by_length.

With data.length_grouping nothing needs to be split; this is for those who want the files.
"""

import bisect
from collections.abc import Callable, Iterable, Iterator, Sequence

from rayembed.config.uris import public_name
from rayembed.data.names import NO_IN_BATCH_NEG, dataset_names, says_no_in_batch_neg
from rayembed.data.storage import identity
from rayembed.data.store import Row, chunks

ROWS_AT_ONCE = 64  # whose texts are counted together


def check_bounds(bounds: Sequence[int]) -> None:
    """Refuses ranges that are none.

    Raises:
        ValueError: the bounds do not begin at 0, or do not ascend.
    """
    if list(bounds) != sorted(set(bounds)) or not bounds or bounds[0] != 0:
        raise ValueError(
            f"split.length_list is {list(bounds)}; allowed: numbers of tokens that ascend from 0, as [0, 500, 1000]"
        )


def range_of(tokens: int, bounds: Sequence[int]) -> int:
    """Which range a length is in: the last that begins at it or below."""
    return bisect.bisect_right(bounds, tokens) - 1


def range_name(place: int, bounds: Sequence[int]) -> str:
    """LEAST-LIMIT, the last range without limit (inf)."""
    limit = str(bounds[place + 1]) if place + 1 < len(bounds) else "inf"
    return f"{bounds[place]}-{limit}"


def file_stem(name: str, place: int, bounds: Sequence[int]) -> str:
    """Name of the file of a range, as FlagEmbedding has it: STEM_len-LEAST-LIMIT.

    A data set that says no_in_batch_neg, by its file or its folder, says it at the end too, where it is looked for.
    """
    ending = f"-{NO_IN_BATCH_NEG}" if says_no_in_batch_neg(name) else ""
    return f"{_flat(name)}_len-{range_name(place, bounds)}{ending}"


def written_names(sources: Sequence[str]) -> dict[str, str]:
    """What the files of each source are called: by its stem, and as much of its folder as tells it from the others.

    Raises:
        ValueError: two sources come to one name.
    """
    names = dataset_names(sources)
    taken: dict[str, str] = {}
    for source, name in names.items():
        other = taken.setdefault(_flat(name), source)
        if identity(other) != identity(source):
            raise ValueError(
                f"the parts of {public_name(other)} and of {public_name(source)} would both be called {_flat(name)}; "
                "rename one of the two, or split them in experiments of their own"
            )
    return names


def split_by_length(
    rows: Iterable[Row], count_tokens: Callable[[Sequence[str]], Sequence[int]], bounds: Sequence[int]
) -> Iterator[tuple[int, Row]]:
    """Each row with the place of its range.

    Args:
        rows: with query, pos and neg; other columns stay as they are. Some are read ahead.
        count_tokens: texts to their tokens, special ones included and nothing cut off.
        bounds: tokens, where each range begins; the first is 0.
    """
    for some in chunks(rows, ROWS_AT_ONCE):
        texts = [[row["query"], *row["pos"], *row["neg"]] for row in some]
        counts = iter(count_tokens([text for own in texts for text in own]))
        for row, own in zip(some, texts, strict=True):
            yield range_of(max(next(counts) for _ in own), bounds), row


def _flat(name: str) -> str:
    """A name as that of a file: all parts are written to one folder."""
    return name.replace("/", "-")
