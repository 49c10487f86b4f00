"""What comes of a device's answers when whoever asked is gone, or a decision has a bug."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from kvpool.actors.executor import Executor
from kvpool.actors.pool_telemetry import PoolTelemetry
from kvpool.errors import InvariantError
from kvpool.pool.instructions import Batch, CachesRequested, Send
from kvpool.pool.state import PoolState

PAGE = 65536


class Outbox:
    """Keeps what a device is sent."""

    def __init__(self) -> None:
        self.sent: list[Send] = []

    def put(self, send: Send) -> None:
        self.sent.append(send)


@pytest.fixture
def executor() -> Executor:
    state = PoolState("test", "lru", "least_loaded", 10)
    state.add_device("host-0", "here", 4 * PAGE, PAGE, 4096, 32 * PAGE)
    state.connect("c", "default", "here", "token")
    state.register_model("c", {"name": "m", "identity": {"model": "m"}, "block_bytes": None, "limit_bytes": None})
    return Executor(state, PoolTelemetry(state))


@pytest.fixture
def outbox(executor: Executor) -> Outbox:
    outbox = Outbox()
    executor.fleet._outboxes[0] = outbox  # type: ignore[assignment]
    return outbox


async def requested(executor: Executor) -> asyncio.Task[list[Any]]:
    batch = Batch(1)
    event = CachesRequested(batch, "c", [(1, 0, PAGE, PAGE, 0.0, 0, None)])
    task = asyncio.create_task(executor.finish(batch, executor._state.handle(event, 0.0)))
    await asyncio.sleep(0)
    return task


GRANTED = [(0, ((0, 1),), 0)]


async def test_who_asked_a_device_and_is_cancelled_keeps_nobody_waiting(
    executor: Executor, outbox: Outbox, caplog: pytest.LogCaptureFixture
) -> None:
    trim = asyncio.create_task(executor.fleet.operate(0, ("trim",)))
    await asyncio.sleep(0)
    waiting = await requested(executor)
    trim.cancel()
    await asyncio.wait([trim])
    executor._device_answered(0, outbox.sent, [PAGE, (GRANTED, [], None)], (1, 0))
    (answer,) = await asyncio.wait_for(waiting, 60)
    assert answer[0] == "granted"
    assert not caplog.records, "it is no bug"


async def test_a_bug_in_what_follows_on_one_operation_is_told_and_keeps_nobody_waiting(
    executor: Executor, outbox: Outbox, caplog: pytest.LogCaptureFixture
) -> None:
    def wrong(answer: Any, now: float) -> None:
        raise InvariantError("this is wrong")

    before = await requested(executor)
    executor.fleet.put(Send(0, ("trim",), wrong))
    behind = await requested(executor)
    with caplog.at_level(logging.ERROR, "kvpool.pool"):
        executor._device_answered(0, outbox.sent, [(GRANTED, [], None), PAGE, (GRANTED, [], None)], (1, 0))
    answers = [*await asyncio.wait_for(before, 60), *await asyncio.wait_for(behind, 60)]
    assert [answer[0] for answer in answers] == ["granted", "granted"]
    assert "'trim'" in caplog.text
    assert "this is wrong" in caplog.text


async def test_who_asked_a_lost_device_is_told_why_in_a_line(executor: Executor, outbox: Outbox) -> None:
    asked = await requested(executor)
    executor._device_lost(0, outbox.sent, "The actor died unexpectedly.\n\tclass_name: DeviceActor\n\tpid: 7")
    (answer,) = await asked
    assert answer[:2] == ("error", "DeviceLostError")
    assert answer[2].endswith("only there: The actor died unexpectedly.")
