"""Where caches of sizes that are no powers of two may begin: places where others were freed, or ended."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from kvpool.errors import ensure

_KEPT = 4096
"""How many holes are remembered."""

_LATEST = 4
"""How many of the latest are shown to who looks for more than a size."""


class Holes:
    """Offsets of holes and how large they were when noted, found by size: the smallest that is large enough.

    (Were they taken as they come, the latest first, small caches would lie in what large ones left. Where nothing may
    move, a device full of sizes that come and go in turn would refuse the first one with a quarter of its memory free.)

    What is noted may be out of date: holes are filled and grow without a word here. Whoever is given one looks at what
    is there, and notes that.

    Parameters
    ----------
    unit_bytes
        All sizes are multiples of it.
    """

    def __init__(self, unit_bytes: int) -> None:
        self._unit_bytes = unit_bytes
        #: Bytes by offset, the latest last.
        self._bytes: dict[int, int] = {}
        self._by_end: dict[int, int] = {}
        self._by_bytes: dict[int, dict[int, None]] = {}
        #: The sizes in ``_by_bytes``: a bit for each unit.
        self._sizes = 0

    def note(self, offset: int, size_bytes: int) -> None:
        """Enter a hole as the latest, or what became of it: one with that which ends where it begins."""
        self.forget(offset)
        before = self._by_end.get(offset)
        if before is not None:
            size_bytes += self._bytes[before]
            self.forget(before)
            offset = before
        if len(self._bytes) >= _KEPT:  # what lies deep is found by a search of all
            for old in list(islice(self._bytes, _KEPT // 2)):
                self.forget(old)
        self._bytes[offset] = size_bytes
        self._by_end[offset + size_bytes] = offset
        self._by_bytes.setdefault(size_bytes, {})[offset] = None
        self._sizes |= 1 << (size_bytes // self._unit_bytes)

    def forget(self, offset: int) -> None:
        """Drop a hole, if it is known."""
        size_bytes = self._bytes.pop(offset, None)
        if size_bytes is None:
            return
        if self._by_end.get(offset + size_bytes) == offset:
            del self._by_end[offset + size_bytes]
        same = self._by_bytes[size_bytes]
        del same[offset]
        if not same:
            del self._by_bytes[size_bytes]
            self._sizes ^= 1 << (size_bytes // self._unit_bytes)

    def smallest(self, least_bytes: int) -> tuple[int, int] | None:
        """Return offset and bytes of the smallest hole of so many bytes, the latest of these; ``None``: there is none.

        ``least_bytes`` is a multiple of the unit.
        """
        least = least_bytes // self._unit_bytes
        sizes = self._sizes >> least
        if not sizes:
            return None
        size_bytes = (least + (sizes & -sizes).bit_length() - 1) * self._unit_bytes
        return next(reversed(self._by_bytes[size_bytes])), size_bytes

    def latest(self) -> Iterator[int]:
        """Yield a few that were noted last, as they are known now."""
        yield from list(islice(reversed(self._bytes), _LATEST))

    def check(self) -> None:
        """Prove that offsets, ends and sizes tell the same.

        Raises
        ------
        InvariantError
            If they do not.
        """
        by_bytes = {offset: size_bytes for size_bytes, same in self._by_bytes.items() for offset in same}
        ensure(by_bytes == self._bytes, "each hole is known by its size")
        sizes = sum(1 << (size_bytes // self._unit_bytes) for size_bytes in self._by_bytes)
        ensure(sizes == self._sizes, "each size is known")
        ends = {end: offset for end, offset in self._by_end.items() if self._bytes.get(offset) != end - offset}
        ensure(not ends, "each end is that of a hole", ends=ends)
