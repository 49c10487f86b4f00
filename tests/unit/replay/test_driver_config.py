"""The pool that a replay makes for itself, and plans it refuses before it starts anything."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kvpool.cache.store import DeviceStore
from kvpool.errors import ConfigError, InvalidRequestError
from kvpool.memory.allocator import GPUMemoryAllocator
from kvpool.memory.host import HostBackend
from kvpool.replay.driver import ReplayPlan, ReplayResult, pool_config, replay
from kvpool.sizes import MIB
from kvpool.workload import TraceRequest


@pytest.fixture(autouse=True)
def _no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("devices", [1, 2, 3])
@pytest.mark.parametrize("capacity", [0.05, 0.2])
@pytest.mark.parametrize("block_bytes", [4096, 5000, 12288, 65536, 100_000, 3 * 65536, 1 * MIB])
def test_memory_follows_from_the_share_of_unique_blocks(block_bytes: int, capacity: float, devices: int) -> None:
    """As many blocks must fit as were asked for, and hardly more: else the hit ratio would be another's."""
    unique = 170_000
    plan = ReplayPlan(devices=f"host:{devices}", capacity=capacity, block_bytes=block_bytes)
    config = pool_config(plan, unique)
    sizes = config.device_sizes_bytes()
    page_bytes = config.page_size_bytes(sizes[0], 4096)
    assert len(sizes) == devices
    assert all(size % page_bytes == 0 for size in sizes)
    footprint_bytes = -(-block_bytes // config.min_block) * config.min_block
    if block_bytes >= page_bytes:
        footprint_bytes = -(-block_bytes // page_bytes) * page_bytes
    fitting = sum(size // footprint_bytes for size in sizes)
    assert fitting == pytest.approx(capacity * unique, rel=0.005)


@pytest.mark.parametrize("block_bytes", [4096, 5000, 12288, 100_000, 3 * 65536])
def test_so_many_blocks_really_fit(block_bytes: int) -> None:
    """Also of a size that is no power of two, which a large page would hold badly."""
    plan = ReplayPlan(devices="host:1", capacity=0.05, block_bytes=block_bytes)
    config = pool_config(plan, 4000)
    (size_bytes,) = config.device_sizes_bytes()
    allocator = GPUMemoryAllocator(
        HostBackend(), size_bytes, config.page_size_bytes(size_bytes, 4096), min_block_bytes=config.min_block
    )
    store = DeviceStore(allocator)
    asked = ("allocate", "c", 1, "t", list(range(300)), block_bytes, block_bytes, [])
    _, (places, _, shortage) = store.apply([("connect", "c", "t", ""), asked])
    assert (len(places), shortage is None) == (200, False)
    allocator.close()


def test_every_device_has_at_least_a_block() -> None:
    config = pool_config(ReplayPlan(devices="host:4", capacity=0.001, block_bytes=65536), unique=10)
    assert all(size >= 65536 for size in config.device_sizes_bytes())


def test_small_blocks_waste_nothing() -> None:
    assert pool_config(ReplayPlan(block_bytes=512), unique=10_000).min_block == 512
    assert pool_config(ReplayPlan(block_bytes=65536), unique=10_000).min_block == 4096


def test_a_given_size_stands() -> None:
    config = pool_config(ReplayPlan(devices="host:2x300MiB", capacity=0.5, policy="lru"), unique=10)
    assert config.device_sizes_bytes() == [300 * MIB] * 2


@pytest.mark.parametrize("capacity", [0.0, -0.1, 1.01, float("nan")])
def test_a_capacity_that_is_no_share_is_refused(capacity: float) -> None:
    with pytest.raises(ConfigError, match="--capacity"):
        pool_config(ReplayPlan(capacity=capacity), unique=1000)


@pytest.mark.parametrize("devices", ["gpu:1", "host:0", "host", "host:2x"])
def test_devices_that_cannot_be_are_refused(devices: str) -> None:
    with pytest.raises(ConfigError, match="devices"):
        pool_config(ReplayPlan(devices=devices), unique=1000)


TRACE = [TraceRequest(0.0, 10, 1, (1, 2))]


@pytest.mark.parametrize(
    ("change", "requests", "named"),
    [
        ({"speed": "2x"}, TRACE, "--speed"),
        ({"replicas": 0}, TRACE, "replicas"),
        ({"in_flight": 0}, TRACE, "in flight"),
        ({"block_bytes": 12}, TRACE, "--block-bytes"),
        ({"block_bytes": 0}, TRACE, "--block-bytes"),
        ({"capacity": 2.0}, TRACE, "--capacity"),
        ({"devices": "tpu:1"}, TRACE, "devices"),
        ({}, [], "no block ids"),
        ({}, [TraceRequest(0.0, 10, 1, ())], "no block ids"),
    ],
)
async def test_a_plan_that_cannot_be_used_starts_nothing(
    change: dict[str, object], requests: list[TraceRequest], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(*_: object) -> None:
        raise AssertionError("a pool was started for a plan that cannot be used")

    monkeypatch.setattr("kvpool.replay.driver.temporary_pool", started)
    with pytest.raises(InvalidRequestError, match=named):
        await replay(requests, replace(ReplayPlan(), **change))


def test_quantiles_of_the_allocation_time() -> None:
    assert ReplayResult().allocation_ms(0.99) == 0.0
    result = ReplayResult(allocations_s=[n / 1000 for n in range(100, 0, -1)])
    assert result.allocation_ms(0.0) == pytest.approx(1)
    assert result.allocation_ms(0.5) == pytest.approx(51)
    assert result.allocation_ms(1.0) == pytest.approx(100)


def test_figures_of_a_replay() -> None:
    result = ReplayResult(blocks=200, blocks_hit=50, seconds=4.0)
    figures = result.to_dict()
    assert (figures["prefix_hit_ratio"], figures["blocks_per_s"]) == (0.25, 50.0)
    assert ReplayResult().to_dict()["prefix_hit_ratio"] == ReplayResult().to_dict()["blocks_per_s"] == 0.0
