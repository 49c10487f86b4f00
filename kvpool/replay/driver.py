"""Drives a replay: requests in the trace's order over several replicas, with few in flight."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvpool.actors.cluster import call, kill, make_worker
from kvpool.client import CachePool
from kvpool.client.temporary import temporary_pool
from kvpool.config import PoolConfig, load_config
from kvpool.errors import ConfigError, InvalidRequestError
from kvpool.pool.statistics import PoolStatistics
from kvpool.replay.content import BlockContent
from kvpool.replay.replica import Replica
from kvpool.sizes import MIB, round_up
from kvpool.workload import TraceRequest, unique_blocks

SAMPLES = 120
"""Points of the curves over time."""

_SPEEDS = {"max": 0.0, "1x": 1.0, "10x": 10.0}


@dataclass(frozen=True)
class ReplayPlan:
    """What is replayed on what.

    Parameters
    ----------
    devices
        ``host:2`` (memory follows from ``capacity``) or ``host:2x300MiB``.
    capacity
        Memory of all devices as a share of the trace's unique blocks.
    block_bytes
        Size of a block, a multiple of 8.
    replicas
        Model actors.
    in_flight
        Requests between their look-up and the end of their writes. More would count blocks that are still being
        written as misses.
    speed
        ``max``, or arrivals at ``1x`` or ``10x`` the trace's pace.
    pool
        Name of a running pool to use; None starts one for this replay and deletes it afterwards.
    """

    devices: str = "host:2"
    capacity: float = 0.05
    block_bytes: int = 65536
    replicas: int = 3
    in_flight: int = 3
    speed: str = "max"
    policy: str = "lru"
    pool: str | None = None


@dataclass
class ReplayResult:
    """What came out of a replay."""

    requests: int = 0
    blocks: int = 0
    blocks_hit: int = 0
    blocks_stored: int = 0
    verified_bytes: int = 0
    wrong_bytes: int = 0
    evictions: int = 0
    peak_bytes: int = 0
    capacity_bytes: int = 0
    seconds: float = 0.0
    policy: str = ""
    allocations_s: list[float] = field(default_factory=list)
    samples: list[dict[str, float]] = field(default_factory=list)

    @property
    def prefix_hit_ratio(self) -> float:
        """Leading resident blocks as a share of all blocks."""
        return self.blocks_hit / self.blocks if self.blocks else 0.0

    def allocation_ms(self, quantile: float) -> float:
        """Return a quantile of the time to get new blocks, milliseconds; 0 if there were none."""
        times = sorted(self.allocations_s)
        return 1000 * times[min(int(quantile * len(times)), len(times) - 1)] if times else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as built-in types."""
        return {
            "requests": self.requests,
            "blocks": self.blocks,
            "prefix_hit_ratio": self.prefix_hit_ratio,
            "blocks_hit": self.blocks_hit,
            "blocks_stored": self.blocks_stored,
            "verified_bytes": self.verified_bytes,
            "wrong_bytes": self.wrong_bytes,
            "evictions": self.evictions,
            "allocation_p50_ms": self.allocation_ms(0.50),
            "allocation_p99_ms": self.allocation_ms(0.99),
            "peak_memory_bytes": self.peak_bytes,
            "capacity_bytes": self.capacity_bytes,
            "seconds": self.seconds,
            "blocks_per_s": self.blocks / self.seconds if self.seconds else 0.0,
            "policy": self.policy,
            "samples": self.samples,
        }


def pool_config(plan: ReplayPlan, unique: int) -> PoolConfig:
    """Return the configuration of the pool that a replay starts for itself.

    Without a size in ``devices``, the memory of all devices together is ``capacity`` of the ``unique`` blocks, rounded
    up to whole pages, which are small enough to keep that rounding under half a percent; all those blocks fit.
    """
    settings: dict[str, Any] = {
        "name": f"replay-{os.getpid()}",
        "policy": plan.policy,
        "min_block": min(4096, 1 << (plan.block_bytes.bit_length() - 1)),
    }
    if "x" in plan.devices:
        return load_config(devices=plan.devices, **settings)
    if not 0 < plan.capacity <= 1:
        raise ConfigError(f"--capacity is a share of the unique blocks, above 0 and at most 1, not {plan.capacity}")
    count = len(load_config(devices=plan.devices).device_sizes_bytes())
    taken_bytes = round_up(plan.block_bytes, settings["min_block"])
    device_bytes = -(-max(round(plan.capacity * unique), count) // count) * taken_bytes
    if taken_bytes & (taken_bytes - 1):
        # In a page shared by such blocks the tail behind each would be too small for the next, so that as much as
        # half the memory held nothing: each gets whole pages of its own.
        page_bytes = taken_bytes & -taken_bytes
    else:
        page_bytes = max(4096, taken_bytes)
        while page_bytes < 2 * MIB and 2 * page_bytes * 256 <= device_bytes:
            page_bytes *= 2
    return load_config(devices=f"{plan.devices}x{round_up(device_bytes, page_bytes)}", page_size=page_bytes, **settings)


async def replay(
    requests: Sequence[TraceRequest], plan: ReplayPlan, progress: Callable[[int], None] = lambda _done: None
) -> ReplayResult:
    """Replay a trace; ``progress`` is called with the number of requests done.

    Raises
    ------
    InvalidRequestError
        If the trace has no block ids, or a part of the plan cannot be used.
    """
    if plan.speed not in _SPEEDS:
        raise InvalidRequestError(f"--speed is one of {', '.join(_SPEEDS)}, not {plan.speed!r}")
    if plan.replicas < 1 or plan.in_flight < 1:
        raise InvalidRequestError(
            f"replicas and requests in flight are at least 1, not {plan.replicas}, {plan.in_flight}"
        )
    if not any(request.hash_ids for request in requests):
        raise InvalidRequestError(
            "this trace has no block ids (arrivals and lengths only), so there is nothing to look up"
        )
    BlockContent(plan.block_bytes)
    config = pool_config(plan, unique_blocks(requests)) if plan.pool is None else None
    async with temporary_pool(config) if config else await CachePool.connect(plan.pool or "") as pool:
        replicas: list[Any] = []
        try:
            for _ in range(plan.replicas):
                replicas.append(make_worker(Replica, pool.name, "replayed", plan.block_bytes))
            await asyncio.gather(*(call(replica.start) for replica in replicas))
            result = await _Run(pool, replicas, requests, plan, progress).run()
            await asyncio.gather(*(call(replica.stop) for replica in replicas))
        finally:
            for replica in replicas:
                kill(replica)
    return result


class _Run:
    """One replay under way."""

    def __init__(
        self,
        pool: CachePool,
        replicas: Sequence[Any],
        requests: Sequence[TraceRequest],
        plan: ReplayPlan,
        progress: Callable[[int], None],
    ) -> None:
        self._pool = pool
        self._replicas = replicas
        self._requests = requests
        self._plan = plan
        self._progress = progress
        self._result = ReplayResult()
        self._evictions_before = 0
        self._began = 0.0

    async def run(self) -> ReplayResult:
        try:
            return await self._run()
        except ExceptionGroup as errors:  # of the requests in flight; the first is why the others ended
            raise errors.exceptions[0] from errors

    async def _run(self) -> ReplayResult:
        before = await self._pool.stats()
        self._evictions_before = before.evictions
        self._result.capacity_bytes = before.total("capacity_bytes")
        self._result.policy = before.policy
        room = asyncio.Semaphore(self._plan.in_flight)
        fills: set[asyncio.Task[None]] = set()
        speed = _SPEEDS[self._plan.speed]
        sample_every = max(1, len(self._requests) // SAMPLES)
        self._began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for number, request in enumerate(self._requests):
                if not request.hash_ids:
                    continue
                if speed:
                    due = self._began + request.timestamp_ms / 1000 / speed
                    await asyncio.sleep(max(0.0, due - time.perf_counter()))
                await room.acquire()
                replica = self._replicas[number % len(self._replicas)]
                # Awaited here, so that look-ups reach the pool in the trace's order.
                hits = await call(replica.look_up, number, list(request.hash_ids), request.output_length)
                self._result.requests += 1
                self._result.blocks += len(request.hash_ids)
                self._result.blocks_hit += hits
                task = group.create_task(self._fill(replica, number, room))
                fills.add(task)
                task.add_done_callback(fills.discard)
                if number % sample_every == 0:
                    self._sample(await self._pool.stats())
                    self._progress(number)
        self._result.seconds = time.perf_counter() - self._began
        self._sample(await self._pool.stats())
        self._progress(len(self._requests))
        return self._result

    async def _fill(self, replica: Any, number: int, room: asyncio.Semaphore) -> None:
        try:
            outcome = await call(replica.fill, number)
        finally:
            room.release()
        result = self._result
        result.verified_bytes += outcome["verified_bytes"]
        result.wrong_bytes += outcome["wrong_bytes"]
        result.blocks_stored += outcome["stored"]
        if outcome["allocation_s"] is not None:
            result.allocations_s.append(outcome["allocation_s"])

    def _sample(self, stats: PoolStatistics) -> None:
        result = self._result
        in_use = stats.total("backed_bytes")
        result.peak_bytes = max(result.peak_bytes, in_use)
        result.evictions = stats.evictions - self._evictions_before
        result.samples.append(
            {
                "seconds": time.perf_counter() - self._began,
                "requests": result.requests,
                "prefix_hit_ratio": result.prefix_hit_ratio,
                "memory_bytes": in_use,
                "evictions": result.evictions,
            }
        )
