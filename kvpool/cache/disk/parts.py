"""Bytes that lie in several places of memory, to and from one place of a file."""

from __future__ import annotations

import ctypes
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


def begin_to_write_out(file: int) -> None:
    """Let the disk begin with what was written to a file, and do not wait: a sync has the less to wait for then.

    No more than a hint. (Nothing is waited for, so no error of the disk is told here: the sync tells it.)
    """
    if _sync_file_range is not None:
        _sync_file_range(file, 0, 0, _SYNC_FILE_RANGE_WRITE)


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


_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)  # Linux has it, Python no name for it
if _sync_file_range is not None:
    _sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
