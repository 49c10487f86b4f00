"""Writing to disk all that lies in the host tier alone, by word."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import partial

from kvpool.cache.contents import LowerContents
from kvpool.cache.disk_calls import DiskCalls
from kvpool.cache.host_index import HostEntry, Kind
from kvpool.cache.host_tier import HostTier
from kvpool.cache.key import CacheKey
from kvpool.cache.source import Source
from kvpool.errors import TierError

_HELD_AT_ONCE = 64
"""Entries that cannot make room for others while they are written: few, and enough for all threads."""
_SMALL_HELD_AT_ONCE, _SMALL_HELD_BYTES = 384, 32 << 20
"""As many if they are small, and take a quarter of the tier at most: what the disk tier writes together."""
_HELD_SHARE = 4


class Saving:
    """Writes the host tier's entries through to the disk.

    Parameters
    ----------
    contents
        What lies below.
    """

    def __init__(self, contents: LowerContents) -> None:
        self._contents = contents

    def alone(self, tenant: str | None) -> list[CacheKey]:
        """Return the caches of a tenant, or of anyone, that lie in the host tier and nowhere else. O(entries)."""
        entries = self._contents.host.index if self._contents.host is not None else ()
        return [entry.key for entry in entries if entry.kind is Kind.SOLE and tenant in (None, entry.key.tenant)]

    async def save(
        self, calls: DiskCalls, tenant: str | None, since: int, again: Collection[CacheKey]
    ) -> dict[CacheKey, TierError]:
        """Write what a tenant, or anyone, has in the host tier, the oldest first; returns why not, of what is not.

        Of entries that came before the one of serial number ``since``, those of the keys ``again``.
        """
        host = self._contents.host
        if host is None:
            return {}
        entries = [entry for kind in (Kind.SAVED, Kind.SOLE, Kind.COPY) for entry in host.index.idle(kind)]
        entries += [entry for entry in host.index if entry.holds]
        new = [entry for entry in entries if entry.serial >= since or entry.key in again]
        wanted = [entry for entry in new if tenant in (None, entry.key.tenant)]
        errors: dict[CacheKey, TierError] = {}
        for part in _parts(wanted, min(_SMALL_HELD_BYTES, host.capacity_bytes // _HELD_SHARE)):
            there = [entry for entry in part if host.index.get(entry.key) is entry]
            for entry, error in zip(there, await self._save(host, calls, there), strict=True):
                if error is not None and error.details.get("cause") != "removed":  # meanwhile, so it is not to be kept
                    errors[entry.key] = error
        return errors

    async def _save(self, host: HostTier, calls: DiskCalls, entries: Sequence[HostEntry]) -> list[TierError | None]:
        index = host.index
        sources = [Source(entry.key, entry.parent, entry.address, entry.size_bytes) for entry in entries]
        for entry in entries:
            index.hold(entry)
        try:
            errors = await calls.write_each(sources)
        finally:
            for entry in entries:
                late = calls.late(entry.address)
                if late is None:
                    index.release(entry)
                else:
                    late.add_done_callback(partial(_release, host, entry))
        for entry, source, error in zip(entries, sources, errors, strict=True):
            if error is None and index.get(entry.key) is entry and entry.kind is Kind.SOLE:
                # What was written first may have gone again by now, for what came behind it.
                index.use(entry, self._contents.kind_alone(source))
        return errors


def _parts(entries: Sequence[HostEntry], most_bytes: int) -> Iterator[list[HostEntry]]:
    """Yield entries in parts: more than few only as long as they are small."""
    part: list[HostEntry] = []
    size_bytes = 0
    for entry in entries:
        size_bytes += entry.size_bytes
        full = len(part) >= _HELD_AT_ONCE and (len(part) == _SMALL_HELD_AT_ONCE or size_bytes > most_bytes)
        if full:
            yield part
            part, size_bytes = [], entry.size_bytes
        part.append(entry)
    if part:
        yield part


def _release(host: HostTier, entry: HostEntry, _late: object) -> None:
    host.index.release(entry)
