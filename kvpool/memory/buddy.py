"""The buddy allocator: power-of-two ranges of addresses, integers only.

Everything here is arithmetic; no address is ever touched. A range of ``2**k`` minimum blocks starts at a multiple of
its own size, so its *buddy*, the other half of the range twice as large, is one exclusive-or away. Two free buddies are
one free range of the next order: they are merged at once, at each :meth:`BuddyAllocator.free`.
"""

from __future__ import annotations

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


class BuddyAllocator:
    """Hands out ranges of the addresses ``[0, size_bytes)``, or of the blocks it is given by :meth:`add`.

    Parameters
    ----------
    size_bytes
        Addresses managed from the start, a multiple of ``min_block_bytes``; 0 to start empty. What is no multiple of
        ``max_block_bytes`` is managed as the largest power-of-two blocks that fit, so the tail of an uneven arena is used
        too, but never merged with what lies before it.
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

    __slots__ = ("_free", "_live", "_roots", "_steps", "max_block_bytes", "min_block_bytes", "total_bytes")

    def __init__(self, size_bytes: int, min_block_bytes: int, max_block_bytes: int | None = None) -> None:
        if max_block_bytes is None:
            max_block_bytes = 1 << (size_bytes.bit_length() - 1) if size_bytes > 0 else 0
        for name, value in (("min_block_bytes", min_block_bytes), ("max_block_bytes", max_block_bytes)):
            if value <= 0 or value & (value - 1):
                raise ConfigError(f"{name} must be a power of two, not {value}", asked_bytes=value)
        if max_block_bytes < min_block_bytes or size_bytes < 0 or size_bytes % min_block_bytes:
            raise ConfigError(
                f"cannot manage {size_bytes} bytes in blocks of {min_block_bytes} to {max_block_bytes} bytes: "
                "the size must be a multiple of the smallest block, and the smallest no larger than the largest",
                asked_bytes=size_bytes,
            )
        self.min_block_bytes = min_block_bytes
        self.max_block_bytes = max_block_bytes
        self.total_bytes = 0
        #: Free ranges by size: offset to nothing. A dict and no set, because popitem() gives the newest.
        self._free: dict[int, dict[int, None]] = {}
        block_bytes = min_block_bytes
        while block_bytes <= max_block_bytes:
            self._free[block_bytes] = {}
            block_bytes *= 2
        orders = list(self._free.items())
        #: For each power-of-two size the orders from it upwards, as (size, free ranges).
        self._steps = {block: tuple(orders[i:]) for i, (block, _) in enumerate(orders)}
        #: Allocated ranges: offset to bytes, a power of two, or a multiple of the minimum block when the tail went back.
        self._live: dict[int, int] = {}
        #: Blocks under management, never merged with each other: offset to bytes.
        self._roots: dict[int, int] = {}
        offset = 0
        while offset < size_bytes:
            block_bytes = min(max_block_bytes, 1 << ((size_bytes - offset).bit_length() - 1))
            self._roots[offset] = block_bytes
            self._free[block_bytes][offset] = None
            offset += block_bytes
        self.total_bytes = size_bytes

    # --- allocating ------------------------------------------------------------------------------------------------

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
            If a size is below 1, larger than all there is, or the maximum is below the size.
        AddressSpaceError
            If no free range is large enough now.
        """
        if max_size_bytes is not None or size_bytes not in self._steps:
            return self._allocate_rounded(size_bytes, max_size_bytes)
        for block_bytes, blocks in self._steps[size_bytes]:
            if blocks:
                break
        else:
            raise self._no_room(size_bytes)
        offset, _ = blocks.popitem()
        if block_bytes != size_bytes:
            free = self._free
            while block_bytes != size_bytes:
                block_bytes >>= 1
                free[block_bytes][offset + block_bytes] = None
        self._live[offset] = block_bytes
        return offset

    def _allocate_rounded(self, size_bytes: int, max_size_bytes: int | None) -> int:
        if max_size_bytes is None:
            max_size_bytes = size_bytes
        if size_bytes <= 0 or max_size_bytes < size_bytes or max_size_bytes > max(self.total_bytes, self.max_block_bytes):
            raise InvalidSizeError(
                f"asked for {size_bytes} bytes growing to {max_size_bytes}: possible are sizes from 1 to "
                f"{self.total_bytes} bytes, the maximum no smaller than the size",
                asked_bytes=size_bytes,
                max_size_bytes=max_size_bytes,
                total_bytes=self.total_bytes,
            )
        needed_bytes = round_up(max_size_bytes, self.min_block_bytes)
        range_bytes = 1 << (needed_bytes - 1).bit_length()
        if range_bytes > self.max_block_bytes:
            raise self._no_room(max_size_bytes)
        offset = self.allocate(range_bytes)
        if max_size_bytes == size_bytes and needed_bytes != range_bytes:
            # The tail, as the blocks of its binary digits. None can merge: the buddy of each holds some of the range.
            end = offset + needed_bytes
            while end != offset + range_bytes:
                block_bytes = end & -end
                self._free[block_bytes][end] = None
                end += block_bytes
            self._live[offset] = needed_bytes
        return offset

    def free(self, offset: int) -> None:
        """Give the range at ``offset`` back and merge it with its free buddies.

        Raises
        ------
        DoubleReleaseError
            If ``offset`` is free already.
        UnknownCacheError
            If it is no offset that was handed out: outside, misaligned or inside another range.
        """
        try:
            size_bytes = self._live.pop(offset)
            steps = self._steps[size_bytes]
        except KeyError:
            self._free_rounded(offset)
            return
        for block_bytes, blocks in steps:
            buddy = offset ^ block_bytes
            if buddy not in blocks:
                break
            del blocks[buddy]
            offset &= buddy
        blocks[offset] = None
