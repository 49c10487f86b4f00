"""Leaf-first LRU: who goes, in the cases that its docstring names. The property test covers the rest."""

import pytest

from kvpool.cache.index import CacheIndex
from kvpool.cache.key import encode_block_id
from kvpool.cache.lru import LeafFirstLRU


class Pool:
    """An index of blocks of one byte, by number."""

    def __init__(self, devices: int = 1) -> None:
        self.index = CacheIndex("lru")
        for number in range(devices):
            self.index.add_device(number)
        self.space = self.index.space("tenant", "fingerprint")

    def row(self, block: int) -> int:
        return self.index.find(self.space, encode_block_id(block))

    def store(self, blocks: list[int], parent: int | None = None, device: int = 0) -> None:
        """Store a chain and keep it pinned."""
        above = -1 if parent is None else self.row(parent)
        rows = self.index.add_chain(self.space, 1, device, len(blocks), above, now=0.0)
        self.index.publish_all(rows, [encode_block_id(block) for block in blocks])

    def pin(self, blocks: list[int]) -> None:
        self.index.pin([self.row(block) for block in blocks], now=0.0)

    def give_back(self, blocks: list[int]) -> None:
        """Unpin a chain that is named from its root."""
        self.index.unpin([self.row(block) for block in reversed(blocks)], now=0.0)

    def block_of(self, row: int) -> int:
        key = self.index.key_of(row)
        assert key is not None
        return int.from_bytes(key, "big")

    def drain(self) -> list[int]:
        """Evict all that may go, one by one; returns the blocks in order."""
        policy = self.index.policy
        assert isinstance(policy, LeafFirstLRU)
        order = []
        while (row := policy.victim()) >= 0:
            order.append(self.block_of(row))
            self.index.remove(row)
            self.index.check()
            policy.check()
        return order

    def planned(self, device: int = 0) -> list[int]:
        return [self.block_of(row) for row in self.index.policy.victims(device)]


def test_a_chain_loses_its_tail_first_and_the_older_chain_goes_first() -> None:
    pool = Pool()
    pool.store([1, 2, 3])
    pool.store([4, 5])
    pool.give_back([1, 2, 3])
    pool.give_back([4, 5])
    assert pool.planned() == [3, 2, 1, 5, 4]
    assert pool.drain() == [3, 2, 1, 5, 4]


def test_a_hit_makes_a_chain_young() -> None:
    pool = Pool()
    for chain in ([1, 2, 3], [4, 5]):
        pool.store(chain)
        pool.give_back(chain)
    pool.pin([1, 2])
    assert pool.planned() == [3, 5, 4], "what is pinned cannot go"
    pool.give_back([1, 2])
    assert pool.drain() == [3, 5, 4, 2, 1]


def test_a_shared_prefix_stays_until_its_last_child_has_gone() -> None:
    pool = Pool()
    pool.store([1, 2])
    pool.give_back([1, 2])
    pool.pin([1])
    pool.store([3], parent=1)
    pool.index.unpin([pool.row(3), pool.row(1)], now=0.0)
    assert pool.planned() == [2, 3, 1]
    assert pool.drain() == [2, 3, 1]


def test_a_fork_waits_for_a_pinned_child_though_the_other_one_goes() -> None:
    pool = Pool()
    pool.store([1, 2])
    pool.store([3], parent=1)
    pool.give_back([1, 2])
    assert pool.drain() == [2]
    pool.give_back([3])
    assert pool.drain() == [3, 1]


def test_an_old_parent_of_a_pinned_child_does_not_stop_others() -> None:
    pool = Pool()
    pool.store([1])
    pool.store([2], parent=1)
    pool.store([3])
    pool.give_back([1])
    pool.give_back([3])
    assert pool.index.policy.victim() == pool.row(3)
    pool.give_back([2])
    assert pool.drain() == [3, 2, 1]


def test_an_old_parent_goes_right_after_the_child_it_waited_for() -> None:
    pool = Pool()
    pool.store([1])
    pool.store([2], parent=1)
    pool.give_back([1])
    pool.give_back([2])
    pool.store([3])
    pool.give_back([3])
    assert pool.planned() == [2, 1, 3]
    assert pool.drain() == [2, 1, 3]


def test_a_lease_on_the_tail_alone_shelters_the_chain_above() -> None:
    pool = Pool()
    pool.store([1, 2, 3])
    pool.give_back([1, 2, 3])
    pool.store([4])
    pool.give_back([4])
    pool.pin([3])
    assert pool.planned() == [4]
    pool.give_back([3])
    assert pool.drain() == [4, 3, 2, 1], "3 is younger than 4; 2 and 1 are older, but had to wait for it"


def test_a_new_child_shelters_a_parent_that_nobody_holds() -> None:
    pool = Pool()
    pool.store([1, 2])
    pool.give_back([1, 2])
    pool.store([3], parent=2)
    assert pool.index.policy.victim() == -1
    pool.give_back([3])
    assert pool.drain() == [3, 2, 1]


def test_an_exposed_parent_that_gets_a_child_again_has_to_wait_again() -> None:
    pool = Pool()
    pool.store([1])
    pool.store([2], parent=1)
    pool.give_back([1])
    pool.index.remove(pool.row(2))
    assert pool.index.policy.victim() == pool.row(1)
    pool.store([3], parent=1)
    assert pool.index.policy.victim() == -1
    assert pool.planned() == []
    pool.index.remove(pool.row(3))
    assert pool.drain() == [1]


def test_a_parent_exposed_twice_is_listed_once() -> None:
    pool = Pool()
    pool.store([1])
    pool.give_back([1])
    for block in (2, 3):  # nobody asks for a victim meanwhile, so the first entry is still there
        pool.store([block], parent=1)
        pool.index.remove(pool.row(block))
    assert pool.planned() == [1]
    assert pool.drain() == [1]


def test_a_chain_across_devices_goes_in_the_same_order() -> None:
    pool = Pool(devices=2)
    for number, block in enumerate([1, 2, 3, 4]):
        pool.store([block], parent=block - 1 if number else None, device=number % 2)
    pool.store([9], device=1)
    pool.give_back([1, 2, 3, 4])
    pool.give_back([9])
    assert pool.planned(0) == [], "3 waits for 4, which lies on the other device"
    assert pool.planned(1) == [4, 9], "2 waits for 3"
    assert pool.drain() == [4, 3, 2, 1, 9]


def test_a_device_never_heard_of_has_no_victims() -> None:
    pool = Pool(devices=2)
    pool.store([1])
    pool.give_back([1])
    assert pool.planned(1) == []


def test_dead_entries_do_not_pile_up_on_a_device_that_is_never_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvpool.cache.lru._PURGE_AT_LEAST", 16)
    pool = Pool()
    policy = pool.index.policy
    assert isinstance(policy, LeafFirstLRU)
    pool.store([0])
    pool.give_back([0])
    pool.store([1])
    for block in range(2, 500):
        pool.store([block], parent=1)
        pool.give_back([1])
        pool.index.remove(pool.row(block))  # exposes 1
        pool.pin([1])  # and its entry is dead
        assert len(policy._exposed[0]) <= 16
    policy.check()
    pool.give_back([1])
    assert pool.drain() == [0, 1]
