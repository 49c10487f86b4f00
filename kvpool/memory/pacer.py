"""When compaction in the background takes its next step."""

from __future__ import annotations

from kvpool.memory.allocation import Compaction

STEP_S = 0.0005
"""What a step takes as a rule, and whoever comes meanwhile waits. (The largest cache may take longer.)"""

_LEAST_BYTES, _MOST_BYTES = 1 << 16, 1 << 20
"""What a step copies."""

IDLE_S = 1.0
"""How often it is looked whether there is something to do, when there was nothing."""

_QUIET_S = 0.05
"""After so long without an operation nobody is disturbed."""
_BUSY = 0.02
"""Part of the share of time that is taken while operations come, so that fewer than one in a hundred meets a step."""


class CompactionPacer:
    """Spreads steps over time, so that they take a share of it, and a fiftieth of that while others are served.

    All times are seconds of one clock, which the caller reads.

    Parameters
    ----------
    threshold
        Fragmentation above which memory is compacted; 1: never.
    share
        Most of the time that steps take.
    """

    def __init__(self, threshold: float, share: float) -> None:
        self._threshold = threshold
        self._share = share
        self._last_operation = float("-inf")
        #: What the next step is to copy at most: as much as the last one would have done in its time.
        self.step_bytes = _LEAST_BYTES
        #: Fragmentation at which nothing could be moved: until there is more, nothing is tried.
        self._futile = 0.0

    def operated(self, now: float) -> None:
        """Note that somebody was served."""
        self._last_operation = now

    def due(self, fragmentation: float) -> bool:
        """Whether a step is worth its time now."""
        self._futile = min(self._futile, fragmentation)
        return fragmentation > max(self._threshold, self._futile)

    def stepped(self, began: float, ended: float, fragmentation: float, done: Compaction) -> float:
        """Return how long to wait after a step, seconds.

        Parameters
        ----------
        began, ended
            When it did.
        fragmentation
            What it left.
        done
            What it did.
        """
        if done.moved_bytes:
            step_bytes = int(done.moved_bytes * STEP_S / max(ended - began, 1e-6))
            self.step_bytes = min(max(step_bytes, _LEAST_BYTES), _MOST_BYTES)
        if not done.more:
            self._futile = fragmentation
            return IDLE_S
        share = self._share if ended - self._last_operation > _QUIET_S else self._share * _BUSY
        return (ended - began) * (1 / share - 1)
