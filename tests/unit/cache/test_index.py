"""The table of caches: keys, chains, leases, ids, and what it costs."""

import gc
import tracemalloc

import pytest

from kvpool.cache.eviction import policy_names, register_policy
from kvpool.cache.guarded_policy import make_policy
from kvpool.cache.index import CacheIndex
from kvpool.cache.key import encode_block_id
from kvpool.cache.lru import LeafFirstLRU
from kvpool.errors import ConfigError, InvariantError, StaleCacheError, UnknownCacheError, UnknownPolicyError


@pytest.fixture
def index() -> CacheIndex:
    index = CacheIndex()
    index.add_device(0)
    index.add_device(1)
    return index


def hashes(*ids: int) -> list[bytes]:
    return [encode_block_id(i) for i in ids]


def publish_chain(index: CacheIndex, space: int, ids: list[int], device: int = 0) -> list[int]:
    """Publish a chain from its root and give it back."""
    rows = index.add_chain(space, 100, device, len(ids), now=0.0)
    index.publish_all(rows, hashes(*ids))
    index.unpin(rows[::-1], now=1.0)
    return rows


def test_a_match_is_the_leading_published_run(index: CacheIndex) -> None:
    space = index.space("tenant", "fingerprint")
    rows = publish_chain(index, space, [1, 2, 3])
    assert index.match(space, hashes(1, 2, 3, 4)) == rows
    assert index.match(space, hashes(1, 9, 3)) == rows[:1]
    assert index.match(space, hashes(9, 1, 2)) == []
    assert index.match(space, []) == []


def test_complete_caches_are_published_and_held_by_nobody(index: CacheIndex) -> None:
    space = index.space("tenant", "fingerprint")
    (root,) = publish_chain(index, space, [1])
    index.pin([root], now=2.0)
    rows = index.add_complete(space, 100, 0, hashes(2, 3), root, now=2.0)
    index.check()
    assert index.match(space, hashes(1, 2, 3)) == [root, *rows]
    assert list(index.policy.victims(0)) == rows[::-1]
    assert (index.resident_bytes[0], index.evictable_bytes[0]) == (300, 200)
    index.unpin([root], now=3.0)
    assert list(index.policy.victims(0)) == [*rows[::-1], root]


@pytest.mark.parametrize("taken", [(4, 3), (4, 4), (3,)])
def test_complete_caches_under_keys_that_are_not_free_change_nothing(index: CacheIndex, taken: tuple[int, ...]) -> None:
    space = index.space("tenant", "fingerprint")
    (root,) = publish_chain(index, space, [3])
    with pytest.raises(InvariantError, match=r"a key that is taken|two caches under one key"):
        index.add_complete(space, 100, 0, hashes(*taken), root, now=4.0)
    index.check()
    assert len(index) == 1
    assert index.find(space, encode_block_id(4)) == -1


def test_a_single_complete_block_is_stored_as_a_chain_is(index: CacheIndex) -> None:
    """It goes in, and out, by a way of its own."""
    space, void = (index.space("tenant", name) for name in ("fingerprint", "void"))
    (root,) = publish_chain(index, space, [1])
    index.bury_all(void)
    (grave,) = (number for number in range(void + 2) if number not in (space, void))
    for asked, message in (
        ((grave, 100, 0, hashes(2)), "nothing is looked up"),
        ((space, 100, 7, hashes(2)), "not added"),
        ((space, 100, 0, hashes(2), root + 1), "a parent that is gone"),
    ):
        with pytest.raises(InvariantError, match=message):
            index.add_complete(*asked, now=2.0)
        index.check()
        assert len(index) == 1
    (row,) = index.add_complete(space, 100, 0, hashes(2), root, now=2.0)
    index.check()
    assert index.match(space, hashes(1, 2)) == [root, row]
    assert list(index.policy.victims(0)) == [row, root]
    stale = index.id_of(row)
    index.remove_all([row])
    index.check()
    assert (index.resident_bytes[0], index.evictable_bytes[0], index.live_row(stale)) == (100, 100, -1)
    with pytest.raises(InvariantError, match="that is gone"):
        index.remove_all([row])
    index.check()


@pytest.mark.parametrize("keys", [1, 3])
def test_caches_are_published_under_a_key_each(index: CacheIndex, keys: int) -> None:
    space = index.space("tenant", "fingerprint")
    rows = index.add_chain(space, 100, 0, 2, now=0.0)
    with pytest.raises(InvariantError, match="fewer or more keys"):
        index.publish_all(rows, hashes(*range(keys)))
    index.check()


def test_what_is_not_published_is_not_found(index: CacheIndex) -> None:
    space = index.space("tenant", "fingerprint")
    row = index.add(space, 100, 0, now=0.0)
    assert index.find(space, encode_block_id(1)) == -1
    assert not index.is_sealed(row)
    index.publish(row, encode_block_id(1))
    assert index.find(space, encode_block_id(1)) == row
    assert index.is_sealed(row)
    assert index.key_of(row) == encode_block_id(1)


def test_equal_hashes_of_other_tenants_and_models_are_other_keys(index: CacheIndex) -> None:
    spaces = [index.space(tenant, model) for tenant in ("a", "b") for model in ("m", "n")]
    assert len(set(spaces)) == 4
    assert index.space("a", "m") == spaces[0]
    rows = [publish_chain(index, space, [1])[0] for space in spaces]
    assert [index.find(space, encode_block_id(1)) for space in spaces] == rows
    assert [index.tenant_of(row) for row in rows] == ["a", "a", "b", "b"]
    assert [index.space_of(row) for row in rows] == spaces
    index.remove(rows[0])
    assert index.find(spaces[0], encode_block_id(1)) == -1
    assert index.find(spaces[1], encode_block_id(1)) == rows[1]


def test_leases_are_counted(index: CacheIndex) -> None:
    space = index.space("tenant", "fingerprint")
    [row] = publish_chain(index, space, [1])
    index.pin([row], now=2.0)
    index.pin([row], now=3.0)
    index.unpin([row], now=4.0)
    assert index.policy.victim() == -1, "one lease is left"
    assert (index.last_accessed[row], index.access_count[row]) == (3.0, 2)
    index.unpin([row], now=5.0)
    assert index.policy.victim() == row
    assert index.last_accessed[row] == 5.0
    with pytest.raises(InvariantError, match="nobody holds"):
        index.unpin([row], now=6.0)


def test_bytes_are_accounted_by_device(index: CacheIndex) -> None:
    space = index.space("tenant", "fingerprint")
    first, second = publish_chain(index, space, [1, 2], device=1)
    whole = index.add(space, 7, 0, now=0.0)
    assert (index.resident_bytes, index.evictable_bytes) == ([7, 200], [0, 200])
    index.pin([first], now=1.0)
    assert index.evictable_bytes == [0, 100]
    index.remove(second)
    index.unpin([whole], now=1.0)
    assert (index.resident_bytes, index.evictable_bytes) == ([7, 100], [0, 0]), "what has no key is not evictable"
    index.check()


def test_a_cache_without_key_is_never_a_victim(index: CacheIndex) -> None:
    row = index.add(index.space("tenant", "fingerprint"), 100, 0, now=0.0)
    index.seal(row)
    index.unpin([row], now=1.0)
    assert index.is_sealed(row)
    assert index.policy.victim() == -1
    assert list(index.policy.victims(0)) == []


def test_an_id_outlives_its_row(index: CacheIndex) -> None:
    space = index.space("tenant", "fingerprint")
    row = index.add(space, 100, 0, now=0.0)
    cache_id = index.id_of(row)
    assert index.row_of(cache_id) == row
    index.remove(row)
    assert index.add(space, 100, 0, now=0.0) == row, "the row is used again"
    assert index.id_of(row) != cache_id
    with pytest.raises(StaleCacheError, match=str(cache_id)):
        index.row_of(cache_id)
    assert index.live_row(cache_id) == -1


@pytest.mark.parametrize("foreign", [0, 5, -1, 1 << 32, (7 << 32) | 0, (1 << 32) | 1, (1 << 32) | 2**31, 1 << 90])
def test_a_foreign_id_is_unknown(index: CacheIndex, foreign: int) -> None:
    cache_id = index.id_of(index.add(index.space("tenant", "fingerprint"), 100, 0, now=0.0))
    if foreign != cache_id:
        with pytest.raises(UnknownCacheError, match=str(foreign)):
            index.row_of(foreign)
        assert index.live_row(foreign) == -1


def test_a_row_whose_ids_are_used_up_is_retired(index: CacheIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvpool.cache.index.MAX_STAMP", 4)
    space = index.space("tenant", "fingerprint")
    seen = set()
    for _ in range(10):
        row = index.add(space, 100, 0, now=0.0)
        seen.add(index.id_of(row))
        index.remove(row)
    assert len(seen) == 10
    assert max(seen) < 4 << 32, "no id grows past the bound"
    index.check()


def test_removing_a_parent_leaves_its_children_as_roots(index: CacheIndex) -> None:
    space = index.space("tenant", "fingerprint")
    first, second, third = publish_chain(index, space, [1, 2, 3])
    index.remove(second)
    index.check()
    assert index.parent[third] == -1
    assert index.match(space, hashes(1, 2, 3)) == [first]
    assert list(index.policy.victims(0)) == [third, first]


def test_a_lost_device_takes_its_caches_and_no_others(index: CacheIndex) -> None:
    space = index.space("tenant", "fingerprint")
    root = index.add(space, 100, 0, now=0.0)
    lost = index.add(space, 100, 1, root, now=0.0)
    leaf = index.add(space, 100, 0, lost, now=0.0)
    index.publish_all([root, lost, leaf], hashes(1, 2, 3))
    unkeyed = index.add(space, 50, 1, now=0.0)
    lost_ids = [index.id_of(row) for row in (lost, unkeyed)]
    index.unpin([leaf, root], now=1.0)
    assert index.remove_device(1) == 2
    index.check()
    assert index.resident_bytes == [200, 0]
    assert [index.live_row(cache_id) for cache_id in lost_ids] == [-1, -1]
    assert list(index.policy.victims(0)) == [leaf, root]
    assert index.remove_device(1) == 0


def test_many_leave_as_few_do(index: CacheIndex) -> None:
    """From some hundred on, the books are kept column by column; orphans and leased caches included."""
    other = CacheIndex()
    for number in range(2):
        other.add_device(number)
    going = []
    for each, most in ((index, 10_000), (other, 100)):
        space = each.space("tenant", "fingerprint")
        rows = publish_chain(each, space, list(range(1200)))
        rows += publish_chain(each, space, list(range(5000, 5300)), device=1)
        each.pin([rows[1300]], now=2.0)
        unkeyed = each.add(space, 7, 0, now=2.0)
        going = [*rows[1300:], *rows[600:1100][::-1], unkeyed]
        for start in range(0, len(going), most):
            each.remove_all(going[start : start + most])
        each.check()
        assert each.match(space, hashes(*range(1200))) == rows[:600]
    assert index.resident_bytes == other.resident_bytes
    assert index.evictable_bytes == other.evictable_bytes
    parents = [[each.parent[row] for row, used in enumerate(each.flags) if used] for each in (index, other)]
    assert parents[0] == parents[1]
    assert index._stamps == other._stamps
    with pytest.raises(InvariantError):
        index.remove_all(going)


def test_bugs_of_the_caller_are_found(index: CacheIndex) -> None:
    space = index.space("tenant", "fingerprint")
    [row] = publish_chain(index, space, [1])
    other = index.add(space, 100, 0, now=0.0)
    with pytest.raises(InvariantError, match="key that is taken"):
        index.publish(other, encode_block_id(1))
    with pytest.raises(InvariantError, match="no holder"):
        index.publish(row, encode_block_id(2))
    index.remove(row)
    with pytest.raises(InvariantError, match="gone"):
        index.remove(row)
    with pytest.raises(InvariantError, match="parent that is gone"):
        index.add(space, 100, 0, row, now=0.0)
    with pytest.raises(InvariantError, match="device"):
        index.add(space, 100, 2, now=0.0)
    index.check()
    assert len(index) == 1
    assert index.published == 0


def test_policies_are_known_by_name(index: CacheIndex) -> None:
    assert "lru" in policy_names()
    assert isinstance(make_policy("LRU", index), LeafFirstLRU)
    with pytest.raises(UnknownPolicyError, match=r"'mru'.*lru"):
        make_policy("mru", index)
    with pytest.raises(ConfigError, match="exists already"):
        register_policy("Lru")(lambda index: LeafFirstLRU(index))
    with pytest.raises(UnknownPolicyError, match=r"did you mean 'adaptive'\?"):
        make_policy("Adaptiv", index)


def test_a_policy_that_a_user_registers_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    class MostRecentFirst(LeafFirstLRU):
        def victim(self) -> int:
            return max(self.victims(0), key=lambda row: self._stamp[row], default=-1)

    monkeypatch.setattr("kvpool.cache.eviction._POLICIES", {})
    register_policy("most-recent")(MostRecentFirst)
    index = CacheIndex("most-recent")
    index.add_device(0)
    space = index.space("tenant", "fingerprint")
    publish_chain(index, space, [1])
    [newest] = publish_chain(index, space, [2])
    assert index.policy.victim() == newest


def test_a_cache_costs_no_object_and_few_bytes() -> None:
    count = 20_000
    index = CacheIndex()
    index.add_device(0)
    space = index.space("tenant", "fingerprint")
    gc.collect()
    tracked = len(gc.get_objects())
    tracemalloc.start()
    try:
        for first in range(0, count, 20):
            publish_chain(index, space, list(range(first, first + 20)))
        gc.collect()
        used_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(index) == count
    assert used_bytes / count < 240
    assert len(gc.get_objects()) - tracked < 100, "the garbage collector has as little to do as before"
