"""Eight processes that do everything at once, some of them killed, while memory is compacted and evicted."""

import asyncio
import os
import random
import signal
from collections import Counter

import pytest
import ray
from footprint import state
from pool_actors import until
from storm_process import StormProcess

PROCESSES = 8
KILLED = 3
OPERATIONS = int(os.environ.get("STORM_OPERATIONS", "4000"))
"""Of all processes together. The figure that counts is 100,000."""
DEADLINE_S = 240 + OPERATIONS / 100


@pytest.mark.timeout(DEADLINE_S + 60)
async def test_everything_at_once_with_kills_reads_no_wrong_byte_and_leaves_nothing(make_pool):
    rng = random.Random(7)
    pool = await make_pool("host:2x4MiB", page_size="64KiB")  # all want some more than that
    share = OPERATIONS // PROCESSES
    counts, pids, killed = Counter(), [], []

    async def process(number: int, killed_at: int | None) -> None:
        client = StormProcess.remote()
        pid = await client.connect.remote(pool.name)
        pids.append(pid)
        running = client.run.remote(share, number)
        if killed_at is None:
            counts.update(await running)
            ray.kill(client)
            return
        done = await client.reached.remote(killed_at)
        os.kill(pid, signal.SIGKILL)  # while it holds caches, and waits for others
        counts.update(done)
        (ended,) = await asyncio.gather(running, return_exceptions=True)
        assert isinstance(ended, ray.exceptions.RayActorError)
        killed.append(pid)
        another = StormProcess.remote()  # does what is left of its share
        pids.append(await another.connect.remote(pool.name))
        counts.update(await another.run.remote(share - done["operations"], PROCESSES + number))
        ray.kill(another)

    ends = [rng.randrange(share // 10, share * 3 // 4) for _ in range(KILLED)] + [None] * (PROCESSES - KILLED)
    async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as group:
        for number, end in enumerate(ends):
            group.create_task(process(number, end))

    stats = await pool.stats()
    moved_bytes = stats.total("compacted_bytes")
    print(f"\n{dict(counts)}, {moved_bytes} bytes moved, evicted: {stats.evictions_by_reason}")
    assert counts["operations"] == share * PROCESSES
    assert counts["wrong"] == 0
    assert len(killed) == stats.clients_died == KILLED
    for way in ("hits", "resized", "sealed"):
        assert counts[way] > OPERATIONS / 50, way
    assert moved_bytes > 0
    assert min(stats.evictions_by_reason[reason] for reason in ("capacity", "request")) > 0
    await until(lambda: all(state(pid) in ("gone", "Z") for pid in pids), "the end of the clients")
