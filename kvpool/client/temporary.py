"""A pool that ends with the work for which it was started."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from traceback import clear_frames
from typing import Any

from kvpool.actors.cluster import ensure_own_ray
from kvpool.client.pool import CachePool, delete_pool
from kvpool.config import PoolConfig
from kvpool.errors import CacheStateError

_DRAIN_S = 10.0
"""How long the leases of processes that have just been killed may take to end."""


@asynccontextmanager
async def temporary_pool(config: PoolConfig | None = None, **settings: Any) -> AsyncIterator[CachePool]:
    """Start a pool as :meth:`CachePool.create` does, and delete it when the block ends, however it does.

    Unless ``RAY_ADDRESS`` names a cluster, and no Ray is connected yet, it is in a Ray of this process alone.
    """
    ensure_own_ray()
    creating = asyncio.ensure_future(CachePool.create(config, **settings))
    try:
        pool = await asyncio.shield(creating)
    except asyncio.CancelledError:
        await (await creating).delete()  # a start that is cut short would leave what it has started
        raise
    try:
        yield pool
    except BaseException as error:
        clear_frames(error.__traceback__)  # in which tensors of the work are still alive
        await _end(pool)
        raise
    await _end(pool)


async def _end(pool: CachePool) -> None:
    try:
        with suppress(CacheStateError):  # tensors that are still alive stay mapped until this process ends
            await pool.close()  # first: releases that are on their way are told to a pool that is there
    finally:
        await delete_pool(pool.actor, pool.name, _DRAIN_S, pool.client_id)
