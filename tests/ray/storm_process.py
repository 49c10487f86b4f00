"""A client that does everything at once with a pool, and verifies every byte that it reads."""

from __future__ import annotations

import asyncio
import os
import random
from typing import Any

import numpy as np
import ray

from kvpool import CachePool, ModelSpec, encode_block_id
from kvpool.errors import CapacityError

BLOCK_BYTES = 12 * 1024
KIB = 1024
KEYS = 40
CHAINS, CHAIN_BLOCKS = 10, 6
TASKS = 8
"""Of one process, so that its calls meet each other on their way."""
MOST_HELD = 2
"""Caches that one task holds at a time: all tasks together two thirds of what a storm's pool has (8 MiB)."""
MOST_BYTES, LARGEST_BYTES = 48 * KIB, 192 * KIB
"""Of such a cache when it is asked for, and when it has grown."""
WAIT_S = 0.5


def content(number: int, size_bytes: int) -> np.ndarray[Any, Any]:
    """Bytes that follow from a number, other ones at each place and for each number."""
    words = np.arange(-(-size_bytes // 8), dtype=np.uint64) + np.uint64(number * 0x9E3779B97F4A7C15 % 2**64)
    return words.view(np.uint8)[:size_bytes]


def key_bytes(key: int) -> int:
    """Size of the cache of a key: the same for all who store it."""
    return 4 * KIB * (1 + key % 37) - key % 5


@ray.remote(num_cpus=0)
class StormProcess:
    """One client of the storm."""

    async def connect(self, name: str) -> int:
        """Connect; returns the process id."""
        self.pool = await CachePool.connect(name)
        self.caches = await self.pool.model("storm caches")
        self.blocks = await self.pool.model(ModelSpec("storm blocks", block_bytes=BLOCK_BYTES))
        self.counts = dict.fromkeys(("operations", "wrong", "refused", "verified", "hits", "resized", "sealed"), 0)
        self._news = asyncio.Condition()
        return os.getpid()

    async def run(self, operations: int, seed: int) -> dict[str, int]:
        """Do that many operations, release everything, and tell what was counted."""
        self._left = operations
        await asyncio.gather(*(self._task(random.Random(f"{seed} {n}")) for n in range(TASKS)))
        await self.pool.close()
        return self.counts

    async def reached(self, operations: int) -> dict[str, int]:
        """Tell what was counted once so many operations are done. The others go on."""
        async with self._news:
            await self._news.wait_for(lambda: self.counts["operations"] >= operations)
        return self.counts

    async def _task(self, rng: random.Random) -> None:
        held: list[tuple[Any, int]] = []
        ways = {
            self._store: 20,
            self._find: 30,
            self._put: 20,
            self._match: 30,
            self._hold: 20,
            self._resize: 30,
            self._let_go: 20,
            self._evict: 3,
            self._defragment: 1,
        }
        while self._left:
            self._left -= 1
            (way,) = rng.choices(list(ways), list(ways.values()))
            try:
                await way(held, rng)
            except CapacityError:
                self.counts["refused"] += 1
            async with self._news:
                self.counts["operations"] += 1
                self._news.notify_all()
        while held:
            await self._let_go(held, rng)

    def _verify(self, found: np.ndarray[Any, Any], number: int) -> None:
        self.counts["verified"] += 1
        self.counts["wrong"] += not np.array_equal(found, content(number, found.size))

    # -- caches with a key ----------------------------------------------------------------------------------------

    async def _store(self, _held: Any, rng: random.Random) -> None:
        key = rng.randrange(KEYS)
        async with await self.caches.request_cache(key_bytes(key), timeout_s=WAIT_S) as cache:
            cache.numpy("uint8", (key_bytes(key),))[:] = content(key, key_bytes(key))
            await cache.seal(key=str(key))
            self.counts["sealed"] += 1
            self._verify(cache.numpy("uint8", (key_bytes(key),)), key)  # another's, if that was first

    async def _find(self, _held: Any, rng: random.Random) -> None:
        key = rng.randrange(KEYS)
        cache = await self.caches.find_cache(str(key))
        if cache is not None:
            async with cache:
                self.counts["wrong"] += cache.size_bytes != key_bytes(key)
                self._verify(cache.numpy("uint8", (cache.size_bytes,)), key)
                self.counts["hits"] += 1

    # -- blocks ---------------------------------------------------------------------------------------------------

    async def _put(self, _held: Any, rng: random.Random) -> None:
        chain = _chain(rng)
        await self.blocks.put_blocks(
            [encode_block_id(number) for number in chain], np.stack([content(n, BLOCK_BYTES) for n in chain])
        )

    async def _match(self, _held: Any, rng: random.Random) -> None:
        chain = _chain(rng)
        async with await self.blocks.match_prefix([encode_block_id(number) for number in chain]) as hit:
            for number, block in zip(chain, hit.numpy(), strict=False):
                self._verify(block, number)
                self.counts["hits"] += 1
                del block

    # -- caches of one's own --------------------------------------------------------------------------------------

    async def _hold(self, held: list[tuple[Any, int]], rng: random.Random) -> None:
        if len(held) == MOST_HELD:
            await self._let_go(held, rng)
        size_bytes, number = rng.randrange(1, MOST_BYTES), rng.getrandbits(40)
        most_bytes = rng.choice([size_bytes, LARGEST_BYTES])
        cache = await self.caches.request_cache(size_bytes, max_size=most_bytes, timeout_s=WAIT_S)
        cache.numpy("uint8", (size_bytes,))[:] = content(number, size_bytes)
        held.append((cache, number))

    async def _resize(self, held: list[tuple[Any, int]], rng: random.Random) -> None:
        growing = [(cache, number) for cache, number in held if cache.max_size_bytes > cache.size_bytes]
        if not growing:
            await self._hold(held, rng)
            return
        cache, number = rng.choice(growing)
        before, size_bytes = cache.size_bytes, rng.randrange(1, cache.max_size_bytes)
        try:
            await cache.resize(size_bytes, timeout_s=WAIT_S)
            self.counts["resized"] += 1
        except CapacityError:
            size_bytes = before
            raise
        finally:
            view = cache.numpy("uint8", (size_bytes,))
            kept = min(before, size_bytes)
            self._verify(view[:kept], number)
            view[kept:] = content(number, size_bytes)[kept:]
            del view

    async def _let_go(self, held: list[tuple[Any, int]], rng: random.Random) -> None:
        if held:
            cache, number = held.pop(rng.randrange(len(held)))
            self._verify(cache.numpy("uint8", (cache.size_bytes,)), number)
            await cache.release()

    # -- what an operator does ------------------------------------------------------------------------------------

    async def _evict(self, _held: Any, rng: random.Random) -> None:
        await self.pool.evict(size=rng.choice([16 * KIB, 128 * KIB]))

    async def _defragment(self, _held: Any, _rng: random.Random) -> None:
        await self.pool.defragment()


def _chain(rng: random.Random) -> range:
    first = 10_000 + CHAIN_BLOCKS * rng.randrange(CHAINS)
    return range(first, first + rng.randrange(1, CHAIN_BLOCKS + 1))
