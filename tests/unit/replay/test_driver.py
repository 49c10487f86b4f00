"""A replay under way, over replicas that stand for the actors."""

from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest

from kvpool.errors import PoolUnavailableError
from kvpool.replay import driver
from kvpool.replay.driver import ReplayPlan, replay
from kvpool.workload import generate


class Pool:
    """As much of a pool as the driver sees."""

    name = "p"

    async def stats(self):
        return SimpleNamespace(evictions=0, policy="lru", total=lambda _field: 0)


class Replica:
    """Answers as an actor does; its third request finds the pool gone."""

    def __init__(self):
        self.started = self.ended = False
        for name in ("start", "look_up", "fill", "stop"):
            setattr(self, name, SimpleNamespace(remote=getattr(self, f"_{name}")))

    async def _start(self):
        self.started = True

    async def _look_up(self, number, ids, output_tokens):
        return 0

    async def _fill(self, number):
        if number >= 2:
            raise PoolUnavailableError("the pool's actor is gone")
        return {"verified_bytes": 0, "wrong_bytes": 0, "stored": 1, "allocation_s": 0.001}

    async def _stop(self):
        self.ended = True


async def test_an_error_of_a_request_ends_the_replay_as_itself_and_leaves_nothing_behind(monkeypatch):
    # The command line shows one line for it; a group of errors would be a traceback.
    replicas, killed, ended = [], [], []

    def make_worker(*_):
        replicas.append(Replica())
        return replicas[-1]

    @asynccontextmanager
    async def temporary_pool(_config):
        try:
            yield Pool()
        finally:
            ended.append(list(killed))

    monkeypatch.setattr(driver, "make_worker", make_worker)
    monkeypatch.setattr(driver, "kill", killed.append)
    monkeypatch.setattr(driver, "temporary_pool", temporary_pool)
    with pytest.raises(PoolUnavailableError, match="the pool's actor is gone"):
        await replay(generate(1, sessions=5), ReplayPlan(replicas=2))
    assert [replica.started for replica in replicas] == [True, True]
    assert killed == replicas
    assert ended == [replicas], "the pool ends when nobody uses it any more"
