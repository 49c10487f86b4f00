"""Which Ray a process connects to, or starts."""

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError

from kvpool.actors import cluster
from kvpool.errors import PoolNotFoundError, PoolUnavailableError


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cluster that is asked refuses, as one does that wants a token."""

    def refuse(**_: object) -> None:
        raise ConnectionError("authentication token is missing")

    monkeypatch.setattr(cluster, "knock", lambda address: None)
    monkeypatch.setattr(cluster, "_init", refuse)
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)


def test_where_no_cluster_runs_one_may_be_started(refusing: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    started: list[bool] = []
    cluster.ensure_ray(start=lambda: started.append(True))
    assert started == [True]
    with pytest.raises(PoolNotFoundError, match="ray start --head"):
        cluster.ensure_ray()


def test_none_is_started_in_place_of_one_that_is_named(refusing: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
    with pytest.raises(PoolNotFoundError, match="RAY_AUTH_MODE=token"):
        cluster.ensure_ray(start=lambda: pytest.fail("a pool there would be found by nobody"))


@pytest.fixture
def taking() -> Iterator[Callable[[], Any]]:
    """Take SIGTERM; returns the handler."""

    def take() -> Any:
        handler = lambda *_: None  # noqa: E731  another one each time
        signal.signal(signal.SIGTERM, handler)
        return handler

    before = signal.getsignal(signal.SIGTERM)
    yield take
    signal.signal(signal.SIGTERM, before)


def test_a_handler_of_sigterm_outlasts_that_of_ray(taking: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.ray, "init", lambda **_: taking())
    mine = taking()
    cluster.start_local_ray()
    assert signal.getsignal(signal.SIGTERM) is mine


def test_another_thread_leaves_sigterm_to_who_takes_it_meanwhile(
    taking: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a server does in the main thread while a worker of its connects."""
    connecting, taken = threading.Event(), threading.Event()

    def connect(**_: object) -> None:
        connecting.set()
        taken.wait()

    monkeypatch.setattr(cluster.ray, "init", connect)
    taking()
    with ThreadPoolExecutor() as threads:
        started = threads.submit(cluster.start_local_ray)
        connecting.wait()
        mine = taking()
        taken.set()
        started.result()
    assert signal.getsignal(signal.SIGTERM) is mine


@pytest.mark.parametrize("said", [ActorDiedError(), ActorUnavailableError("It went.", None)])
async def test_an_error_repeats_one_line_of_what_ray_says(said: RayActorError, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(said), "__str__", lambda _: "The actor died.\n\tclass_name: PoolActor\n\tpid: 7")

    async def remote() -> None:
        raise said

    with pytest.raises(PoolUnavailableError) as caught:
        await cluster.call(SimpleNamespace(remote=remote))
    assert caught.value.message.endswith("Ray says: The actor died.")
    assert caught.value.details == {"ray": str(said)}
