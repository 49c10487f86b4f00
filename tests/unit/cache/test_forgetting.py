"""The line of turns to be forgotten."""

from collections.abc import Sequence

import numpy as np

from kvpool.cache.forgetting import ForgettingLine


class Waiting:
    """A line, and the columns that its holder keeps for it."""

    def __init__(self, turns: int) -> None:
        self.line = ForgettingLine()
        self.marks = np.zeros(turns, np.uint8)
        self.held = np.zeros(turns, np.int32)

    def put_last(self, turns: Sequence[int]) -> None:
        for turn in turns:
            self.marks[turn] = 1
            self.line.put_last(turn)

    def take(self, most: int, at_once: int = 512) -> list[int]:
        taken: list[int] = self.line.take_oldest(most, at_once, self.marks, self.held).tolist()
        return taken


def test_the_oldest_of_more_than_there_may_be_go() -> None:
    waiting = Waiting(10)
    assert waiting.take(0) == []
    waiting.put_last(range(10))
    assert waiting.take(7) == [0, 1, 2]
    assert waiting.take(7) == []
    assert waiting.take(0, at_once=2) == [3, 4]
    assert len(waiting.line) == 5
    assert waiting.marks.tolist() == [0] * 5 + [1] * 5


def test_what_was_renewed_goes_back_to_the_end() -> None:
    waiting = Waiting(4)
    waiting.put_last(range(4))
    waiting.marks[0] = 2
    assert waiting.take(2) == [1, 2]
    assert len(waiting.line) == 2
    assert waiting.take(0) == [3, 0]


def test_what_holds_blocks_leaves_the_line_and_stays() -> None:
    waiting = Waiting(3)
    waiting.put_last(range(3))
    waiting.held[1] = 1
    assert waiting.take(0) == [0, 2]
    assert (len(waiting.line), waiting.marks[1]) == (0, 0)


def test_what_is_put_first_goes_first_the_last_of_it_at_the_front() -> None:
    waiting = Waiting(6)
    waiting.put_last([0, 1])
    waiting.line.put_first(2)
    waiting.line.put_all_first(np.array([3, 4]))
    waiting.marks[[2, 3, 4]] = 1
    assert waiting.take(1, at_once=2) == [4, 3]
    assert waiting.take(1) == [2, 0]


def test_what_has_left_a_long_line_is_cut_off() -> None:
    waiting = Waiting(20_000)
    for start in range(0, 20_000, 100):
        waiting.put_last(range(start, start + 100))
        waiting.take(500)
    assert len(waiting.line) == 500
    assert len(waiting.line._turns) < 10_000
    waiting.put_last([0])
    assert waiting.take(0, at_once=1000)[-1] == 0
