"""What a device found on disk when it started reaches the pool whole, or it is said that it did not."""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace
from typing import Any

import pytest

from kvpool.actors import device_actor, fleet
from kvpool.actors.cluster import ActorLost
from kvpool.actors.device_actor import DeviceActor
from kvpool.actors.fleet import Fleet
from kvpool.cache.contents import Location
from kvpool.cache.key import CacheKey, encode_block_id
from kvpool.pool.instructions import Move

SPACE = ("default", "f")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> DeviceActor:
    """A device that found 1000 caches, called without Ray; one of them is gone by now."""

    async def submit(method: Any, *args: Any) -> Any:
        return await method(*args)

    monkeypatch.setattr(fleet, "submit", submit)
    monkeypatch.setattr(device_actor, "_FOUND_AT_ONCE", 64)
    actor = DeviceActor("p", "host-0", 1 << 20, 1 << 16, 4096, 1 << 24, 0, "/tmp/none.sock", 1)
    keys = [CacheKey(*SPACE, encode_block_id(number)) for number in range(1000)]
    actor._found = keys
    actor._tiers = SimpleNamespace(  # type: ignore[assignment]
        locate=lambda key: None if key == keys[500] else Location("disk", None, 4096)
    )
    return actor


def make_fleet(actor: Any) -> Fleet:
    made = Fleet(lambda *_: None, lambda *_: None, lambda *_: None)
    made._actors[0] = actor
    return made


async def test_however_much_was_found_all_that_is_there_is_told(device: DeviceActor) -> None:
    told = [found async for found in make_fleet(device).found(0)]
    assert {space[:2] for space in told} == {SPACE}
    hashes = [block_hash for *_, entries in told for block_hash, _, _ in entries]
    assert hashes == [encode_block_id(number) for number in range(1000) if number != 500]


async def test_a_device_that_does_not_answer_is_logged(
    device: DeviceActor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fleet, "_FOUND_S", 0.05)
    real, calls = device.found, 0

    async def found() -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            await asyncio.Event().wait()
        return await real()

    monkeypatch.setattr(device, "found", found)
    with caplog.at_level(logging.ERROR, "kvpool.pool"):
        told = [found async for found in make_fleet(device).found(0)]
    assert sum(len(entries) for *_, entries in told) == 128
    assert "found on disk" in caplog.text


async def test_a_move_of_a_lost_device_is_told_why_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Died(ActorLost):
        def __str__(self) -> str:
            return "The actor died unexpectedly.\n\tclass_name: DeviceActor"

    async def submit(method: Any, *args: Any) -> Any:
        raise Died

    monkeypatch.setattr(fleet, "submit", submit)
    answers: list[Any] = []
    move = Move(0, "save", (None,), lambda answer, now: None)
    await make_fleet(SimpleNamespace(save=None))._move(move, lambda move, answer: answers.append(answer))
    assert answers[0][:2] == ("error", "DeviceLostError")
    assert answers[0][2] == "device 0 is gone: The actor died unexpectedly."
