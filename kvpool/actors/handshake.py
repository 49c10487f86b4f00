"""The first call to a pool's actor: whether it lives, and speaks this version's protocol."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from kvpool.actors.cluster import call, is_dead
from kvpool.actors.compatibility import check_protocol
from kvpool.errors import PoolUnavailableError

_CORRECTED_S = 0.02
"""How soon a name that stood for a dead actor is looked up again, seconds."""


async def shake_hands(find: Callable[[], Any], name: str, *, timeout_s: float) -> Any:
    """Find a pool's actor and check that this process can use it; returns the actor's handle.

    A process looks names up in its own notes, and Ray corrects them a moment after an actor's end. So a name that is
    free, or is another actor's by now, may still stand for a dead one: it is looked up again until that has passed.

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
        If the actor does not answer in time, or each of two different ones has died.
    ProtocolError
        If it runs another version: says how to drain and restart it.
    """
    loop = asyncio.get_running_loop()
    until, dead = loop.time() + timeout_s, None
    while True:
        actor = find()
        try:
            # Any version answers this, while another version's connect() may not even take our arguments.
            described = await call(actor.describe, timeout_s=timeout_s)
        except PoolUnavailableError as error:
            if not is_dead(error) or dead not in (None, actor) or loop.time() >= until:
                raise
            dead = actor
            await asyncio.sleep(_CORRECTED_S)
        else:
            check_protocol(name, described)
            return actor
