"""Pools that end with the work for which they were started, also where a signal ends it."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from command_line import RAY_LOG, SIGN_OF_LIFE, start_process
from pool_actors import until

from kvpool.actors.cluster import pool_names
from kvpool.client import CachePool
from kvpool.client.temporary import temporary_pool
from kvpool.errors import InvalidRequestError

NAME = f"temporary-{os.getpid()}"
SETTINGS = {"name": NAME, "devices": "host:1x4MiB"}


async def write(pool: CachePool, written: asyncio.Event) -> None:
    """Hold a tensor over memory of the pool until this is cancelled."""
    async with await pool.request_cache("m", size="1MiB") as cache:
        view = cache.numpy("uint8", (1 << 20,))
        view[:] = 1
        written.set()
        await asyncio.sleep(600)
        del view


async def test_it_is_there_in_the_block_and_gone_after_it() -> None:
    async with temporary_pool(**SETTINGS) as pool, await pool.request_cache("m", size="1MiB"):
        assert NAME in pool_names()
    assert NAME not in pool_names()


async def test_a_tensor_of_the_work_that_is_cancelled_does_not_keep_it() -> None:
    written = asyncio.Event()

    async def work() -> None:
        async with temporary_pool(**SETTINGS) as pool:
            await write(pool, written)

    working = asyncio.ensure_future(work())
    await written.wait()
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    assert NAME not in pool_names()


async def test_a_start_that_is_cancelled_leaves_nothing() -> None:
    async def work() -> None:
        async with temporary_pool(**SETTINGS):
            pytest.fail("it was cancelled before")

    working = asyncio.ensure_future(work())
    await until(lambda: NAME in pool_names(), "the pool is being started")
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    assert NAME not in pool_names()


@pytest.mark.parametrize("error", [None, InvalidRequestError("enough")], ids=["ends well", "fails"])
async def test_a_tensor_that_lives_on_elsewhere_does_not_keep_it_either(error: InvalidRequestError | None) -> None:
    kept: list[Any] = []

    async def work() -> None:
        nonlocal connection
        async with temporary_pool(**SETTINGS) as connection:
            async with await connection.request_cache("m", size="1MiB") as cache:
                kept.append(cache.numpy("uint8", (1 << 20,)))
                kept[0][:] = 7
            if error is not None:
                raise error

    connection: CachePool | None = None
    with nullcontext() if error is None else pytest.raises(InvalidRequestError, match="enough"):
        await work()
    assert NAME not in pool_names()
    assert kept[0].min() == 7
    kept.clear()
    assert connection is not None
    await connection.close()


REPLAY = ("replay", "--devices", "host:2x4MiB", "--block-bytes", "8192")


@pytest.mark.parametrize(
    ("arguments", "number", "when"),
    [
        (("bench", "quotas"), signal.SIGINT, "while it starts"),
        (("bench", "quotas"), signal.SIGTERM, "at work"),
        (("bench", "waiting"), signal.SIGINT, "at work"),
        (REPLAY, signal.SIGTERM, "while it starts"),
        (REPLAY, signal.SIGINT, "at work"),
    ],
    ids=["quotas-starting", "quotas", "waiting", "replay-starting", "replay"],
)
async def test_a_signal_leaves_no_pool_and_is_told_in_a_word(
    arguments: tuple[str, ...], number: signal.Signals, when: str, tmp_path: Path
) -> None:
    process = await start_process(*arguments, folder=tmp_path)
    name = f"{arguments[0]}-{process.pid}"
    async with asyncio.timeout(240):
        await until(lambda: name in pool_names(), "the pool is being started")
        if when == "at work":
            pool = await CachePool.connect(name)

            async def used() -> bool:
                return bool((await pool.stats()).total("live_bytes"))

            await until(used, "its memory is used")
            await pool.close()
        for _ in range(2):  # as timeout does, and who presses Ctrl-C again
            process.send_signal(number)
        printed, complaints = await process.communicate()
    assert name not in pool_names()
    told = complaints.decode().splitlines()
    assert [line for line in told if not RAY_LOG.match(line) and not SIGN_OF_LIFE.match(line)] == [
        "kvpool: interrupted"
    ]
    assert (process.returncode, printed) == (128 + number, b"")
