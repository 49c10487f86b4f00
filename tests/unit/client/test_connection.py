"""What a connection does in the background, when its event loop ends."""

from __future__ import annotations

import asyncio
import gc
import warnings

from kvpool.client.connection import Connection


class Left:
    """As much of a connection as work in the background needs."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._background: set[asyncio.Task[object]] = set()


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
