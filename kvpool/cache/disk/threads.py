"""Threads for calls that block, and waiting for them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, ParamSpec, TypeVar

_Result = TypeVar("_Result")
_Arguments = ParamSpec("_Arguments")


class Threads:
    """A bounded number of threads, handed out in the order in which they were asked for.

    Parameters
    ----------
    count
        Threads.
    name
        For the names of the threads.
    """

    def __init__(self, count: int, name: str) -> None:
        self._count = count
        self._held = 0
        self._free = asyncio.Semaphore(count)
        self._executor = ThreadPoolExecutor(count, name)

    @asynccontextmanager
    async def one(self) -> AsyncIterator[None]:
        """Hold a thread: who holds one may :meth:`run`, and never waits for another's call."""
        async with self._free:
            self._held += 1
            try:
                yield
            finally:
                self._held -= 1

    @property
    def free(self) -> int:
        """How many nobody holds."""
        return self._count - self._held

    async def run(
        self, function: Callable[_Arguments, _Result], *args: _Arguments.args, **kwargs: _Arguments.kwargs
    ) -> _Result:
        """Call a function in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, lambda: function(*args, **kwargs))

    async def close(self) -> None:
        """Return when all who asked before have had their thread, and none is left."""
        for _ in range(self._count):
            await self._free.acquire()
        self._executor.shutdown()
        for _ in range(self._count):  # who comes later finds the tier closed
            self._free.release()


async def uncancelled(work: Coroutine[Any, Any, _Result]) -> _Result:
    """Do ``work`` to its end even when the caller is cancelled meanwhile; the cancellation takes effect then.

    A thread cannot be stopped, and it reads or fills memory of the caller.
    """
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait((task,))
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        task.exception()  # else its error would be reported as never retrieved
        raise cancelled
    return task.result()
