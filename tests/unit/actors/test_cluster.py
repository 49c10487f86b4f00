"""Which Ray a process connects to, or starts."""

from types import SimpleNamespace

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


@pytest.mark.parametrize("said", [ActorDiedError(), ActorUnavailableError("It went.", None)])
async def test_an_error_repeats_one_line_of_what_ray_says(said: RayActorError, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(said), "__str__", lambda _: "The actor died.\n\tclass_name: PoolActor\n\tpid: 7")

    async def remote() -> None:
        raise said

    with pytest.raises(PoolUnavailableError) as caught:
        await cluster.call(SimpleNamespace(remote=remote))
    assert caught.value.message.endswith("Ray says: The actor died.")
    assert caught.value.details == {"ray": str(said)}
