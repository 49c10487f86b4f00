"""Requests of this process that wait for memory, and the one stream by which the pool tells what became of them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from kvpool.actors.cluster import call
from kvpool.client.lane import ANSWER_S
from kvpool.errors import CacheStateError, KvpoolError, from_wire

logger = logging.getLogger("kvpool.client")

_POLL_S = 20.0


class WaitingRequests:
    """Waits for the grants of one client, all by one long poll.

    Parameters
    ----------
    actor
        The pool's actor.
    client
        Id of this client.
    abandoned
        Given each grant whose caller was cancelled meanwhile.
    """

    def __init__(self, actor: Any, client: str, abandoned: Callable[[Any], None]) -> None:
        self._actor = actor
        self._client = client
        self._abandoned = abandoned
        self._futures: dict[int, asyncio.Future[Any]] = {}
        self._early: dict[int, Any] = {}
        self._cancelled: set[int] = set()
        self._giving_up: list[int] = []
        self._poller: asyncio.Task[None] | None = None
        self._canceller: asyncio.Task[None] | None = None
        self._seen = 0
        self._closed = False

    async def wait(self, ticket: int) -> Any:
        """Return the ``granted`` answer of a request that was queued, or raise its error.

        Raises
        ------
        CapacityError
            If there was no room in time.
        PoolUnavailableError
            If the pool is gone, or does not answer.
        CacheStateError
            If the connection is closed meanwhile.
        """
        if self._closed:
            raise _closed()
        if ticket in self._early:
            return _result(self._early.pop(ticket))
        future = self._futures[ticket] = asyncio.get_running_loop().create_future()
        self._start_polling()
        try:
            return _result(await future)
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                self._give_back(future.result())  # it came between the cancelling and this caller's next turn
            elif ticket in self._futures:
                self.give_up(ticket)
            raise
        finally:
            self._futures.pop(ticket, None)

    def give_up(self, ticket: int) -> None:
        """Stop waiting; a grant that is on its way is given back when it comes."""
        if self._closed:
            return  # all that the client asked for ended with it
        if ticket in self._early:  # the grant overtook the answer that names the ticket
            self._give_back(self._early.pop(ticket))
            return
        self._cancelled.add(ticket)
        self._giving_up.append(ticket)
        self._start_polling()
        self._start_cancelling()

    def _start_cancelling(self) -> None:
        if self._canceller is None and not self._closed:
            self._canceller = asyncio.get_running_loop().create_task(self._cancel())

    def close(self) -> None:
        """Wait no more: the client leaves the pool, and everyone who waits is told."""
        self._closed = True
        if self._poller is not None:
            self._poller.cancel()
        for future in self._futures.values():
            if not future.done():
                future.set_exception(_closed())
        self._cancelled.clear()
        self._early.clear()

    def _start_polling(self) -> None:
        # A task that is cancelled before its first step never comes to its own end.
        if (self._poller is None or self._poller.done()) and not self._closed:
            self._poller = asyncio.get_running_loop().create_task(self._poll())

    async def _poll(self) -> None:
        try:
            while self._futures or self._cancelled:  # the grant of a cancelled request may be on its way
                self._seen, outcomes = await call(
                    self._actor.grants, self._client, self._seen, _POLL_S, timeout_s=_POLL_S + ANSWER_S
                )
                for ticket, answer in outcomes:
                    self._take(ticket, answer)
        except Exception as error:  # noqa: BLE001 - everyone who waits gets it
            self._fail(error)
        finally:
            self._poller = None

    def _fail(self, error: Exception) -> None:
        """Tell everyone who waits, and give their tickets up: the pool may be alive, and grant them still.

        Those that were given up before are forgotten, so that polling ends when the pool does.
        """
        failed, self._futures = self._futures, {}
        self._cancelled.clear()
        for ticket, future in failed.items():
            if not future.done():
                future.set_exception(error)
            self._cancelled.add(ticket)
            self._giving_up.append(ticket)
        if failed:
            self._start_cancelling()

    def _take(self, ticket: int, answer: Any) -> None:
        future = self._futures.pop(ticket, None)
        if future is not None and not future.done():
            future.set_result(answer)
        elif ticket in self._cancelled or future is not None:
            self._cancelled.discard(ticket)
            self._give_back(answer)
        else:  # the grant overtook the answer that names the ticket
            self._early[ticket] = answer

    def _give_back(self, answer: Any) -> None:
        try:
            self._abandoned(answer)
        except Exception:  # the outcomes behind this one must reach their callers
            logger.exception("giving back what came too late: %.200r", answer)

    async def _cancel(self) -> None:
        """Cancel what was given up, all of one turn of the event loop in one call."""
        while self._giving_up:
            tickets, self._giving_up = self._giving_up, []
            try:
                self._cancelled.difference_update(
                    await call(self._actor.cancel, self._client, tickets, timeout_s=ANSWER_S)
                )
            except KvpoolError as error:
                logger.warning("cancelling %d waiting requests: %s", len(tickets), error)
        self._canceller = None
        if self._cancelled:
            self._start_polling()  # the others' grants are on their way; no poll runs if the last one failed


def _closed() -> CacheStateError:
    return CacheStateError("the connection was closed while this request waited for memory: connect again")


def _result(answer: Any) -> Any:
    if answer[0] == "error":
        raise from_wire(answer[1:])
    return answer
