"""Bytes that lie in several places of memory, to and from one place of a file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

_MOST_PARTS = 1024
"""As many as one call takes (IOV_MAX of Linux). After each a thread waits up to 5 ms for a busy event loop to let go of
the interpreter."""


def write_all(file: int, parts: Iterable[bytes | memoryview]) -> None:
    """Write all parts, of single bytes, one behind the other, where the file is."""
    left = list(parts)
    left.reverse()
    while left:
        _advance(left, os.writev(file, left[: -_MOST_PARTS - 1 : -1]))


def read_all(file: int, parts: Sequence[bytearray | memoryview], offset: int = 0) -> bool:
    """Fill all parts, of single bytes, from a place of the file on; False if it ends before."""
    left = list(reversed(parts))
    while left:
        count = os.preadv(file, left[: -_MOST_PARTS - 1 : -1], offset)
        if not count and any(map(len, left)):
            return False
        offset += count
        _advance(left, count)
    return True


def _advance(left: list[Any], count: int) -> None:
    """Take the first ``count`` bytes off: one call moves at most 2 GiB, or less when it is interrupted.

    ``left`` has its first part at the end, where it is taken off for nothing.
    """
    while left and count >= len(left[-1]):
        count -= len(left.pop())
    if count:
        left[-1] = memoryview(left[-1])[count:]
