"""The pool's metrics: each has a unit and a description, and is documented; values come from the snapshot alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from kvpool.actors.metrics import PoolMetrics, PoolSnapshot
from kvpool.cache.host_tier import HostTier
from kvpool.cache.tier_statistics import TierCounters, tier_statistics
from kvpool.memory.host import HostBackend
from kvpool.pool.state import PoolState
from kvpool.pool.statistics import collect

DOCUMENT = Path(__file__).parents[3] / "docs" / "telemetry.md"


class RecordingMeter:
    """Keeps what instruments are made, by name."""

    def __init__(self):
        self.made = {}

    def _make(self, name, unit="", description="", **_):
        self.made[name] = (unit, description)

    create_histogram = _make

    def _observable(self, name, callbacks=None, unit="", description=""):
        self.made[name] = (unit, description)

    create_observable_counter = create_observable_gauge = create_observable_up_down_counter = _observable


def instruments():
    meter = RecordingMeter()
    PoolMetrics(meter)
    return meter.made


@pytest.mark.parametrize(("name", "made"), instruments().items())
def test_every_metric_has_a_unit_in_ucum_and_a_description(name, made):
    unit, description = made
    assert name.startswith("kvpool.")
    assert unit in ("s", "By", "1") or re.fullmatch(r"\{[a-z]+\}", unit)
    assert description


def test_the_table_of_metrics_is_that_of_the_code():
    rows = re.findall(r"^\| `(kvpool\.[a-z.]+)` \| (\S+) \|", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    documented = {name: unit.strip("`") for name, unit in rows}
    assert documented == {name: unit for name, (unit, _) in instruments().items()}


@pytest.fixture
def reader():
    return InMemoryMetricReader()


@pytest.fixture
def pool_metrics(reader):
    provider = MeterProvider([reader], shutdown_on_exit=False)
    yield PoolMetrics(provider.get_meter("t"))
    provider.shutdown()


def points(reader):
    data = reader.get_metrics_data()
    return {
        metric.name: [(dict(point.attributes), getattr(point, "value", point)) for point in metric.data.data_points]
        for resource in (data.resource_metrics if data else ())
        for scope in resource.scope_metrics
        for metric in scope.metrics
    }


def snapshot(lower=(None, None), **figures):
    state = PoolState("p", "lru", "least_loaded", 10)
    for name in ("host-0", "host-1"):
        state.add_device(name, "h", 1000, 100, 10, 8000)
    memory = {0: {"live": 250, "backed": 500, "reserve": 100, "zombie": 0, "free": 400, "caches": 3, "leases": 2}}
    memory[0]["lower"] = lower[0]
    if lower[1] is not None:
        memory[1] = memory[0] | {"lower": lower[1]}
    state.ledger.counters.evictions_by_reason["capacity"] = 7
    return PoolSnapshot(collect(state, memory), **{"hits": {}, "misses": {}, "errors": {}} | figures)


def test_nothing_is_told_before_the_first_snapshot(reader, pool_metrics):
    assert points(reader) == {}


def test_a_device_that_did_not_report_has_a_gap(reader, pool_metrics):
    pool_metrics.snapshot = snapshot()
    found = points(reader)
    on_first = {"device": "host-0", "tier": "host"}
    assert found["kvpool.memory.live"] == [(on_first, 250)]
    assert found["kvpool.memory.utilization"] == [(on_first, 0.25)]
    assert found["kvpool.memory.fragmentation"] == [(on_first, 0.5)]
    assert found["kvpool.leases"] == [(on_first, 2)]
    assert found["kvpool.evictions"] == [
        ({"reason": reason}, count) for reason, count in (("capacity", 7), ("request", 0), ("invalidate", 0))
    ]


def test_each_tier_below_a_device_is_told_apart(reader, pool_metrics):
    host = HostTier(HostBackend(1 << 30), 1 << 20, 1 << 16)
    counters = TierCounters(demoted=5, not_kept=1, copied_ahead=2, host_hits=3, host_misses=4, host_written_bytes=500)
    host.errors["ENOMEM"] += 1
    lower = tier_statistics(host, None, None, counters)
    disk = {"budget_bytes": 9000, "used_bytes": 70, "files": 7, "hits": 2, "misses": 1, "written_bytes": 60}
    disk |= {"read_bytes": 20, "pending_removals": 3, "errors": {"timeout": 3}, "bad_files": {"checksum": 1}}
    pool_metrics.snapshot = snapshot(lower=[lower | {"disk": disk}, lower])
    found = points(reader)
    in_host, on_disk, other = (
        {"device": f"host-{n}", "tier": tier} for n, tier in ((0, "host"), (0, "disk"), (1, "host"))
    )
    for name, values in {
        "capacity": (1 << 20, 9000, 1 << 20),
        "used": (0, 70, 0),
        "caches": (0, 7, 0),
        "hits": (3, 2, 3),
        "misses": (4, 1, 4),
        "written": (500, 60, 500),
        "read": (0, 20, 0),
    }.items():
        expected = [(where, value) for where, value in zip((in_host, on_disk, other), values, strict=True)]
        assert found[f"kvpool.lower.{name}"] == expected, name
    assert found["kvpool.lower.removals.pending"] == [(on_disk, 3)]
    assert found["kvpool.lower.errors"] == [
        (in_host | {"error.type": "ENOMEM"}, 1),
        (on_disk | {"error.type": "timeout"}, 3),
        (on_disk | {"error.type": "bad_checksum"}, 1),
        (other | {"error.type": "ENOMEM"}, 1),
    ]
    assert found["kvpool.lower.demotions"][:3] == [
        ({"device": "host-0", "outcome": outcome}, n) for outcome, n in (("kept", 5), ("lost", 1), ("copied_ahead", 2))
    ]
    host.close()


def test_counts_have_few_attributes(reader, pool_metrics):
    pool_metrics.snapshot = snapshot(hits={"a": 3}, misses={"a": 1, "b": 2}, errors={"LimitError": 4})
    found = points(reader)
    assert found["kvpool.cache.hits"] == [({"model": "a"}, 3)]
    assert found["kvpool.cache.misses"] == [({"model": "a"}, 1), ({"model": "b"}, 2)]
    assert found["kvpool.errors"] == [({"error.type": "LimitError"}, 4)]


def test_models_beyond_a_hundred_are_counted_together(reader, pool_metrics):
    for number in range(105):
        pool_metrics.allocated(f"model-{number}", 0.01)
    pool_metrics.allocated("model-0", 0.01)
    counts = {attributes["model"]: point.count for attributes, point in points(reader)["kvpool.allocation.duration"]}
    assert len(counts) == 101
    assert (counts["model-0"], counts["other"]) == (2, 5)


def test_durations_are_recorded_in_buckets_below_a_millisecond(reader, pool_metrics):
    pool_metrics.evicted("host-0", "host", "lru", 0.0004)
    pool_metrics.waited("m", "granted", 0.3)
    pool_metrics.demoted("host-0", "ahead", 0.01)
    pool_metrics.filled("host-1", 0.02)
    found = points(reader)
    assert found["kvpool.lower.demotion.duration"][0][0] == {"device": "host-0", "reason": "ahead"}
    assert found["kvpool.lower.fill.duration"][0][0] == {"device": "host-1"}
    ((attributes, point),) = found["kvpool.eviction.duration"]
    assert attributes == {"device": "host-0", "tier": "host", "policy": "lru"}
    assert sum(bound < 0.001 for bound in point.explicit_bounds) == 3
    ((attributes, _),) = found["kvpool.wait.duration"]
    assert attributes == {"model": "m", "outcome": "granted"}
