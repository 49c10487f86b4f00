"""A sign of life for commands that take a while."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread
from time import monotonic

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

_AFTER_S = 1.5
"""A command that takes longer says what it does, where there is no spinner."""
_AGAIN_S = 30.0
"""And then again and again, so that the log of a job shows that it goes on."""


@contextmanager
def working(what: str) -> Iterator[None]:
    """Show on standard error that something is done while the block runs.

    In a terminal that is a spinner with the time so far; elsewhere (the log of a job) a line once it has taken longer
    than a moment, and now and then another.
    """
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (SpinnerColumn(), TextColumn("{task.description} …"), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as shown:
            shown.add_task(what, total=None)
            yield
        return
    began_s = monotonic()

    def tell() -> None:
        spent_s = round(monotonic() - began_s)
        console.print(f"{what} … ({spent_s} s)", highlight=False, soft_wrap=True)

    with called_after(_AFTER_S, tell, again_s=_AGAIN_S):
        yield


@contextmanager
def called_after(after_s: float, tell: Callable[[], None], again_s: float = math.inf) -> Iterator[None]:
    """Call a function from a thread when the block has run so long, and then each ``again_s``; never after its end."""
    ended = Event()

    def wait() -> None:
        wait_s = after_s
        while not ended.wait(wait_s if math.isfinite(wait_s) else None):
            tell()
            wait_s = again_s

    thread = Thread(target=wait, name="kvpool-sign-of-life", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
