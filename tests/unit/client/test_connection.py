"""What a connection does in the background, when its event loop ends."""

from __future__ import annotations

import asyncio
import gc
import logging
import warnings

import pytest

from kvpool.client.connection import Connection
from kvpool.errors import CacheStateError


class Left:
    """As much of a connection as work in the background needs."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._background: set[asyncio.Task[object]] = set()
        self._exiting = False


def test_a_loop_that_ends_leaves_no_coroutine_that_nobody_awaits():
    async def work() -> None:
        raise AssertionError("the loop ended before")

    async def leave() -> None:
        Connection.spawn(Left(), work, "work")  # type: ignore[arg-type]

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        asyncio.run(leave())
        gc.collect()
    assert [str(each.message) for each in told if "never awaited" in str(each.message)] == []


async def test_a_process_that_starts_no_threads_any_more_ends_its_work_without_a_word(caplog):
    connection = Left()
    await connection.loop.shutdown_default_executor()

    async def work() -> None:
        await Connection.in_thread(connection, print)  # type: ignore[arg-type]

    with caplog.at_level(logging.INFO):
        Connection.spawn(connection, work, "work")  # type: ignore[arg-type]
        await asyncio.gather(*connection._background)
    assert connection._exiting
    assert caplog.messages == []
    with pytest.raises(CacheStateError, match="this process ends"):
        await work()


async def test_what_fails_in_a_thread_is_raised_and_ends_nothing(caplog):
    connection = Left()

    def fail() -> None:
        raise RuntimeError("at its shutdown")

    async def work() -> None:
        await Connection.in_thread(connection, fail)  # type: ignore[arg-type]

    with pytest.raises(RuntimeError, match="at its shutdown"):
        await work()
    assert not connection._exiting
    Connection.spawn(connection, work, "work in the background")  # type: ignore[arg-type]
    await asyncio.gather(*connection._background)
    assert caplog.messages == ["work in the background"]
    assert "at its shutdown" in caplog.text
