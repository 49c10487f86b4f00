"""Ctrl-C and SIGTERM: a command that has made something cleans it up before it ends."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Coroutine
from types import FrameType
from typing import Any, Self, TypeVar

_Result = TypeVar("_Result")

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A signal has ended a command. Its cause is what went wrong in cleaning up, if something did."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Interruption:
    """Lets the first SIGINT or SIGTERM end a block as an exception does; later ones do not end its cleaning up.

    Two come where one was meant: ``timeout`` sends its signal to a process and to its group, and people press Ctrl-C
    again. In another thread than the main one, which gets no signals, it does nothing.
    """

    def __init__(self) -> None:
        self._number: int | None = None
        self._cancel: Callable[[], object] | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # as a shell has it for what it runs in background
                    self._before[number] = signal.signal(number, self._end)
        return self

    def __exit__(self, _kind: object, raised: BaseException | None, _traceback: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._number is not None and raised is not None:
            raise Interrupted(self._number) from (raised if isinstance(raised, Exception) else None)

    def run(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        """Run a coroutine in an event loop of its own. A signal cancels it, and it alone: not what it cleans up by."""
        return asyncio.run(self._cancellable(work))

    async def _cancellable(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        if task is not None:
            self._cancel = lambda: loop.call_soon_threadsafe(task.cancel)
        try:
            return await work
        finally:
            self._cancel = None

    def _end(self, number: int, _frame: FrameType | None) -> None:
        if self._number is not None:
            return
        self._number = number
        if self._cancel is None:
            raise Interrupted(number)
        self._cancel()
