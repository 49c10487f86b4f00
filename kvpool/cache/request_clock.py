"""The time that worth is measured in."""

from __future__ import annotations

from math import inf

_MEAN_OVER = 201
"""Requests that the running mean of inter-arrival times looks back on, about."""

_LONGEST_PAUSE = 1000.0
"""Most that a single pause counts, in mean inter-arrival times."""


class RequestClock:
    """Counts half in requests, half in wall time over the mean time between two requests.

    So its unit is a request, whatever the load. Requests alone would stand still while nothing arrives, and wall time
    alone fails where time stamps are coarse or equal.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.requests = 0
        self._mean_s = 0.0
        self._last_s = inf

    def advance(self, now_s: float) -> float:
        """Count a request that arrives at a time (seconds) and return the time on this clock."""
        last_s, mean_s = self._last_s, self._mean_s
        self.requests = requests = self.requests + 1
        pause_s = now_s - last_s if now_s > last_s else 0.0
        self._last_s = now_s
        self._mean_s = mean_s = mean_s + (pause_s - mean_s) / (requests if requests < _MEAN_OVER else _MEAN_OVER)
        pauses = pause_s / mean_s if mean_s > 0 else 1.0
        self.now = now = self.now + 0.5 + 0.5 * (pauses if pauses < _LONGEST_PAUSE else _LONGEST_PAUSE)
        return now
