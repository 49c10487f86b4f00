"""Bytes that lie in several places of memory, to and from one place of a file."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Sequence
from typing import Any

_MOST_PARTS = 1024
"""As many as one call takes (IOV_MAX of Linux). After each a thread waits up to 5 ms for a busy event loop to let go of
the interpreter."""
_WRITE_OUT = getattr(os, "RWF_DSYNC", 0)
"""For the same reason, so that the disk does not wait for that, too."""
_UNKNOWN = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def write_all(file: int, parts: Iterable[bytes | memoryview]) -> None:
    """Write all parts, of single bytes, one behind the other, from the begin of the file on. A sync is still needed."""
    left = list(parts)
    left.reverse()
    offset = 0
    while left:
        count = _write(file, left[: -_MOST_PARTS - 1 : -1], offset)
        offset += count
        _advance(left, count)


def _write(file: int, parts: Sequence[bytes | memoryview], offset: int) -> int:
    try:
        return os.pwritev(file, parts, offset, _WRITE_OUT)
    except OSError as error:
        if not _WRITE_OUT or error.errno not in _UNKNOWN:
            raise
        return os.pwritev(file, parts, offset)


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
