"""Copying between addresses of this process."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from kvpool.memory.page_tables import PAGE_TABLES


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
        destination, size_bytes = destinations[start], (end - start) * block_bytes
        PAGE_TABLES.enter(destination, size_bytes)
        ctypes.memmove(destination, sources[start], size_bytes)
        start = end


def view_at(address: int, size_bytes: int) -> memoryview:
    """Return the bytes at an address as a writable view. It keeps nothing alive."""
    return memoryview((ctypes.c_char * size_bytes).from_address(address)).cast("B")
