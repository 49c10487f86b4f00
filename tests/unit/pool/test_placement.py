"""Which device a new cache goes to."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpool.errors import UnknownPolicyError
from kvpool.pool.placement import PLACEMENTS, LeastLoaded, RoundRobin, make_placement


def test_round_robin_takes_turns_and_passes_over_full_and_lost_devices() -> None:
    placement = RoundRobin()
    assert [placement.choose([9, 9, 9], 5) for _ in range(4)] == [0, 1, 2, 0]
    assert placement.choose([9, 4, -1], 5) == 0
    assert [placement.choose([9, 9, 9], 5) for _ in range(2)] == [1, 2]


def test_least_loaded_takes_the_emptiest_and_the_first_of_equals() -> None:
    placement = LeastLoaded()
    assert placement.choose([3, 7, 7, -1], 5) == 1
    assert placement.choose([7, 8, 7], 5) == 1


@pytest.mark.parametrize("name", sorted(PLACEMENTS))
@given(rounds=st.lists(st.tuples(st.lists(st.integers(-1, 20), max_size=6), st.integers(1, 20)), max_size=6))
def test_a_device_with_room_is_found_whenever_there_is_one(name: str, rounds: list[tuple[list[int], int]]) -> None:
    placement = make_placement(name)
    for free_bytes, need_bytes in rounds:
        chosen = placement.choose(free_bytes, need_bytes)
        fits = [device for device, free in enumerate(free_bytes) if free >= need_bytes]
        assert chosen in fits if fits else chosen == -1


def test_an_unknown_placement_is_refused_with_those_there_are() -> None:
    with pytest.raises(UnknownPolicyError, match="least_loaded, round_robin"):
        make_placement("nearest")


def test_each_pool_takes_its_own_turns() -> None:
    first, second = make_placement("round_robin"), make_placement("round_robin")
    assert first.choose([1, 1], 1) == second.choose([1, 1], 1) == 0
