"""SIGKILL in the middle of writing, 50 times: what was acknowledged holds, and nothing reads back wrong."""

import asyncio
import os
import random
import sys
from collections import Counter
from pathlib import Path

import durable_writer
from disk_stores import key_of, read
from durable_writer import CACHES, stored_content

KILLS = 50
MOST_LINES = 40
DEADLINE_S = 60.0


async def test_fifty_kills_at_random_moments(open_tier, tmp_path):
    rng = random.Random(20)
    folder = str(tmp_path / "tier")
    tests = Path(durable_writer.__file__).parent
    writer = await asyncio.create_subprocess_exec(
        sys.executable, tests / "durable_writer.py", folder,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(tests)},
    )  # fmt: skip
    said: dict[str, set[int]] = {"stored": set(), "removed": set()}
    found: Counter[str] = Counter()
    try:
        for life in range(KILLS):
            async with asyncio.timeout(DEADLINE_S):
                await one_life(writer, life * CACHES, rng, said)
            tier = await open_tier(folder)  # the lock went with the process
            found["leftovers"] += tier.statistics().leftover_files
            numbers = range(life * CACHES, (life + 1) * CACHES)
            found["unacknowledged"] += await check(tier, numbers, said)
            await tier.close()
        tier = await open_tier(folder)
        await check(tier, range(KILLS * CACHES), said)
        figures = tier.statistics()
        assert (figures.bad_files, figures.errors, figures.leftover_files) == ({}, {}, 0)
    finally:
        writer.stdin.close()
        await writer.wait()
    assert len(said["stored"]) > 5 * KILLS
    assert len(said["removed"]) > KILLS // 5
    assert found["leftovers"] > 0, "some kills came in the middle of a file"
    assert found["unacknowledged"] > 0


async def one_life(writer, first, rng, said):
    """Let a child write, and die after some lines and some moments more; take in what it said."""
    writer.stdin.write(f"{first} {rng.randrange(1, MOST_LINES)} {rng.random() * 0.005}\n".encode())
    while (line := (await writer.stdout.readline()).decode().split()) != ["dead"]:
        assert line, "the writer has failed"
        said[line[0]].add(int(line[1]))


async def check(tier, numbers, said):
    """Read all of these; returns how many are there that nobody acknowledged."""
    unacknowledged = 0
    for number in numbers:
        content = await read(tier, key_of(number))
        if number in said["removed"]:
            assert content is None, f"{number} came back"
        elif content is None:
            # Killed between the removal and its acknowledgement, it is gone rightly.
            assert number not in said["stored"] or number % 7 == 6, f"{number} is lost"
        else:
            assert content == stored_content(number), f"{number} reads back wrong"
            unacknowledged += number not in said["stored"]
    return unacknowledged
