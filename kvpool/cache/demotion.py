"""Bringing caches down from the device."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from kvpool.cache.arrivals import Arrivals
from kvpool.cache.contents import LowerContents
from kvpool.cache.disk.tier import DiskTier
from kvpool.cache.disk_calls import DiskCalls
from kvpool.cache.host_index import Kind
from kvpool.cache.key import CacheKey
from kvpool.cache.mover import Mover
from kvpool.cache.source import Source
from kvpool.cache.staging import StagedWrites
from kvpool.cache.write_behind import WriteBehind
from kvpool.errors import TierError


class Demotion:
    """Copies caches to the host tier, or without one to the disk; see :class:`~kvpool.cache.lower_tiers.LowerTiers`.

    Parameters
    ----------
    contents
        What lies below.
    mover
        Copies.
    patience_s, watermark
        As for :class:`~kvpool.cache.lower_tiers.LowerTiers`.
    """

    def __init__(self, contents: LowerContents, mover: Mover, patience_s: float, watermark: float) -> None:
        self._contents, self._mover = contents, mover
        self.patience_s, self._watermark = patience_s, watermark
        self.arrivals: Arrivals | None = None
        self._behind: WriteBehind | None = None
        self._staged: StagedWrites | None = None
        if contents.host is not None:
            self.arrivals = Arrivals(contents.host, mover, contents.under_way, contents.kind_alone, contents.dropped)

    def use_disk(self, disk: DiskTier) -> None:
        """Begin to write to a disk, now that it has been started."""
        under_way = self._contents.under_way
        if self._contents.host is not None and self.arrivals is not None:
            self._behind = WriteBehind(self._contents.host, disk, under_way, self._watermark)
            self.arrivals.behind = self._behind
        else:
            self._staged = StagedWrites(disk, self._mover, under_way)

    async def demote(self, sources: list[Source]) -> list[bool]:
        """Keep caches whose memory is about to be used again; for each, whether it can be found below."""
        contents = self._contents
        deadline = asyncio.get_running_loop().time() + self.patience_s
        unique = {source.key: source for source in sources}
        if self.arrivals is not None:
            unique = await self._in_turn(self.arrivals, unique)
        kept = {key for key, source in unique.items() if contents.use(source, None)}
        new = [source for key, source in unique.items() if key not in kept]
        if new and self.arrivals is not None:
            kept |= await self._bring(self.arrivals, new, Kind.SOLE, deadline)
        elif new and self._staged is not None:
            stored = await self._staged.write(new, deadline)
            kept |= {source.key for source, there in zip(new, stored, strict=True) if there}
        if self._behind is not None:
            self._behind.wake(sum(source.size_bytes for source in unique.values()))
        kept = contents.still_there(kept)
        contents.counters.demoted += len(kept)
        contents.counters.not_kept += sum(key not in kept and not contents.under_way.refuses(key) for key in unique)
        return [source.key in kept for source in sources]

    async def copy_ahead(self, sources: list[Source]) -> list[bool]:
        """Copy caches that the device keeps; for each, whether it can be found below."""
        contents, arrivals = self._contents, self.arrivals
        if arrivals is None:
            return await self._write_ahead(sources)
        unique = await self._in_turn(arrivals, {source.key: source for source in sources})
        kept = {key for key, source in unique.items() if contents.use(source, Kind.COPY)}
        new = [source for key, source in unique.items() if key not in kept]
        if new:
            arrived = await self._bring(arrivals, new, Kind.COPY, 0.0)
            contents.counters.copied_ahead += len(arrived)
            kept |= arrived
        kept = contents.still_there(kept)
        return [source.key in kept for source in sources]

    async def _bring(self, arrivals: Arrivals, new: list[Source], kind: Kind, deadline: float) -> set[CacheKey]:
        arrived = await arrivals.bring(new, kind, deadline)
        self._contents.counters.host_written_bytes += sum(each.size_bytes for each in new if each.key in arrived)
        return arrived

    async def _write_ahead(self, sources: list[Source]) -> list[bool]:
        staged = self._staged
        if staged is None:
            return [False] * len(sources)
        # Through a buffer, and in bounded time: what stands behind this in line must not wait for a store that hangs.
        deadline = asyncio.get_running_loop().time() + self.patience_s
        stored = await staged.write(sources, deadline)
        self._contents.counters.copied_ahead += stored.count(True)
        return stored

    async def write_through(self, calls: DiskCalls | None, sources: Sequence[Source]) -> list[TierError | None]:
        """Write caches to the disk; None for each that is safe there."""
        if calls is None:
            return [self.no_disk()] * len(sources)
        contents = self._contents
        # Each once: who takes a key twice, to let it go for others, finds that somebody holds it.
        unique = {source.key: source for source in sources}
        errors = dict(zip(unique, await calls.write_through(list(unique.values())), strict=True))
        for key, source in unique.items():
            entry = contents.host_entry(key)
            if errors[key] is None and entry is not None and entry.kind is Kind.SOLE and contents.host is not None:
                contents.host.index.use(entry, contents.kind_alone(source))
        return [errors[source.key] for source in sources]

    def no_disk(self) -> TierError:
        """Return the error of what cannot be written for want of a disk."""
        problem = self._contents.disk_problem
        why = "set disk_url" if problem is None else problem
        return TierError(f"a cache cannot be stored durably without a disk tier: {why}", cause="no_disk")

    async def _in_turn(self, arrivals: Arrivals, sources: dict[CacheKey, Source]) -> dict[CacheKey, Source]:
        """Wait until none of these keys is on its way here by another call; leaves out what was removed meanwhile.

        Entered as under way for that time: a removal that began and ended within it must find them.
        """
        under_way = self._contents.under_way
        works = {key: under_way.begin(key) for key in sources}
        try:
            await arrivals.all_arrived(sources)
        finally:
            for work in works.values():
                if work is not None:
                    under_way.end(work)
        return {key: sources[key] for key, work in works.items() if work is not None and not work.void}
