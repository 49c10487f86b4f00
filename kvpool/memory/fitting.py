"""Which free blocks the caches of the emptiest pages go into, where their sizes are those of blocks.

The buddy allocator knows its free blocks by size. So a cache whose size is a power of two finds the smallest block that
holds it without a look at what else lies in the pages, and a plan costs what is moved, not what is looked at. Caches of
other sizes would leave holes that no block shows: :mod:`kvpool.memory.evacuation` plans for these.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from operator import itemgetter

from kvpool.memory.compaction import Plan
from kvpool.memory.moves import Moves
from kvpool.memory.residents import Resident


class Blocks:
    """Free blocks that a plan takes, the smallest that fits first. Nothing is taken before the plan is carried out.

    Parameters
    ----------
    free
        Offsets by size, a power of two; sizes ascend. Not to be changed while this is in use.
    without
        Pages whose blocks are not taken.
    page_bytes
        Size of a page.
    """

    def __init__(self, free: Mapping[int, Iterable[int]], without: set[int], page_bytes: int) -> None:
        self._mask = -page_bytes
        self._without = without
        #: By size: what is left of those that are free, and what larger ones were split into.
        self._left = {size_bytes: self._usable(offsets) for size_bytes, offsets in free.items()}
        self._split: dict[int, list[int]] = {size_bytes: [] for size_bytes in free}

    def take(self, size_bytes: int, count: int) -> list[int]:
        """Return the offsets of ``count`` blocks of ``size_bytes``, a power of two, ascending; fewer if there are none.

        What there is of this size comes first, then larger blocks are split.
        """
        if size_bytes not in self._left:
            return []
        split = self._split[size_bytes]
        found = split[-count:]
        del split[-count:]
        found += islice(self._left[size_bytes], count - len(found))
        while len(found) < count:
            larger = self._take_larger(size_bytes)
            if larger is None:
                break
            start, larger_bytes = larger
            split += range(start + larger_bytes - size_bytes, start - size_bytes, -size_bytes)
            missing = len(found) - count
            found += split[missing:]
            del split[missing:]
        found.sort()
        return found

    def _take_larger(self, size_bytes: int) -> tuple[int, int] | None:
        """Return offset and bytes of the smallest block above a size."""
        for block_bytes, left in self._left.items():
            if block_bytes > size_bytes:
                split = self._split[block_bytes]
                offset = split.pop() if split else next(left, None)
                if offset is not None:
                    return offset, block_bytes
        return None

    def _usable(self, offsets: Iterable[int]) -> Iterator[int]:
        mask, without = self._mask, self._without
        return (offset for offset in offsets if offset & mask not in without)


def plan_fit(
    pages: Iterable[tuple[int, Mapping[int, Resident] | None]],
    blocks: Blocks,
) -> Plan:
    """Empty pages into free blocks, one after the other, up to the first that cannot be.

    That is one in which something lies whose size is no power of two, or that goes on in another page, or finds no
    block.

    Parameters
    ----------
    pages
        Those in which all may move, the emptiest first, and what lies in each of them; ``None``: it goes on elsewhere.
    blocks
        Those in other pages.
    """
    ids: list[int] = []
    sources: list[int] = []
    destinations: list[int] = []
    sizes_bytes: list[int] = []
    freed: list[int] = []
    for page, parts in pages:
        if parts is None:
            break
        if parts:
            offsets: Sequence[int] = sorted(parts)
            page_ids, page_sizes = zip(*map(parts.__getitem__, offsets), strict=True)
            if page_sizes.count(page_sizes[0]) < len(page_sizes):  # the largest first
                ranked = sorted(range(len(offsets)), key=page_sizes.__getitem__, reverse=True)
                page_ids, offsets, page_sizes = (itemgetter(*ranked)(each) for each in (page_ids, offsets, page_sizes))
            places = _places(page_sizes, blocks)
            if places is None:
                break
            ids += page_ids
            sources += offsets
            destinations += places
            sizes_bytes += page_sizes
        freed.append(page)
    return Plan(Moves(ids, sources, destinations, sizes_bytes), tuple(freed))


def _places(sizes_bytes: Sequence[int], blocks: Blocks) -> list[int] | None:
    """Return blocks for caches of these sizes, equal ones side by side; ``None`` if not all find one."""
    places: list[int] = []
    while len(places) < len(sizes_bytes):
        size_bytes = sizes_bytes[len(places)]
        count = sizes_bytes.count(size_bytes)
        if size_bytes & (size_bytes - 1):
            return None
        found = blocks.take(size_bytes, count)
        if len(found) < count:
            return None
        places += found
    return places
