"""What became of the requests that waited, on its way to one client by a long poll."""

from __future__ import annotations

import asyncio
from typing import Any


class GrantStream:
    """Outcomes for one client, kept until its next poll says that it has them."""

    def __init__(self) -> None:
        self._outcomes: list[tuple[int, Any]] = []
        self._first = 1
        self._news = asyncio.Event()

    def put(self, ticket: int, answer: Any) -> None:
        """Add the outcome of a waiting request."""
        self._outcomes.append((ticket, answer))
        self._news.set()

    async def poll(self, seen: int, wait_s: float) -> tuple[int, list[tuple[int, Any]]]:
        """Return ``(number of the last, outcomes after number seen)``, waiting for one up to ``wait_s``."""
        del self._outcomes[: max(0, seen - self._first + 1)]
        self._first = max(self._first, seen + 1)
        if not self._outcomes:
            self._news.clear()
            try:
                async with asyncio.timeout(wait_s):
                    await self._news.wait()
            except TimeoutError:
                return seen, []
        return self._first + len(self._outcomes) - 1, list(self._outcomes)
