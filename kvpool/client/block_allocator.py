"""Blocks of one size inside a leased cache, handed out without asking anybody."""

from __future__ import annotations

import asyncio
import logging
import operator
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, SupportsIndex

from kvpool.errors import (
    CacheStateError,
    CapacityError,
    DeviceLostError,
    InvalidSizeError,
    KvpoolError,
    LimitError,
    StaleCacheError,
    UnknownCacheError,
)
from kvpool.memory.block_space import BlockSpace
from kvpool.memory.extents import Extents, difference, union
from kvpool.sizes import format_count, format_size

if TYPE_CHECKING:
    from kvpool.client.cache import VirtualKVCache
    from kvpool.client.connection import Connection

logger = logging.getLogger("kvpool.client")

_PAUSE_S = 1.0
"""How long to wait before memory is asked for ahead again where there was none, seconds."""

_LEAST_AHEAD = 64
"""Blocks kept ahead at least, unless the caller says otherwise: four batches of 16."""


def _nothing() -> None:
    pass


def _whole(given: object, what: str) -> int:
    if isinstance(given, SupportsIndex) and not isinstance(given, bool):
        return operator.index(given)
    raise InvalidSizeError(f"{what} is a whole number, not {given!r}", asked=repr(given))


class BlockAllocator:
    """Hands out the numbers of equal blocks inside one cache, in microseconds: only their memory takes a call.

    Block ``n`` is ``tensor[:, n]`` of a tensor of shape ``(planes, num_blocks, ...)`` over the cache; with one plane,
    ``tensor[n]``.

    :meth:`allocate` and :meth:`free` ask nobody. Memory is brought in ahead of use and given back when it is not used,
    in the background, as the event loop of the connection gets its turns (how much, and when:
    :class:`~kvpool.memory.block_space.BlockSpace`); :meth:`reserve` waits for it. Safe to use from several threads.
    While it is open, it alone decides what of the cache is backed.

    Made by :meth:`VirtualKVCache.block_allocator`.
    """

    def __init__(
        self,
        cache: VirtualKVCache,
        connection: Connection,
        page_bytes: int,
        block_bytes: int,
        planes: int,
        ahead_blocks: int | None,
    ) -> None:
        planes = _whole(planes, "planes")
        self.block_bytes = block_bytes
        """Of one block in one plane."""
        self.planes = planes
        self._cache = cache
        self._connection = connection
        num_blocks = cache.max_size_bytes // (planes * block_bytes) if planes > 0 and block_bytes > 0 else 0
        if num_blocks < 1:
            raise InvalidSizeError(
                f"{planes} planes of blocks of {block_bytes} bytes: cache {cache.id} has room for "
                f"{format_size(cache.max_size_bytes)} in all",
                asked_bytes=block_bytes,
            )
        self.num_blocks = num_blocks
        """How many blocks there are, backed or not: what the cache's ``max_size`` holds."""
        self._group_blocks = min(max(1, page_bytes // block_bytes), num_blocks)
        groups = range(-(-num_blocks // self._group_blocks))
        backed = [group for group in groups if not difference(self._ranges([group]), cache.backed)]
        least_blocks = min(max(2 * self._group_blocks, _LEAST_AHEAD), num_blocks)
        ahead = least_blocks if ahead_blocks is None else _whole(ahead_blocks, "ahead_blocks")
        self._space = BlockSpace(num_blocks, self._group_blocks, ahead, backed)
        self._lock = threading.Lock()
        #: Memory is brought in for one purpose at a time, and given back for one, from the planning to the end; each
        #: while the other waits, since one takes groups that have no memory and the other groups that have some.
        self._growing = asyncio.Lock()
        self._shrinking = asyncio.Lock()
        #: How many free blocks :meth:`reserve` is to be told of while it waits, and how.
        self._enough: int | None = None
        self._tell: Callable[[], object] = _nothing
        self._balancing = False
        self._closed = False
        self._wake()

    @property
    def ahead_blocks(self) -> int:
        """How many blocks are kept free and backed ahead of use."""
        return self._space.ahead_blocks

    @property
    def free_blocks(self) -> int:
        """Blocks that :meth:`allocate` could hand out now."""
        return self._space.free_blocks

    @property
    def used_blocks(self) -> int:
        """Blocks that are handed out."""
        return self._space.used_blocks

    @property
    def backed_blocks(self) -> int:
        """Blocks that have memory, in use or not."""
        return self.used_blocks + self.free_blocks

    def allocate(self, count: int) -> list[int]:
        """Return the numbers of ``count`` blocks, all or none.

        Raises
        ------
        CapacityError
            If so many are not free with memory under them. :meth:`reserve` waits for memory; more comes by itself, too,
            as long as there is any.
        CacheStateError
            If the allocator is closed.
        """
        self._check_open()
        with self._lock:
            try:
                return self._space.allocate(count)
            finally:
                if not self._balancing and self._space.unbalanced:
                    self._wake()

    def free(self, numbers: Iterable[int]) -> None:
        """Take blocks back, from a list of their numbers or an array or tensor of them, all or none.

        Raises
        ------
        DoubleReleaseError
            If one is free already, or named twice.
        InvalidRequestError
            If one is no number of a block.
        CacheStateError
            If the allocator is closed.
        """
        self._check_open()
        with self._lock:
            self._space.free(numbers)
            if self._enough is not None and self._space.free_blocks >= self._enough:
                self._enough = None
                self._tell()
            if not self._balancing and self._space.unbalanced:
                self._wake()

    async def reserve(self, count: int, *, timeout_s: float | None = None) -> None:
        """Return when ``count`` blocks are free with memory under them, waiting for it as :meth:`VirtualKVCache.back`.

        Blocks that are freed meanwhile count. It books nothing for its caller: whoever allocates first has them.

        Parameters
        ----------
        count
            How many, those included that are free now.
        timeout_s
            How long to wait for memory, seconds; by default the pool's ``timeout_s``. 0 does not wait.

        Raises
        ------
        CapacityError
            If so many blocks are in use that ``count`` cannot be free, or there is no memory in time.
        InvalidSizeError
            If there are not so many blocks at all, or not so much memory.
        LimitError
            If so many are more than the cache's model or tenant may hold at most.
        CacheStateError
            If the allocator is closed, or is closed meanwhile.
        """
        self._check_open()
        loop = asyncio.get_running_loop()
        deadline = None if timeout_s is None else loop.time() + timeout_s
        async with self._growing:
            while True:  # once more if others allocated meanwhile
                self._check_open()
                with self._lock:
                    groups = self._space.missing_for(count)
                if not groups:
                    return
                await self._bring(groups, count, None if deadline is None else max(0.0, deadline - loop.time()))

    async def _bring(self, groups: list[int], count: int, timeout_s: float | None) -> None:
        """Back groups so that ``count`` blocks are free, and no longer those that blocks freed meanwhile make needless.

        What is needless is taken from the change that waits, so that the rest keeps its place in the pool's line.
        """
        loop, freed = asyncio.get_running_loop(), asyncio.Event()
        change = asyncio.ensure_future(self._cache.change("back", self._ranges(groups), timeout_s))
        try:
            while True:
                with self._lock:
                    if self._closed:
                        break
                    needed = self._space.needed_of(groups, count)
                    self._tell = partial(loop.call_soon_threadsafe, freed.set)
                    self._enough = self._space.free_blocks_without(needed, count)
                if needed != groups:
                    groups, needless = needed, groups[len(needed) :]
                    await self._cache.change("unback", self._ranges(needless), None)
                noticed = asyncio.ensure_future(freed.wait())
                try:
                    await asyncio.wait({change, noticed}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    noticed.cancel()
                if change.done():
                    break
                freed.clear()
            if not change.done():
                self._check_open()  # it was closed
            await change
        except (InvalidSizeError, LimitError) as error:
            used = self.used_blocks
            if not used:
                way_out = ", so that can never be: ask for less, or start the pool with larger devices"
                raise type(error)(
                    f"cannot reserve {format_count(count, 'block')}: {error.message}"
                    f"{way_out if isinstance(error, InvalidSizeError) else ''}",
                    asked_blocks=count,
                ) from error
            raise CapacityError(
                f"cannot reserve {format_count(count, 'block')} while {used} are in use: "
                f"{error.message}; free some first",
                asked_blocks=count,
                used_blocks=used,
            ) from error
        except asyncio.CancelledError:
            self._connection.run_soon(partial(self._withdraw, groups), f"withdrawing from cache {self._cache.id}", 0.0)
            raise
        finally:
            change.cancel()
            with self._lock:
                self._enough, self._tell = None, _nothing
        with self._lock:
            self._space.note_backed(groups)

    async def _withdraw(self, groups: list[int]) -> None:
        """Give back what may have come for a caller that was cancelled."""
        async with self._growing:
            with self._lock:
                left = [group for group in groups if self._space.is_unbacked(group)]
            if left and not self.closed:
                await self._cache.change("unback", self._ranges(left), None)

    async def trim(self) -> int:
        """Give the memory of all blocks that share no page with one in use back; returns how many those were.

        Nothing is backed ahead again until something is asked for. Raises :class:`CacheStateError` if it is closed.
        """
        self._check_open()
        async with self._shrinking:
            with self._lock:
                free_blocks = self._space.free_blocks
                groups = self._space.take_empty()
                count = free_blocks - self._space.free_blocks
            await self._unback(groups)
            return count

    def close(self) -> None:
        """Hand out no more blocks, and leave the cache's memory as it is. Idempotent.

        A :meth:`reserve` that waits ends with :class:`CacheStateError`. Another allocator may then be opened; for it,
        all blocks are free.
        """
        with self._lock:
            self._closed = True
            self._tell()

    def _check_open(self) -> None:
        self._cache.check_usable()
        if self.closed:
            raise CacheStateError(
                f"the block allocator of cache {self._cache.id} is closed, or its cache is sealed: open another one, "
                "of a cache that is being written"
            )

    def __repr__(self) -> str:
        state = "closed, " if self.closed else ""
        return (
            f"<BlockAllocator of cache {self._cache.id}: {state}{self.used_blocks} used and {self.free_blocks} free of "
            f"{self.num_blocks} blocks of {self.block_bytes} bytes in {self.planes} planes>"
        )

    @property
    def closed(self) -> bool:
        """Whether it was closed, or its cache is sealed or released."""
        return self._closed or self._cache.released or self._cache.sealed

    def _ranges(self, groups: Sequence[int]) -> Extents:
        """Return the bytes of groups of blocks in the cache, in all planes."""
        ranges = []
        for group in groups:
            first = group * self._group_blocks
            end = min(first + self._group_blocks, self.num_blocks)
            for plane in range(self.planes):
                start = plane * self.num_blocks
                ranges.append(((start + first) * self.block_bytes, (start + end) * self.block_bytes))
        return union(ranges)

    async def _back(self, groups: list[int], timeout_s: float | None) -> None:
        await self._cache.change("back", self._ranges(groups), timeout_s)
        with self._lock:
            self._space.note_backed(groups)

    async def _unback(self, groups: list[int]) -> None:
        if not groups:
            return
        try:
            await self._cache.change("unback", self._ranges(groups), None)
        except BaseException:
            # Perhaps it is gone all the same: then nothing may be handed out of it before it is backed again.
            with self._lock:
                self._space.note_unbacked(groups)
            raise
        with self._lock:
            self._space.note_unbacked(groups)

    # -- in the background ------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        """Let memory follow use. Any thread."""
        self._balancing = True
        self._run_soon(0.0)

    def _run_soon(self, after_s: float) -> None:
        self._connection.run_soon(self._balance, f"backing blocks of cache {self._cache.id} ahead of use", after_s)

    async def _balance(self) -> None:
        pause_s = 0.0
        try:
            while not self.closed:
                async with self._growing:
                    with self._lock:
                        missing = self._space.missing()
                    if missing:
                        await self._back(missing, 0.0)
                async with self._shrinking:
                    with self._lock:
                        surplus = self._space.take_surplus()
                    await self._unback(surplus)
                if not missing and not surplus:
                    return
        except (CapacityError, InvalidSizeError, LimitError) as error:  # more than the device has, or the limit, in all
            pause_s = _PAUSE_S
            logger.debug("no memory ahead for blocks of cache %d: %s", self._cache.id, error)
        except (DeviceLostError, StaleCacheError, UnknownCacheError) as error:
            self._closed = True
            logger.info("the blocks of cache %d are gone: %s", self._cache.id, error)
        except Exception as error:
            pause_s = _PAUSE_S  # whatever it is: tried again at once it would fail again, without end
            if not (self.closed and isinstance(error, KvpoolError)):
                raise
        finally:
            # Under the lock, as use may have changed since the last look.
            with self._lock:
                self._balancing = False
            if not self.closed and (pause_s or self._space.unbalanced):
                self._balancing = True
                self._run_soon(pause_s)
