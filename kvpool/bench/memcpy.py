"""What compaction is compared with: as many bytes copied, a page at a time."""

from __future__ import annotations

import ctypes
import time

from kvpool.errors import ensure


class Memcpy:
    """Memmove between two private buffers that are warm: this process has touched them before.

    Parameters
    ----------
    size_bytes
        Of each, whole pages. As much as what is compared with it moves: less would stay in the processor's cache.
    page_bytes
        Copied at once.
    """

    def __init__(self, size_bytes: int, page_bytes: int) -> None:
        ensure(size_bytes % page_bytes == 0, "whole pages are copied", size_bytes=size_bytes, page_bytes=page_bytes)
        self._size_bytes, self._page_bytes = size_bytes, page_bytes
        self._source, self._destination = (ctypes.create_string_buffer(size_bytes) for _ in range(2))
        self.gb_per_s()  # memory that is touched for the first time takes many times as long

    def gb_per_s(self) -> float:
        """Return the billions of bytes copied in a second of this thread."""
        source, destination = ctypes.addressof(self._source), ctypes.addressof(self._destination)
        start = time.thread_time()
        for offset in range(0, self._size_bytes, self._page_bytes):
            ctypes.memmove(destination + offset, source + offset, self._page_bytes)
        return self._size_bytes / (time.thread_time() - start) / 1e9
