"""Blocks inside a cache, with a cache that changes its memory when the test says so."""

from __future__ import annotations

import asyncio

import pytest

from kvpool.client.block_allocator import BlockAllocator
from kvpool.errors import CacheStateError, CapacityError, DeviceLostError, InvalidSizeError, LimitError
from kvpool.memory.extents import difference, total_bytes, union

BLOCK, PAGE = 16, 64


class Cache:
    """As much of a cache as the allocator sees."""

    id, released, sealed = 7, False, False
    max_size_bytes = 2 * 32 * BLOCK

    def __init__(self) -> None:
        self.backed = ()
        self.memory_bytes = self.device_bytes = self.max_size_bytes
        self.calls: list[str] = []
        self.fails: Exception | None = None
        self.grows_not: Exception | None = None
        self.too_much: Exception = InvalidSizeError("more than the device has")
        self.line: list[Waiting] = []

    async def change(self, kind, ranges, timeout_s) -> None:
        self.calls.append("back, waiting" if kind == "back" and timeout_s != 0 else kind)
        if kind == "unback":
            await self._unback(ranges)
            return
        if self.grows_not is not None:
            raise self.grows_not
        waiting = Waiting(ranges)
        if total_bytes(union(self.backed, waiting.ranges)) > self.device_bytes:
            raise self.too_much
        await asyncio.sleep(0)
        while not self._fits(waiting):
            if timeout_s == 0:
                raise CapacityError("no room")
            self.line.append(waiting)
            await waiting.called.wait()
            waiting.called.clear()
        self.backed = union(self.backed, waiting.ranges)

    def _fits(self, waiting) -> bool:
        return total_bytes(union(self.backed, waiting.ranges)) <= self.memory_bytes

    async def _unback(self, ranges) -> None:
        await asyncio.sleep(0)
        if self.fails is not None:
            raise self.fails
        self.backed = difference(self.backed, union(ranges))
        for waiting in self.line:  # what was said last counts
            waiting.ranges = difference(waiting.ranges, union(ranges))
        self.call()

    def call(self) -> None:
        """Let who waits look whether there is memory now."""
        line, self.line = self.line, []
        for waiting in line:
            waiting.called.set()

    def check_usable(self) -> None:
        if self.released:
            raise CacheStateError("released")


class Waiting:
    """A change that waits for memory."""

    def __init__(self, ranges) -> None:
        self.ranges = union(ranges)
        self.called = asyncio.Event()


class Connection:
    """Runs what is to be run soon, at once or when :meth:`pass_time` says so."""

    def __init__(self) -> None:
        self.later = []
        self.tasks = []

    def run_soon(self, make, what, after_s) -> None:
        if after_s:
            self.later.append(make)
        else:
            self.tasks.append(asyncio.ensure_future(make()))

    async def rest(self) -> list[BaseException]:
        """Let all come to an end; returns what failed."""
        failed = []
        while self.tasks:
            failed += [e for e in await asyncio.gather(*self._take(), return_exceptions=True) if e is not None]
        return failed

    def _take(self):
        tasks, self.tasks = self.tasks, []
        return tasks

    def pass_time(self) -> None:
        self.later, later = [], self.later
        self.tasks += [asyncio.ensure_future(make()) for make in later]


def opened(cache: Cache, ahead_blocks: int | None = 8) -> tuple[BlockAllocator, Connection]:
    connection = Connection()
    return BlockAllocator(cache, connection, PAGE, BLOCK, 2, ahead_blocks), connection


async def test_memory_comes_ahead_of_use_and_goes_when_it_is_too_much():
    cache = Cache()
    blocks, connection = opened(cache)
    await connection.rest()
    assert (blocks.num_blocks, blocks.free_blocks, blocks.ahead_blocks) == (32, 16, 8)
    assert cache.backed == ((0, 16 * BLOCK), (32 * BLOCK, 48 * BLOCK)), "of both planes"
    held = blocks.allocate(12)
    await connection.rest()
    assert (blocks.free_blocks, blocks.backed_blocks) == (16, 28)
    calls = len(cache.calls)
    for _ in range(100):
        blocks.free(blocks.allocate(8))
    await connection.rest()
    assert len(cache.calls) == calls, "what comes and goes around one level changes no memory"
    blocks.free(held)
    await connection.rest()
    assert blocks.free_blocks == 16
    assert cache.backed == ((0, 16 * BLOCK), (32 * BLOCK, 48 * BLOCK)), "the last ones went"


async def test_where_there_is_no_memory_it_is_not_asked_for_all_the_time():
    cache = Cache()
    cache.memory_bytes = 2 * 4 * BLOCK
    blocks, connection = opened(cache, ahead_blocks=2)
    await connection.rest()
    blocks.allocate(3)
    for _ in range(5):
        with pytest.raises(CapacityError, match="3 of 32 are in use"):
            blocks.allocate(4)
        await connection.rest()
    assert cache.calls == ["back", "back"]
    cache.memory_bytes *= 2
    connection.pass_time()
    await connection.rest()
    assert len(blocks.allocate(4)) == 4


async def test_reserved_memory_stays_until_it_is_used():
    cache = Cache()
    blocks, connection = opened(cache, ahead_blocks=2)
    await blocks.reserve(24)
    assert "back, waiting" in cache.calls
    blocks.free(blocks.allocate(1))
    await connection.rest()
    assert blocks.free_blocks >= 23
    blocks.free(blocks.allocate(24))
    await connection.rest()
    assert blocks.free_blocks <= 6
    with pytest.raises(InvalidSizeError):
        await blocks.reserve(33)


async def test_blocks_whose_memory_may_be_gone_are_not_handed_out():
    cache = Cache()
    blocks, connection = opened(cache)
    await connection.rest()
    cache.fails = DeviceLostError("gone")
    with pytest.raises(DeviceLostError):
        await blocks.trim()
    assert blocks.free_blocks == 0
    with pytest.raises(CapacityError):
        blocks.allocate(1)
    assert await connection.rest() == []
    assert blocks.free_blocks == 16, "backed once more"


async def test_what_is_backed_already_is_taken_over():
    cache = Cache()
    cache.backed = ((0, 6 * BLOCK), (32 * BLOCK, 40 * BLOCK))
    blocks, connection = opened(cache, ahead_blocks=1)
    await connection.rest()
    assert sorted(blocks.allocate(4)) == [0, 1, 2, 3], "the blocks that are backed in both planes"
    assert cache.calls == []


async def test_an_allocator_ends_with_its_cache():
    cache = Cache()
    blocks, connection = opened(cache)
    await connection.rest()
    numbers = blocks.allocate(16)
    cache.released = True
    assert await connection.rest() == []
    await refuse_all(blocks, numbers, "released")
    assert (await connection.rest(), connection.later) == ([], [])


async def refuse_all(blocks: BlockAllocator, numbers: list[int], why: str) -> None:
    for refused in (lambda: blocks.allocate(1), lambda: blocks.free(numbers)):
        with pytest.raises(CacheStateError, match=why):
            refused()
    for waits in (blocks.reserve(1), blocks.trim()):
        with pytest.raises(CacheStateError, match=why):
            await waits


async def test_a_closed_allocator_does_nothing_any_more():
    blocks, connection = opened(Cache())
    await connection.rest()
    numbers = blocks.allocate(2)
    blocks.close()
    await refuse_all(blocks, numbers, "closed")
    assert "closed, 2 used and 14 free of 32 blocks" in repr(blocks)


async def turns() -> None:
    """Let everybody go as far as they come without memory."""
    for _ in range(20):
        await asyncio.sleep(0)


async def waiting_reserve(cache: Cache, count: int) -> tuple[BlockAllocator, Connection, list[int], asyncio.Task[None]]:
    """Open an allocator whose cache has memory for four groups, all in use, and reserve more."""
    cache.memory_bytes = 2 * 16 * BLOCK
    blocks, connection = opened(cache, ahead_blocks=0)
    await blocks.reserve(16)
    numbers = blocks.allocate(16)
    task = asyncio.ensure_future(blocks.reserve(count))
    await turns()
    assert cache.line
    return blocks, connection, numbers, task


async def test_a_reserve_that_waits_ends_with_the_blocks_that_are_freed():
    cache = Cache()
    blocks, _, numbers, task = await waiting_reserve(cache, 8)
    blocks.free(numbers[:8])
    await asyncio.wait_for(task, 60)
    assert blocks.free_blocks == 8
    assert (cache.line, total_bytes(cache.backed)) == ([], cache.memory_bytes)


async def test_a_reserve_that_waits_waits_for_less_when_some_blocks_are_freed():
    cache = Cache()
    blocks, _, numbers, task = await waiting_reserve(cache, 8)
    await asyncio.to_thread(blocks.free, numbers[:5])
    await turns()
    cache.memory_bytes += 2 * 4 * BLOCK  # of one group, not of two
    await turns()
    cache.call()
    await asyncio.wait_for(task, 60)
    assert blocks.free_blocks == 9


async def test_more_than_the_device_has_beside_what_is_in_use_is_a_lack_of_room():
    """It can be had once some blocks are freed, so that a scheduler preempts for it."""
    cache = Cache()
    cache.device_bytes = 2 * 16 * BLOCK
    blocks, connection = opened(cache, ahead_blocks=2)
    await blocks.reserve(12)
    numbers = blocks.allocate(12)
    with pytest.raises(CapacityError, match="while 12 are in use"):
        await blocks.reserve(8)
    blocks.allocate(4)
    assert await connection.rest() == [], "nor does it fail when it is wanted ahead"
    blocks.free(numbers)
    await blocks.reserve(8)


async def test_more_than_the_device_has_while_nothing_is_in_use_can_never_be():
    cache = Cache()
    cache.device_bytes = 2 * 16 * BLOCK
    blocks, _ = opened(cache, ahead_blocks=2)
    with pytest.raises(InvalidSizeError, match="never be: ask for less, or start the pool with larger devices"):
        await blocks.reserve(20)
    await blocks.reserve(8)


@pytest.mark.parametrize("error", [RuntimeError("what nobody expects"), CacheStateError("nor this"), KeyError(1)])
async def test_whatever_fails_in_the_background_is_not_tried_again_at_once(error):
    cache = Cache()
    cache.grows_not = error
    blocks, connection = opened(cache)
    assert await connection.rest() == [error]
    assert (cache.calls, len(connection.later)) == (["back"], 1)
    cache.grows_not = None
    connection.pass_time()
    assert await connection.rest() == []
    assert blocks.free_blocks == 16


async def test_above_a_limit_a_reserve_is_refused_and_nothing_is_wanted_ahead():
    cache = Cache()
    cache.device_bytes, cache.too_much = 2 * 16 * BLOCK, LimitError("its limit")
    blocks, connection = opened(cache, ahead_blocks=10)
    with pytest.raises(LimitError, match="cannot reserve 20 blocks: its limit"):
        await blocks.reserve(20)
    assert await connection.rest() == []
    assert len(connection.later) == 1
    await blocks.reserve(12)
    blocks.allocate(12)
    with pytest.raises(CapacityError, match="its limit; free some first"):
        await blocks.reserve(8)


@pytest.mark.parametrize("close", [BlockAllocator.close, lambda blocks: asyncio.to_thread(blocks.close)])
async def test_closing_ends_all_reserves_that_wait(close):
    cache = Cache()
    blocks, _, _, first = await waiting_reserve(cache, 8)
    second = asyncio.ensure_future(blocks.reserve(8))
    await turns()
    closing = close(blocks)
    if closing is not None:
        await closing
    for task in (first, second):
        with pytest.raises(CacheStateError, match="closed"):
            await asyncio.wait_for(task, 60)
    await turns()
    cache.memory_bytes = cache.max_size_bytes
    backed = cache.backed
    cache.call()
    await turns()
    assert cache.backed == backed, "its growth waits no more"
    blocks.close()


async def test_trim_passes_a_reserve_that_waits():
    cache = Cache()
    blocks, _, numbers, task = await waiting_reserve(cache, 16)
    blocks.free(numbers[4:8])
    assert await asyncio.wait_for(blocks.trim(), 60) == 4
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_what_came_for_a_cancelled_reserve_is_given_back():
    cache = Cache()
    blocks, connection, _, task = await waiting_reserve(cache, 8)
    backed = cache.backed
    cache.memory_bytes = cache.max_size_bytes
    cache.call()
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await connection.rest() == []
    assert (cache.backed, blocks.free_blocks) == (backed, 0)


@pytest.mark.parametrize(("block_bytes", "planes"), [(0, 1), (-5, 1), (16, 0), (2000, 1), (600, 2)])
async def test_no_block_fits(block_bytes, planes):
    with pytest.raises(InvalidSizeError):
        BlockAllocator(Cache(), Connection(), PAGE, block_bytes, planes, None)


@pytest.mark.parametrize(("planes", "ahead_blocks"), [("2", None), (1.5, None), (None, None), (True, None), (1, "8")])
async def test_what_is_no_number_is_a_typed_error(planes, ahead_blocks):
    with pytest.raises(InvalidSizeError, match="is a whole number, not"):
        BlockAllocator(Cache(), Connection(), PAGE, BLOCK, planes, ahead_blocks)
