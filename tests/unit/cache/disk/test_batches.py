"""Whatever happens to a batch, nobody who asked for a part of it waits for ever."""

from __future__ import annotations

import asyncio
from collections import deque

import pytest

from kvpool.cache.disk.batches import Batches, Request, answered
from kvpool.cache.disk.threads import Threads
from kvpool.errors import TierError


class Failing(Batches[Request[None], None]):
    """Of which one step fails, once."""

    def __init__(self, threads: Threads, step: str, error: BaseException) -> None:
        super().__init__(threads)
        self._step, self._error = step, error

    def take(self, waiting: deque[Request[None]]) -> list[Request[None]]:
        batch = list(waiting)
        waiting.clear()
        return batch

    async def do(self, batch: list[Request[None]]) -> None:
        if self._step == "do":
            raise self._error

    async def finish(self, batch: list[Request[None]]) -> None:
        if self._step == "finish":
            raise self._error
        for request in batch:
            request.succeed(None)


@pytest.mark.parametrize("step", ["do", "finish"])
@pytest.mark.parametrize("error", [TierError("the store says no", cause="test"), asyncio.CancelledError()])
async def test_a_step_that_fails_answers_all(step: str, error: BaseException) -> None:
    batches = Failing(Threads(1, "test"), step, error)
    requests = [Request[None]() for _ in range(3)]
    for request in requests:
        batches.add(request)
    async with asyncio.timeout(60):
        await answered(requests)
    assert [type(request.done.exception()) for request in requests] == [type(error)] * 3
