"""Caches that grow and shrink under tensors that stay."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from pool_actors import until, until_no_zombies

import kvpool.sync
from kvpool import Access, CachePool, byte_ranges
from kvpool.errors import (
    CacheStateError,
    CapacityError,
    DoubleReleaseError,
    InvalidSizeError,
    SealedError,
    TensorMismatchError,
)

PAGE = 64 * 1024
MIB = 1024 * 1024


async def device_of(pool: CachePool):
    (device,) = (await pool.stats()).devices
    return device


async def nothing_is_warm(pool: CachePool) -> bool:
    device = await device_of(pool)
    return device.reserve_bytes == 0 and device.free_bytes == device.capacity_bytes


def grow_blocking(name: str) -> None:
    with (
        kvpool.sync.CachePool.connect(name) as pool,
        pool.request_cache("m", size=PAGE, max_size=4 * PAGE) as cache,
    ):
        view = cache.numpy("uint8", 4 * PAGE)
        cache.back([(2 * PAGE, 3 * PAGE)])
        view[2 * PAGE] = 1
        cache.unback([(0, PAGE)])
        assert (cache.size_bytes, view.sum()) == (PAGE, 1)
        cache.resize(2 * PAGE)
        assert view[2 * PAGE] == 0
        del view


async def test_a_hundred_resizes_change_no_byte_and_lose_no_page(make_pool):
    pool = await make_pool("host:1x80MiB", page_size="2MiB")
    async with await pool.request_cache("m", size_mb=4, max_size_mb=64) as cache:
        whole = cache.numpy("uint8", 64 * MIB)
        address, front = whole.ctypes.data, whole[: 4 * MIB]
        front[:] = np.arange(4 * MIB, dtype=np.uint32).view(np.uint8)[: 4 * MIB]
        expected = front.copy()
        for round_ in range(100):
            await cache.resize(64 * MIB)
            whole[4 * MIB :: MIB] = round_ + 1
            assert whole[63 * MIB] == round_ + 1
            await cache.resize(4 * MIB)
            assert not whole[4 * MIB :: MIB].any(), "what is not backed reads as zeros"
        assert np.array_equal(front, expected)
        assert cache.numpy("uint8", 1).ctypes.data == address
        await until_no_zombies(pool)
        device = await device_of(pool)
        assert (device.live_bytes, device.backed_bytes, device.free_bytes) == (4 * MIB, 4 * MIB, 76 * MIB)
        del whole, front


async def test_a_tensor_of_the_largest_shape_is_backed_block_by_block(pool):
    """Blocks are the second dimension: keys and values lie far apart."""
    shape = (2, 16, PAGE // 4)
    async with await pool.request_cache("m", size="1KiB", max_size=2 * 16 * PAGE) as cache:
        await cache.resize(0)
        tensor, reader = cache.numpy("float32", shape), cache.numpy("float32", shape, access=Access.READ)
        assert (cache.size_bytes, tensor.any()) == (0, False)
        for block in (3, 9):
            await cache.back(byte_ranges("float32", shape, np.s_[:, block]))
            tensor[:, block] = block
        assert cache.size_bytes == (await device_of(pool)).backed_bytes == 4 * PAGE
        assert [int(reader[plane, block, 7]) for plane in (0, 1) for block in (3, 4, 9)] == [3, 0, 9, 3, 0, 9]
        await cache.unback(byte_ranges("float32", shape, np.s_[:, :4]))
        assert (tensor[:, 3].any(), reader[:, 3].any(), bool((tensor[:, 9] == 9).all())) == (False, False, True)
        assert cache.backed == ((9 * PAGE, 10 * PAGE), (25 * PAGE, 26 * PAGE))
        del tensor, reader
    await asyncio.to_thread(grow_blocking, pool.name)


async def test_twenty_times_the_memory_is_promised_to_caches_that_take_turns(make_pool):
    pool = await make_pool("host:1x1MiB", arena_factor=64)
    caches = [await pool.request_cache("m", size="4KiB", max_size="1MiB") for _ in range(10)]
    await asyncio.gather(*(cache.resize(0) for cache in caches))
    caches += [await pool.request_cache("m", size="4KiB", max_size="1MiB") for _ in range(10)]
    await asyncio.gather(*(cache.resize(0) for cache in caches[10:]))
    for number, cache in enumerate(caches):
        await cache.resize("1MiB")
        view = cache.numpy("uint8", MIB)
        view[:] = number + 1
        await cache.resize(0)
        assert not view.any()
        del view
    for cache in caches:
        await cache.release()


async def test_growing_waits_for_memory_and_a_cancelled_wait_leaves_the_line(pool):
    cache = await pool.request_cache("m", size=PAGE, max_size=2 * MIB)
    other = await pool.request_cache("m", size=24 * PAGE)
    view = cache.numpy("uint8", 2 * MIB)
    with pytest.raises(CapacityError) as refused:
        await cache.resize("1MiB", timeout_s=0)
    assert refused.value.details["asked_bytes"] == 15 * PAGE
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await cache.resize("1MiB")
    waiting = asyncio.create_task(cache.resize("1MiB"))
    await until(lambda: somebody_waits(pool), "the line")
    await cache.unback([(0, PAGE)])  # shrinking waits for nothing
    assert (cache.backed, waiting.done()) == ((), False)
    await cache.resize(0)
    await waiting  # the last word counts, so nothing of it is left
    assert cache.backed == ()
    waiting = asyncio.create_task(cache.resize("1MiB"))
    await other.release()
    await waiting
    view[:MIB] = 5
    assert cache.size_bytes == MIB
    del view
    await cache.release()


async def somebody_waits(pool: CachePool) -> bool:
    return bool((await pool.stats()).waiting)


async def refuse_sizes_that_cannot_be(pool: CachePool) -> None:
    async with await pool.request_cache("m", size=PAGE, max_size=4 * PAGE) as cache:
        for size in (5 * PAGE, -1, "nothing", 0.5):
            with pytest.raises(InvalidSizeError):
                await cache.resize(size)
        with pytest.raises(InvalidSizeError, match="its max_size is"):
            await cache.resize(5 * PAGE)
        with pytest.raises(InvalidSizeError):
            await cache.back([(0, 5 * PAGE)])
    with pytest.raises(InvalidSizeError):
        await pool.request_cache("m", 1, max_size_mb=2, max_size="2MiB")


async def test_a_grown_cache_is_sealed_with_its_size_and_found_by_others(pool):
    await refuse_sizes_that_cannot_be(pool)
    cache = await pool.request_cache("m", size=PAGE, max_size=8 * PAGE)
    await cache.back([(4 * PAGE, 5 * PAGE)])
    with pytest.raises(CacheStateError, match="resize"):
        await cache.seal("key")
    await cache.resize(3 * PAGE)
    cache.numpy("uint8", 3 * PAGE)[:] = 7
    await cache.seal("key")
    with pytest.raises(SealedError):
        await cache.resize(PAGE)
    with pytest.raises(TensorMismatchError):
        cache.numpy("uint8", 4 * PAGE)
    await cache.release()
    other = await CachePool.connect(pool.name)
    async with other, await other.find_cache("m", "key") as found:
        assert found.size_bytes == 3 * PAGE
        assert (found.numpy("uint8", 3 * PAGE) == 7).all()


async def test_blocks_are_handed_out_and_their_memory_follows(make_pool):
    pool = await make_pool(idle_trim_s=0.2)
    block_bytes = PAGE // 4
    async with await pool.request_cache("m", size=block_bytes, max_size=2 * 64 * block_bytes) as cache:
        tensor = cache.numpy("uint8", (2, 64, block_bytes))
        blocks = cache.block_allocator(block_bytes, planes=2, ahead_blocks=8)
        assert (blocks.num_blocks, blocks.free_blocks) == (64, 0)
        with pytest.raises(CapacityError, match="reserve"):
            blocks.allocate(1)
        with pytest.raises(CacheStateError, match="already"):
            cache.block_allocator(block_bytes)
        for change in (cache.resize(0), cache.back([(0, 1)]), cache.unback([(0, 1)])):
            with pytest.raises(CacheStateError, match="block allocator"):
                await change
        await blocks.reserve(24)
        held = [blocks.allocate(4) for _ in range(6)]
        for numbers in held:
            tensor[:, numbers] = numbers[0] + 1
        await until(lambda: blocks.free_blocks >= 8, "memory ahead of use")
        assert [int(tensor[1, numbers].min()) for numbers in held] == [numbers[0] + 1 for numbers in held]
        blocks.free(held[0])
        with pytest.raises(DoubleReleaseError):
            blocks.free([*held[1], held[0][0]])
        for numbers in held[1:]:
            blocks.free(numbers)
        await until(lambda: blocks.free_blocks <= 24, "the return of what is too much")
        assert await blocks.trim() >= 16
        assert (blocks.free_blocks, cache.size_bytes) == (0, 0)
        assert not tensor.any()
        await blocks.reserve(1)
        del tensor
    assert cache.backed == ()
    with pytest.raises(CacheStateError, match="released"):
        blocks.allocate(1)
    other = await pool.request_cache("m", size=8 * PAGE)
    await other.release()
    await until(lambda: nothing_is_warm(pool), "the return of what lies idle")
