"""The pool's journal, read by long polls."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from kvpool.errors import InvalidRequestError
from kvpool.pool.journal import Journal

_MOST_EVENTS = 1000
"""Events of one answer."""

_MOST_WAIT_S = 30.0


class EventFeed:
    """Lets any number of readers wait for what the journal records.

    Parameters
    ----------
    journal
        The record.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._told = 0
        self._news = asyncio.Event()

    def notify(self) -> None:
        """Wake those who wait if there is something new. For the end of each decision."""
        if self._journal.last != self._told:
            self._told = self._journal.last
            self._news.set()
            self._news = asyncio.Event()  # the next wait is for the next news

    async def poll(self, seen: int | None, wait_s: float, tenant: str | None) -> tuple[int, list[tuple[Any, ...]]]:
        """Return ``(number of the last event read, events after number seen)``, waiting for one up to ``wait_s``.

        Raises
        ------
        InvalidRequestError
            If ``seen`` is no number, or ``wait_s`` no time.
        """
        if not (seen is None or isinstance(seen, int)) or not 0 <= wait_s <= _MOST_WAIT_S:
            raise InvalidRequestError(
                f"events are polled with the number of the last one seen, or None, and 0 to {_MOST_WAIT_S:g} s to "
                f"wait; got {seen!r} and {wait_s!r}"
            )
        deadline = time.monotonic() + wait_s
        begins = seen is None
        while True:
            news = self._news
            seen, events = self._journal.read(seen, tenant, _MOST_EVENTS, time.monotonic())
            if events or begins:
                return seen, events
            if seen < self._journal.last:
                await asyncio.sleep(0)  # others' events were looked at, and there are more
                continue
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    await news.wait()
            except TimeoutError:
                return seen, []
