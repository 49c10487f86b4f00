"""Rows by device, such that any of them can be drawn."""

from __future__ import annotations

from array import array

import numpy as np
from numpy.typing import NDArray

_NOWHERE = -1


class LeafSets:
    """A set of rows for each device: add, discard and draw in O(1)."""

    def __init__(self) -> None:
        self._rows: list[array[int]] = []  # by device
        self.devices: list[int] = []
        """Devices that had leaves so far, from 0 on."""
        self.where = array("i")
        """By row, the device in whose set it is; negative: it is in none."""
        self._place = array("I")  # by row: where it is in that set

    def grow(self, rows: int) -> None:
        """Make room for row numbers below ``rows``."""
        added = rows - len(self.where)
        self.where.extend(array("i", [_NOWHERE]) * added)
        self._place.frombytes(bytes(added * self._place.itemsize))

    def count(self, device: int) -> int:
        """Return how many leaves a device has."""
        return len(self._rows[device]) if device < len(self._rows) else 0

    def add(self, row: int, device: int) -> None:
        """Add a row, which may be in a set already: in this one, or that of a device where it was before."""
        if self.where[row] == device:
            return
        self.discard(row)
        while device >= len(self._rows):
            self.devices.append(len(self._rows))
            self._rows.append(array("i"))
        there = self._rows[device]
        self._place[row] = len(there)
        self.where[row] = device
        there.append(row)

    def keep(self, device: int, kept: NDArray[np.bool_]) -> None:
        """Take all rows of a device out but those marked, in the order of :meth:`all`. Takes 1 ms for 150,000."""
        there = self.all(device)
        np.frombuffer(self.where, np.int32)[there[~kept]] = _NOWHERE
        there = there[kept]
        np.frombuffer(self._place, np.int32)[there] = np.arange(len(there))
        self._rows[device] = array("i", there.tobytes())

    def all(self, device: int) -> NDArray[np.int32]:
        """Return a copy of the rows of a device."""
        return np.array(self._rows[device], np.int32)

    def discard(self, row: int) -> None:
        """Take a row out of the set in which it is, if any."""
        device = self.where[row]
        if device < 0:
            return
        there, place = self._rows[device], self._place
        last = there.pop()
        if last != row:
            place[last] = at = place[row]
            there[at] = last
        self.where[row] = _NOWHERE

    def draw(self, device: int, count: int, chance: np.random.Generator) -> NDArray[np.int32]:
        """Return ``count`` rows drawn with repetition, or all of them if there are at most twice as many."""
        rows = np.frombuffer(self._rows[device], np.int32)
        if len(rows) <= 2 * count:
            return rows.copy()
        return rows[chance.integers(0, len(rows), count)]
