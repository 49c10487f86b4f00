"""A table whose caches are held by leases, and ranked by a policy while nobody holds them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from kvpool.cache.eviction import CacheEvictionPolicy
from kvpool.cache.meter import Meter
from kvpool.cache.table import KEYED, RESIDENT, SEALED, CacheTable
from kvpool.errors import ensure


class LeasedTable(CacheTable):
    """Caches and their leases. What is published and held by nobody is *evictable*.

    Whatever begins or ceases to be so is told to the policy, which ranks it, counted by device in
    :attr:`evictable_bytes`, and told to the meter if there is one. Times (``now``) are seconds of the caller's clock.
    """

    policy: CacheEvictionPolicy
    """Ranks what is evictable. Set before there is anything."""

    def __init__(self) -> None:
        super().__init__()
        self.meter: Meter | None = None

    def guard(self, rows: Sequence[int], *, now: float) -> None:
        """:meth:`pin` for the pool's own sake: it is no access."""
        pins, flags = self.pins, self.flags
        taken = []
        for row in rows:
            if not pins[row] and flags[row] & KEYED:
                taken.append(row)
                self.evictable_bytes[self.device[row]] -= self.size_bytes[row]
            pins[row] += 1
        if taken:
            self._taken(taken, now)

    @contextmanager
    def shielded(self, rows: Sequence[int], *, now: float) -> Iterator[None]:
        """Guard the rows of a chain for the length of a decision, which a meter is not told of."""
        meter, self.meter = self.meter, None
        self.guard(rows, now=now)
        self.meter = meter
        try:
            yield
        finally:
            self.meter = None
            self.unpin(rows[::-1], now=now)
            self.meter = meter

    def pin(self, rows: Sequence[int], *, now: float) -> None:
        """Add a lease to each; a chain in the order of the chain. Pinned caches never go."""
        if not rows:
            return
        pins, flags, accessed, accesses = self.pins, self.flags, self.last_accessed, self.access_count
        if len(rows) == 1:
            row = rows[0]
            leases = pins[row]
            pins[row] = leases + 1
            accessed[row] = now
            accesses[row] += 1
            if not leases and flags[row] & KEYED:
                size_bytes = self.size_bytes[row]
                self.evictable_bytes[self.device[row]] -= size_bytes
                self.policy.taken(rows, now)
                if self.meter is not None:
                    self.meter.charge(self.partition[row], 0, -size_bytes)
            return
        taken = []
        for row in rows:
            leases = pins[row]
            if not leases and flags[row] & KEYED:
                taken.append(row)
                self.evictable_bytes[self.device[row]] -= self.size_bytes[row]
            pins[row] = leases + 1
            accessed[row] = now
            accesses[row] += 1
        if taken:
            self._taken(taken, now)

    def unpin(self, rows: Sequence[int], *, now: float) -> None:
        """Take a lease off each; a chain tail first. A published cache that loses its last one may go from then on."""
        if not rows:
            return
        pins, flags, accessed = self.pins, self.flags, self.last_accessed
        if len(rows) == 1:
            row = rows[0]
            leases = pins[row]
            if leases > 1:
                pins[row] = leases - 1
                return
            if not leases:
                ensure(False, "a lease given back that nobody holds", row=row)
            pins[row] = 0
            accessed[row] = now
            if flags[row] & KEYED:
                size_bytes = self.size_bytes[row]
                self.evictable_bytes[self.device[row]] += size_bytes
                self.policy.evictable(rows, now)
                if self.meter is not None:
                    self.meter.charge(self.partition[row], 0, size_bytes)
            return
        devices, sizes, evictable_bytes = self.device, self.size_bytes, self.evictable_bytes
        evictable = []
        for row in rows:
            leases = pins[row]
            if leases > 1:
                pins[row] = leases - 1
                continue
            if not leases:
                ensure(False, "a lease given back that nobody holds", row=row)
            pins[row] = 0
            accessed[row] = now
            if flags[row] & KEYED:
                evictable.append(row)
                evictable_bytes[devices[row]] += sizes[row]
        if evictable:
            self.policy.evictable(evictable, now)
            if self.meter is not None:
                for row in evictable:
                    self.meter.charge(self.partition[row], 0, sizes[row])

    def _taken(self, rows: Sequence[int], now: float) -> None:
        self.policy.taken(rows, now)
        if self.meter is not None:
            for row in rows:
                self.meter.charge(self.partition[row], 0, -self.size_bytes[row])

    def adopt(self, row: int, elder: int) -> None:
        """Chain those behind a duplicate behind the cache that has its key, before they are cut off.

        Those that nobody holds stay: the policy has ranked them where they are. O(rows) if there are any.
        """
        if not self.children[row]:
            return
        above = elder
        while above >= 0:
            if above == row:  # it has the key of one before it in its own chain
                return
            above = self.parent[above]
        behind = np.flatnonzero(
            (np.frombuffer(self.parent, np.int32) == row) & (np.frombuffer(self.flags, np.uint8) != 0)
        )
        held = [child for child in behind.tolist() if self.pins[child] or not self.flags[child] & KEYED]
        if not held:
            return
        if not self.pins[elder]:
            self.policy.sheltered(elder)
        for child in held:
            self.parent[child] = elder
        self.children[elder] += len(held)
        self.children[row] -= len(held)

    def resize(self, row: int, size_bytes: int, asked_bytes: int) -> None:
        """Enter what a cache that is not sealed takes of its device from now on, and what has a meaning in it."""
        ensure(self.flags[row] == RESIDENT, "resizing a cache that is sealed or gone", row=row)
        more_bytes = size_bytes - self.size_bytes[row]
        self.resident_bytes[self.device[row]] += more_bytes
        if self.meter is not None:
            self.meter.charge(self.partition[row], more_bytes, 0)
        self.size_bytes[row], self.asked_bytes[row] = size_bytes, asked_bytes

    def seal(self, row: int) -> None:
        """Mark a cache immutable; it gets no key by that. Idempotent."""
        ensure(self.flags[row], "sealing a cache that is gone", row=row)
        self.flags[row] |= SEALED
