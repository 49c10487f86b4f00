"""HostIndex against the simplest model there is: a list in the order of use, searched."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvpool.cache.host_index import HostEntry, HostIndex, Kind
from kvpool.cache.key import CacheKey, encode_block_id

BUDGET = 40
KINDS = st.sampled_from(Kind)


class HostIndexMachine(RuleBasedStateMachine):
    """Adds, uses, holds, releases and drops entries, and claims room."""

    def __init__(self) -> None:
        super().__init__()
        self.index = HostIndex(BUDGET)
        self.order: list[HostEntry] = []  # idle ones, the longest unused first
        self.held: list[HostEntry] = []  # once for each hold
        self.kinds: dict[CacheKey, Kind] = {}
        self.claimed = 0
        self.next_number = 0

    def expected(self, last: Kind) -> HostEntry | None:
        idle = [entry for entry in self.order if self.kinds[entry.key] <= last]
        return min(idle, key=lambda entry: self.kinds[entry.key], default=None)  # the first of the lowest kind

    def used(self) -> int:
        known = {entry.key: entry for entry in [*self.order, *self.held] if entry.key in self.kinds}
        return sum(entry.room_bytes for entry in known.values()) + self.claimed

    def pick(self, entries: list[HostEntry], number: int) -> HostEntry:
        return entries[number % len(entries)]

    @rule(room=st.integers(1, 9), kind=KINDS)
    def add(self, room: int, kind: Kind) -> None:
        assert self.index.fits(room) == (self.used() + room <= BUDGET)
        while not self.index.fits(room):
            victim = self.index.oldest(Kind.SOLE)
            assert victim is self.expected(Kind.SOLE)
            if victim is None:
                return
            self.forget(victim)
        key = CacheKey("t", "f", encode_block_id(self.next_number))
        self.next_number += 1
        entry = HostEntry(key, None, room, room, kind)
        self.index.add(entry)
        self.order.append(entry)
        self.kinds[key] = kind

    def forget(self, entry: HostEntry) -> None:
        assert self.index.drop(entry.key) is entry
        del self.kinds[entry.key]
        if entry in self.order:
            self.order.remove(entry)

    @precondition(lambda self: self.kinds)
    @rule(number=st.integers(0, 99))
    def drop(self, number: int) -> None:
        known = list(self.index)
        self.forget(self.pick(known, number))

    @precondition(lambda self: self.kinds)
    @rule(number=st.integers(0, 99), kind=KINDS)
    def use(self, number: int, kind: Kind) -> None:
        entry = self.pick([*self.index], number)
        self.index.use(entry, kind)
        self.kinds[entry.key] = kind
        if entry in self.order:
            self.order.remove(entry)
            self.order.append(entry)

    @precondition(lambda self: self.kinds)
    @rule(number=st.integers(0, 99))
    def make_oldest(self, number: int) -> None:
        entry = self.pick([*self.index], number)
        self.index.make_oldest(entry)
        if entry in self.order:
            self.order.remove(entry)
            self.order.insert(0, entry)

    @precondition(lambda self: self.kinds)
    @rule(number=st.integers(0, 99))
    def hold(self, number: int) -> None:
        entry = self.pick([*self.index], number)
        self.index.hold(entry)
        self.held.append(entry)
        if entry in self.order:
            self.order.remove(entry)

    @precondition(lambda self: self.held)
    @rule(number=st.integers(0, 99))
    def release(self, number: int) -> None:
        entry = self.held.pop(number % len(self.held))
        self.index.release(entry)
        if entry not in self.held and entry.key in self.kinds:
            self.order.append(entry)

    @rule(room=st.integers(1, 9))
    def claim(self, room: int) -> None:
        if self.index.fits(room):
            self.index.claim(room)
            self.claimed += room

    @precondition(lambda self: self.claimed)
    @rule()
    def unclaim(self) -> None:
        self.index.unclaim(self.claimed)
        self.claimed = 0

    @invariant()
    def agrees(self) -> None:
        self.index.check()
        assert self.index.used_bytes == self.used()
        assert len(self.index) == len(self.kinds)
        for last in Kind:
            assert self.index.oldest(last) is self.expected(last)
            idle = sum(entry.room_bytes for entry in self.order if self.kinds[entry.key] <= last)
            assert self.index.could_fit(7, last) == (self.used() - idle + 7 <= BUDGET)


TestHostIndex = HostIndexMachine.TestCase
TestHostIndex.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
