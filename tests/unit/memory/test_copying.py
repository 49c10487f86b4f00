"""Blocks are copied in as few goes as they lie."""

import ctypes

import numpy as np
import pytest

from kvpool.memory import copying
from kvpool.memory.copying import copy_blocks, view_at

BLOCK = 24


@pytest.fixture
def copies(monkeypatch):
    """The copies made: (blocks from the destination's start, from the source's start, bytes)."""
    made = []

    def move(destination, source, size_bytes):
        made.append((destination, source, size_bytes))
        return real(destination, source, size_bytes)

    real = ctypes.memmove
    monkeypatch.setattr(copying.ctypes, "memmove", move)
    return made


@pytest.mark.parametrize(
    ("destinations", "sources", "expected"),
    [
        ([0, 1, 2, 3], [4, 5, 6, 7], [(0, 4, 4)]),
        ([0, 1, 4, 5], [0, 1, 2, 3], [(0, 0, 2), (4, 2, 2)]),
        ([0, 1, 2, 3], [0, 1, 5, 6], [(0, 0, 2), (2, 5, 2)]),
        ([3, 2, 1], [3, 2, 1], [(3, 3, 1), (2, 2, 1), (1, 1, 1)]),
        ([0, 2, 4], [0, 2, 4], [(0, 0, 1), (2, 2, 1), (4, 4, 1)]),
        ([5], [2], [(5, 2, 1)]),
        ([], [], []),
    ],
)
def test_neighbours_on_both_sides_are_copied_in_one_go(copies, destinations, sources, expected):
    there, here = np.zeros(8 * BLOCK, dtype=np.uint8), np.random.default_rng(1).integers(1, 255, 8 * BLOCK, np.uint8)
    copy_blocks(
        [there.ctypes.data + at * BLOCK for at in destinations],
        [here.ctypes.data + at * BLOCK for at in sources],
        BLOCK,
    )
    assert copies == [
        (there.ctypes.data + to * BLOCK, here.ctypes.data + at * BLOCK, count * BLOCK) for to, at, count in expected
    ]
    want = np.zeros_like(there)
    for to, at in zip(destinations, sources, strict=True):
        want[to * BLOCK : (to + 1) * BLOCK] = here[at * BLOCK : (at + 1) * BLOCK]
    assert (there == want).all(), "and nothing else is touched"


def test_a_view_reads_and_writes_the_bytes_at_an_address():
    block = np.arange(16, dtype=np.uint8)
    view = view_at(block.ctypes.data + 4, 8)
    assert bytes(view) == bytes(range(4, 12))
    view[0] = 99
    assert block[4] == 99
