"""Operations on their way to one device: in order, one batch in flight, the next one gathering meanwhile."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from kvpool.actors.cluster import ActorLost, submit
from kvpool.errors import InvariantError
from kvpool.pool.instructions import Send

logger = logging.getLogger("kvpool.pool")

_UNKNOWN_ZOMBIES = (0, 0)
"""Older than any figure, so it changes none."""


class Outbox:
    """Sends a device its operations.

    One batch is in flight at a time: an async actor does not promise the order of concurrent calls, and what comes
    meanwhile makes the next batch, so that load makes batches larger instead of calls more.

    Parameters
    ----------
    actor
        Handle of the device actor.
    answered
        Called with the operations sent, their answers and the device's zombie figure.
    lost
        Called with the operations that will never be answered and the reason.
    """

    def __init__(
        self,
        actor: Any,
        answered: Callable[[list[Send], list[Any], tuple[int, int]], None],
        lost: Callable[[list[Send], str], None],
    ) -> None:
        self._actor = actor
        self._answered = answered
        self._lost = lost
        self._pending: list[Send] = []
        self._task: asyncio.Task[None] | None = None

    def put(self, send: Send) -> None:
        """Add an operation; it leaves at once, or with the next batch."""
        self._pending.append(send)
        if self._task is None:
            self._start()

    def _start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        try:
            while self._pending:
                sent, self._pending = self._pending, []
                try:
                    operations = [send.operation for send in sent]
                    if any(send.traces for send in sent):
                        traces = [tuple(trace.carrier for trace in send.traces) for send in sent]
                        answers, zombies = await submit(self._actor.apply, operations, traces)
                    else:
                        answers, zombies = await submit(self._actor.apply, operations)
                except ActorLost as error:
                    self._lost(sent, str(error))
                except Exception as error:  # a bug there: whoever asked must not wait for ever
                    logger.exception("a device could not answer %s", [send.operation[0] for send in sent])
                    wrong = ("error", *InvariantError(f"a device could not answer: {error}").to_wire())
                    self._answered(sent, [wrong] * len(sent), _UNKNOWN_ZOMBIES)
                else:
                    self._answered(sent, answers, zombies)
        finally:
            self._task = None  # also after a bug in a decision: what comes next must not wait for ever
            if self._pending:
                self._start()
