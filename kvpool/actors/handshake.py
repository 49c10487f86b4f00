"""The first call to a pool's actor: whether it lives, and speaks this version's protocol."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from kvpool.actors.cluster import call, is_dead, is_out_of_reach
from kvpool.actors.compatibility import check_protocol
from kvpool.errors import PoolUnavailableError

_CORRECTED_S = 0.02
"""How soon a name that stood for a dead actor is looked up again, seconds."""


async def shake_hands(find: Callable[[], Any], name: str, *, timeout_s: float) -> Any:
    """Find a pool's actor as :func:`find_living` does, and check that this process can use it; returns its handle.

    Raises
    ------
    PoolNotFoundError, PoolUnavailableError
        As :func:`find_living`.
    ProtocolError
        If it runs another version: says how to drain and restart it.
    """
    actor, described = await find_living(find, timeout_s=timeout_s)
    check_protocol(name, described)
    return actor


async def find_living(find: Callable[[], Any], *, timeout_s: float) -> tuple[Any, dict[str, Any]]:
    """Find a pool's actor, of whatever version, that answers; returns its handle and how it describes itself.

    A process looks names up in its own notes, and Ray corrects them a moment after an actor's end. So a name that is
    free, or is another actor's by now, may still stand for a dead one: it is looked up again until that has passed.
    (Until then Ray says of a call that the actor is dead, or only that it is out of reach, if it has not heard of its
    end either within a second.)

    Parameters
    ----------
    find
        Looks the name up, or makes the actor if there is none; returns a handle.
    timeout_s
        How long the actor may take to answer, seconds; a new one has to start first.

    Raises
    ------
    PoolNotFoundError
        If ``find`` raises it: none of that name runs.
    PoolUnavailableError
        If the actor does not answer, or stays out of reach, for that time, or each of two different ones has died.
    """
    loop = asyncio.get_running_loop()
    until, dead = loop.time() + timeout_s, None
    while True:
        actor = find()
        try:
            # Any version answers this, while another version's connect() may not even take our arguments.
            described = await call(actor.describe, timeout_s=timeout_s)
        except PoolUnavailableError as error:
            if loop.time() >= until:
                raise
            if is_dead(error) and dead in (None, actor):
                dead = actor
            elif not is_out_of_reach(error):
                raise
            await asyncio.sleep(_CORRECTED_S)
        else:
            return actor, described
