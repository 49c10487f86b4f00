"""Letting requests in: each needs room among those that are under way, and its key."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

from kvpool.cache.disk.batches import Request
from kvpool.cache.disk.key_locks import KeyLocks
from kvpool.cache.key import CacheKey

_Request = TypeVar("_Request", bound=Request)  # type: ignore[type-arg]


class Admission:
    """Requests of one kind. Those that find room, and their key free, go on at once, without a task of their own.

    Parameters
    ----------
    locks
        Of the tier.
    most
        Requests under way, or waiting for their key or a thread, at most.
    """

    def __init__(self, locks: KeyLocks, most: int) -> None:
        self._locks = locks
        self._room = most
        # For room, in the order in which they came. (To take the first of a dict is to pass all that went before.)
        self._waiting: OrderedDict[Request[Any], Callable[[], None]] = OrderedDict()
        self._steps: set[asyncio.Task[None]] = set()
        self.admitted = 0
        """And not done."""

    @property
    def full(self) -> bool:
        """Whether a request would wait for room."""
        return self._room <= 0

    def admit(self, request: _Request, key: CacheKey, go_on: Callable[[_Request], None]) -> None:
        """Go on with a request once it has room and its key, which it holds until it is done."""
        if self._room > 0:
            self._room -= 1
            self._lock(request, key, go_on)
        else:
            self._waiting[request] = partial(self._lock, request, key, go_on)
            request.done.add_done_callback(partial(self._withdraw, request))

    def begin(self, request: Request[Any], steps: Coroutine[Any, Any, None]) -> None:
        """Take steps that may wait; they end when the request is given up, and if they fail, that is its answer."""
        task = asyncio.ensure_future(steps)
        self._steps.add(task)

        def ended(task: asyncio.Task[None]) -> None:
            self._steps.discard(task)
            if task.cancelled():
                request.cancel()
            elif (error := task.exception()) is not None:
                request.fail(error)

        task.add_done_callback(ended)
        request.done.add_done_callback(lambda done: task.cancel() if done.cancelled() else None)

    def _withdraw(self, request: Request[Any], _done: asyncio.Future[Any]) -> None:
        self._waiting.pop(request, None)

    def _lock(self, request: _Request, key: CacheKey, go_on: Callable[[_Request], None]) -> None:
        self.admitted += 1
        if self._locks.try_to_take(key):
            request.done.add_done_callback(partial(self._unlock_and_leave, key))
            go_on(request)
        else:
            request.done.add_done_callback(self._leave)
            self.begin(request, self._lock_in_turn(request, key, go_on))

    async def _lock_in_turn(self, request: _Request, key: CacheKey, go_on: Callable[[_Request], None]) -> None:
        await self._locks.acquire(key)
        if request.done.done():  # given up at this moment
            self._locks.release(key)
            return
        request.done.add_done_callback(lambda _: self._locks.release(key))
        go_on(request)

    def _unlock_and_leave(self, key: CacheKey, done: asyncio.Future[Any]) -> None:
        self._locks.release(key)
        self._leave(done)

    def _leave(self, _done: asyncio.Future[Any]) -> None:
        self.admitted -= 1
        while self._waiting:
            request, go_on = self._waiting.popitem(last=False)
            if not request.done.done():  # else it was given up at this moment
                go_on()
                return
        self._room += 1
