"""Calls of one kind from this process, merged into few RPCs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any

from kvpool.actors.cluster import call
from kvpool.actors.protocol import errors_of
from kvpool.errors import PoolUnavailableError, ProtocolError, from_wire
from kvpool.telemetry.calls import ClientCall, UntracedCall, batch_call, client_call
from kvpool.telemetry.context import Carrier

logger = logging.getLogger("kvpool.client")

ANSWER_S = 60.0
"""How long the pool may take to answer a call, seconds. No call waits for memory, so this only tells a hang."""


_Entry = tuple[tuple[Any, ...], Carrier | None, asyncio.Future[Any]]
"""An item, its trace context if it has one of its own, and the future of its answer."""


class Lane:
    """Merges concurrent calls: what is submitted in one turn of the event loop leaves in one RPC.

    Parameters
    ----------
    name, actor
        The actor and its method, called with ``(client, items)``.
    client
        Id of this client.
    abandoned
        Given each answer whose caller was cancelled meanwhile, or told that the pool does not answer: it may hold a
        lease that must be given back.
    """

    MOST_ITEMS = 256
    """Items of one RPC. Larger batches would keep the pool and this process from working at the same time."""

    MOST_IN_FLIGHT = 8
    """RPCs in flight; what comes meanwhile gathers, so that load makes batches larger instead of calls more."""

    def __init__(self, name: str, actor: Any, client: str, abandoned: Callable[[Any], None]) -> None:
        self.name = name
        self._method = getattr(actor, name)
        self._client = client
        self._abandoned = abandoned
        self._items: list[_Entry] = []
        self._in_flight: set[asyncio.Task[None]] = set()
        self._overdue: set[asyncio.Task[None]] = set()
        self._scheduled = False

    def call(self) -> ClientCall | UntracedCall:
        """Return the span of one call, to be entered; gives its trace context, None if the caller is in no trace."""
        return client_call(f"kvpool.{self.name}")

    async def ask(self, item: tuple[Any, ...], trace: Carrier | None = None) -> Any:
        """Submit an item, to be sent with its trace context, and return its answer."""
        future = self.submit(item, trace)
        try:
            return await future
        except asyncio.CancelledError:
            # The caller may be cancelled between the coming of the answer and its own next turn.
            if future.done() and not future.cancelled() and future.exception() is None:
                self._give_back(future.result())
            raise

    def submit(self, item: tuple[Any, ...], trace: Carrier | None = None) -> asyncio.Future[Any]:
        """Return a future of the item's answer; an error answer is raised from it as its own class.

        Items without a trace context share the one of the span of their RPC.
        """
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._items.append((item, trace, future))
        if not self._scheduled:
            self._scheduled = True
            loop.call_soon(self._flush)
        return future

    async def drain(self) -> None:
        """Wait until all that was submitted has its answer."""
        while self._in_flight or self._items:
            await asyncio.gather(*self._in_flight, *(future for _, _, future in self._items), return_exceptions=True)

    def _flush(self) -> None:
        self._scheduled = False
        while self._items and len(self._in_flight) < self.MOST_IN_FLIGHT:
            sent, self._items = self._items[: self.MOST_ITEMS], self._items[self.MOST_ITEMS :]
            task = asyncio.get_running_loop().create_task(self._send(sent))
            self._in_flight.add(task)
            task.add_done_callback(self._landed)

    def _landed(self, task: asyncio.Task[None]) -> None:
        self._in_flight.discard(task)
        if self._items and not self._scheduled:
            self._flush()

    async def _send(self, sent: list[_Entry]) -> None:
        try:
            span = batch_call(f"kvpool.{self.name}", sum(trace is None for _, trace, _ in sent))
        except Exception as error:  # noqa: BLE001 - a span processor of the application's
            _fail(sent, error)
            return
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        timer = loop.call_later(ANSWER_S, self._give_up, task, sent)
        with span as shared:
            items = [(*item, shared if trace is None else trace) for item, trace, _ in sent]
            try:
                answers = await call(self._method, self._client, items)
                if len(answers) != len(sent):
                    raise ProtocolError(f"the pool answered {len(sent)} items by {len(answers)}: restart it")
            except Exception as error:  # noqa: BLE001 - every caller of the batch gets it
                span.fail(error)
                _fail(sent, error)
                return
            finally:
                timer.cancel()
            if shared is not None:
                note_errors(
                    span, [answer for (_, trace, _), answer in zip(sent, answers, strict=True) if trace is None]
                )
            for (_, _, future), answer in zip(sent, answers, strict=True):
                if future.done():
                    self._give_back(answer)
                elif answer[0] == "error":
                    future.set_exception(from_wire(answer[1:]))
                else:
                    future.set_result(answer)

    def _give_back(self, answer: Any) -> None:
        try:
            self._abandoned(answer)
        except Exception:  # the answers behind this one must reach their callers
            logger.exception("giving back what came too late: %.200r", answer)

    def _give_up(self, task: asyncio.Task[None] | None, sent: list[_Entry]) -> None:
        """Tell the callers that the pool does not answer. The call stays open: what it grants late is given back."""
        _fail(sent, PoolUnavailableError(f"the pool did not answer within {ANSWER_S:g} s: is its node overloaded?"))
        if task is not None:
            self._overdue.add(task)
            task.add_done_callback(self._overdue.discard)
            self._landed(task)


def note_errors(span: ClientCall | UntracedCall, answers: Sequence[Any]) -> None:
    """Let a span tell of the errors within answers."""
    for _, error in errors_of(answers):
        span.fail(from_wire(error))


def _fail(sent: list[_Entry], error: Exception) -> None:
    for _, _, future in sent:
        if not future.done():
            future.set_exception(error)
