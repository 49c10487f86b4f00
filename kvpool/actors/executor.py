"""Carries out what the pool's state decides: operations to devices, answers to callers, grants to those who wait."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from kvpool.actors.event_feed import EventFeed
from kvpool.actors.fleet import Fleet
from kvpool.actors.pool_telemetry import PoolTelemetry
from kvpool.actors.protocol import check_items, errors_of
from kvpool.actors.stream import Stream
from kvpool.errors import DeviceLostError, KvpoolError
from kvpool.pool.instructions import (
    Batch,
    BatchDone,
    BlocksRequested,
    CachesRequested,
    ChangesRequested,
    ClientGone,
    DeviceAnswered,
    DeviceFreed,
    DeviceLost,
    Event,
    Failed,
    Grant,
    Instruction,
    LowerGone,
    Move,
    Moved,
    PersistRequested,
    PinRequested,
    PolicyFailed,
    PrefixesFetched,
    PrefixesLookedUp,
    ReleaseRequested,
    SealRequested,
    Send,
    Tick,
    Waited,
)
from kvpool.pool.state import PoolState

logger = logging.getLogger("kvpool.pool")

_METHODS: dict[tuple[Any, ...], str] = {
    (CachesRequested,): "request_caches",
    (ChangesRequested,): "change_backing",
    (PrefixesLookedUp,): "look_up",
    (PrefixesFetched,): "fetch",
    (PersistRequested,): "persist",
    (BlocksRequested,): "request_blocks",
    (SealRequested, False): "seal",
    (SealRequested, True): "seal_and_release",
    (ReleaseRequested,): "release",
    (PinRequested, True): "pin",
    (PinRequested, False): "unpin",
}
"""What the client called, by the event that came of it."""


class Executor:
    """The pool's state in an event loop, with the devices that carry out its instructions.

    Parameters
    ----------
    state
        Whose decisions are carried out, one at a time.
    telemetry
        Told of what happens.
    """

    def __init__(self, state: PoolState, telemetry: PoolTelemetry) -> None:
        self._state = state
        self._telemetry = telemetry
        self.fleet = Fleet(self._device_answered, self._device_told, self._device_lost)
        self.grants: dict[str, Stream] = {}
        self.feed = EventFeed(state.ledger.journal)
        self._done: dict[Batch, asyncio.Future[list[Any]]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = 0.0

    def _device_answered(self, number: int, sent: list[Send], answers: list[Any], zombies: tuple[int, int]) -> None:
        self.decide(DeviceAnswered(number, sent, answers, zombies))

    def _device_told(self, number: int, event: tuple[Any, ...]) -> None:
        match event:
            case ("gone", client, ended, freed):
                self.grants.pop(client, None)
                self.decide(ClientGone(client, number, ended, freed))
            case ("freed", zombies):
                self.decide(DeviceFreed(number, zombies))
            case ("lower_gone", keys, stamp):
                self.decide(LowerGone(number, keys, stamp))

    def _moved(self, move: Move, answer: Any) -> None:
        self.decide(Moved(move, answer))

    def _device_lost(self, number: int, sent: list[Send], reason: str) -> None:
        device = self._state.ledger.devices[number]
        if device.lost is None:
            logger.error("device %s of pool %s is lost: %s", device.name, self._state.name, reason)
            self.decide(DeviceLost(number, reason))
        in_short = reason.partition("\n")[0]  # Ray says more in the lines below, for the log
        error = DeviceLostError(f"device {device.name} is gone with all that was only there: {in_short}")
        self.carry_out(self._state.fail_operations(sent, error, time.monotonic()))

    async def submit(self, event: Any, fields: dict[str, Any], client: str, items: list[Any], *more: Any) -> list[Any]:
        """Decide on a batch of items of one client; returns an answer for each.

        ``event`` is the class of the event, ``more`` what it takes beyond the items; ``fields`` describes an item.
        """
        if not items:
            return []
        now = time.monotonic()
        method = _METHODS.get((event, *more), event.__name__)
        answers: list[Any]
        try:
            check_items(items, fields)
        except KvpoolError as error:
            answers = [("error", *error.to_wire())] * len(items)
        else:
            answers = await self._submit(method, event, client, items, more, now)
        self._telemetry.answered(method, items, answers, time.monotonic() - now)
        return answers

    async def _submit(
        self, method: str, event: Any, client: str, items: list[Any], more: tuple[Any, ...], now: float
    ) -> list[Any]:
        batch = Batch(len(items))
        with self._telemetry.batch(method, items) as spans:
            try:
                instructions = self._state.handle(event(batch, client, spans.items, *more), now)
            except KvpoolError as error:
                answers: list[Any] = [("error", *error.to_wire())] * len(items)
            else:
                answers = await self.finish(batch, instructions)
            spans.failed(errors_of(answers))
            return answers

    async def finish(self, batch: Batch, instructions: list[Instruction]) -> list[Any]:
        """Carry instructions out and wait until ``batch`` has all its answers."""
        future: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        self._done[batch] = future
        self.carry_out(instructions)
        return await future

    def decide(self, event: Event) -> None:
        """Decide on an event, now, and carry out what follows."""
        self.carry_out(self._state.handle(event, time.monotonic()))

    def carry_out(self, instructions: list[Instruction]) -> None:
        """Carry out what was decided, in order."""
        now = time.monotonic()
        for instruction in instructions:
            match instruction:
                case Send():
                    self.fleet.put(self._telemetry.timed(instruction, now))
                case Move():
                    self.fleet.move(self._telemetry.timed_move(instruction, now), self._moved)
                case BatchDone():
                    future = self._done.pop(instruction.batch)
                    if not future.cancelled():
                        future.set_result(instruction.batch.answers)
                case Grant():
                    stream = self.grants.get(instruction.client)
                    if stream is not None:
                        stream.put((instruction.ticket, instruction.answer))
                case Waited():
                    self._telemetry.waited(instruction, now)
                case Failed(operation, error):
                    logger.error("what is to follow on %r could not be decided", operation[0], exc_info=error)
                case PolicyFailed(error):
                    by = self._state.policy_name
                    logger.error("pool %s goes on with policy %s: %s", self._state.name, by, error, exc_info=error)
        self.feed.notify()
        self._set_timer()

    def _set_timer(self) -> None:
        deadline = self._state.next_deadline()
        if self._timer is not None:
            if deadline is not None and self._timer_due <= deadline:
                return
            self._timer.cancel()
            self._timer = None
        if deadline is not None:
            # The loop's clock is time.monotonic(), the clock of all decisions. (Ray's uvloop does not say when a timer
            # is due that was due at once, so that is kept here.)
            self._timer_due = deadline
            self._timer = asyncio.get_running_loop().call_at(deadline, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self.decide(Tick())
