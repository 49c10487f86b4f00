"""One operation on a key's file at a time, in the order in which they came."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from kvpool.cache.key import CacheKey
from kvpool.errors import ensure


class KeyLocks:
    """A fair lock for each key that somebody uses; costs nothing for the others."""

    def __init__(self) -> None:
        self._waiting: dict[CacheKey, deque[asyncio.Future[None]]] = {}

    def is_held(self, key: CacheKey) -> bool:
        """Whether somebody holds a key."""
        return key in self._waiting

    def try_to_take(self, key: CacheKey) -> bool:
        """Hold a key if nobody holds it."""
        if key in self._waiting:
            return False
        self._waiting[key] = deque()
        return True

    def take(self, key: CacheKey) -> None:
        """Hold a key that nobody holds."""
        ensure(self.try_to_take(key), "a key is taken that somebody holds")

    async def acquire(self, key: CacheKey) -> None:
        """Hold a key once all who came before have released it."""
        waiting = self._waiting.get(key)
        if waiting is None:
            self.take(key)
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                if turn in waiting:  # else a release has passed it over already
                    waiting.remove(turn)
            else:  # it was handed to us at the moment of the cancellation
                self.release(key)
            raise

    def release(self, key: CacheKey) -> None:
        """Hand a key to the next who waits."""
        waiting = self._waiting[key]
        while waiting:
            turn = waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        del self._waiting[key]

    @asynccontextmanager
    async def hold(self, keys: Iterable[CacheKey]) -> AsyncIterator[None]:
        """Hold several keys. They are taken in sorted order, so that two who do this never wait for each other."""
        held: list[CacheKey] = []
        try:
            for key in sorted(set(keys)):
                await self.acquire(key)
                held.append(key)
            yield
        finally:
            for key in held:
                self.release(key)
