"""What goes on in the background goes on after a failure, which is told."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections import deque

import pytest
from disk_stores import DEADLINE_S

from kvpool.actors.device_actor import DeviceActor
from kvpool.actors.upkeep import keep_up
from kvpool.cache.lower_tiers import LowerTiers
from kvpool.errors import BackendError


async def test_a_step_that_fails_is_told_once_for_each_cause_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    failures = deque([KeyError("x"), KeyError("y"), None, BackendError("full", errno="ENOMEM"), KeyError("z")])
    done = asyncio.Event()

    async def step() -> float:
        if not failures:
            done.set()
            return 60.0
        failure = failures.popleft()
        if failure is not None:
            raise failure
        return 0.0

    with caplog.at_level(logging.ERROR, "kvpool.device"):
        task = asyncio.create_task(keep_up("what it does", step, 0.0))
        await asyncio.wait_for(done.wait(), DEADLINE_S)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [KeyError, BackendError]
    assert "what it does failed" in caplog.text


@pytest.mark.parametrize(
    ("pause", "method"), [("_REMOVALS_S", "complete_removals"), ("_LEFTOVERS_S", "remove_from_leftovers")]
)
async def test_a_device_tries_removals_from_disk_again(
    tmp_path, monkeypatch: pytest.MonkeyPatch, pause: str, method: str
) -> None:
    monkeypatch.setattr(f"kvpool.actors.device_actor.{pause}", 0.001)
    tried = asyncio.Event()

    async def remove(self: LowerTiers) -> None:
        tried.set()

    monkeypatch.setattr(LowerTiers, method, remove)
    page = 1 << 16
    tiers = {"host_bytes": 0, "disk_url": str(tmp_path / "disk"), "disk_bytes": page, "write_policy": "write_back"}
    actor = DeviceActor("p", "host-0", 4 * page, page, 4096, 16 * page, 0, str(tmp_path / "s"), 1, tiers=tiers)
    await actor.start()
    await asyncio.wait_for(tried.wait(), DEADLINE_S)
    await actor.shutdown()
    await asyncio.wait(actor._removers)
    gc.unfreeze()  # the actor froze what this process had


async def test_a_device_compacts_and_trims_on_after_a_bug(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvpool.actors.device_actor.IDLE_S", 0.001)
    page = 1 << 16
    actor = DeviceActor("p", "host-0", 4 * page, page, 4096, 16 * page, 0, str(tmp_path / "s"), 1, idle_trim_s=0.004)
    await actor.start()
    calls = {"due": 0, "trim_idle": 0}
    both = asyncio.Event()

    def broken(name: str):
        def call(*_: object) -> None:
            calls[name] += 1
            if min(calls.values()) >= 3:
                both.set()
            raise ZeroDivisionError(name)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(actor._pacer, "due", broken("due"))
        patch.setattr(actor._allocator, "trim_idle", broken("trim_idle"))
        await asyncio.wait_for(both.wait(), DEADLINE_S)
    await actor.shutdown()
    gc.unfreeze()  # the actor froze what this process had
