"""Writing to disk all that lies in the host tier alone, by word."""

from __future__ import annotations

from kvpool.cache.contents import LowerContents
from kvpool.cache.disk_calls import DiskCalls
from kvpool.cache.gathering import all_of
from kvpool.cache.host_index import HostEntry, Kind
from kvpool.cache.host_tier import HostTier
from kvpool.cache.source import Source
from kvpool.errors import TierError

_HELD_AT_ONCE = 64
"""Entries that cannot make room for others while they are written: few, and enough for all threads."""


class Saving:
    """Writes the host tier's entries through to the disk.

    Parameters
    ----------
    contents
        What lies below.
    """

    def __init__(self, contents: LowerContents) -> None:
        self._contents = contents

    async def save(self, calls: DiskCalls, tenant: str | None) -> list[TierError]:
        """Write what a tenant, or anyone, has in the host tier, the oldest first; returns what went wrong."""
        host = self._contents.host
        if host is None:
            return []
        entries = [entry for kind in (Kind.SAVED, Kind.SOLE, Kind.COPY) for entry in host.index.idle(kind)]
        entries += [entry for entry in host.index if entry.holds]
        wanted = [entry for entry in entries if tenant in (None, entry.key.tenant)]
        errors: list[TierError] = []
        for start in range(0, len(wanted), _HELD_AT_ONCE):
            part = wanted[start : start + _HELD_AT_ONCE]
            outcomes = await all_of([self._save(host, calls, entry) for entry in part])
            # One that was removed meanwhile is not to be kept.
            errors += [error for error in outcomes if error is not None and error.details.get("cause") != "removed"]
        return errors

    async def _save(self, host: HostTier, calls: DiskCalls, entry: HostEntry) -> TierError | None:
        index = host.index
        if index.get(entry.key) is not entry:  # dropped for room by now
            return None
        index.hold(entry)
        try:
            error = await calls.write_through(Source(entry.key, entry.parent, entry.address, entry.size_bytes))
        finally:
            late = calls.late(entry.address)
            if late is None:
                index.release(entry)
            else:
                late.add_done_callback(lambda _: index.release(entry))
        if error is None and index.get(entry.key) is entry and entry.kind is Kind.SOLE:
            index.use(entry, Kind.SAVED)
        return error
