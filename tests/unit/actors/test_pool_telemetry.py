"""What the pool's telemetry takes for an allocation and for an eviction, and whose."""

from __future__ import annotations

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

import kvpool.actors.pool_telemetry
from kvpool.actors.pool_telemetry import PoolTelemetry
from kvpool.cache import eviction
from kvpool.cache.eviction import register_policy
from kvpool.cache.lru import LeafFirstLRU
from kvpool.pool.instructions import Move, Send
from kvpool.pool.state import PoolState


@pytest.fixture
def reader(monkeypatch):
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader], shutdown_on_exit=False)
    monkeypatch.setattr(kvpool.actors.pool_telemetry, "meter_provider", lambda *_, **__: provider)
    yield reader
    provider.shutdown()


@pytest.fixture
def state():
    state = PoolState("p", "lru", "least_loaded", 10)
    state.add_device("host-0", "here", 4 * 65536, 65536, 4096, 32 * 65536)
    state.connect("c", "default", "here", "token")
    for name in ("stored", "known"):
        spec = {"name": name, "identity": {"model": name}, "block_bytes": 4096, "limit_bytes": None}
        state.register_model("c", spec)
    return state


@pytest.fixture
def telemetry(reader, state):
    return PoolTelemetry(state)


def points(reader, name):
    data = reader.get_metrics_data()
    return [
        (dict(point.attributes), point.count)
        for resource in (data.resource_metrics if data else ())
        for scope in resource.scope_metrics
        for metric in scope.metrics
        if metric.name == name
        for point in metric.data.data_points
    ]


def test_blocks_that_were_all_there_or_did_not_fit_are_no_allocation(reader, telemetry):
    items = [(1, 0, b"", None, None), (2, 1, b"", None, None), (3, 1, b"", None, None)]
    answers = [("blocks", 0, [7], [0], [(0, ())]), ("blocks", 3, [], [], []), ("blocks", 0, [], [], [])]
    telemetry.answered("request_blocks", items, answers, 0.1)
    assert points(reader, "kvpool.allocation.duration") == [({"model": "stored"}, 1)]


def test_an_eviction_is_that_of_the_policy_that_decided_on_it(reader, state, telemetry, monkeypatch):
    monkeypatch.setattr(eviction, "_POLICIES", dict(eviction._POLICIES))
    register_policy("another")(LeafFirstLRU)
    before = telemetry.timed(Send(0, ("evict", [1]), lambda *_: None), 0.0)
    state.set_policy("another", 0.0)
    after = telemetry.timed(Send(0, ("evict", [2]), lambda *_: None), 0.0)
    before.then([], 0.1)
    after.then([], 0.1)
    found = points(reader, "kvpool.eviction.duration")
    assert sorted((attributes["policy"], count) for attributes, count in found) == [("another", 1), ("lru", 1)]


def test_what_goes_down_and_comes_up_is_timed_unless_it_failed(reader, telemetry):
    answered = []

    def then(answer, _now):
        answered.append(answer)

    for kind in ("lower", "copy", "hold"):
        telemetry.timed(Send(0, (kind, "default", "f", []), then), 0.0).then([True], 0.1)
    telemetry.timed(Send(0, ("lower", "default", "f", []), then), 0.0).then(("error", "DeviceLostError", "", {}), 0.1)
    telemetry.timed(Send(0, ("evict", []), then), 0.0).then([], 0.1)
    for method in ("fill", "persist"):
        telemetry.timed_move(Move(0, method, (), then), 0.0).then([True], 0.1)
    assert len(answered) == 7
    assert points(reader, "kvpool.lower.demotion.duration") == [
        ({"device": "host-0", "reason": "eviction"}, 1),
        ({"device": "host-0", "reason": "ahead"}, 1),
    ]
    assert points(reader, "kvpool.lower.fill.duration") == [({"device": "host-0"}, 1)]
    assert points(reader, "kvpool.eviction.duration") == []
