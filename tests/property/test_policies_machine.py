"""Every policy against a model that knows only what may go: leaves that nobody holds, each once, children first.

LFU and size-aware LRU are also compared with a search through lists for the one worth least.
"""

from typing import Any

from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvpool.cache.index import CacheIndex
from kvpool.cache.key import encode_block_id

DEVICES = 2


class PolicyMachine(RuleBasedStateMachine):
    """Requests, leases, evictions and losses; devices may share a chain."""

    policy = "adaptive"

    @initialize()
    def begin(self) -> None:
        self.index = CacheIndex(self.policy, seed=7)
        for number in range(DEVICES):
            self.index.add_device(number)
        self.space = self.index.space("tenant", "fingerprint")
        self.held: list[list[int]] = []
        self.now = 0.0
        self.floor = 0.0
        self.stamps: dict[int, int] = {}
        self.worths: dict[int, float] = {}
        self.stamp = 0

    def free_rows(self, device: int) -> set[int]:
        index = self.index
        return {
            row
            for row in range(len(index.flags))
            if index.flags[row] and not index.pins[row] and index.key_of(row) and index.device[row] == device
        }

    def give_back(self, rows: list[int]) -> None:
        rows = [row for row in rows if self.index.pins[row]]
        self.value([row for row in rows[::-1] if self.index.pins[row] == 1])
        self.index.unpin(rows[::-1], now=self.now)

    def value(self, rows: list[int]) -> None:
        """Note what rows are worth that nobody holds from now on."""
        for row in rows:
            self.stamp += 1
            self.stamps[row] = self.stamp
            self.worths[row] = self.worth(row)

    def worth(self, row: int) -> float:
        return 0.0

    @rule(
        chain=st.lists(st.integers(0, 3), min_size=1, max_size=6),
        pause=st.sampled_from([0.0, 0.5, 90.0]),
        device=st.integers(0, DEVICES - 1),
        size_bytes=st.integers(1, 5),
        hold=st.booleans(),
        known=st.booleans(),
        complete=st.booleans(),
    )
    def request(
        self, chain: list[int], pause: float, device: int, size_bytes: int, hold: bool, known: bool, complete: bool
    ) -> None:
        """A path in a tree of degree 4; without ``known``, no policy is told that it is a request; with ``complete``,
        nobody holds what it adds.
        """
        self.now += pause
        ids = [sum(4**depth * (step + 1) for depth, step in enumerate(chain[: end + 1])) for end in range(len(chain))]
        hashes = [encode_block_id(one) for one in ids]
        index = self.index
        rows = index.look_up(self.space, hashes, now=self.now) if known else index.match(self.space, hashes)
        index.pin(rows, now=self.now)
        admitted = len(hashes) - len(rows)
        if known and admitted:
            index.policy.answered(self.space, hashes, rows, 100, self.now)
            devices = range(DEVICES)
            admitted = index.policy.admit(self.space, hashes, rows, devices, size_bytes, admitted, self.now)
            assert 0 <= admitted <= len(hashes) - len(rows)
        missing = hashes[len(rows) : len(rows) + admitted]
        taken = [index.find(self.space, block_hash) >= 0 for block_hash in missing]  # orphans of a lost parent
        admitted = taken.index(True) if True in taken else len(missing)
        above = rows[-1] if rows else -1
        told = hashes if known else ()
        if complete:
            added = missing[:admitted]
            new = index.add_complete(self.space, size_bytes, device, added, above, now=self.now, chain=told)
            self.value(new[::-1])
        else:
            new = index.add_chain(self.space, size_bytes, device, admitted, above, now=self.now, chain=told)
            index.publish_all(new, missing[:admitted])
            rows = rows + new
        if hold:
            self.held.append(rows)
        else:
            self.give_back(rows)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        self.give_back(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @rule(device=st.integers(0, DEVICES - 1), count=st.integers(1, 5))
    def evict(self, device: int, count: int) -> None:
        rows = [row for row, _ in zip(self.index.policy.victims(device), range(count), strict=False)]
        self.forget(rows)

    @rule()
    def evict_the_worst(self) -> None:
        row = self.index.policy.victim()
        if row >= 0:
            self.forget([row])

    def forget(self, rows: list[int]) -> None:
        for row in rows:
            self.floor = max(self.floor, self.worths[row])
        self.index.remove_all(rows)

    @precondition(lambda self: len(self.index) > 6)
    @rule(device=st.integers(0, DEVICES - 1))
    def lose_device(self, device: int) -> None:
        rows = [row for row in range(len(self.index.flags)) if self.index.flags[row]]
        for row in rows:
            if self.index.device[row] == device and not self.index.pins[row]:
                self.floor = max(self.floor, self.worths[row])
        self.index.remove_device(device)
        self.held = [[row for row in held if self.index.flags[row]] for held in self.held]

    def order(self, device: int) -> list[int] | None:
        """Return the victims of a device as a search finds them; None where the model does not know worth."""
        return None

    @invariant()
    def sound(self) -> None:
        self.index.check()

    @invariant()
    def each_that_may_go_is_named_once_and_children_before_parents(self) -> None:
        index = self.index
        for device in range(DEVICES):
            gone: dict[int, int] = {}
            seen: set[int] = set()
            order = list(index.policy.victims(device))
            for row in order:
                assert row in self.free_rows(device) - seen
                assert gone.get(row, 0) == index.children[row], "a victim with a resident child"
                seen.add(row)
                if index.parent[row] >= 0:
                    gone[index.parent[row]] = gone.get(index.parent[row], 0) + 1
            left = self.free_rows(device) - seen
            assert all(gone.get(row, 0) < index.children[row] for row in left), "what could go was not named"
            assert order == list(index.policy.victims(device)), "asking changes nothing"
            if self.order(device) is not None:
                assert order == self.order(device)
        firsts = {next(index.policy.victims(device), -1) for device in range(DEVICES)} - {-1}
        assert index.policy.victim() in (firsts or {-1})


class SearchedMachine(PolicyMachine):
    """A policy whose worth is fixed when a cache is given back."""

    def order(self, device: int) -> list[int]:
        index = self.index
        left = self.free_rows(device)
        order: list[int] = []
        while True:
            leaves = [row for row in left if index.children[row] == sum(index.parent[other] == row for other in order)]
            if not leaves:
                return order
            row = min(leaves, key=lambda row: (self.worths[row], self.stamps[row]))
            order.append(row)
            left.remove(row)


class LFUMachine(SearchedMachine):
    policy = "lfu"

    def worth(self, row: int) -> float:
        return self.index.access_count[row]


class SizeAwareMachine(SearchedMachine):
    policy = "size_aware_lru"

    def worth(self, row: int) -> float:
        return self.floor + 1 / self.index.size_bytes[row]


class LRUMachine(PolicyMachine):
    policy = "lru"


_FEW = settings(max_examples=25, stateful_step_count=30, deadline=None, phases=[Phase.reuse, Phase.generate])


def _case(machine: type[PolicyMachine]) -> Any:
    case = machine.TestCase
    case.settings = _FEW
    return case


TestAdaptive = _case(PolicyMachine)
TestLFU = _case(LFUMachine)
TestSizeAwareLRU = _case(SizeAwareMachine)
TestLRU = _case(LRUMachine)
