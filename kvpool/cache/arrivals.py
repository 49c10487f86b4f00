"""Caches on their way into the host tier."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from kvpool.cache.host_index import HostEntry, Kind
from kvpool.cache.host_tier import HostMemory, HostTier
from kvpool.cache.key import CacheKey
from kvpool.cache.mover import Move, Mover
from kvpool.cache.source import Source
from kvpool.cache.under_way import UnderWay, Work
from kvpool.cache.write_behind import WriteBehind

_ALLOCATIONS_AT_ONCE = 32
"""Before others get the event loop: new memory takes half a millisecond a page."""


class _Arrival:
    """A cache on its way into the host tier."""

    def __init__(self, source: Source, work: Work) -> None:
        self.source, self.work = source, work
        self.memory: HostMemory | None = None


class Arrivals:
    """Takes memory for caches in the host tier, copies them there, and only then lets them be found.

    Parameters
    ----------
    host
        Where to.
    mover
        Copies.
    under_way
        Where each arrival is entered: a removal makes it void.
    kind_alone
        What an entry is once the device does not have it.
    on_drop
        Called with an entry that made way for one of another size under its key.
    """

    def __init__(
        self,
        host: HostTier,
        mover: Mover,
        under_way: UnderWay,
        kind_alone: Callable[[Source], Kind],
        on_drop: Callable[[HostEntry], None],
    ) -> None:
        self._host, self._mover, self._under_way = host, mover, under_way
        self._kind_alone, self._dropped = kind_alone, on_drop
        self._arriving: dict[CacheKey, asyncio.Future[None]] = {}
        self.behind: WriteBehind | None = None
        """Where there is a disk, once it has been started."""

    def __len__(self) -> int:
        return len(self._arriving)

    async def all_arrived(self, keys: Iterable[CacheKey]) -> None:
        """Return when none of these keys is on its way into the host tier."""
        wanted = list(keys)
        while coming := [self._arriving[key] for key in wanted if key in self._arriving]:
            await asyncio.wait(coming)

    async def bring(self, sources: list[Source], kind: Kind, deadline: float) -> set[CacheKey]:
        """Copy caches into the host tier as ``COPY`` or ``SOLE``; returns the keys of those that are there."""
        host = self._host
        arrivals: list[_Arrival] = []
        for source in sources:
            work = self._under_way.begin(source.key)
            if work is not None:
                self._arriving[source.key] = asyncio.get_running_loop().create_future()
                arrivals.append(_Arrival(source, work))
        try:
            # In the order of addresses, so that neighbours stay neighbours and are copied in one go.
            in_place = sorted(arrivals, key=lambda arrival: arrival.source.address)
            for number, arrival in enumerate(in_place, start=1):
                arrival.memory = await self._memory(arrival.source, kind, deadline)
                if not number % _ALLOCATIONS_AT_ONCE:
                    await asyncio.sleep(0)
            await self._mover.copy(
                [
                    Move(arrival.memory.address, arrival.source.address, arrival.source.size_bytes)
                    for arrival in in_place
                    if arrival.memory is not None
                ]
            )
            arrived = set()
            for arrival in arrivals:
                source, memory = arrival.source, arrival.memory
                if memory is not None and not arrival.work.void:
                    arrival.memory = None
                    host.enter(
                        source.key, source.parent, memory, kind if kind is Kind.COPY else self._kind_alone(source)
                    )
                    arrived.add(source.key)
            void = [arrival.memory for arrival in arrivals if arrival.memory is not None]
            if void:
                await self._mover.run(host.wipe, void)
            return arrived
        finally:
            for arrival in arrivals:
                if arrival.memory is not None:
                    host.give_back(arrival.memory)
                self._arriving.pop(arrival.source.key).set_result(None)
                self._under_way.end(arrival.work)

    async def _memory(self, source: Source, kind: Kind, deadline: float) -> HostMemory | None:
        """Take memory in the host tier; for a sole one also where others must leave for the disk, or for nowhere."""
        host, tenant, size_bytes = self._host, source.key.tenant, source.size_bytes
        other = host.index.get(source.key)
        if other is not None:  # of another size: whoever says so last is believed
            if other.holds:
                return None
            host.drop(other)
            self._dropped(other)
        memory = host.allocate(tenant, size_bytes, Kind.SAVED)
        if kind is Kind.COPY:
            return memory
        room_bytes = host.room_bytes(size_bytes)
        while memory is None and self.behind is not None and room_bytes <= host.capacity_bytes:
            if not await self.behind.saved_one(room_bytes, deadline):
                break
            memory = host.allocate(tenant, size_bytes, Kind.SAVED)
        return host.allocate(tenant, size_bytes, Kind.SOLE) if memory is None else memory
