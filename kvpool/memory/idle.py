"""How long memory has lain idle, told without asking a clock whenever it is used.

What is put away gets an ascending number. Of those numbers only now and then one is marked with the time: what is not
above a mark that is old enough, and is still there, has not been used since.
"""

from __future__ import annotations

from collections import deque


class IdleMarks:
    """Numbers and times, as long as they may still be of use."""

    def __init__(self) -> None:
        self._marks: deque[tuple[float, int]] = deque()
        self._idle = 0

    def pass_time(self, newest: int, now: float, idle_s: float) -> int:
        """Mark the newest number, and return the highest of those that were given ``idle_s`` ago or earlier.

        Times are seconds of the caller's clock.
        """
        self._marks.append((now, newest))
        while self._marks and self._marks[0][0] <= now - idle_s:
            _, self._idle = self._marks.popleft()
        return self._idle
