"""Eight processes that do everything at once, some of them killed, while memory is compacted and evicted."""

import asyncio
import os
import random
import signal

import ray
from footprint import state
from pool_actors import until
from storm_process import StormProcess

PROCESSES = 8
KILLED = 3
OPERATIONS = int(os.environ.get("STORM_OPERATIONS", "4000"))
"""Of all processes together. The figure that counts is 100,000."""
DEADLINE_S = 60 + OPERATIONS / 100


async def test_everything_at_once_with_kills_reads_no_wrong_byte_and_leaves_nothing(make_pool):
    rng = random.Random(7)
    pool = await make_pool("host:2x4MiB", page_size="64KiB")  # some 15 MB are in use by turns
    clients = [StormProcess.remote() for _ in range(PROCESSES)]
    pids = await asyncio.gather(*(client.connect.remote(pool.name) for client in clients))

    async def keep_moving():
        while True:
            await pool.defragment()
            await pool.evict(size=rng.choice(["256KiB", "1MiB"]))
            await asyncio.sleep(0.05)

    async with asyncio.timeout(DEADLINE_S):
        moving = asyncio.create_task(keep_moving())
        runs = [client.run.remote(OPERATIONS // PROCESSES, seed) for seed, client in enumerate(clients)]
        for pid in pids[:KILLED]:  # while they hold caches, and wait for others
            await asyncio.sleep(OPERATIONS / 8000 * rng.random())
            os.kill(pid, signal.SIGKILL)
        ended = await asyncio.gather(*runs, return_exceptions=True)
        moving.cancel()
        failed = await asyncio.gather(moving, return_exceptions=True)
    assert [type(each) for each in failed] == [asyncio.CancelledError]

    counts = [each for each in ended if isinstance(each, dict)]
    print(f"\n{counts}")
    assert all(isinstance(each, dict | ray.exceptions.RayActorError) for each in ended), ended
    assert len(counts) >= PROCESSES - KILLED
    assert sum(each["wrong"] for each in counts) == 0
    for way in ("hits", "resized", "sealed"):
        assert sum(each[way] for each in counts) > 0
    for client in clients:
        ray.kill(client)
    await until(lambda: all(state(pid) in ("gone", "Z") for pid in pids), "the end of the clients")
