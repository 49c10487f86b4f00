"""A thread that moves bytes between addresses of this process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, ParamSpec, TypeVar

from kvpool.memory.copying import copy_blocks

_Result = TypeVar("_Result")
_Arguments = ParamSpec("_Arguments")

_INLINE_BYTES = 1 << 18
"""Copies up to this size are done on the event loop: handing them to a thread would take longer."""


class Move(NamedTuple):
    """Bytes to copy."""

    destination: int
    source: int
    size_bytes: int


class Mover:
    """One thread, for what comes one after another.

    Parameters
    ----------
    name
        Of the thread.
    """

    def __init__(self, name: str) -> None:
        self._executor = ThreadPoolExecutor(1, name)

    async def copy(self, moves: Sequence[Move]) -> None:
        """Copy bytes; neighbours in one go."""
        if sum(move.size_bytes for move in moves) <= _INLINE_BYTES:
            _copy(moves)
        else:
            await self.run(_copy, moves)

    async def run(
        self, function: Callable[_Arguments, _Result], *args: _Arguments.args, **kwargs: _Arguments.kwargs
    ) -> _Result:
        """Call a function in the thread. A cancellation takes effect when it has returned, however often it comes.

        (No task, which the end of ``asyncio.run()`` would cancel while the thread goes on with memory of others.)
        """
        call = asyncio.get_running_loop().run_in_executor(self._executor, lambda: function(*args, **kwargs))
        cancelled: asyncio.CancelledError | None = None
        while not call.done():
            try:
                await asyncio.wait((call,))
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            call.exception()  # else it would be reported as never retrieved
            raise cancelled
        return call.result()

    def close(self) -> None:
        """End the thread. Nothing may be under way."""
        self._executor.shutdown()


def _copy(moves: Sequence[Move]) -> None:
    start = 0
    while start < len(moves):
        size_bytes = moves[start].size_bytes
        end = start + 1
        while end < len(moves) and moves[end].size_bytes == size_bytes:
            end += 1
        same = moves[start:end]
        copy_blocks([move.destination for move in same], [move.source for move in same], size_bytes)
        start = end
