"""Growth in place: blocks handed out inside a cache, beside a plain list; a cache resized by 1 GiB, up and down."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

from kvpool.bench.rows import median, quantile, row
from kvpool.client.cache import VirtualKVCache
from kvpool.client.temporary import temporary_pool
from kvpool.errors import ensure
from kvpool.memory.block_space import BlockSpace
from kvpool.sizes import GIB, KIB, MIB

_BATCH = 16
_BATCHES = 20_000
_LIVE_BATCHES = 256
_ROUNDS = 5
_RESIZES = 100
_KEPT_BYTES = 4 * MIB
_BLOCK_BYTES = 256 * KIB


async def measure() -> dict[str, Any]:
    """Run the benchmark with a pool of its own; returns ``{"bench": "blocks", "rows": [...]}``. Takes 1.1 GiB."""
    rows = [_space_row()]
    async with temporary_pool(
        name=f"bench-{os.getpid()}", devices="host:1x1152MiB", page_size="2MiB", timeout_s=120.0
    ) as pool:
        async with await pool.request_cache("bench", size_mb=2, max_size_mb=512) as cache:
            rows += await _allocator_rows(cache)
        async with await pool.request_cache("bench", size=_KEPT_BYTES, max_size="1028MiB") as cache:
            rows += await _resize_rows(cache)
        await pool.trim()
        stats = await pool.stats()
        leaked_bytes = stats.total("backed_bytes") + stats.total("live_bytes")
        rows.append(row("left when all is released", leaked_bytes, "bytes"))
    return {"bench": "blocks", "rows": rows}


def _space_row() -> dict[str, Any]:
    """Time the decisions alone."""
    count = 2 * _BATCH * _LIVE_BATCHES
    rates = []
    baselines = []
    for _ in range(_ROUNDS):
        space = BlockSpace(count, 8, count, range(count // 8))
        rates.append(_churn(space.allocate, space.free))
        baselines.append(_churn(*_plain(count)))
    return row("decisions alone, batches of 16, beside a plain list", median(rates), "blocks/s", median(baselines))


def _plain(count: int) -> tuple[Any, Any]:
    """Return what takes numbers from the end of a list and puts them back, and checks nothing."""
    numbers = list(range(count))

    def allocate(wanted: int) -> list[int]:
        taken = numbers[-wanted:]
        del numbers[-wanted:]
        return taken

    return allocate, numbers.extend


def _churn(allocate: Any, free: Any) -> float:
    """Return blocks a second that are allocated and freed, in batches, while many others are in use."""
    live = [allocate(_BATCH) for _ in range(_LIVE_BATCHES)]
    began = time.perf_counter()
    for number in range(_BATCHES):
        place = number * 7919 % _LIVE_BATCHES
        free(live[place])
        live[place] = allocate(_BATCH)
    seconds = time.perf_counter() - began
    for numbers in live:
        free(numbers)
    return _BATCHES * _BATCH / seconds


async def _allocator_rows(cache: VirtualKVCache) -> list[dict[str, Any]]:
    blocks = cache.block_allocator(_BLOCK_BYTES)
    needed = _BATCH * (_LIVE_BATCHES // 4)
    began = time.perf_counter()
    await blocks.reserve(needed)
    reserve_s = time.perf_counter() - began
    rates = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        for _ in range(_BATCHES):
            blocks.free(blocks.allocate(_BATCH))
        rates.append(_BATCHES * _BATCH / (time.perf_counter() - began))
        await blocks.reserve(needed)
    began = time.perf_counter()
    given_back = await blocks.trim()
    trim_s = time.perf_counter() - began
    ensure(given_back >= needed, "what was reserved is given back", blocks=given_back)
    blocks.close()
    return [
        row("allocated and freed in batches of 16, no call", median(rates), "blocks/s"),
        row("reserve: memory for 256 MiB of blocks", 1000 * reserve_s, "ms"),
        row("trim: the same memory given back", 1000 * trim_s, "ms"),
    ]


async def _resize_rows(cache: VirtualKVCache) -> list[dict[str, Any]]:
    view = cache.numpy("uint32", cache.max_size_bytes // 4)
    kept = view[: _KEPT_BYTES // 4]
    kept[:] = range(_KEPT_BYTES // 4)
    up, down = [], []
    for number in range(_RESIZES):
        began = time.perf_counter()
        await cache.resize(_KEPT_BYTES + GIB)
        up.append(time.perf_counter() - began)
        view[_KEPT_BYTES // 4 :: KIB] = number + 1  # once a page of the kernel
        began = time.perf_counter()
        await cache.resize(_KEPT_BYTES)
        down.append(time.perf_counter() - began)
        ensure(not view[_KEPT_BYTES // 4 :: 512 * KIB].any(), "what was given back reads as zeros", round=number)
    changed = sum(int(word) != number for number, word in enumerate(kept.tolist()))
    ensure(changed == 0, "no byte of what stays has changed", words=changed)
    del view, kept
    await asyncio.sleep(0)
    return [
        row("resize up by 1 GiB in pages of 2 MiB, median of 100", 1000 * median(up), "ms"),
        row("the same, p99", 1000 * quantile(up, 0.99), "ms"),
        row("resize down by 1 GiB, median of 100", 1000 * median(down), "ms"),
        row("words of the part that stays that changed", changed, "words"),
    ]
