"""Calls of one kind from this process, merged into few RPCs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from kvpool.actors.cluster import call
from kvpool.errors import from_wire

ANSWER_S = 60.0
"""How long the pool may take to answer a call, seconds. No call waits for memory, so this only tells a hang."""


class Lane:
    """Merges concurrent calls: what is submitted in one turn of the event loop leaves in one RPC.

    Parameters
    ----------
    method
        The actor's method, called with ``(client, items)``.
    client
        Id of this client.
    abandoned
        Given each answer whose caller was cancelled meanwhile: it may hold a lease that must be given back.
    """

    MOST_ITEMS = 256
    """Items of one RPC. Larger batches would keep the pool and this process from working at the same time."""

    MOST_IN_FLIGHT = 8
    """RPCs in flight; what comes meanwhile gathers, so that load makes batches larger instead of calls more."""

    def __init__(self, method: Any, client: str, abandoned: Callable[[Any], None]) -> None:
        self._method = method
        self._client = client
        self._abandoned = abandoned
        self._items: list[tuple[Any, asyncio.Future[Any]]] = []
        self._in_flight: set[asyncio.Task[None]] = set()
        self._scheduled = False

    def submit(self, item: tuple[Any, ...]) -> asyncio.Future[Any]:
        """Return a future of the item's answer; an error answer is raised from it as its own class."""
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._items.append((item, future))
        if not self._scheduled:
            self._scheduled = True
            loop.call_soon(self._flush)
        return future

    async def drain(self) -> None:
        """Wait until all that was submitted has its answer."""
        while self._in_flight or self._items:
            await asyncio.gather(*self._in_flight, *(future for _, future in self._items), return_exceptions=True)

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

    async def _send(self, sent: list[tuple[Any, asyncio.Future[Any]]]) -> None:
        try:
            answers = await call(self._method, self._client, [item for item, _ in sent], timeout_s=ANSWER_S)
        except Exception as error:  # noqa: BLE001 - every caller of the batch gets it
            for _, future in sent:
                if not future.done():
                    future.set_exception(error)
            return
        for (_, future), answer in zip(sent, answers, strict=True):
            if future.done():
                self._abandoned(answer)
            elif answer[0] == "error":
                future.set_exception(from_wire(answer[1:]))
            else:
                future.set_result(answer)
