"""Figures of a pool."""

from __future__ import annotations

import json

import pytest
from pool_harness import PAGE, LocalPool, hashes

from kvpool.pool.instructions import Batch, DeviceLost, PrefixesLookedUp
from kvpool.pool.statistics import PoolStatistics, collect


def memory_of(pool: LocalPool) -> dict[int, dict[str, int]]:
    reports = {}
    for number, store in enumerate(pool.stores):
        usage = store.allocator.usage()
        reports[number] = {
            "live": usage.live_bytes,
            "backed": usage.backed_bytes,
            "reserve": usage.reserve_bytes,
            "zombie": usage.zombie_bytes,
            "free": usage.free_bytes,
            "caches": store.caches,
        }
    return reports


@pytest.fixture
def pool():
    pool = LocalPool(devices=2, pages=4)
    pool.connect()
    pool.model()
    yield pool
    pool.close()


def test_a_new_pool_has_done_nothing_and_divides_by_nothing(pool):
    stats = collect(pool.state, {})
    assert (stats.hit_ratio, stats.utilization, stats.fragmentation) == (0.0, 0.0, 0.0)
    assert (stats.requests, stats.keys, stats.waiting, stats.evictions) == (0, 0, 0, 0)
    assert stats.total("capacity_bytes") == 8 * PAGE
    assert [device.name for device in stats.devices] == ["host-0", "host-1"]


def test_a_pool_without_memory_has_ratios_too():
    stats = collect(LocalPool(devices=0).state, {})
    assert (stats.hit_ratio, stats.utilization, stats.fragmentation) == (0.0, 0.0, 0.0)


def test_what_happened_is_counted(pool):
    pool.put(range(8))
    pool.look_up(range(10))
    pool.request(PAGE)
    pool.request(9 * PAGE)
    pool.request(4 * PAGE, timeout_s=9.0)
    stats = collect(pool.state, memory_of(pool))
    assert (stats.lookups, stats.blocks_looked_up, stats.blocks_hit, stats.hit_ratio) == (1, 10, 8, 0.8)
    assert (stats.blocks_stored, stats.keys) == (8, 8)
    assert (stats.requests, stats.grants, stats.refusals, stats.waiting) == (3, 1, 1, 1)
    assert stats.errors == {"InvalidSizeError": 1}
    assert stats.models == {"m": 9}  # a cache and eight blocks
    assert stats.clients == 1


def test_misses_never_go_down_while_look_ups_are_on_their_way(pool):
    def misses():
        model, stats = pool.state.ledger.models[0], collect(pool.state, {})
        assert (model.blocks_looked_up, model.blocks_hit) == (stats.blocks_looked_up, stats.blocks_hit)
        return stats.blocks_looked_up - stats.blocks_hit

    pool.put(range(8))
    pool.look_up([99])
    assert misses() == 1
    batch = Batch(2)
    items = [(1, 0, hashes(range(10)), None), (2, 0, hashes([98]), None)]
    pool.handle(PrefixesLookedUp(batch, "c", items))
    assert misses() == 2, "the second is answered at once"
    pool.settle()
    assert [len(answer[1]) for answer in pool.done.pop(batch)] == [8, 0]
    assert misses() == 4


def test_ratios_come_from_bytes(pool):
    pool.request(PAGE)
    pool.request(PAGE // 4)
    stats = collect(pool.state, memory_of(pool))
    live_bytes, backed_bytes = PAGE + PAGE // 4, 2 * PAGE
    assert stats.total("live_bytes") == live_bytes
    assert stats.utilization == live_bytes / (8 * PAGE)
    assert stats.fragmentation == 1 - live_bytes / backed_bytes
    whole, part = sorted(stats.devices, key=lambda device: -device.live_bytes)
    assert (whole.utilization, whole.fragmentation) == (0.25, 0.0)
    assert (part.utilization, part.fragmentation) == (1 / 16, 0.75)


def test_pinned_and_evictable_are_told_apart(pool):
    pool.put(range(4))
    held = pool.look_up(range(1))
    stats = collect(pool.state, memory_of(pool))
    assert (stats.total("pinned_bytes"), stats.total("evictable_bytes")) == (4096, 3 * 4096)
    pool.release(held[1])
    stats = collect(pool.state, memory_of(pool))
    assert (stats.total("pinned_bytes"), stats.total("evictable_bytes")) == (0, 4 * 4096)


def test_evictions_are_counted_where_they_happen(pool):
    pool.put(range(128))
    pool.put(range(200, 210))
    stats = collect(pool.state, memory_of(pool))
    assert stats.evictions == stats.total("evictions") == 10
    assert stats.evicted_bytes == 10 * 4096


def test_models_of_the_same_name_are_counted_together(pool):
    pool.connect("other", tenant="other")
    number = pool.model("other")
    pool.request(100)
    pool.request(100, client="other", model=number)
    assert collect(pool.state, {}).models == {"m": 2}


def test_lost_devices_and_stand_ins_are_told(pool):
    pool.handle(DeviceLost(1, "its node is gone"))
    stats = collect(pool.state, {}, policy_requested="size_aware_lru", preset="vista")
    assert [device.lost for device in stats.devices] == [None, "its node is gone"]
    assert (stats.policy, stats.policy_requested, stats.preset) == ("lru", "size_aware_lru", "vista")
    assert collect(pool.state, {}).policy_requested == "lru"


def test_a_dict_of_built_in_types_holds_everything(pool):
    pool.put(range(5))
    pool.look_up(range(9))
    stats = collect(pool.state, memory_of(pool), preset="vista")
    figures = json.loads(json.dumps(stats.to_dict()))
    assert PoolStatistics.from_dict(figures) == stats
    assert figures["hit_ratio"] == stats.hit_ratio == 5 / 9
    assert figures["devices"][0]["utilization"] == stats.devices[0].utilization > 0


def test_a_pool_that_runs_since_before_a_figure_came_is_understood(pool):
    stats = collect(pool.state, memory_of(pool))
    figures = stats.to_dict()
    for device in figures["devices"]:
        del device["disk_url"]
    assert PoolStatistics.from_dict(figures | {"of_a_later_version": 1}) == stats
