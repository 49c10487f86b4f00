"""CacheIndex with leaf-first LRU against the simplest model there is: a list in the order of last use, searched."""

from dataclasses import dataclass
from unittest.mock import patch

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvpool.cache.index import CacheIndex
from kvpool.cache.key import encode_block_id
from kvpool.cache.lru import LeafFirstLRU
from kvpool.errors import StaleCacheError

DEVICES = 3
SPACES = 2


@dataclass
class Known:
    """What the model knows of a resident cache."""

    cache_id: int
    space: int
    device: int
    size_bytes: int
    parent: int  # row, or -1
    pins: int = 1
    block: int | None = None


class IndexMachine(RuleBasedStateMachine):
    """Adds, publishes, pins, unpins, evicts and loses caches."""

    @initialize(
        forest=st.lists(
            st.tuples(st.integers(0, 9), st.integers(1, 4), st.integers(0, DEVICES - 1)), min_size=2, max_size=6
        )
    )
    def begin(self, forest: list[tuple[int, int, int]]) -> None:
        # Small steps of growth and early purges, so that both happen within a few rules.
        self.patches = [patch("kvpool.cache.table._GROWTH_ROWS", 4), patch("kvpool.cache.lru._PURGE_AT_LEAST", 2)]
        for each in self.patches:
            each.start()
        self.index = CacheIndex("lru")
        for number in range(DEVICES):
            self.index.add_device(number)
        self.spaces = [self.index.space(f"tenant {number}", "fingerprint") for number in range(SPACES)]
        self.caches: dict[int, Known] = {}
        self.order: list[int] = []  # evictable rows, the longest unused first
        self.gone: list[int] = []
        self.next_block = 0
        self.now = 0.0
        for branch, count, device in forest:
            parents = [-1, *sorted(self.caches)]
            rows = self.add_rows(count, 0, device, 1, parents[branch % len(parents)])
            self.publish_rows(rows)
            self.unpin_rows(rows[::-1])

    def teardown(self) -> None:
        for each in getattr(self, "patches", []):
            each.stop()

    # -- the model ------------------------------------------------------------------------------------------------

    def children(self, row: int, without: set[int] = frozenset()) -> int:  # type: ignore[assignment]
        return sum(known.parent == row for other, known in self.caches.items() if other not in without)

    def planned(self, device: int | None) -> list[int]:
        """Evict in thought until nothing more may go."""
        gone: set[int] = set()
        order = []
        while True:
            for row in self.order:
                wanted = device is None or self.caches[row].device == device
                if row not in gone and wanted and not self.children(row, gone):
                    gone.add(row)
                    order.append(row)
                    break
            else:
                return order

    def chain(self, row: int) -> list[int]:
        rows = []
        while row >= 0:
            rows.append(row)
            row = self.caches[row].parent
        return rows[::-1]

    def forget(self, row: int) -> None:
        for known in self.caches.values():
            if known.parent == row:
                known.parent = -1
        self.gone.append(self.caches.pop(row).cache_id)
        if row in self.order:
            self.order.remove(row)

    def pin_rows(self, rows: list[int]) -> None:
        self.now += 1
        self.index.pin(rows, now=self.now)
        for row in rows:
            self.caches[row].pins += 1
            if row in self.order:
                self.order.remove(row)

    def unpin_rows(self, rows: list[int]) -> None:
        self.now += 1
        self.index.unpin(rows, now=self.now)
        for row in rows:
            known = self.caches[row]
            known.pins -= 1
            if not known.pins and known.block is not None:
                self.order.append(row)

    def add_rows(self, count: int, space: int, device: int, size_bytes: int, parent: int) -> list[int]:
        rows = self.index.add_chain(self.spaces[space], size_bytes, device, count, parent, now=self.now)
        assert len(set(rows)) == count
        assert self.caches.keys().isdisjoint(rows)
        for row in rows:
            self.caches[row] = Known(self.index.id_of(row), space, device, size_bytes, parent)
            parent = row
        return rows

    def publish_rows(self, rows: list[int]) -> None:
        blocks = range(self.next_block, self.next_block + len(rows))
        self.next_block += len(rows)
        self.index.publish_all(rows, [encode_block_id(block) for block in blocks])
        for row, block in zip(rows, blocks, strict=True):
            self.caches[row].block = block

    def draw_row(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.caches)))

    # -- rules ----------------------------------------------------------------------------------------------------

    @rule(
        data=st.data(),
        count=st.integers(1, 4),
        space=st.integers(0, SPACES - 1),
        device=st.integers(0, DEVICES - 1),
        size_bytes=st.integers(1, 9),
        publish=st.booleans(),
        hold=st.booleans(),
    )
    def add(
        self, data: st.DataObject, count: int, space: int, device: int, size_bytes: int, publish: bool, hold: bool
    ) -> None:
        parent = data.draw(st.sampled_from([-1, *sorted(self.caches)]))
        rows = self.add_rows(count, space, device, size_bytes, parent)
        if publish:
            self.publish_rows(rows)
        if not hold:
            self.unpin_rows(rows[::-1])

    @rule(
        data=st.data(),
        count=st.integers(1, 4),
        space=st.integers(0, SPACES - 1),
        device=st.integers(0, DEVICES - 1),
        size_bytes=st.integers(1, 9),
    )
    def add_complete(self, data: st.DataObject, count: int, space: int, device: int, size_bytes: int) -> None:
        parent = data.draw(st.sampled_from([-1, *sorted(self.caches)]))
        blocks = range(self.next_block, self.next_block + count)
        self.next_block += count
        hashes = [encode_block_id(block) for block in blocks]
        rows = self.index.add_complete(self.spaces[space], size_bytes, device, hashes, parent, now=self.now)
        for row, block in zip(rows, blocks, strict=True):
            self.caches[row] = Known(self.index.id_of(row), space, device, size_bytes, parent, 0, block)
            parent = row
        self.order.extend(rows[::-1])

    @precondition(lambda self: any(known.pins and known.block is None for known in self.caches.values()))
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        pinned = [row for row, known in self.caches.items() if known.pins and known.block is None]
        self.publish_rows([data.draw(st.sampled_from(sorted(pinned)))])

    @precondition(lambda self: self.caches)
    @rule(data=st.data(), hold=st.booleans())
    def use_chain(self, data: st.DataObject, hold: bool) -> None:
        rows = self.chain(self.draw_row(data))
        self.pin_rows(rows)
        if not hold:
            self.unpin_rows(rows[::-1])

    @precondition(lambda self: self.caches)
    @rule(data=st.data())
    def pin_any(self, data: st.DataObject) -> None:
        self.pin_rows(data.draw(st.lists(st.sampled_from(sorted(self.caches)), min_size=1, max_size=4)))

    @precondition(lambda self: any(known.pins for known in self.caches.values()))
    @rule(data=st.data())
    def unpin_any(self, data: st.DataObject) -> None:
        pinned = sorted(row for row, known in self.caches.items() if known.pins)
        self.unpin_rows(data.draw(st.lists(st.sampled_from(pinned), min_size=1, unique=True)))

    @precondition(lambda self: self.caches)
    @rule(data=st.data())
    def unpin_chain(self, data: st.DataObject) -> None:
        rows = [row for row in self.chain(self.draw_row(data)) if self.caches[row].pins]
        self.unpin_rows(rows[::-1])

    @precondition(lambda self: self.order)
    @rule(count=st.integers(1, 4))
    def evict(self, count: int) -> None:
        for _ in range(count):
            row = self.index.policy.victim()
            if row >= 0:
                self.index.remove(row)
                self.forget(row)

    @precondition(lambda self: self.order)
    @rule(device=st.integers(0, DEVICES - 1), count=st.integers(1, 4))
    def evict_from(self, device: int, count: int) -> None:
        rows = list(self.index.policy.victims(device))[:count]
        self.index.remove_all(rows)
        for row in rows:
            self.forget(row)

    @precondition(lambda self: len(self.caches) > 8)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        row = self.draw_row(data)
        self.index.remove(row)
        self.forget(row)

    @precondition(lambda self: len(self.caches) > 8)
    @rule(device=st.integers(0, DEVICES - 1))
    def lose_device(self, device: int) -> None:
        rows = [row for row, known in self.caches.items() if known.device == device]
        assert self.index.remove_device(device) == len(rows)
        for row in rows:
            self.forget(row)

    # -- what must hold -------------------------------------------------------------------------------------------

    @invariant()
    def sound(self) -> None:
        self.index.check()
        policy = self.index.policy
        assert isinstance(policy, LeafFirstLRU)
        policy.check()

    @invariant()
    def victims_are_those_of_the_model(self) -> None:
        planned = self.planned(None)
        assert self.index.policy.victim() == (planned[0] if planned else -1)
        for device in range(DEVICES):
            assert list(self.index.policy.victims(device)) == self.planned(device)

    @invariant()
    def caches_are_those_of_the_model(self) -> None:
        assert len(self.index) == len(self.caches)
        for row, known in self.caches.items():
            assert self.index.row_of(known.cache_id) == row
            assert (self.index.parent[row], self.index.pins[row]) == (known.parent, known.pins)
            if known.block is not None:
                block_hash = encode_block_id(known.block)
                assert self.index.find(self.spaces[known.space], block_hash) == row
                assert self.index.find(self.spaces[1 - known.space], block_hash) == -1
        resident = [
            sum(known.size_bytes for known in self.caches.values() if known.device == device)
            for device in range(DEVICES)
        ]
        evictable = [
            sum(self.caches[row].size_bytes for row in self.order if self.caches[row].device == device)
            for device in range(DEVICES)
        ]
        assert (self.index.resident_bytes, self.index.evictable_bytes) == (resident, evictable)

    @invariant()
    def ids_of_the_gone_are_stale(self) -> None:
        for cache_id in self.gone[-5:]:
            with pytest.raises(StaleCacheError):
                self.index.row_of(cache_id)


TestIndexMachine = IndexMachine.TestCase
TestIndexMachine.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)
