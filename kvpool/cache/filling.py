"""Bringing caches up into memory of the device."""

from __future__ import annotations

import asyncio

from kvpool.cache.contents import LowerContents
from kvpool.cache.disk_calls import DiskCalls
from kvpool.cache.gathering import settle
from kvpool.cache.host_index import HostEntry, Kind
from kvpool.cache.host_tier import HostTier
from kvpool.cache.mover import Move, Mover
from kvpool.cache.source import Source
from kvpool.cache.under_way import Work


class Filling:
    """Fills memory of the device from the host tier by one thread, from the disk by several.

    Parameters
    ----------
    contents
        What lies below.
    mover
        Copies what lies in the host tier.
    """

    def __init__(self, contents: LowerContents, mover: Mover) -> None:
        self._contents, self._mover = contents, mover

    async def fill(self, calls: DiskCalls | None, targets: list[Source]) -> list[bool]:
        """Bring caches up; for each, whether all its bytes are there."""
        contents = self._contents
        filled = [False] * len(targets)
        held: list[tuple[int, HostEntry, Work]] = []
        below: list[int] = []
        for number, target in enumerate(targets):
            entry = contents.host_entry(target.key)
            if entry is None or entry.size_bytes != target.size_bytes:
                below.append(number)
            elif contents.host is not None and (work := contents.under_way.begin(target.key)) is not None:
                contents.host.index.hold(entry)
                held.append((number, entry, work))
        reading: asyncio.Task[list[bool]] | None = None
        if below and calls is not None:
            reading = asyncio.ensure_future(calls.read([targets[number] for number in below]))
        reads = () if reading is None else (reading,)
        try:
            if held and contents.host is not None:
                await self._copy_up(contents.host, targets, held, filled)
            if reads:
                await asyncio.wait(reads)
        finally:
            await settle(reads)
        if reading is not None:
            for number, there in zip(below, reading.result(), strict=True):
                filled[number] = there
        contents.counters.fills += filled.count(True)
        contents.counters.misses += filled.count(False)
        if contents.host is not None:
            contents.counters.host_misses += len(targets) - sum(filled[number] for number, _, _ in held)
        return filled

    async def _copy_up(
        self, host: HostTier, targets: list[Source], held: list[tuple[int, HostEntry, Work]], filled: list[bool]
    ) -> None:
        try:
            moves = [Move(targets[number].address, entry.address, entry.size_bytes) for number, entry, _ in held]
            await self._mover.copy(sorted(moves))
            for number, entry, work in held:
                if not work.void:
                    host.index.use(entry, Kind.COPY)
                    filled[number] = True
                    self._contents.counters.host_hits += 1
                    self._contents.counters.host_read_bytes += entry.size_bytes
        finally:
            for _, entry, work in held:
                host.index.release(entry)
                self._contents.under_way.end(work)
