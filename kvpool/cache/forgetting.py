"""The line of turns to be forgotten: those begun longest ago come first."""

from __future__ import annotations

from array import array

import numpy as np
from numpy.typing import NDArray

from kvpool.cache.table import Rows

_CUT_AT = 4096


class ForgettingLine:
    """Turns in the order in which they are forgotten, each at most once.

    Whoever holds it keeps a column of marks: 0 for a turn that is not in line, 1 for one that is, 2 for one that was
    renewed since. A renewed one that comes to the front goes back to the end.
    """

    def __init__(self) -> None:
        self._first = array("i")  # what was put first, the last of it at the end
        self._turns = array("i")
        self._begin = 0  # in _turns; those before it have left
        self.put_last = self._turns.append
        """Put a turn at the end, which is not in line."""
        self.put_first = self._first.append
        """Put a turn at the front, which is not in line."""

    def __len__(self) -> int:
        return len(self._first) + len(self._turns) - self._begin

    def put_all_first(self, turns: Rows) -> None:
        """:meth:`put_first` several."""
        self._first.extend(turns.tolist())

    def take_oldest(self, most: int, at_once: int, marks: NDArray[np.uint8], held: NDArray[np.int32]) -> Rows:
        """Take the first of more than ``most`` out of the line, some ``at_once``; return those that hold nothing."""
        forgotten = []
        left = at_once
        while (count := min(left, len(self) - most)) > 0:
            turns = self._take(count)
            left -= len(turns)
            marks[turns] -= 1
            renewed = marks.take(turns) != 0
            if renewed.any():
                self._turns.extend(turns[renewed].tolist())
                turns = turns[~renewed]
            forgotten.append(turns[held.take(turns) == 0])
        return np.concatenate(forgotten) if forgotten else np.array([], np.int64)

    def _take(self, count: int) -> Rows:
        """Take as many from the front as there are in the first part of the line, at most ``count``."""
        first = self._first
        if first:
            turns = np.array(first[-count:][::-1], np.int64)
            del first[-count:]
            return turns
        turns = np.array(self._turns[self._begin : self._begin + count], np.int64)
        self._begin += count
        if self._begin >= _CUT_AT and 2 * self._begin >= len(self._turns):
            del self._turns[: self._begin]
            self._begin = 0
        return turns
