"""What lies in the host tier below a device, and what goes first when something else must fit.

Three kinds, in the order in which they go. A *copy* lies on the device above as well: dropping it loses nothing. A
*saved* one lies on disk as well: dropping it loses time. A *sole* one is lost when it is dropped.
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from kvpool.cache.key import BlockHash, CacheKey
from kvpool.errors import ensure


class Kind(enum.IntEnum):
    """Where else an entry's content lies. What has the lower number is dropped first."""

    COPY = 0
    """On the device above."""
    SAVED = 1
    """On disk, and not on the device above."""
    SOLE = 2
    """Nowhere."""


@dataclass(slots=True, eq=False)
class HostEntry:
    """A cache in the host tier. Its index alone changes it."""

    key: CacheKey
    parent: BlockHash | None
    size_bytes: int
    room_bytes: int
    """What it takes of the budget."""
    kind: Kind
    memory_id: int = 0
    """Of its memory, for the tier that has any."""
    address: int = 0
    holds: int = 0
    """Who reads its memory right now: while there are any, it is not dropped for room."""
    serial: int = 0
    """How many entries there had ever been before it."""


class HostIndex:
    """Entries by key, and by kind in the order of demotion and use. Integers only: no bytes, no clock.

    Parameters
    ----------
    budget_bytes
        Room for all entries together.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self._entries: dict[CacheKey, HostEntry] = {}
        # Oldest first; those that are held are in none.
        self._orders: tuple[OrderedDict[CacheKey, HostEntry], ...] = tuple(OrderedDict() for _ in Kind)
        self._kind_bytes = [0] * len(Kind)
        self._idle_bytes = [0] * len(Kind)
        self._claimed_bytes = 0
        self.next_serial = 0
        """Of the next entry."""

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[HostEntry]:
        """Yield the entries, in no order."""
        return iter(self._entries.values())

    @property
    def used_bytes(self) -> int:
        """Room that entries take, and what is claimed."""
        return sum(self._kind_bytes) + self._claimed_bytes

    def kind_bytes(self, kind: Kind) -> int:
        """Room that all entries of a kind take."""
        return self._kind_bytes[kind]

    def get(self, key: CacheKey) -> HostEntry | None:
        """Return the entry of a key without counting as use."""
        return self._entries.get(key)

    def add(self, entry: HostEntry) -> None:
        """Enter a cache as the newest of its kind; there must be room."""
        ensure(entry.key not in self._entries, "a key is entered twice in the host index")
        ensure(self.fits(entry.room_bytes), "an entry is added to a full host index", room_bytes=entry.room_bytes)
        self._entries[entry.key] = entry
        entry.serial = self.next_serial
        self.next_serial += 1
        self._kind_bytes[entry.kind] += entry.room_bytes
        self._line_up(entry)

    def drop(self, key: CacheKey) -> HostEntry:
        """Forget a cache, held or not, and return what it was."""
        entry = self._entries.pop(key)
        self._kind_bytes[entry.kind] -= entry.room_bytes
        if not entry.holds:
            self._leave_line(entry)
        return entry

    def use(self, entry: HostEntry, kind: Kind) -> None:
        """Make an entry the newest of a kind, which may be the one that it has."""
        self._kind_bytes[entry.kind] -= entry.room_bytes
        self._kind_bytes[kind] += entry.room_bytes
        if entry.holds:
            entry.kind = kind
            return
        self._leave_line(entry)
        entry.kind = kind
        self._line_up(entry)

    def make_oldest(self, entry: HostEntry) -> None:
        """Let an entry be the next of its kind to go, unless it is held."""
        if not entry.holds:
            self._orders[entry.kind].move_to_end(entry.key, last=False)

    def hold(self, entry: HostEntry) -> None:
        """Keep an entry from being the oldest of anything; once for each who reads it."""
        if not entry.holds:
            self._leave_line(entry)
        entry.holds += 1

    def release(self, entry: HostEntry) -> None:
        """End one hold. The last one makes it the newest of its kind, if it has not been dropped meanwhile."""
        ensure(entry.holds > 0, "an entry is released that nobody holds")
        entry.holds -= 1
        if not entry.holds and self._entries.get(entry.key) is entry:
            self._line_up(entry)

    def idle(self, kind: Kind) -> list[HostEntry]:
        """Return the entries of one kind that nobody holds, the oldest first."""
        return list(self._orders[kind].values())

    def oldest(self, last: Kind) -> HostEntry | None:
        """Return what goes next: the oldest of the lowest kind, ``last`` at most; None if all such ones are held."""
        for kind in list(Kind)[: last + 1]:
            entry = self.oldest_of(kind)
            if entry is not None:
                return entry
        return None

    def oldest_of(self, kind: Kind) -> HostEntry | None:
        """Return the oldest of one kind, None if all such ones are held."""
        return next(iter(self._orders[kind].values()), None)

    def fits(self, room_bytes: int) -> bool:
        """Whether there is so much room now."""
        return self.used_bytes + room_bytes <= self.budget_bytes

    def could_fit(self, room_bytes: int, last: Kind) -> bool:
        """Whether there were so much room if all that is not held went, of kinds up to ``last``."""
        return self.used_bytes - sum(self._idle_bytes[: last + 1]) + room_bytes <= self.budget_bytes

    def claim(self, room_bytes: int) -> None:
        """Take room for what is no entry: not yet, or no longer."""
        ensure(self.fits(room_bytes), "room is claimed that there is not", room_bytes=room_bytes)
        self._claimed_bytes += room_bytes

    def unclaim(self, room_bytes: int) -> None:
        """Give that room back."""
        self._claimed_bytes -= room_bytes
        ensure(self._claimed_bytes >= 0, "room is given back that was not claimed", room_bytes=room_bytes)

    def check(self) -> None:
        """Raise InvariantError unless orders and sums are right. O(entries), for tests."""
        for kind in Kind:
            entries = [entry for entry in self if entry.kind is kind]
            idle = {entry.key: entry for entry in entries if not entry.holds}
            ensure(idle == dict(self._orders[kind]), "who is idle stands in line", kind=kind)
            ensure(self._kind_bytes[kind] == sum(entry.room_bytes for entry in entries), "bytes of a kind", kind=kind)
            ensure(self._idle_bytes[kind] == sum(entry.room_bytes for entry in idle.values()), "idle bytes", kind=kind)
        ensure(0 <= self.used_bytes <= self.budget_bytes, "the budget holds", used_bytes=self.used_bytes)

    def _line_up(self, entry: HostEntry) -> None:
        self._orders[entry.kind][entry.key] = entry
        self._idle_bytes[entry.kind] += entry.room_bytes

    def _leave_line(self, entry: HostEntry) -> None:
        del self._orders[entry.kind][entry.key]
        self._idle_bytes[entry.kind] -= entry.room_bytes
