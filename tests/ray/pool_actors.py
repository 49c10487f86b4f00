"""The actors of a pool as a test sees them: found, waited for, killed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayActorError

from kvpool import CachePool

DEADLINE_S = 60.0
"""Tells a hang from an answer, also on a machine that is busy with other things."""


async def until(condition: Callable[[], Any], what: str) -> None:
    """Wait for something in another process that tells no event. ``condition`` may be a coroutine function."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        holds = condition()
        if asyncio.iscoroutine(holds):
            holds = await holds
        if holds:
            return
        assert time.monotonic() < deadline, f"not within {DEADLINE_S:g} s: {what}"
        await asyncio.sleep(0.002)


async def until_waiting(pool: CachePool, count: int) -> None:
    """Wait until that many requests wait for memory."""

    async def waiting() -> bool:
        return (await pool.stats()).waiting == count

    await until(waiting, f"{count} requests wait")


async def leased_bytes(pool: CachePool) -> dict[str, int]:
    """Return the bytes that each client holds leased."""
    return {each["client"]: each["bytes"] for each in await pool.actor.leases.remote()}


async def until_leased(pool: CachePool, size_bytes: int) -> None:
    """Wait until all clients together hold that many bytes leased."""

    async def leased() -> bool:
        return sum((await leased_bytes(pool)).values()) == size_bytes

    await until(leased, f"{size_bytes} bytes are leased")


async def until_no_zombies(pool: CachePool) -> None:
    """Wait until no page is mapped by a client from whom it was asked back."""

    async def none() -> bool:
        return (await pool.stats()).total("zombie_bytes") == 0

    await until(none, "the end of the zombies")


async def until_lost(pool: CachePool, number: int) -> None:
    """Wait until the pool knows that a device is lost."""

    async def lost() -> bool:
        return (await pool.stats()).devices[number].lost is not None

    await until(lost, f"the pool notices the death of device {number}")


def device_actors(pool: CachePool) -> list[Any]:
    """Handles of a pool's device actors that are alive."""
    prefix = f"kvpool/{pool.name}/"
    names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
    found = []
    for name in sorted(names):
        if name.startswith(prefix):
            with contextlib.suppress(ValueError):  # it died since it was listed
                found.append(ray.get_actor(name, namespace="kvpool"))
    return found


async def pid_of(actor: Any) -> int:
    """Process id of an actor."""
    return int(await actor.__ray_call__.remote(lambda _: os.getpid()))


async def pids_of_actors(pool: CachePool) -> list[int]:
    """Process ids of a pool's actors, the pool's own last, once Ray has told this process of all that are new."""
    pids: list[int] = []

    async def all_answer() -> bool:
        # By a name that was an actor's before, its handle is found for a moment of no certain length.
        with contextlib.suppress(RayActorError):
            pids[:] = await asyncio.gather(*(pid_of(actor) for actor in (*device_actors(pool), pool.actor)))
        return len(pids) == 1 + len(pool._connection.devices)

    await until(all_answer, "the actors of the pool answer")
    return pids


async def make_patient(pool: CachePool) -> None:
    """Let devices wait for their disk: a busy machine is not a slow store, for which a cache would be dropped."""
    for device in device_actors(pool):
        await device.__ray_call__.remote(lambda actor: setattr(actor._tiers._demotion, "patience_s", 1000.0))


async def kill_device(pool: CachePool, number: int) -> None:
    """Kill a device's process by SIGKILL."""
    os.kill(await pid_of(device_actors(pool)[number]), signal.SIGKILL)
