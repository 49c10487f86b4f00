"""The first call to a pool's actor, while Ray has not told this process yet what has become of it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError

from kvpool.actors.handshake import find_living, shake_hands
from kvpool.actors.protocol import PROTOCOL_VERSION
from kvpool.errors import PoolNotFoundError, PoolUnavailableError, ProtocolError

ALIVE = {"protocol": PROTOCOL_VERSION, "version": "1"}
DEAD, AWAY = ActorDiedError(), ActorUnavailableError("no connection", None)


def actor(*answers: Any) -> Any:
    """An actor that gives or raises these answers one after another, the last one for ever."""
    left = list(answers)

    async def describe() -> Any:
        answer = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    return SimpleNamespace(describe=SimpleNamespace(remote=describe))


def finding(*actors: Any) -> Callable[[], Any]:
    """A look-up that finds these one after another, the last one for ever; an error is raised."""
    left = list(actors)

    def find() -> Any:
        found = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(found, Exception):
            raise found
        return found

    return find


async def test_an_actor_that_is_out_of_reach_for_a_moment_is_asked_again() -> None:
    living = actor(AWAY, AWAY, ALIVE)
    assert await find_living(finding(living), timeout_s=60.0) == (living, ALIVE)


async def test_a_dead_actor_of_which_ray_says_only_that_it_is_out_of_reach_is_looked_up_again() -> None:
    """What Ray says of an actor whose end it has not heard of within a second: on a busy machine it takes longer."""
    dead, living = actor(AWAY, AWAY, DEAD), actor(ALIVE)
    assert await shake_hands(finding(dead, dead, dead, living), "p", timeout_s=60.0) is living
    with pytest.raises(PoolNotFoundError):
        await find_living(finding(dead, PoolNotFoundError("no pool named 'p'")), timeout_s=60.0)


async def test_an_actor_that_stays_out_of_reach_is_told() -> None:
    with pytest.raises(PoolUnavailableError, match="out of reach"):
        await find_living(finding(actor(AWAY)), timeout_s=0.0)


async def test_two_that_died_are_not_a_name_that_is_old() -> None:
    with pytest.raises(PoolUnavailableError, match="is gone"):
        await find_living(finding(actor(DEAD), actor(DEAD), actor(ALIVE)), timeout_s=60.0)


async def test_another_version_is_found_and_gets_no_hand() -> None:
    other = actor(ALIVE | {"protocol": 99})
    assert (await find_living(finding(other), timeout_s=60.0))[0] is other
    with pytest.raises(ProtocolError):
        await shake_hands(finding(other), "p", timeout_s=60.0)
