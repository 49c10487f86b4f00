"""Copying between addresses of this process."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence


def copy_blocks(destinations: Sequence[int], sources: Sequence[int], block_bytes: int) -> None:
    """Copy blocks between addresses, neighbours that lie the same way on both sides in one go."""
    start = 0
    count = len(destinations)
    while start < count:
        end = start + 1
        while (
            end < count
            and destinations[end] - destinations[end - 1] == block_bytes
            and sources[end] - sources[end - 1] == block_bytes
        ):
            end += 1
        ctypes.memmove(destinations[start], sources[start], (end - start) * block_bytes)
        start = end
