"""The buddy allocator: power-of-two ranges of addresses, integers only.

Everything here is arithmetic; no address is ever touched. A range of ``2**k`` minimum blocks starts at a multiple of
its own size, so its *buddy*, the other half of the range twice as large, is one exclusive-or away. Two free buddies are
one free range of the next order: they are merged at once, at each :meth:`BuddyAllocator.free`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from kvpool.errors import (
    AddressSpaceError,
    CacheStateError,
    ConfigError,
    DoubleReleaseError,
    InvalidSizeError,
    KvpoolError,
    UnknownCacheError,
    ensure,
)
from kvpool.sizes import round_up

_MOST_CUTS = 4096
"""Kept of :meth:`BuddyAllocator._cut`: parts begin at the same places in many blocks, and are of few sizes."""


class BuddyAllocator:
    """Hands out ranges of the addresses ``[0, size_bytes)``, or of the blocks it is given by :meth:`add`.

    Parameters
    ----------
    size_bytes
        Addresses managed from the start, a multiple of ``min_block_bytes``; 0 to start empty. What is left
        behind the last whole ``max_block_bytes`` is managed as the largest power-of-two blocks that fit.
    min_block_bytes
        Smallest range handed out, a power of two. Sizes are rounded up to its multiples.
    max_block_bytes
        Largest range handed out, a power of two. Default: the largest that fits ``size_bytes``.

    Raises
    ------
    ConfigError
        If the sizes are no powers of two or do not fit together.

    Notes
    -----
    One dict for each order holds its free ranges in the order they became free, so that the address freed last is
    reused first: its memory is warm. ``allocate`` and ``free`` take O(log(max_block_bytes / min_block_bytes)); most of
    the time under churn neither splits nor merges.
    """

    __slots__ = (
        "_climbs",
        "_cuts",
        "_free",
        "_live",
        "_roots",
        "_steps",
        "max_block_bytes",
        "min_block_bytes",
        "total_bytes",
    )

    def __init__(self, size_bytes: int, min_block_bytes: int, max_block_bytes: int | None = None) -> None:
        if max_block_bytes is None:
            max_block_bytes = 1 << (size_bytes.bit_length() - 1) if size_bytes > 0 else 0
        powers = min_block_bytes.bit_count() == max_block_bytes.bit_count() == 1
        if not powers or not 0 < min_block_bytes <= max_block_bytes or size_bytes < 0 or size_bytes % min_block_bytes:
            raise ConfigError(
                f"cannot manage {size_bytes} bytes in blocks of {min_block_bytes} to {max_block_bytes}: give powers of "
                "two, the first no larger than the second, and a size that is a multiple of the first"
            )
        self.min_block_bytes = min_block_bytes
        self.max_block_bytes = max_block_bytes
        self.total_bytes = size_bytes
        #: Free ranges by size: offset to nothing. A dict and no set, because popitem() gives the newest.
        self._free: dict[int, dict[int, None]] = {}
        block_bytes = min_block_bytes
        while block_bytes <= max_block_bytes:
            self._free[block_bytes] = {}
            block_bytes *= 2
        orders = list(self._free.items())
        #: For each power-of-two size the orders from it upwards, as (size, free ranges): the way a split searches.
        self._steps = {block: tuple(orders[i:]) for i, (block, _) in enumerate(orders)}
        #: The same as (buddy mask, free ranges): the way a merge climbs. ``offset ^ -1`` is negative and so never free:
        #: the climb ends at the largest block without a test of its own.
        masks = [(-1 if block == max_block_bytes else block, blocks) for block, blocks in orders]
        self._climbs = {block: tuple(masks[i:]) for i, (block, _) in enumerate(orders)}
        #: Allocated ranges: offset to bytes, a power of two, or a multiple of the minimum if the tail was given back;
        #: negative where :meth:`carve` put it, since such a range begins anywhere and is freed in pieces.
        self._live: dict[int, int] = {}
        #: Kept by :meth:`_cut`.
        self._cuts: dict[tuple[int, int], tuple[tuple[dict[int, None], int], ...]] = {}
        #: Blocks under management, never merged with each other: offset to bytes.
        self._roots: dict[int, int] = {}
        offset = 0
        while offset < size_bytes:
            block_bytes = min(max_block_bytes, 1 << ((size_bytes - offset).bit_length() - 1))
            self._roots[offset] = block_bytes
            self._free[block_bytes][offset] = None
            offset += block_bytes

    def allocate(self, size_bytes: int, max_size_bytes: int | None = None) -> int:
        """Return the offset of a range of at least ``size_bytes``.

        Parameters
        ----------
        size_bytes
            Bytes needed. Rounded up to a multiple of the minimum block: n minimum blocks take exactly n.
        max_size_bytes
            Bytes the range may grow to in place. If larger than ``size_bytes``, the whole power-of-two range that holds
            it is kept.

        Raises
        ------
        InvalidSizeError
            If a size is below 1 or above ``max_block_bytes``, or the maximum is below the size.
        AddressSpaceError
            If no free range is large enough now.
        """
        if max_size_bytes is not None or size_bytes not in self._steps:
            return self._allocate_rounded(size_bytes, max_size_bytes)
        free = self._free
        for block_bytes, blocks in self._steps[size_bytes]:
            if blocks:
                offset, _ = blocks.popitem()
                while block_bytes != size_bytes:
                    block_bytes >>= 1
                    free[block_bytes][offset + block_bytes] = None
                self._live[offset] = block_bytes
                return offset
        raise self._no_room(size_bytes)

    def _allocate_rounded(self, size_bytes: int, max_size_bytes: int | None) -> int:
        if max_size_bytes is None:
            max_size_bytes = size_bytes
        if not isinstance(size_bytes, int) or not 0 < size_bytes <= max_size_bytes <= self.max_block_bytes:
            raise InvalidSizeError(
                f"asked for {size_bytes!r} bytes that may grow to {max_size_bytes!r}: ask for 1 to "
                f"{self.max_block_bytes} bytes, and a maximum no smaller than the size",
                asked_bytes=size_bytes,
                max_size_bytes=max_size_bytes,
                largest_bytes=self.max_block_bytes,
            )
        needed_bytes = -(-max_size_bytes & -self.min_block_bytes)
        range_bytes = 1 << (needed_bytes - 1).bit_length()
        offset = self.allocate(range_bytes)
        if max_size_bytes == size_bytes and needed_bytes != range_bytes:
            self._live[offset] = needed_bytes
            # The tail, by its binary digits. None of these blocks merges: the buddy of each holds a part of the range.
            end = offset + needed_bytes
            while end != offset + range_bytes:
                self._free[end & -end][end] = None
                end += end & -end
        return offset

    def free(self, offset: int) -> None:
        """Give the range at ``offset`` back and merge it with its free buddies.

        Raises
        ------
        DoubleReleaseError
            If ``offset`` is free already.
        UnknownCacheError
            If it was not handed out: outside, misaligned or inside another range.
        """
        try:
            size_bytes = self._live.pop(offset)
        except KeyError:
            raise self._not_live(offset) from None
        if size_bytes in self._climbs:
            self._merge(offset, size_bytes)
            return
        if size_bytes < 0:
            self._merge_range(offset, offset - size_bytes)
            return
        end = offset + size_bytes
        while end != offset:  # by its binary digits, the smallest and last block first: it merges into the next
            size_bytes = end & -end
            end -= size_bytes
            self._merge(end, size_bytes)

    def shrink(self, offset: int, size_bytes: int) -> None:
        """Give the tail of the range at ``offset`` back; its first ``size_bytes`` (rounded up) stay allocated.

        Raises
        ------
        InvalidSizeError
            If ``size_bytes`` is below 1 or larger than the range.
        DoubleReleaseError, UnknownCacheError
            As :meth:`free`.
        """
        range_bytes = self.allocation_size(offset)
        if not 0 < size_bytes <= range_bytes:
            raise InvalidSizeError(
                f"cannot shrink the range at {offset} to {size_bytes} bytes: 1 to {range_bytes} are possible",
                asked_bytes=size_bytes,
                largest_bytes=range_bytes,
            )
        left_bytes = round_up(size_bytes, self.min_block_bytes)
        self._live[offset] = left_bytes if self._live[offset] > 0 else -left_bytes
        self._merge_range(offset + left_bytes, offset + range_bytes)

    def _merge_range(self, start: int, end: int) -> None:
        """Free ``[start, end)``, a part of one range, as the largest blocks that lie in it."""
        while start != end:
            block_bytes = min(start & -start or self.max_block_bytes, 1 << ((end - start).bit_length() - 1))
            self._merge(start, block_bytes)
            start += block_bytes

    def _merge(self, offset: int, size_bytes: int) -> None:
        for mask, blocks in self._climbs[size_bytes]:
            buddy = offset ^ mask
            if buddy not in blocks:
                break
            del blocks[buddy]
            offset &= buddy
        blocks[offset] = None

    def carve(self, offset: int, size_bytes: int) -> None:
        """Allocate exactly ``[offset, offset + size_bytes)``, at any multiple of the minimum block.

        Raises
        ------
        CacheStateError
            If not all of it is free. Nothing is changed then.
        """
        blocks = self._free.get(size_bytes)
        if blocks is not None and offset in blocks:  # a range as :meth:`allocate` would have handed it out
            del blocks[offset]
            self._live[offset] = size_bytes
            return
        end = offset + size_bytes
        found: list[tuple[int, int]] = []
        position = offset
        while position < end:
            found.append(self._free_block_at(position, end))
            if not found[-1][1]:
                raise CacheStateError(f"cannot carve [{offset}, {end}): {position} is not free", offset=position)
            position = sum(found[-1])
        for start, block_bytes in found:
            del self._free[block_bytes][start]
        self._live[offset] = -size_bytes
        if found[0][0] != offset:
            self._merge_range(found[0][0], offset)
        if position != end:
            self._merge_range(end, position)

    def carve_all(self, offsets: Iterable[int], sizes_bytes: Iterable[int]) -> None:
        """Call :meth:`carve` for each; faster where what is carved is all of some free ranges."""
        free, live, cuts, mask = self._free, self._live, self._cuts, -self.max_block_bytes
        none: dict[int, None] = {}
        blocks, blocks_bytes = none, 0  # the free ranges of the size of the last one
        for offset, size_bytes in zip(offsets, sizes_bytes, strict=True):
            if size_bytes != blocks_bytes:
                blocks, blocks_bytes = free.get(size_bytes, none), size_bytes
            if offset in blocks:
                del blocks[offset]
                live[offset] = size_bytes
                continue
            block, start = offset & mask, offset & ~mask
            try:
                pieces = cuts.get((start, size_bytes)) or self._cut(start, size_bytes)
                for ranges, start in pieces:
                    del ranges[block + start]
                live[offset] = -size_bytes
            except KeyError:
                self._merge_range(offset, block + start)  # as it was
                self.carve(offset, size_bytes)

    def _cut(self, start: int, size_bytes: int) -> tuple[tuple[dict[int, None], int], ...]:
        """Return what a free part of a block consists of: where ranges begin in it, and those that are free like them.

        Buddies are merged, so it is the largest ranges that fit. ``start`` counts from the block's own.
        """
        if len(self._cuts) == _MOST_CUTS:
            self._cuts.clear()
        pieces: list[tuple[dict[int, None], int]] = []
        position, end = start, start + size_bytes
        while position < end:
            block_bytes = position & -position
            if not 0 < block_bytes <= end - position:
                block_bytes = 1 << (end - position).bit_length() - 1
            pieces.append((self._free[block_bytes], position))
            position += block_bytes
        found = self._cuts[start, size_bytes] = tuple(pieces)
        return found

    def clear(self, offset: int, starts: Sequence[int]) -> None:
        """Free all that lies in the managed block of ``max_block_bytes`` at ``offset``, faster than one by one.

        Parameters
        ----------
        starts
            Where the ranges in it begin, all of them, ascending.

        Raises
        ------
        InvariantError
            If these are not the ranges in it.
        """
        free, cuts, end = self._free, self._cuts, offset + self.max_block_bytes
        none: dict[int, None] = {}
        blocks, blocks_bytes = none, 0  # the free ranges of the size of the last gap
        position = offset
        try:
            for start, size_bytes in zip((*starts, end), (*map(self._live.pop, starts), 0), strict=True):
                gap_bytes = start - position
                if gap_bytes:
                    if gap_bytes != blocks_bytes:
                        ensure(gap_bytes > 0, "what lies in a block does not overlap", block=offset, offset=start)
                        blocks, blocks_bytes = free.get(gap_bytes, none), gap_bytes
                    if position in blocks:
                        del blocks[position]
                    else:
                        inside = position - offset
                        pieces = cuts.get((inside, gap_bytes)) or self._cut(inside, gap_bytes)
                        for ranges, inside in pieces:
                            del ranges[offset + inside]
                position = start + size_bytes if size_bytes > 0 else start - size_bytes
        except KeyError:
            ensure(False, "what lies in a block is known", block=offset)
        free[self.max_block_bytes][offset] = None

    def is_free(self, offset: int, size_bytes: int) -> bool:
        """Whether :meth:`carve` would find all of ``[offset, offset + size_bytes)`` free."""
        end = offset + size_bytes
        while offset < end:
            start, block_bytes = self._free_block_at(offset, end)
            if not block_bytes:
                return False
            offset = start + block_bytes
        return True

    def _free_block_at(self, offset: int, end: int) -> tuple[int, int]:
        """Return offset and bytes of the free range in which ``offset`` lies; of 0 bytes if none does.

        Fast where what is free ends at ``end``.
        """
        likely_bytes = min(offset & -offset or self.max_block_bytes, 1 << ((end - offset).bit_length() - 1))
        if offset in self._free.get(likely_bytes, ()):
            return offset, likely_bytes
        for block_bytes, blocks in self._free.items():
            if offset & -block_bytes in blocks:
                return offset & -block_bytes, block_bytes
        return offset, 0

    def free_run_bytes(self, offset: int) -> int:
        """Return how many bytes from ``offset`` on are free, across the borders of blocks."""
        end, live = offset, self._live
        while end not in live:  # as a rule what is free goes on until a range begins
            for block_bytes, blocks in self._free.items():
                if end & -block_bytes in blocks:
                    end = (end & -block_bytes) + block_bytes
                    break
            else:
                break
        return end - offset

    def free_runs(self) -> list[tuple[int, int]]:
        """Return offset and bytes of all that is free, ascending, neighbours as one. O(n log n) of the free ranges."""
        runs: list[tuple[int, int]] = []
        for offset, size_bytes in sorted((each, size) for size, blocks in self._free.items() for each in blocks):
            if runs and sum(runs[-1]) == offset:
                runs[-1] = runs[-1][0], runs[-1][1] + size_bytes
            else:
                runs.append((offset, size_bytes))
        return runs

    def end_of(self, offset: int) -> int | None:
        """Return where the range that begins at ``offset`` ends, ``None`` if none does."""
        size_bytes = self._live.get(offset)
        return None if size_bytes is None else offset + abs(size_bytes)

    def split(self, offset: int) -> None:
        """Make the range at ``offset`` as many ranges of the minimum block, each to be freed by itself.

        Raises
        ------
        DoubleReleaseError, UnknownCacheError
            As :meth:`free`.
        """
        for start in range(offset, offset + self.allocation_size(offset), self.min_block_bytes):
            self._live[start] = self.min_block_bytes

    def unite(self, offset: int, size_bytes: int) -> None:
        """Make ranges that lie side by side in ``[offset, offset + size_bytes)`` one range, to be freed as one.

        Raises
        ------
        DoubleReleaseError, UnknownCacheError
            As :meth:`free`, if they are not exactly that.
        """
        end = offset + size_bytes
        starts = [offset]
        while starts[-1] < end:
            starts.append(starts[-1] + self.allocation_size(starts[-1]))
        if starts[-1] != end:
            raise self._not_live(end)
        for start in starts[:-1]:
            del self._live[start]
        self._live[offset] = -size_bytes

    def add(self, offset: int) -> None:
        """Manage one more free block of ``max_block_bytes``; :class:`CacheStateError` if misaligned or managed."""
        if offset < 0 or offset % self.max_block_bytes or offset in self._roots:
            raise CacheStateError(
                f"cannot add the block at {offset}: give a multiple of {self.max_block_bytes} that is not managed yet"
            )
        self._roots[offset] = self.max_block_bytes
        self._free[self.max_block_bytes][offset] = None
        self.total_bytes += self.max_block_bytes

    def take(self, offset: int) -> None:
        """Stop managing the block of ``max_block_bytes`` at ``offset``; :class:`CacheStateError` if not wholly free."""
        if not self.is_free_block(offset):
            raise CacheStateError(f"cannot take the block at {offset}: free what lies in it first")
        del self._free[self.max_block_bytes][offset]
        del self._roots[offset]
        self.total_bytes -= self.max_block_bytes

    def withhold(self, offset: int) -> list[int]:
        """Allocate all that is free within the managed block of ``max_block_bytes`` at ``offset``.

        Returns the offsets of the ranges that this makes, each to be freed like any other.
        """
        withheld = []
        for block_bytes, blocks in self._free.items():
            for start in range(offset, offset + self.max_block_bytes, block_bytes):
                if start in blocks:
                    del blocks[start]
                    self._live[start] = block_bytes
                    withheld.append(start)
        return withheld

    def manages(self, offset: int) -> bool:
        """Whether a block under management begins at ``offset``."""
        return offset in self._roots

    def is_free_block(self, offset: int) -> bool:
        """Whether :meth:`take` would take the block at ``offset``."""
        return offset in self._free[self.max_block_bytes]

    def allocation_size(self, offset: int) -> int:
        """Return the bytes of the range at ``offset`` (rounded as :meth:`allocate` did).

        Raises
        ------
        DoubleReleaseError, UnknownCacheError
            As :meth:`free`.
        """
        try:
            return abs(self._live[offset])
        except KeyError:
            raise self._not_live(offset) from None

    @property
    def free_blocks(self) -> Mapping[int, Iterable[int]]:
        """Offsets of the free ranges by size, a power of two, which ascends. A view: it changes with each call."""
        return self._free

    @property
    def free_bytes(self) -> int:
        """Bytes of all free ranges together."""
        return sum(block_bytes * len(blocks) for block_bytes, blocks in self._free.items())

    @property
    def blocks(self) -> list[int]:
        """Offsets of the managed blocks, ascending."""
        return sorted(self._roots)

    @property
    def used_bytes(self) -> int:
        """Bytes of all ranges handed out."""
        return self.total_bytes - self.free_bytes

    @property
    def largest_free_bytes(self) -> int:
        """The largest size that :meth:`allocate` could serve now; 0 when full."""
        return max((block_bytes for block_bytes, blocks in self._free.items() if blocks), default=0)

    def check(self) -> None:
        """Prove that no ranges overlap, that all free buddies are merged, and that nothing is lost. O(n log n).

        Raises
        ------
        InvariantError
            If one of these does not hold.
        """
        ranges = [(offset, offset + abs(size_bytes)) for offset, size_bytes in self._live.items()]
        for block_bytes, blocks in self._free.items():
            for offset in blocks:
                ensure(offset % block_bytes == 0, "a free range lies at a multiple of its size", offset=offset)
                merged = block_bytes == self.max_block_bytes or offset ^ block_bytes not in blocks
                ensure(merged, "two free buddies are one range", offset=offset, block_bytes=block_bytes)
                ranges.append((offset, offset + block_bytes))
        ranges.sort()
        for (_, end), (start, _) in pairwise(ranges):
            ensure(end <= start, "ranges do not overlap", end=end, start=start)
        covered = iter(ranges)
        end = 0
        for root, root_bytes in sorted(self._roots.items()):
            end = max(end, root)  # what :meth:`carve` or :meth:`unite` made may go on from the block before
            while end < root + root_bytes:
                start, stop = next(covered, (-1, -1))
                ensure(start == end, "each managed address is free or allocated", address=end, found=start)
                carved = self._live.get(start, 0) < 0
                ensure(carved or stop <= root + root_bytes, "a range ends inside its block", end=stop, root=root)
                end = stop
        ensure(end <= max((sum(root) for root in self._roots.items()), default=0), "a range ends inside", end=end)
        ensure(next(covered, None) is None, "no range lies outside what is managed")
        ensure(sum(self._roots.values()) == self.total_bytes, "the total is the sum of the blocks")

    def _no_room(self, asked_bytes: int) -> KvpoolError:
        return AddressSpaceError(
            f"no free range of {asked_bytes} bytes: {self.free_bytes} of {self.total_bytes} bytes are free, the "
            f"largest range is {self.largest_free_bytes}; free something or ask for less",
            asked_bytes=asked_bytes,
            free_bytes=self.free_bytes,
            largest_bytes=self.largest_free_bytes,
        )

    def _not_live(self, offset: int) -> KvpoolError:
        for block_bytes, blocks in self._free.items():
            if offset % self.min_block_bytes == 0 and offset & -block_bytes in blocks:
                return DoubleReleaseError(f"the range at {offset} is free already; free it once", offset=offset)
        return UnknownCacheError(
            f"{offset} is no offset that was handed out here; free the offset that allocate() returned", offset=offset
        )
