"""What a client of a pool notices of compaction in the background, beside a pool that never compacts."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

import numpy as np

from kvpool.bench.rows import quantile, row
from kvpool.cache.key import encode_block_id
from kvpool.client import CachePool, Model, ModelSpec
from kvpool.client.temporary import temporary_pool
from kvpool.errors import ensure
from kvpool.sizes import KIB, MIB, format_size

_CAPACITY_BYTES = 256 * MIB
_PAGE_BYTES = 2 * MIB
_SIZE_BYTES = 64 * KIB
_REQUESTS = 1500
_AT_ONCE = 64
_BEGIN_S = 30.0
"""How long to wait for the first step."""


async def measure() -> list[dict[str, Any]]:
    """Return the rows. Two pools of their own, asked in turn, so that whatever else goes on meets both."""
    beside, without = (
        temporary_pool(
            name=f"bench-{name}-{os.getpid()}",
            devices=f"host:1x{_CAPACITY_BYTES}",
            page_size=_PAGE_BYTES,
            reserve=1.0,
            compaction_threshold=threshold,
        )
        for name, threshold in (("beside", 0.0), ("without", 1.0))
    )
    async with beside as compacting, without as other:
        return await _rows(compacting, other)


async def _rows(beside: CachePool, without: CachePool) -> list[dict[str, Any]]:
    for pool in (without, beside):  # the one that compacts last: it begins within a second
        await _make_holes(pool)
    begin = time.monotonic()
    while not (before := (await beside.stats()).total("compacted_bytes")):
        ensure(time.monotonic() < begin + _BEGIN_S, "compaction begins where every other cache has gone")
        await asyncio.sleep(0.01)
    models = [await pool.model("client") for pool in (beside, without)]
    latencies: tuple[list[float], list[float]] = [], []
    for number in range(_REQUESTS):
        for which in (0, 1) if number % 2 else (1, 0):
            latencies[which].append(await _request_s(models[which]))
    moved_bytes = (await beside.stats()).total("compacted_bytes") - before
    ensure((await without.stats()).total("compacted_bytes") == 0, "the other pool does not compact")
    of = f"request of {format_size(_SIZE_BYTES)} to a pool"
    rows = []
    for share in (0.5, 0.99):
        name = f"{of}, p{share * 100:g}, with compaction in the background, beside without"
        rows.append(row(name, quantile(latencies[0], share) * 1e3, "ms", quantile(latencies[1], share) * 1e3))
    return [*rows, row("moved meanwhile", moved_bytes / MIB, "MiB")]


async def _make_holes(pool: CachePool) -> None:
    """Fill a pool with the blocks of two models in turn, and evict one of them."""
    stays, goes = [await pool.model(ModelSpec(name, block_bytes=_SIZE_BYTES)) for name in ("stays", "goes")]
    block = np.ones((1, _SIZE_BYTES), np.uint8)
    for first in range(0, _CAPACITY_BYTES // _SIZE_BYTES, _AT_ONCE):
        numbers = range(first, first + _AT_ONCE)
        await asyncio.gather(*((stays, goes)[n % 2].put_blocks([encode_block_id(n << 8)], block) for n in numbers))
    await pool.evict("all", model=goes)


async def _request_s(model: Model) -> float:
    """Ask for a cache and give it back; returns the seconds until it was there."""
    began = time.perf_counter()
    cache = await model.request_cache(_SIZE_BYTES)
    took_s = time.perf_counter() - began
    await cache.release()
    return took_s
