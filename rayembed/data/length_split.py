"""Rows by the length of their longest text, a file for each range: FlagEmbedding's split_data_by_length.

With data.length_grouping nothing needs to be split; this is for those who want the files.
"""

import bisect
from collections.abc import Callable, Iterable, Iterator, Sequence

from rayembed.data.store import Row

BOUNDS = (0, *range(500, 7001, 500))  # tokens, where each range begins


def range_of(tokens: int, bounds: Sequence[int] = BOUNDS) -> int:
    """Which range a length is in: the last that begins at it or below.

    Raises:
        ValueError: the bounds do not begin at 0, or do not ascend.
    """
    if list(bounds) != sorted(set(bounds)) or not bounds or bounds[0] != 0:
        raise ValueError(f"found the bounds {list(bounds)}; allowed: numbers of tokens that ascend from 0")
    return bisect.bisect_right(bounds, tokens) - 1


def file_stem(stem: str, place: int, bounds: Sequence[int] = BOUNDS) -> str:
    """Name of the file of a range, as FlagEmbedding has it: STEM_len-LEAST-LIMIT, the last without limit (inf)."""
    limit = str(bounds[place + 1]) if place + 1 < len(bounds) else "inf"
    return f"{stem}_len-{bounds[place]}-{limit}"


def split_by_length(
    rows: Iterable[Row], count_tokens: Callable[[Sequence[str]], Sequence[int]], bounds: Sequence[int] = BOUNDS
) -> Iterator[tuple[int, Row]]:
    """Each row with the place of its range.

    Args:
        rows: with query, pos and neg; other columns stay as they are.
        count_tokens: texts to their tokens, special ones included and nothing cut off.
        bounds: tokens, where each range begins; the first is 0.
    """
    for row in rows:
        longest = max(count_tokens([row["query"], *row["pos"], *row["neg"]]))
        yield range_of(longest, bounds), row
