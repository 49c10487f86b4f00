"""How soon a model gets what it is guaranteed while others idle, borrow or ask for all they can."""

from __future__ import annotations

import asyncio
import gc
import os
import time
from typing import Any

import numpy as np

from kvpool.bench.rows import median, row
from kvpool.cache.key import encode_block_id
from kvpool.client import CachePool, Model, ModelSpec, VirtualKVCache
from kvpool.client.temporary import temporary_pool
from kvpool.errors import CapacityError, ensure

SIZE_BYTES = 64 * 1024
CAPACITY_BYTES = 64 << 20
SHARE = 40
_ROUNDS = 10
_AT_ONCE = 64


async def measure() -> dict[str, Any]:
    """Run the benchmark on a pool of its own; returns ``{"bench": ..., "rows": [...]}``."""
    # What this process has imported is 200,000 objects, through which each full collection goes for 60 ms and more. A
    # process that minds such a pause freezes them once it has loaded its model, and what is measured here is the pool.
    gc.collect()
    gc.freeze()
    async with temporary_pool(
        name=f"bench-{os.getpid()}", devices=f"host:1x{CAPACITY_BYTES}", page_size=SIZE_BYTES, reserve=1.0
    ) as pool:
        owner, other = [await pool.model(ModelSpec(name, block_bytes=SIZE_BYTES)) for name in ("owner", "other")]
        for model in (owner, other):
            await pool.set_quota(model=model, guaranteed=f"{SHARE}%", limit="80%")
        count = CAPACITY_BYTES * SHARE // 100 // SIZE_BYTES
        idle_ms, borrowed_ms, burst_ms, first_ms, first_idle_ms = [], [], [], [], []
        for number in range(_ROUNDS):
            await pool.evict("all")
            first_idle_ms.append(await _take(owner, 1))
            idle_ms.append(await _take(owner, count))
            await _borrow(other, number)
            first_ms.append(await _take(owner, 1))
            await _borrow(other, number)
            borrowed_ms.append(await _take(owner, count))
            await _borrow(other, number)
            burst_ms.append(await _beside_a_burst(pool, owner, other, count))
    all_of_it = f"{count} caches of 64 KiB, its guarantee of {SHARE} %"
    idle, first_idle = median(idle_ms), median(first_idle_ms)
    rows = [
        row(f"{all_of_it}: in an empty pool", idle, "ms"),
        row("one cache: in an empty pool", first_idle, "ms"),
        row("one cache: another has borrowed all it may", median(first_ms), "ms", first_idle),
        row(f"{all_of_it}: another has borrowed all it may", median(borrowed_ms), "ms", idle),
        row(f"{all_of_it}: another has leased all it may, and waits for more", median(burst_ms), "ms", idle),
        row("the same, worst of 10 rounds", max(burst_ms), "ms", idle),
    ]
    return {"bench": "quotas", "rows": rows}


async def _take(model: Model, count: int) -> float:
    """Ask for that many caches at once and give them back; returns the milliseconds until all were there."""
    began = time.perf_counter()
    caches = await asyncio.gather(*(model.request_cache(SIZE_BYTES) for _ in range(count)))
    took_ms = 1000 * (time.perf_counter() - began)
    await asyncio.gather(*(cache.release() for cache in caches))
    return took_ms


async def _borrow(model: Model, number: int) -> None:
    """Let a model cache all that its limit lets it."""
    count = CAPACITY_BYTES // SIZE_BYTES
    blocks = np.ones((_AT_ONCE, SIZE_BYTES), np.uint8)
    for first in range(0, count, _AT_ONCE):
        keys = [encode_block_id((number * count + first + n) << 8) for n in range(_AT_ONCE)]
        await model.put_blocks(keys, blocks)


async def _beside_a_burst(pool: CachePool, owner: Model, other: Model, count: int) -> float:
    """Do as :func:`_take` while the other has leased all it may and waits for more; none may exceed its limit."""
    burst = [asyncio.ensure_future(other.request_cache(SIZE_BYTES, timeout_s=60.0)) for _ in range(2 * count)]
    try:
        while (await pool.stats()).waiting + sum(each.done() for each in burst) < len(burst):
            pass
        took_ms = await _take(owner, count)
        for quota in await pool.quotas():
            ensure(quota["held_bytes"] <= quota["limit_bytes"], "nobody holds more than its limit", quota=quota)
    finally:
        for request in burst:
            request.cancel()
        ended = await asyncio.gather(*burst, return_exceptions=True)
        await asyncio.gather(*(each.release() for each in ended if isinstance(each, VirtualKVCache)))
        for each in ended:
            if isinstance(each, BaseException) and not isinstance(each, (asyncio.CancelledError, CapacityError)):
                raise each
    return took_ms
