"""What happened to the content of the pool, for routers and dashboards: a bounded record, kept while anyone reads it.

Nothing is recorded, and a decision costs one comparison more, while nobody listens. Readers poll with the number of the
last event they have seen; who polls too seldom, or comes back after the record was closed, is told that it missed some,
and starts again from a listing.
"""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import Any, NamedTuple

MOST_EVENTS = 1 << 16
"""Events kept. With 200 bytes each they take 13 MB, and only while somebody listens."""

LISTENING_S = 60.0
"""How long after the last poll events are still recorded, seconds."""

_MOST_READ = 10_000
"""Events looked at in one poll, so that a reader of few of them does not hold up the pool."""


class Happened(NamedTuple):
    """One event. ``key`` and ``parent`` are hashes; what does not apply is None."""

    kind: str
    """``stored``, ``removed``, ``cleared`` (all content of a model at once), ``device_lost`` (all that was there), or
    ``missed`` (events were lost on the way to this reader)."""
    tenant: str | None = None
    model: str | None = None
    key: bytes | None = None
    parent: bytes | None = None
    device: str | None = None
    size_bytes: int | None = None
    reason: str | None = None
    """Why it was removed: ``capacity``, ``request`` or ``invalidate`` as in the statistics, or ``gone`` when it was
    published and its writer died before the device had sealed it."""
    number: int | None = None
    """Of the model: names are shared by its revisions, shards and layouts."""
    revision: str | None = None


class Journal:
    """The record. Events are numbered from 1, with gaps where it was closed."""

    def __init__(self) -> None:
        self.open = False
        """Whether events are to be recorded."""
        self.last = 0
        """Number of the latest event."""
        self._events: deque[Happened] = deque(maxlen=MOST_EVENTS)
        self._until = 0.0

    def add(self, event: Happened) -> None:
        """Record an event; call it only while the journal is open."""
        self.last += 1
        self._events.append(event)

    def pass_time(self, now: float) -> None:
        """Close the journal when nobody has listened for long."""
        if self.open and now > self._until:
            self.open = False
            self._events.clear()
            self.last += 1  # whoever has seen all so far will have missed what is not recorded from here on

    def read(self, seen: int | None, tenant: str | None, most: int, now: float) -> tuple[int, list[tuple[Any, ...]]]:
        """Return ``(number of the last event read, events after number seen)``, and listen on.

        Parameters
        ----------
        seen
            Number of the last event that this reader has read; None to begin with what happens from now on.
        tenant
            Whose events, or those of all.
        most
            Events to return.
        now
            Time, seconds.
        """
        self.pass_time(now)
        self.open, self._until = True, now + LISTENING_S
        if seen is None:
            return self.last, []
        first = self.last - len(self._events) + 1
        if not first - 1 <= seen <= self.last:
            return self.last, [tuple(Happened("missed"))]
        found: list[tuple[Any, ...]] = []
        for event in islice(self._events, seen + 1 - first, seen + 1 - first + _MOST_READ):
            if len(found) >= most:
                break
            seen += 1
            if tenant is None or event.tenant in (None, tenant):
                found.append(tuple(event))
        return seen, found
