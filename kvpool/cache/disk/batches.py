"""What waits for a thread, done by it together."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from kvpool.cache.disk.threads import Threads, uncancelled
from kvpool.errors import KvpoolError

Result = TypeVar("Result")


class Request(Generic[Result]):
    """A call that waits for its turn, or whose turn has come. Belongs to one event loop."""

    def __init__(self) -> None:
        self.done: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self.left: asyncio.Event | None = None
        """Of the batch that it went with: set when no thread uses its memory any more."""

    def succeed(self, result: Result) -> None:
        """Answer it, unless whoever waited was cancelled."""
        if not self.done.done():
            self.done.set_result(result)

    def fail(self, error: BaseException) -> None:
        """Answer it with an error, unless whoever waited was cancelled."""
        if not self.done.done():
            self.done.set_exception(error)
            self.done.exception()  # whoever waits gets it still; cancelled at this moment, nobody does


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

    async def ask(self, request: _Request) -> Result:
        """Do it in its turn; cancelled before that, it ends at once, else when the thread is done with the memory."""
        self._waiting.append(request)
        self._call_thread()
        try:
            result: Result = await request.done
        except asyncio.CancelledError:
            if request.left is not None:
                await uncancelled(request.left.wait())
            elif request in self._waiting:  # else it was refused at the same moment
                self._waiting.remove(request)
            raise
        return result

    def _call_thread(self) -> None:
        if self._waiting and self._coming is None:
            self._coming = asyncio.ensure_future(self._serve())
            self._tasks.add(self._coming)
            self._coming.add_done_callback(self._tasks.discard)

    async def _serve(self) -> None:
        async with self._threads.one():
            self._coming = None
            left = asyncio.Event()
            batch = self.take(self._waiting)
            for request in batch:
                request.left = left
            self._call_thread()  # for what does not go with this
            if not batch:
                return
            try:
                await self._answer(batch, self.do)
            finally:
                left.set()
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
        """Take what goes together off those that wait, in order; refuse what must not be done any more."""

    @abstractmethod
    async def do(self, batch: list[_Request]) -> None:
        """Do it with the thread that is held. What is not answered then is answered by :meth:`finish`."""

    @abstractmethod
    async def finish(self, batch: list[_Request]) -> None:
        """Answer the others, without a thread."""
