"""BuddyAllocator against the simplest model there is: a dict of intervals."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvpool.errors import AddressSpaceError, CacheStateError, DoubleReleaseError, UnknownCacheError
from kvpool.memory.buddy import BuddyAllocator

MIN = 16
PAGE = 16 * MIN


class BuddyMachine(RuleBasedStateMachine):
    """Allocates, frees, adds and takes blocks; the model knows only which addresses are whose."""

    buddy: BuddyAllocator
    live: dict[int, int]
    blocks: set[int]

    @initialize(whole=st.integers(0, 5))
    def begin(self, whole: int) -> None:
        self.buddy = BuddyAllocator(whole * PAGE, MIN, max_block_bytes=PAGE)
        self.live = {}
        self.blocks = {i * PAGE for i in range(whole)}

    def owner_of(self, address: int) -> int | None:
        return next((start for start, size in self.live.items() if start <= address < start + size), None)

    def is_free(self, address: int) -> bool:
        return self.owner_of(address) is None

    def is_managed(self, address: int) -> bool:
        return address - address % PAGE in self.blocks

    @rule(size=st.integers(1, PAGE), growth=st.none() | st.integers(0, PAGE))
    def allocate(self, size: int, growth: int | None) -> None:
        maximum = None if growth is None else min(PAGE, size + growth)
        rounded = -(-size // MIN) * MIN
        if maximum is not None and maximum > size:
            rounded = MIN
            while rounded < maximum:
                rounded *= 2
        power = MIN
        while power < rounded:
            power *= 2
        fits = any(
            self.is_managed(start) and not any(self.owner_of(a) is not None for a in range(start, start + power, MIN))
            for block in self.blocks
            for start in range(block, block + PAGE, power)
        )
        try:
            offset = self.buddy.allocate(size, maximum)
        except AddressSpaceError:
            assert not fits
            return
        assert fits
        assert offset % power == 0
        for address in range(offset, offset + rounded, MIN):
            assert self.is_managed(address)
            assert self.owner_of(address) is None
        assert self.buddy.allocation_size(offset) == rounded
        self.live[offset] = rounded

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        offset = data.draw(st.sampled_from(sorted(self.live)))
        self.buddy.free(offset)
        del self.live[offset]
        with pytest.raises(DoubleReleaseError):
            self.buddy.free(offset)

    @rule(data=st.data(), index=st.integers(0, 7))
    def carve_all(self, data: st.DataObject, index: int) -> None:
        """Carve places of which all is free: some are all that is free there, others only a part of it."""
        free = [a for a in range(index * PAGE, (index + 1) * PAGE, MIN) if self.is_managed(a) and self.is_free(a)]
        carved: dict[int, int] = {}
        while free:
            offset = free[data.draw(st.sampled_from([0, 0, 0, 1, 2])) % len(free)]
            end = offset + MIN
            while end in free and data.draw(st.integers(0, 8)):
                end += MIN
            carved[offset] = end - offset
            free = [address for address in free if address >= end]
            if not data.draw(st.booleans()):
                break
        self.buddy.carve_all(carved.keys(), carved.values())
        self.live |= carved

    @precondition(lambda self: self.blocks)
    @rule(data=st.data())
    def clear(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self.blocks)))
        starts = sorted(start for start in self.live if block <= start < block + PAGE)
        self.buddy.clear(block, starts)
        for start in starts:
            del self.live[start]
        assert self.buddy.is_free_block(block)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def shrink(self, data: st.DataObject) -> None:
        offset = data.draw(st.sampled_from(sorted(self.live)))
        size = data.draw(st.integers(1, self.live[offset]))
        self.buddy.shrink(offset, size)
        self.live[offset] = -(-size // MIN) * MIN

    @rule(offset=st.integers(-MIN, 8 * PAGE))
    def free_at_random(self, offset: int) -> None:
        if offset in self.live:
            return
        free = offset % MIN == 0 and self.is_managed(offset) and self.owner_of(offset) is None
        with pytest.raises(DoubleReleaseError if free else UnknownCacheError):
            self.buddy.free(offset)

    @rule(index=st.integers(0, 7))
    def add(self, index: int) -> None:
        offset = index * PAGE
        if offset in self.blocks:
            with pytest.raises(CacheStateError):
                self.buddy.add(offset)
        else:
            self.buddy.add(offset)
            self.blocks.add(offset)

    @rule(index=st.integers(0, 7))
    def take(self, index: int) -> None:
        offset = index * PAGE
        empty = offset in self.blocks and all(self.owner_of(a) is None for a in range(offset, offset + PAGE, MIN))
        assert self.buddy.is_free_block(offset) == empty
        if empty:
            self.buddy.take(offset)
            self.blocks.remove(offset)
        else:
            with pytest.raises(CacheStateError):
                self.buddy.take(offset)

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "buddy"):
            return
        self.buddy.check()
        assert self.buddy.total_bytes == len(self.blocks) * PAGE
        assert self.buddy.used_bytes == sum(self.live.values())


TestBuddyMachine = BuddyMachine.TestCase
TestBuddyMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
