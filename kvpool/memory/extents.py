"""Which bytes of a cache are backed: parts of it, as plain data.

Extents are ``((start, end), ...)``, bytes from the cache's first, ascending, not empty, and none touching the next.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

from kvpool.errors import InvalidSizeError

Extents = tuple[tuple[int, int], ...]


def checked(ranges: Iterable[Sequence[int]], size_bytes: int) -> Extents:
    """Return ranges as extents: in order, and those that overlap or touch merged.

    Raises
    ------
    InvalidSizeError
        If one is no pair of whole numbers, is empty, or does not lie within ``[0, size_bytes)``; or if they are none.
    """
    if not isinstance(ranges, Iterable):
        raise InvalidSizeError(f"ranges are pairs of (start, end) in bytes of the cache; asked for {ranges!r}")
    found = []
    for each in ranges:
        if (
            not isinstance(each, Sequence)
            or len(each) != 2
            or not all(isinstance(bound, int) for bound in each)
            or not 0 <= each[0] < each[1] <= size_bytes
        ):
            raise InvalidSizeError(
                f"a range is (start, end) in bytes of the cache, 0 <= start < end <= {size_bytes}; asked for {each!r}",
                max_size_bytes=size_bytes,
            )
        found.append((each[0], each[1]))
    return union(found)


def front(size_bytes: int) -> Extents:
    """Return the extents of the first bytes; of 0, none."""
    return ((0, size_bytes),) if size_bytes else ()


def union(*extents: Iterable[tuple[int, int]]) -> Extents:
    """Return what is in any of them."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(chain(*extents)):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return tuple(merged)


def difference(extents: Extents, without: Extents) -> Extents:
    """Return what is in the first and not in the second."""
    left: list[tuple[int, int]] = []
    position = 0
    for start, end in extents:
        while position < len(without) and without[position][1] <= start:
            position += 1
        each = position
        while each < len(without) and without[each][0] < end:
            if start < without[each][0]:
                left.append((start, without[each][0]))
            start = without[each][1]
            each += 1
        if start < end:
            left.append((start, end))
    return tuple(left)


def total_bytes(extents: Extents) -> int:
    """Return how many bytes they have together."""
    return sum(end - start for start, end in extents)


def pages_touched(extents: Extents, page_bytes: int) -> set[int]:
    """Return the numbers, from the cache's first, of the pages in which they lie."""
    return set(chain.from_iterable(range(start // page_bytes, -(-end // page_bytes)) for start, end in extents))


def changed(kind: str, extents: Extents, asked: Extents) -> Extents:
    """Return what is backed after ``"resize"`` (``asked`` alone), ``"back"`` or ``"unback"`` of ``asked``."""
    if kind == "back":
        return union(extents, asked)
    return difference(extents, asked) if kind == "unback" else asked
