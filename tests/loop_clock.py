"""The clock of an event loop, set forward by tests: a deadline passes when a test says so, however busy the machine."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

LONG_S = 1000.0
"""A deadline that never passes of itself."""

_TURNS = 1000
"""Of the event loop, for what follows on a deadline: it is on its way by then without waiting for anybody."""


async def out_of_time(call: Awaitable[Any], hanging: Awaitable[Any] | None = None) -> Any:
    """Let the deadlines of ``call`` pass, of at most ``LONG_S`` each; returns its result, or raises its error.

    ``hanging``: returns when ``call`` has come as far as it is to come; by default that makes no difference.
    """
    calling = asyncio.ensure_future(call)
    if hanging is not None:
        await hanging
    for _ in range(_TURNS):
        if calling.done():
            return calling.result()
        _set_forward(asyncio.get_running_loop())
        await asyncio.sleep(0)
    raise AssertionError("a call goes on beyond its deadline")


def _set_forward(loop: Any) -> None:
    forward_s = getattr(loop, "forward_s", 0.0) + LONG_S
    real = type(loop).time
    loop.forward_s, loop.time = forward_s, lambda: real(loop) + forward_s
