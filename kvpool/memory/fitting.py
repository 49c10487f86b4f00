"""Which free blocks the caches of the emptiest pages go into, where their sizes are those of blocks.

The buddy allocator knows its free blocks by size. So a cache whose size is a power of two finds the smallest block that
holds it without a look at what else lies in the pages, and a plan costs what is moved, not what is looked at. Caches of
other sizes would leave holes that no block shows: :mod:`kvpool.memory.compaction` plans for these.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from kvpool.memory.compaction import Move, Plan
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

    def take(self, size_bytes: int) -> int:
        """Return the offset of a block of ``size_bytes``, a power of two; -1 if there is none."""
        block_bytes = size_bytes
        while block_bytes in self._left:
            split = self._split[block_bytes]
            offset = split.pop() if split else next(self._left[block_bytes], -1)
            if offset >= 0:
                while block_bytes > size_bytes:
                    block_bytes //= 2
                    self._split[block_bytes].append(offset + block_bytes)
                return offset
            block_bytes *= 2
        return -1

    def _usable(self, offsets: Iterable[int]) -> Iterator[int]:
        mask, without = self._mask, self._without
        return (offset for offset in offsets if offset & mask not in without)


def plan_fit(
    sources: Sequence[int], parts: Iterable[Sequence[tuple[int, Resident]]], blocks: Blocks, page_bytes: int
) -> Plan:
    """Empty pages into free blocks, one after the other, up to the first that cannot be.

    That is one in which something lies that is no power of two, or goes on in another page, or finds no block.

    Parameters
    ----------
    sources
        Pages in which all may move, the emptiest first.
    parts
        What lies in each of them.
    blocks
        Those in other pages.
    page_bytes
        Size of a page.
    """
    moves: list[Move] = []
    new, take = tuple.__new__, blocks.take
    for freed, (page, inside) in enumerate(zip(sources, parts, strict=True)):
        before = len(moves)
        for offset, (cache_id, size_bytes) in inside:
            aligned = size_bytes & (size_bytes - 1) == 0 and page <= offset <= page + page_bytes - size_bytes
            destination = take(size_bytes) if aligned else -1
            if destination < 0:
                del moves[before:]
                return Plan(tuple(moves), tuple(sources[:freed]))
            moves.append(new(Move, (cache_id, offset, destination, size_bytes)))  # as Move(...), in half the time
    return Plan(tuple(moves), tuple(sources))
