"""Doing several things at the same time with memory of a caller, who must not get it back before all have ended."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Coroutine, Sequence
from typing import Any, TypeVar

_Result = TypeVar("_Result")


async def all_of(work: Sequence[Coroutine[Any, Any, _Result]]) -> list[_Result]:
    """Do all at the same time. When cancelled, cancel them, and wait for their end: they use memory of the caller."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        if tasks:
            await asyncio.wait(tasks)
    finally:
        await settle(tasks)
    return [task.result() for task in tasks]


async def settle(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Cancel the tasks that are not done, and return when all are, however often this is cancelled."""
    going = {task for task in tasks if not task.done()}
    for task in going:
        task.cancel()
    cancelled: asyncio.CancelledError | None = None
    while going:
        try:
            _, going = await asyncio.wait(going)
        except asyncio.CancelledError as error:
            cancelled = error
    for task in tasks:
        if not task.cancelled():
            task.exception()  # else one that nobody asks for would be reported
    if cancelled is not None:
        raise cancelled
