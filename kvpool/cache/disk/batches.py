"""What waits for a thread, done by it together."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, Generic, TypeVar

from kvpool.cache.disk.threads import Threads
from kvpool.errors import KvpoolError

Result = TypeVar("Result")


class Request(Generic[Result]):
    """A call with memory of the caller, that waits for its turn or whose turn has come. Belongs to one event loop."""

    def __init__(self) -> None:
        self.done: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        """The answer; with it, and when this is cancelled, no thread uses the memory any more."""
        self.line: deque[Any] | None = None
        """Where it waits for a thread, or has waited: who gives it up takes it out, and its memory with it."""
        self.holder: object | None = None
        """Stands for the thread that uses the memory now, one for all that it does together; None: none does."""
        self._given_up = False

    def hold(self, holder: object) -> None:
        """A thread, which ``holder`` stands for, uses the memory from now on."""
        self.holder = holder

    def release(self) -> None:
        """No thread uses the memory any more."""
        self.holder = None
        if self._given_up:
            self.done.cancel()

    def cancel(self) -> None:
        """Give it up: now, or, if a thread uses the memory, as soon as none does."""
        if self.holder is not None:
            self._given_up = True
        elif self.done.cancel() and self.line is not None:
            with suppress(ValueError):  # it has left the line
                self.line.remove(self)

    def succeed(self, result: Result) -> None:
        """Answer it, unless it was given up."""
        if not self.done.done():
            self.done.set_result(result)

    def fail(self, error: BaseException) -> None:
        """Answer it with an error, unless it was given up."""
        if not self.done.done():
            self.done.set_exception(error)
            self.done.exception()  # whoever waits gets it still; cancelled at this moment, nobody does


async def answered(requests: Sequence[Request[Any]]) -> None:
    """Return when all are answered. When cancelled, give them up, and wait until no thread uses their memory.

    One after the other: most are answered by the time that those before them are, and that costs nothing.
    """
    cancelled: asyncio.CancelledError | None = None
    for request in requests:
        while not request.done.done():
            try:
                await asyncio.wait((request.done,))
            except asyncio.CancelledError as error:
                cancelled = error
                for each in requests:
                    each.cancel()
    if cancelled is not None:
        raise cancelled


_Request = TypeVar("_Request", bound=Request)  # type: ignore[type-arg]


class Batches(ABC, Generic[_Request, Result]):
    """Each thread that comes free takes as much of what waits as goes together.

    So nobody waits for others to come: with a thread to spare the first goes at once, and the more there is to be done
    the larger batches are. (A thread for each small cache costs 100 µs of the event loop, more than the work itself.)

    Parameters
    ----------
    threads
        That do it.
    """

    def __init__(self, threads: Threads) -> None:
        self._threads = threads
        self._waiting: deque[_Request] = deque()
        self._coming: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def add(self, request: _Request) -> None:
        """Do it in its turn, with what waits then, unless it has been given up by then."""
        self._waiting.append(request)
        request.line = self._waiting
        self._call_thread()

    def _call_thread(self) -> None:
        if self._waiting and self._coming is None:
            self._coming = asyncio.ensure_future(self._serve())
            self._tasks.add(self._coming)
            self._coming.add_done_callback(self._tasks.discard)

    async def _serve(self) -> None:
        async with self._threads.one():
            self._coming = None
            batch = self.take(self._waiting)
            holder = object()
            for request in batch:
                request.hold(holder)
            self._call_thread()  # for what does not go with this
            if not batch:
                return
            try:
                await self._answer(batch, self.do)
            finally:
                for request in batch:
                    request.release()
        await self._answer(batch, self.finish)

    async def _answer(self, batch: list[_Request], do: Callable[[list[_Request]], Awaitable[None]]) -> None:
        """Take a step of a batch; if it fails, whatever it is, nobody waits on."""
        try:
            await do(batch)
        except BaseException as error:
            for request in batch:
                request.fail(error)
            if not isinstance(error, KvpoolError):
                raise

    @abstractmethod
    def take(self, waiting: deque[_Request]) -> list[_Request]:
        """Take what goes together off those that wait, in order; refuse what must not be done any more.

        Those that are done were given up.
        """

    @abstractmethod
    async def do(self, batch: list[_Request]) -> None:
        """Do it with the thread that is held. What is not answered then is answered by :meth:`finish`."""

    @abstractmethod
    async def finish(self, batch: list[_Request]) -> None:
        """Answer the others, without a thread."""
