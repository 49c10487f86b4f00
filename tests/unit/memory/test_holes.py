"""Holes are found by size, the smallest that is large enough first."""

import random

from kvpool.memory import holes as holes_module
from kvpool.memory.holes import Holes


def test_the_smallest_that_is_large_enough_is_found_the_latest_first() -> None:
    holes = Holes(8)
    for offset, size_bytes in ((0, 24), (100, 16), (200, 16), (300, 80)):
        holes.note(offset, size_bytes)
    assert holes.smallest(8) == (200, 16)
    assert holes.smallest(24) == (0, 24)
    assert holes.smallest(32) == (300, 80)
    assert holes.smallest(88) is None
    holes.forget(200)
    holes.forget(200)
    assert holes.smallest(8) == (100, 16)
    assert list(holes.latest()) == [300, 100, 0]
    holes.check()


def test_what_begins_where_another_hole_ends_is_one_with_it() -> None:
    holes = Holes(8)
    holes.note(0, 24)
    holes.note(24, 16)
    assert holes.smallest(40) == (0, 40)
    holes.note(0, 16)
    assert holes.smallest(8) == (0, 16)
    assert holes.smallest(24) is None
    holes.check()


def test_no_more_are_kept_than_a_bound_says(monkeypatch) -> None:
    monkeypatch.setattr(holes_module, "_KEPT", 4)
    holes = Holes(8)
    for number in range(9):
        holes.note(100 * number, 8 * (number + 1))
    assert holes.smallest(8) == (600, 56), "the oldest went"
    holes.check()


def test_whatever_is_noted_and_forgotten_in_any_order_is_found() -> None:
    holes, rng = Holes(8), random.Random(0)
    for _ in range(3000):
        offset = 8 * rng.randrange(40)
        if rng.random() < 0.6:
            holes.note(offset, 8 * rng.randint(1, 5))
        else:
            holes.forget(offset)
        holes.check()
