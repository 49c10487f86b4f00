"""What happened, on its way to one reader by long polls."""

from __future__ import annotations

import asyncio
from typing import Any


class Stream:
    """Messages for one reader, kept until its next poll says that it has them. Numbered from 1."""

    def __init__(self) -> None:
        self._messages: list[Any] = []
        self._first = 1
        self._news = asyncio.Event()

    def put(self, message: Any) -> None:
        """Add a message."""
        self._messages.append(message)
        self._news.set()

    async def poll(self, seen: int, wait_s: float) -> tuple[int, list[Any]]:
        """Return ``(number of the last, messages after number seen)``, waiting for one up to ``wait_s``."""
        del self._messages[: max(0, seen - self._first + 1)]
        self._first = max(self._first, seen + 1)
        if not self._messages:
            self._news.clear()
            try:
                async with asyncio.timeout(wait_s):
                    await self._news.wait()
            except TimeoutError:
                return seen, []
        return self._first + len(self._messages) - 1, list(self._messages)
