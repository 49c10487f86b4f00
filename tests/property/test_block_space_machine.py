"""Blocks inside a cache against a plain set, with memory that comes and goes behind them."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvpool.errors import CapacityError, DoubleReleaseError, InvalidRequestError, InvalidSizeError
from kvpool.memory.block_space import BlockSpace


class BlockSpaceMachine(RuleBasedStateMachine):
    """A scheduler that allocates and frees, and a worker that changes the memory, either one step at a time."""

    @initialize(
        num_blocks=st.integers(1, 40), group_blocks=st.integers(1, 8), ahead_blocks=st.integers(0, 9), data=st.data()
    )
    def begin(self, num_blocks: int, group_blocks: int, ahead_blocks: int, data: st.DataObject) -> None:
        groups = range(-(-num_blocks // group_blocks))
        self.backed = set(data.draw(st.lists(st.sampled_from(groups), unique=True)))
        self.space = BlockSpace(num_blocks, group_blocks, ahead_blocks, sorted(self.backed))
        self.used: set[int] = set()
        self.leaving: list[int] = []

    def group_of(self, number: int) -> int:
        return number // self.space.group_blocks

    @rule(count=st.integers(0, 20))
    def allocate(self, count: int) -> None:
        free_blocks = self.space.free_blocks
        if count > free_blocks:
            with pytest.raises(CapacityError, match=f"{free_blocks} are free and have memory"):
                self.space.allocate(count)
            return
        numbers = self.space.allocate(count)
        assert len(set(numbers)) == count
        assert self.used.isdisjoint(numbers)
        assert {self.group_of(number) for number in numbers} <= self.backed, "what is handed out has memory"
        self.used.update(numbers)

    @precondition(lambda self: self.used)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        numbers = data.draw(st.lists(st.sampled_from(sorted(self.used)), min_size=1, unique=True))
        bad = data.draw(st.sampled_from([None, None, -1, self.space.num_blocks, "1", 1.0, numbers[0], "free"]))
        if bad is not None:
            others = sorted(set(range(self.space.num_blocks)) - self.used)
            bad = bad if bad != "free" else others[0] if others else numbers[0]
            kind = (
                DoubleReleaseError if isinstance(bad, int) and 0 <= bad < self.space.num_blocks else InvalidRequestError
            )
            with pytest.raises(kind):
                self.space.free([*numbers, bad])
            self.space.check()
        self.space.free(numbers)
        self.used.difference_update(numbers)

    @precondition(lambda self: not self.leaving)
    @rule(reserve=st.none() | st.integers(0, 50))
    def back(self, reserve: int | None) -> None:
        if reserve is None:
            groups = self.space.missing()
            wanted = 2 * self.space.ahead_blocks if groups else 0
        else:
            wanted = reserve
            try:
                groups = self.space.missing_for(reserve)
            except InvalidSizeError:
                assert reserve > self.space.num_blocks
                return
            except CapacityError:
                assert self.space.num_blocks >= reserve > self.space.num_blocks - len(self.used)
                return
        assert self.backed.isdisjoint(groups)
        self.space.note_backed(groups)
        self.backed.update(groups)
        assert self.space.free_blocks >= min(wanted, self.space.num_blocks - len(self.used))

    @precondition(lambda self: not self.leaving)
    @rule(everything=st.booleans())
    def give_back(self, everything: bool) -> None:
        free_blocks = self.space.free_blocks
        self.leaving = self.space.take_empty() if everything else self.space.take_surplus()
        assert everything or not self.leaving or free_blocks > 3 * self.space.ahead_blocks
        assert everything or not self.leaving or self.space.free_blocks >= 2 * self.space.ahead_blocks
        if everything:
            assert {group for group in self.backed if group not in self.leaving} == set(map(self.group_of, self.used))

    @precondition(lambda self: self.leaving)
    @rule(gone=st.booleans())
    def it_is_given_back(self, gone: bool) -> None:
        assert not {self.group_of(number) for number in self.used} & set(self.leaving)
        if gone:
            self.space.note_unbacked(self.leaving)
            self.backed.difference_update(self.leaving)
        else:
            self.space.note_backed(self.leaving)
        self.leaving = []

    @invariant()
    def it_adds_up(self) -> None:
        if hasattr(self, "space"):
            self.space.check()
            assert self.space.used_blocks == len(self.used)
            assert not self.space.unbalanced or self.leaving or self.space.missing() or self.has_surplus()

    def has_surplus(self) -> bool:
        taken = self.space.take_surplus()
        self.space.note_backed(taken)
        return bool(taken)


TestBlockSpaceMachine = BlockSpaceMachine.TestCase
TestBlockSpaceMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
