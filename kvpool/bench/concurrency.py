"""Many requests at once: merged, beside unmerged calls of the same actors and calls of an actor that does nothing.

And with telemetry beside without.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

from kvpool.actors.cluster import call, kill, make_worker
from kvpool.bench import telemetry
from kvpool.bench.rows import median, quantile, row
from kvpool.client import CachePool, Model
from kvpool.client.temporary import temporary_pool

SIZE_BYTES = 64 * 1024
MANY = 1000
_ROUNDS = 15
_SINGLES = 400


class NoOp:
    """The floor: an async actor whose method does nothing."""

    async def nothing(self, content: Any) -> Any:
        """Return what came."""
        return content


async def measure() -> dict[str, Any]:
    """Run the benchmark on a pool of its own; returns ``{"bench": ..., "rows": [...]}``."""
    with_telemetry = telemetry.is_measurable()
    if not with_telemetry:
        print("telemetry is not measured: pip install 'kvpool[otlp]'", file=sys.stderr)
    async with temporary_pool(name=f"bench-{os.getpid()}", devices="host:1x256MiB") as pool:
        floor = make_worker(NoOp)
        try:
            model = await pool.model("bench")
            await _merged(model, MANY)  # pages are created, mapped and warm from here on
            rows = await _rows(pool, model, floor)
        finally:
            kill(floor)
    return {"bench": "concurrency", "rows": rows + (await telemetry.rows() if with_telemetry else [])}


async def _rows(pool: CachePool, model: Model, floor: Any) -> list[dict[str, Any]]:
    item = (1, model.number, SIZE_BYTES, SIZE_BYTES, 30.0, None)
    alone: list[float] = []
    nothing: list[float] = []
    for _ in range(_SINGLES):
        alone += (await _merged(model, 1))[1]
        began = time.perf_counter()
        await call(floor.nothing, [item])
        nothing.append(time.perf_counter() - began)
    hundred = [await _merged(model, 100) for _ in range(_ROUNDS)]
    many: list[tuple[float, list[float]]] = []
    unmerged: list[tuple[float, list[float]]] = []
    floors: list[float] = []
    for _ in range(_ROUNDS):
        many.append(await _merged(model, MANY))
        unmerged.append(await _unmerged(pool, item))
        began = time.perf_counter()
        await asyncio.gather(*(call(floor.nothing, [item]) for _ in range(MANY)))
        floors.append(MANY / (time.perf_counter() - began))
    rate = median([MANY / seconds for seconds, _ in many])
    unmerged_rate = median([MANY / seconds for seconds, _ in unmerged])
    return [
        row("1 request: p50, beside a no-op call", 1000 * median(alone), "ms", 1000 * median(nothing)),
        row("1 request: p99, beside a no-op call", 1000 * quantile(alone, 0.99), "ms", 1000 * quantile(nothing, 0.99)),
        row("100 concurrent: rate, beside 1000 unmerged", median([100 / s for s, _ in hundred]), "1/s", unmerged_rate),
        row("100 concurrent: p99", 1000 * median([quantile(times, 0.99) for _, times in hundred]), "ms"),
        row("1000 concurrent: rate, beside 1000 unmerged", rate, "1/s", unmerged_rate),
        row("1000 concurrent: rate, beside 1000 no-op calls", rate, "1/s", median(floors)),
        row(
            "1000 concurrent: p99, beside 1000 unmerged",
            1000 * median([quantile(times, 0.99) for _, times in many]),
            "ms",
            1000 * median([quantile(times, 0.99) for _, times in unmerged]),
        ),
        row("1000 concurrent: p99, worst round", 1000 * max(quantile(times, 0.99) for _, times in many), "ms"),
    ]


async def _timed(count: int, one: Callable[[], Awaitable[Any]]) -> tuple[float, list[float], list[Any]]:
    times: list[float] = []

    async def timed() -> Any:
        began = time.perf_counter()
        got = await one()
        times.append(time.perf_counter() - began)
        return got

    began = time.perf_counter()
    results = await asyncio.gather(*(timed() for _ in range(count)))
    return time.perf_counter() - began, times, results


async def _merged(model: Model, count: int) -> tuple[float, list[float]]:
    seconds, times, caches = await _timed(count, lambda: model.request_cache(SIZE_BYTES))
    await asyncio.gather(*(cache.release() for cache in caches))
    return seconds, times


async def _unmerged(pool: CachePool, item: tuple[Any, ...]) -> tuple[float, list[float]]:
    """Make the same requests of the same actors, each in a call of its own (and without a handle made of it)."""
    actor, client = pool.actor, pool.client_id
    seconds, times, answers = await _timed(MANY, lambda: call(actor.request_caches, client, [item]))
    await call(actor.release, client, [(1, [answer[0][1] for answer in answers], None)])
    return seconds, times
