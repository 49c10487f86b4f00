"""Memory that comes back while others wait for it: by a release past a long line, and by the death of a client."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from typing import Any

from kvpool.actors.cluster import address, call, kill, make_worker
from kvpool.bench.concurrency import NoOp
from kvpool.bench.rows import median, row
from kvpool.client import CachePool, Model, VirtualKVCache
from kvpool.client.temporary import temporary_pool
from kvpool.errors import ensure

SIZE_BYTES = 64 * 1024
CAPACITY_BYTES = 16 << 20
WAITING = 2000
_ROUNDS = 25
_KILLS = 5
_TIMEOUT_S = 300.0


async def hold(name: str) -> None:
    """Lease all memory of a pool, say so, and keep it until this process is killed."""
    pool = await CachePool.connect(name)
    model = await pool.model("bench")
    caches = await asyncio.gather(*(model.request_cache(SIZE_BYTES) for _ in range(_count())))
    for cache in caches:
        cache.numpy("uint8", (SIZE_BYTES,))[:] = 1
    print("holding", flush=True)
    await asyncio.get_running_loop().create_future()


async def measure() -> dict[str, Any]:
    """Run the benchmark on a pool of its own; returns ``{"bench": ..., "rows": [...]}``."""
    async with temporary_pool(
        name=f"bench-{os.getpid()}", devices=f"host:1x{CAPACITY_BYTES}", page_size=SIZE_BYTES, reserve=1.0
    ) as pool:
        floor = make_worker(NoOp)
        try:
            model = await pool.model("bench")
            floor_ms = await _floor_ms(floor)
            acknowledged_ms, granted_ms = await _release_rounds(pool, model)
            killed_ms = [await _kill_round(pool, model) for _ in range(_KILLS)]
        finally:
            kill(floor)
    line = f"{WAITING} waiting"
    rows = [
        row(f"{line}: release acknowledged, beside a no-op call", median(acknowledged_ms), "ms", floor_ms),
        row(f"{line}: next one granted, beside a no-op call", median(granted_ms), "ms", floor_ms),
        row(f"{line}: next one granted, worst round", max(granted_ms), "ms", floor_ms),
        row("client killed (SIGKILL): its memory granted", median(killed_ms), "ms", floor_ms),
        row("client killed (SIGKILL): its memory granted, worst round", max(killed_ms), "ms", floor_ms),
    ]
    return {"bench": "waiting", "rows": rows}


def _count() -> int:
    return CAPACITY_BYTES // SIZE_BYTES


async def _floor_ms(floor: Any) -> float:
    times = []
    for _ in range(200):
        began = time.perf_counter()
        await call(floor.nothing, None)
        times.append(1000 * (time.perf_counter() - began))
    return median(times)


Granted = asyncio.Queue[tuple[VirtualKVCache, float]]


async def _request(model: Model, granted: Granted) -> None:
    """Wait for memory; tells the cache and when it came."""
    cache = await model.request_cache(SIZE_BYTES, timeout_s=_TIMEOUT_S)
    granted.put_nowait((cache, time.perf_counter()))


async def _release_rounds(pool: CachePool, model: Model) -> tuple[list[float], list[float]]:
    """Release one cache of a full pool, again and again, and let the line grow again by one."""
    held = list(await asyncio.gather(*(model.request_cache(SIZE_BYTES) for _ in range(_count()))))
    granted: Granted = asyncio.Queue()
    waiting = [asyncio.ensure_future(_request(model, granted)) for _ in range(WAITING)]
    acknowledged_ms: list[float] = []
    granted_ms: list[float] = []
    try:
        for _ in range(_ROUNDS):
            await _in_line(pool, WAITING)
            began = time.perf_counter()
            await held.pop().release()
            acknowledged_ms.append(1000 * (time.perf_counter() - began))
            cache, came = await granted.get()
            granted_ms.append(1000 * (came - began))
            held.append(cache)
            waiting.append(asyncio.ensure_future(_request(model, granted)))
    finally:
        for request in waiting:
            request.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await asyncio.gather(*(cache.release() for cache in held))
    return acknowledged_ms, granted_ms


async def _in_line(pool: CachePool, count: int) -> None:
    """Return when that many requests wait."""
    while (await pool.stats()).waiting != count:
        pass


async def _kill_round(pool: CachePool, model: Model) -> float:
    """Kill a client that leases everything; returns the milliseconds until a request that waits has its memory.

    The client is a process of its own: for a worker Ray would print on our standard output that it died.
    """
    holder = await asyncio.create_subprocess_exec(
        sys.executable, "-m", __name__, pool.name,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
        env=os.environ | {"RAY_ADDRESS": address()},
    )  # fmt: skip
    try:
        said = await holder.stdout.readline() if holder.stdout else b""
        ensure(said == b"holding\n", "the client to be killed leases everything")
        granted: Granted = asyncio.Queue()
        waiting = asyncio.ensure_future(_request(model, granted))
        await _in_line(pool, 1)
    finally:
        began = time.perf_counter()
        holder.kill()
    await waiting
    cache, came = granted.get_nowait()
    await cache.release()
    await holder.wait()
    return 1000 * (came - began)


if __name__ == "__main__":
    asyncio.run(hold(sys.argv[1]))
