"""What an actor does in the background for as long as it lives, whatever goes wrong on the way."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from kvpool.errors import KvpoolError

logger = logging.getLogger("kvpool.device")


async def keep_up(name: str, step: Callable[[], Awaitable[float]], pause_s: float) -> None:
    """Take a step again and again, until this task is cancelled.

    One that fails is logged, once for each cause, and is tried again: a task that ended by it would tell nobody.

    Parameters
    ----------
    name
        Of what is done, and of whom, for the log.
    step
        Returns how long to wait before the next one, seconds.
    pause_s
        How long to wait before the first one, and after one that failed.
    """
    told: set[tuple[str, object]] = set()
    wait_s = pause_s
    while True:
        await asyncio.sleep(wait_s)
        try:
            wait_s = await step()
        except Exception as error:
            wait_s = pause_s
            cause = type(error).__name__, error.details.get("errno") if isinstance(error, KvpoolError) else None
            if cause not in told:
                told.add(cause)
                logger.exception("%s failed and is tried again (more of this cause is not told)", name)
