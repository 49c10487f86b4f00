"""LFU, size-aware LRU and what a user adds: who goes. The property tests cover the rest."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvpool.cache import eviction
from kvpool.cache.eviction import find_policy, policy_names
from kvpool.cache.index import CacheIndex
from kvpool.cache.key import encode_block_id
from kvpool.errors import UnknownPolicyError
from kvpool.simulate import simulate
from kvpool.workload import generate


class Pool:
    """An index of blocks, by number."""

    def __init__(self, policy: str) -> None:
        self.index = CacheIndex(policy)
        self.index.add_device(0)
        self.space = self.index.space("tenant", "fingerprint")
        self.now = 0.0

    def store(self, *blocks: int, size_bytes: int = 1) -> None:
        self.now += 1
        rows = self.index.add_chain(self.space, size_bytes, 0, len(blocks), now=self.now)
        self.index.publish_all(rows, [encode_block_id(block) for block in blocks])
        self.index.unpin(rows[::-1], now=self.now)

    def use(self, *blocks: int) -> None:
        rows = [self.index.find(self.space, encode_block_id(block)) for block in blocks]
        self.now += 1
        self.index.pin(rows, now=self.now)
        self.index.unpin(rows[::-1], now=self.now)

    def victims(self) -> list[int]:
        return [int.from_bytes(self.index.key_of(row) or b"", "big") for row in self.index.policy.victims(0)]

    def evict(self, count: int) -> list[int]:
        gone = self.victims()[:count]
        self.index.remove_all([self.index.find(self.space, encode_block_id(block)) for block in gone])
        return gone


def test_the_built_in_policies_are_known_by_name() -> None:
    assert {"adaptive", "lfu", "lru", "size_aware_lru"} <= set(policy_names())
    for name in ("ADAPTIVE", "Lfu", "SIZE_AWARE_LRU"):
        assert callable(find_policy(name))


def test_lfu_keeps_what_was_found_often_and_of_equals_the_latest() -> None:
    pool = Pool("lfu")
    for block in (1, 2, 3):
        pool.store(block)
    pool.use(1)
    pool.use(1)
    pool.use(2)
    assert pool.victims() == [3, 2, 1]
    pool.store(4)
    assert pool.victims() == [3, 4, 2, 1]


def test_lfu_counts_only_while_a_cache_is_resident() -> None:
    pool = Pool("lfu")
    pool.store(1)
    pool.use(1)
    pool.evict(1)
    pool.store(2)
    pool.use(2)
    pool.store(1)
    assert pool.victims() == [1, 2]


def test_lfu_never_takes_a_parent_before_its_child() -> None:
    pool = Pool("lfu")
    pool.store(1, 2, 3)
    for _ in range(3):
        pool.use(1, 2, 3)
    pool.use(1, 2)
    pool.store(4)
    assert pool.victims() == [4, 3, 2, 1]


def test_size_aware_lru_takes_a_large_cache_before_small_ones_used_longer_ago() -> None:
    pool = Pool("size_aware_lru")
    pool.store(1, size_bytes=1)
    pool.store(2, size_bytes=1)
    pool.store(3, size_bytes=100)
    assert pool.victims() == [3, 1, 2]


def test_size_aware_lru_lets_small_caches_go_in_the_end() -> None:
    """Each large one that goes raises what a place is worth by a quarter of what the small one is."""
    pool = Pool("size_aware_lru")
    pool.store(1, size_bytes=1)
    gone = []
    for block in range(10, 20):
        pool.store(block, size_bytes=4)
        gone += pool.evict(1)
    assert gone[:4] == [10, 11, 12, 1]


def test_size_aware_lru_is_lru_when_all_sizes_are_equal() -> None:
    requests = generate(4, sessions=60)
    same = [simulate(requests, policy, 0.1) for policy in ("lru", "size_aware_lru")]
    assert same[0]["prefix_hit_ratio"] == same[1]["prefix_hit_ratio"]
    assert same[0]["evictions"] == same[1]["evictions"]


@pytest.fixture
def documented_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The policy of ten lines in docs/eviction.md, as the module that the text says it is."""
    text = (Path(__file__).parents[3] / "docs" / "eviction.md").read_text(encoding="utf-8")
    code = text.split("```python\n", 1)[1].split("```", 1)[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    (tmp_path / "my_policies.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    policy_names()
    monkeypatch.setattr("kvpool.cache.eviction._POLICIES", dict(eviction._POLICIES))
    yield "my_policies:found_often"
    sys.modules.pop("my_policies", None)


def test_the_policy_of_the_docs_works_under_its_name(documented_module: str) -> None:
    pool = Pool(documented_module)
    pool.store(1)
    pool.use(1)
    pool.store(2)
    assert pool.victims() == [2, 1], "found once, although used before"


def test_the_policy_of_the_docs_hits_something_else_than_lru(documented_module: str) -> None:
    hits = {policy: f"{simulate(generate(1), policy)['prefix_hit_ratio']:.2%}" for policy in ("lru", documented_module)}
    assert hits == {"lru": "33.86%", documented_module: "35.66%"}, "as the text says"


def test_the_class_of_the_docs_admits_the_front_of_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvpool.cache.eviction._POLICIES", {})
    text = (Path(__file__).parents[3] / "docs" / "eviction.md").read_text(encoding="utf-8")
    exec(text.split("```python\n", 2)[2].split("```", 1)[0], {})
    policy = CacheIndex("short_prompts").policy
    hashes = [encode_block_id(number) for number in range(100)]
    assert [policy.admit(0, hashes, range(found), (0,), 1, 5, 0.0) for found in (0, 40, 80)] == [64, 24, 0]
    assert policy.admit(0, hashes, range(40), (0,), 1, 0, 0.0) == 60


def test_a_policy_whose_module_is_not_there_is_refused() -> None:
    with pytest.raises(UnknownPolicyError, match=r"'no_such_module'.*must be installed or on the PYTHONPATH of Ray"):
        find_policy("no_such_module:mru")
