import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpool.client.ranges import byte_ranges
from kvpool.errors import InvalidRequestError, TensorMismatchError


@st.composite
def parts(draw):
    """A shape, and an index that leaves something of it."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    index = []
    for size in shape[: draw(st.integers(0, len(shape)))]:
        start = draw(st.integers(0, size - 1))
        stop = draw(st.integers(start + 1, size))
        one = draw(st.booleans())
        index.append(draw(st.sampled_from([start, start - size])) if one else slice(start, stop))
    return shape, tuple(index)


@given(parts(), st.sampled_from(["uint8", "float16", "float64"]), st.sampled_from([0, 64]))
def test_ranges_are_the_bytes_that_numpy_takes(part, dtype, offset):
    shape, index = part
    whole = np.zeros(shape, dtype)
    whole[index] = 1
    marked = np.flatnonzero(np.repeat(whole.ravel() != 0, whole.itemsize)) + offset
    ranges = byte_ranges(dtype, shape, index, offset_bytes=offset)
    assert [byte for start, end in ranges for byte in range(start, end)] == marked.tolist()
    assert all(a[1] < b[0] for a, b in zip(ranges, ranges[1:], strict=False)), "one range for each run"  # noqa: RUF007


def test_blocks_in_the_second_dimension():
    assert byte_ranges("uint8", (2, 10, 8), np.s_[:, 2:4]) == [(16, 32), (96, 112)]
    assert byte_ranges("uint8", (2, 10, 8), np.s_[:, :]) == [(0, 160)]


@pytest.mark.parametrize("bad", [np.s_[::2], np.s_[0, 0, 0, 0], "ab", 1.5, [0, 1], None])
def test_what_is_no_part_is_refused(bad):
    with pytest.raises(InvalidRequestError):
        byte_ranges("uint8", (2, 10, 8), bad)
    with pytest.raises(TensorMismatchError):
        byte_ranges("uint8", (2, -1), 0)


@pytest.mark.parametrize("index", [np.s_[:, 2:2], np.s_[:, 12:], np.s_[5:2]])
def test_an_empty_slice_has_no_bytes(index):
    assert byte_ranges("float32", (2, 12, 4), index) == []
