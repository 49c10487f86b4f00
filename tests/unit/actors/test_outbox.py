"""Operations on their way to a device that has a bug."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from kvpool.actors.outbox import Outbox
from kvpool.pool.instructions import Send


class BuggyDevice:
    """Fails at the first batch, whatever it is."""

    def __init__(self) -> None:
        self.batches = 0
        self.apply = self

    async def remote(self, operations: list[Any]) -> tuple[list[Any], tuple[int, int]]:
        self.batches += 1
        if self.batches == 1:
            raise ZeroDivisionError("division by zero")
        return ["done"] * len(operations), (7, 0)


async def test_a_bug_of_a_device_keeps_nobody_waiting(caplog: pytest.LogCaptureFixture) -> None:
    told: asyncio.Queue[tuple[Any, ...]] = asyncio.Queue()

    def answered(sent: list[Send], answers: list[Any], zombies: tuple[int, int]) -> None:
        told.put_nowait(([send.operation for send in sent], answers, zombies))

    def lost(_sent: list[Send], reason: str) -> None:
        pytest.fail(reason)

    outbox = Outbox(BuggyDevice(), answered, lost)
    with caplog.at_level(logging.ERROR, "kvpool.pool"):
        outbox.put(Send(0, ("allocate",), lambda _answer, _now: None))
        outbox.put(Send(0, ("trim",), lambda _answer, _now: None))
        operations, answers, zombies = await asyncio.wait_for(told.get(), 60)
        outbox.put(Send(0, ("compact",), lambda _answer, _now: None))
        assert await asyncio.wait_for(told.get(), 60) == ([("compact",)], ["done"], (7, 0))
    assert operations == [("allocate",), ("trim",)]
    assert [answer[:2] for answer in answers] == [("error", "InvariantError")] * 2
    assert "division by zero" in answers[0][2]
    assert zombies == (0, 0), "older than any figure, so it changes none"
    assert "could not answer ['allocate', 'trim']" in caplog.text
