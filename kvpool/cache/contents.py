"""What can be found below a device, in host memory or on disk, and telling when it no longer can."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from kvpool.cache.chains import with_successors
from kvpool.cache.disk.index import DiskEntry
from kvpool.cache.disk.leftovers import Leftovers
from kvpool.cache.disk.tier import DiskTier
from kvpool.cache.host_index import HostEntry, Kind
from kvpool.cache.host_tier import HostTier
from kvpool.cache.key import BlockHash, CacheKey
from kvpool.cache.source import Source
from kvpool.cache.tier_statistics import TierCounters
from kvpool.cache.under_way import UnderWay


class Location(NamedTuple):
    """Where a cache can be found below the device, and what is known of it."""

    tier: str
    """``"host"`` or ``"disk"``."""
    parent: BlockHash | None
    size_bytes: int


class LowerContents:
    """The two tiers as one place: what moves caches down, up and away shares it.

    Parameters
    ----------
    host, disk
        The tiers; ``disk`` is set to None when it turns out to be of no use.
    on_gone, leftovers
        As for :class:`~kvpool.cache.lower_tiers.LowerTiers`.
    """

    def __init__(
        self,
        host: HostTier | None,
        disk: DiskTier | None,
        on_gone: Callable[[Sequence[CacheKey]], None],
        leftovers: Leftovers | None,
    ) -> None:
        self.host, self.disk, self.leftovers = host, disk, leftovers
        self.disk_problem: str | None = None
        """Why the disk could not be started."""
        self.under_way = UnderWay()
        self.counters = TierCounters()
        self._on_gone = on_gone
        self._untold: dict[CacheKey, None] = {}
        self._promised: dict[CacheKey, list[HostEntry]] = {}
        self._kept: Counter[CacheKey] = Counter()  # on disk, there or not
        if host is not None:
            host.on_drop = self.dropped
        if disk is not None:
            disk.on_gone = self._gone_from_disk

    def locate(self, key: CacheKey) -> Location | None:
        """Return where a cache can be found, or None. No use, no hit."""
        if self.under_way.refuses(key):
            return None
        entry = self.host_entry(key)
        if entry is not None:
            return Location("host", entry.parent, entry.size_bytes)
        saved = self.disk.find(key) if self.disk is not None else None
        return None if saved is None else Location("disk", saved.parent, saved.size_bytes)

    def use(self, source: Source, kind: Kind | None) -> bool:
        """Whether a cache lies below; if in the host, as the newest of a kind (None: it leaves the device)."""
        if self.under_way.refuses(source.key):
            return False
        entry = self.host_entry(source.key)
        if entry is not None and entry.size_bytes == source.size_bytes and self.host is not None:
            self.host.index.use(entry, self.kind_alone(source) if kind is None else kind)
            return True
        if self.disk is None or not self._is_on_disk(source):
            return False
        self.disk.touch(source.key)
        return True

    def still_there(self, keys: Iterable[CacheKey]) -> set[CacheKey]:
        """Leave out what was removed, or dropped again, while others of the batch were on their way."""
        return {key for key in keys if self.locate(key) is not None}

    def hold(self, keys: Iterable[CacheKey]) -> None:
        """Keep caches from being pushed out of the tiers until :meth:`unhold`."""
        for key in keys:
            if self.disk is not None:
                self.disk.keep((key,))
                self._kept[key] += 1
            entry = self.host_entry(key)
            if entry is not None and self.host is not None:
                self.host.index.hold(entry)
                self._promised.setdefault(key, []).append(entry)

    def unhold(self, keys: Iterable[CacheKey]) -> None:
        """End what :meth:`hold` began, if it did, for keys in the order of their chain."""
        for key in list(keys)[::-1]:  # so that the head of a chain is newer than its tail, which goes before it
            if self.disk is not None and key in self._kept:
                self.disk.unkeep((key,))
                self._kept[key] -= 1
                if not self._kept[key]:
                    del self._kept[key]
            held = self._promised.get(key)
            if held and self.host is not None:
                self.host.index.release(held.pop())
                if not held:
                    del self._promised[key]

    def with_descendants(self, keys: Iterable[CacheKey]) -> set[CacheKey]:
        """Return these keys, and those of all that lies below and is chained behind them. O(entries)."""
        children: dict[CacheKey, list[CacheKey]] = {}
        saved: Iterable[DiskEntry] = self.disk.known() if self.disk is not None else ()
        for entry in (*(self.host.index if self.host is not None else ()), *saved):
            if entry.parent is not None:
                children.setdefault(entry.key._replace(block_hash=entry.parent), []).append(entry.key)
        return with_successors(keys, children)

    def host_entry(self, key: CacheKey) -> HostEntry | None:
        """Return the entry of a key in the host tier, also while it is being removed."""
        return None if self.host is None else self.host.index.get(key)

    def kind_alone(self, source: Source) -> Kind:
        """Return what a host entry is once the device does not have it."""
        return Kind.SAVED if self._is_on_disk(source) else Kind.SOLE

    def _is_on_disk(self, source: Source) -> bool:
        saved = None if self.disk is None else self.disk.find(source.key)
        return saved is not None and saved.size_bytes == source.size_bytes

    # -- what goes ------------------------------------------------------------------------------------------------

    def dropped(self, entry: HostEntry) -> None:
        """Note that the host tier has dropped an entry for room."""
        if self.disk is None or self.disk.find(entry.key) is None:
            self.counters.dropped += entry.kind is Kind.SOLE
            self._tell((entry.key,))

    def forget_untold(self) -> None:
        """Tell nothing more of what is gone: everything is."""
        self._untold.clear()

    def _gone_from_disk(self, keys: Sequence[CacheKey]) -> None:
        for key in keys:
            entry = self.host_entry(key)
            if entry is None or self.host is None:
                self._tell((key,))
            elif entry.kind is Kind.SAVED:
                self.host.index.use(entry, Kind.SOLE)
                self.host.index.make_oldest(entry)

    def _tell(self, keys: Iterable[CacheKey]) -> None:
        """Tell that keys are gone, all of one turn of the event loop together."""
        if not self._untold:
            asyncio.get_running_loop().call_soon(self._tell_now)
        self._untold.update(dict.fromkeys(keys))

    def _tell_now(self) -> None:
        # Not what has come back in this turn, nor what is being removed.
        gone = [key for key in self._untold if not self.under_way.refuses(key) and self.locate(key) is None]
        self._untold.clear()
        if gone:
            self._on_gone(gone)
