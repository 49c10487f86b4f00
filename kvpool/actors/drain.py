"""Waiting until nobody uses a pool any more."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable

from kvpool.errors import InvalidRequestError, PoolBusyError
from kvpool.pool.leases import PINNER, RAISER
from kvpool.sizes import format_count, format_size

_LOOK_S = 0.05
"""Time between two looks at the leases, seconds."""


def check_drain_time(drain_s: object) -> None:
    """Refuse what is no time to drain.

    Raises
    ------
    InvalidRequestError
        If it is neither None nor a finite number of seconds, 0 or more.
    """
    if drain_s is None:
        return
    if not isinstance(drain_s, (int, float)) or isinstance(drain_s, bool) or not 0 <= drain_s < math.inf:
        raise InvalidRequestError(f"drain_s is how many seconds to wait, 0 or more, or None, not {drain_s!r}")


async def drain(pool: str, leases: Callable[[], Awaitable[dict[str, int]]], wait_s: float, leaving: str | None) -> None:
    """Wait until no client but ``leaving`` holds leases; what is pinned by word, or comes up, does not count.

    ``leases`` returns the bytes that each client holds.

    Raises
    ------
    PoolBusyError
        If some still do ``wait_s`` seconds from now.
    """
    deadline = time.monotonic() + wait_s
    while held := {
        client: size_bytes
        for client, size_bytes in (await leases()).items()
        if client != leaving and not client.startswith((PINNER, RAISER))
    }:
        if time.monotonic() >= deadline:
            who = ", ".join(f"{client}: {format_size(size)}" for client, size in sorted(held.items())[:8])
            raise PoolBusyError(
                f"pool {pool!r} is in use by {format_count(len(held), 'client')} ({who}): release the leases, "
                f"give it time to drain ('kvpool stop --name {pool} --drain 60', delete(drain_s=60)), "
                f"or end a client's leases ('kvpool leases --name {pool} --revoke CLIENT')",
                leases=held,
            )
        await asyncio.sleep(min(_LOOK_S, max(deadline - time.monotonic(), 0.0)))
