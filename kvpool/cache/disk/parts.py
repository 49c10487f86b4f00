"""Bytes that lie in several places of memory, to and from one place of a file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import islice

_MOST_PARTS = 64


def write_all(file: int, parts: Sequence[bytes | memoryview]) -> None:
    """Write all parts, one behind the other, where the file is."""
    left = [memoryview(part).cast("B") for part in reversed(parts)]
    while left:
        _advance(left, os.writev(file, list(islice(reversed(left), _MOST_PARTS))))


def read_all(file: int, parts: Sequence[bytearray | memoryview], offset: int = 0) -> bool:
    """Fill all parts from a place of the file on; False if it ends before."""
    left = [memoryview(part).cast("B") for part in reversed(parts)]
    while left:
        count = os.preadv(file, list(islice(reversed(left), _MOST_PARTS)), offset)
        if not count and any(map(len, left)):
            return False
        offset += count
        _advance(left, count)
    return True


def _advance(left: list[memoryview], count: int) -> None:
    """Take the first ``count`` bytes off: one call moves at most 2 GiB, or less when it is interrupted.

    ``left`` has its first part at the end, where it is taken off for nothing.
    """
    while left and count >= len(left[-1]):
        count -= len(left.pop())
    if count:
        left[-1] = left[-1][count:]
