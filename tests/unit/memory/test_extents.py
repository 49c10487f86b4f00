from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpool.errors import InvalidSizeError
from kvpool.memory.extents import changed, checked, difference, front, pages_touched, total_bytes, union

BOUNDS = st.tuples(st.integers(0, 30), st.integers(0, 30)).filter(lambda pair: pair[0] < pair[1])
RANGES = st.lists(BOUNDS, max_size=5)


def numbers(extents):
    return {number for start, end in extents for number in range(start, end)}


def is_in_order(extents):
    return all(a[1] < b[0] for a, b in pairwise(extents)) and all(a < b for a, b in extents)


@given(RANGES, RANGES)
def test_extents_are_sets_of_bytes(one, two):
    a, b = checked(one, 30), checked(two, 30)
    assert numbers(a) == numbers(one)
    for result, expected in [
        (union(a, b), numbers(a) | numbers(b)),
        (changed("back", a, b), numbers(a) | numbers(b)),
        (difference(a, b), numbers(a) - numbers(b)),
        (changed("unback", a, b), numbers(a) - numbers(b)),
        (changed("resize", a, b), numbers(b)),
    ]:
        assert numbers(result) == expected
        assert is_in_order(result)
        assert total_bytes(result) == len(expected)
        assert pages_touched(result, 4) == {number // 4 for number in expected}


def test_a_front_of_nothing_is_nothing():
    assert front(0) == ()
    assert front(7) == ((0, 7),)


@pytest.mark.parametrize("bad", [(3, 3), (4, 3), (-1, 2), (0, 31), (0, 1.5), (1,), "ab", 7, None])
def test_what_is_no_range_is_refused(bad):
    with pytest.raises(InvalidSizeError, match="0 <= start < end <= 30"):
        checked([(0, 1), bad], 30)


@pytest.mark.parametrize("bad", [None, 7, 1.5])
def test_what_are_no_ranges_at_all_is_refused(bad):
    with pytest.raises(InvalidSizeError, match="pairs of"):
        checked(bad, 30)
