"""What lies below one device's memory: host memory, then disk; and how caches move between them.

Down: a cache that the device evicts is copied to host memory, unless it is there, or on disk, already. When host memory
fills up, the oldest that lies nowhere else is written to disk in the background. Up: a cache is copied into memory of
the device; its entry in host memory stays, and is the first to go. No failure of the store reaches the caller: what
cannot be kept is a miss later, and counted.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from kvpool.cache.disk.index import DiskEntry
from kvpool.cache.disk.threads import uncancelled
from kvpool.cache.disk.tier import DiskTier
from kvpool.cache.host_index import HostEntry, Kind
from kvpool.cache.host_tier import HostTier
from kvpool.cache.key import BlockHash, CacheKey
from kvpool.errors import KvpoolError, TierError, ensure
from kvpool.memory.copying import copy_blocks

logger = logging.getLogger("kvpool.tiers")

OnGone = Callable[[Sequence[CacheKey]], None]

_WRITES = 8
"""Caches that are written to disk at once, ahead of need: more than the tier has threads, so that none waits."""

_MOST_SOLE = 0.75
"""Share of host memory that may lie nowhere else: from there on the oldest is written to disk."""

_REST_S = 5.0
"""How long the disk is left alone after a write that failed, seconds."""

_TRIES, _PAUSE_S = 10, 0.3
"""How often, and how long apart, a folder is tried that another process uses: the one before may be about to end."""


class Source(NamedTuple):
    """A cache in memory of this process: to be kept, or to be filled."""

    key: CacheKey
    parent: BlockHash | None
    address: int
    size_bytes: int


@dataclass(slots=True, eq=False)
class _Flight:
    """Caches on their way, and which of them were removed meanwhile."""

    keys: frozenset[CacheKey]
    removed: set[CacheKey] = field(default_factory=set)
    landed: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(slots=True)
class _Counters:
    lowered: int = 0
    lowered_bytes: int = 0
    raised: int = 0
    raised_bytes: int = 0
    misses: int = 0
    dropped: int = 0
    dropped_bytes: int = 0


class LowerTiers:
    """Host memory and disk below one device. Belongs to one event loop, which decides; threads only move bytes.

    Parameters
    ----------
    host
        Host memory; None: there is none.
    make_disk
        Makes the disk tier, given what it is to call when content is gone; None: there is none.
    on_gone
        Told of keys that could be found here and no longer can. Not of those that were removed by word.
    wait_s
        How long :meth:`demote` may wait for a slow store before it drops what lies nowhere else, seconds.
    """

    def __init__(
        self,
        host: HostTier | None,
        make_disk: Callable[[OnGone], DiskTier] | None,
        on_gone: OnGone,
        wait_s: float = 1.0,
    ) -> None:
        ensure(host is not None or make_disk is not None, "lower tiers are at least one")
        self._host = host
        self._make_disk = make_disk
        self._disk: DiskTier | None = None
        self._on_gone = on_gone
        self._wait_s = wait_s
        self._problem: str | None = None
        self._flights: set[_Flight] = set()
        self._counters = _Counters()
        self._rests_until = 0.0
        self._saver: asyncio.Task[None] | None = None
        self._progress = asyncio.Event()
        self._copier = ThreadPoolExecutor(2, "kvpool-tiers")
        self._closed = False

    async def start(self) -> Sequence[DiskEntry]:
        """Open the disk tier; returns what is found there. Without it, all goes on by host memory alone."""
        if self._make_disk is None:
            return ()
        for left in reversed(range(_TRIES)):
            disk = self._make_disk(self._disk_lost)
            try:
                found = await disk.start()
            except TierError as error:
                if error.details.get("cause") == "locked" and left:
                    await asyncio.sleep(_PAUSE_S)
                    continue
                self._problem = error.message
                logger.warning("going on without the disk tier: %s", error.message)
                return ()
            self._disk = disk
            return found
        return ()

    async def close(self) -> None:
        """Finish what is under way and give all memory back. Files stay."""
        self._closed = True
        if self._saver is not None:
            self._saver.cancel()
            await asyncio.wait([self._saver])
        while self._flights:
            await next(iter(self._flights)).landed.wait()
        if self._disk is not None:
            await self._disk.close()
        await asyncio.to_thread(self._copier.shutdown)
        if self._host is not None:
            self._host.close()

    def find(self, key: CacheKey) -> str | None:
        """Return the tier in which a cache can be found, ``host`` or ``disk``, or None."""
        if self._host is not None and self._host.index.get(key) is not None:
            return "host"
        return "disk" if self._disk is not None and self._disk.find(key) is not None else None

    def hold(self, keys: Iterable[CacheKey]) -> None:
        """Keep caches from being pushed out until they are filled, or :meth:`unhold` is called."""
        if self._host is not None:
            self._host.index.hold(keys)

    def unhold(self, keys: Iterable[CacheKey]) -> None:
        """End what :meth:`hold` began."""
        if self._host is not None:
            self._host.index.unhold(keys)

    # -- down -----------------------------------------------------------------------------------------------------

    async def demote(self, sources: Sequence[Source]) -> list[bool]:
        """Keep caches whose memory is about to be used for others; returns for each whether it can be found here.

        Returns when that memory is no longer needed. Waits for a slow store only as long as ``wait_s`` says (a write
        straight from that memory, where there is no host tier, is waited for to its end, once begun).
        """
        deadline = asyncio.get_running_loop().time() + self._wait_s
        return await uncancelled(self._go_down(sources, Kind.SOLE, deadline))

    async def copy_ahead(self, sources: Sequence[Source]) -> list[bool]:
        """Copy caches that stay where they are for now, so that their demotion takes no copying."""
        return await uncancelled(self._go_down(sources, Kind.COPY, 0.0))

    async def _go_down(self, sources: Sequence[Source], kind: Kind, deadline: float) -> list[bool]:
        flight = self._take_off(source.key for source in sources)
        try:
            there = [self._is_kept(source.key, kind) for source in sources]
            missing = [place for place, kept in enumerate(there) if not kept]
            if missing and not self._closed:
                wanted = [sources[place] for place in missing]
                if self._host is not None:
                    kept = await self._to_host(self._host, flight, wanted, kind, deadline)
                else:
                    kept = await self._to_disk(wanted, deadline)
                for place, is_kept in zip(missing, kept, strict=True):
                    there[place] = is_kept
            return [kept and source.key not in flight.removed for source, kept in zip(sources, there, strict=True)]
        finally:
            self._land(flight)
            self._save()

    def _is_kept(self, key: CacheKey, kind: Kind) -> bool:
        """Whether a cache lies here already; from now on as what ``kind`` says."""
        host, on_disk = self._host, self._disk is not None and self._disk.find(key) is not None
        entry = host.index.get(key) if host is not None else None
        if host is not None and entry is not None:
            if kind is not Kind.COPY:
                host.index.turn(entry, Kind.SAFE if on_disk else Kind.SOLE)
            return True
        return on_disk

    async def _to_host(
        self, host: HostTier, flight: _Flight, sources: Sequence[Source], kind: Kind, deadline: float
    ) -> list[bool]:
        kept = [False] * len(sources)
        place = 0
        while place < len(sources):
            taken: list[tuple[int, int]] = []  # place, handle: as many as there is room for at once
            while place < len(sources):
                handle = self._take(host, sources[place], kind)
                if handle is None and not taken and kind is Kind.SOLE:
                    handle = await self._take_late(host, sources[place], deadline)
                    if handle is None:
                        self._count_dropped(sources[place].size_bytes)
                elif handle is None and taken:
                    break
                if handle is not None:
                    taken.append((place, handle))
                place += 1
            if not taken:
                continue
            await self._copy(
                [(host.address(handle), sources[at].address, sources[at].size_bytes) for at, handle in taken]
            )
            for at, handle in taken:
                source = sources[at]
                if source.key in flight.removed:
                    host.wipe(handle)
                elif self._host_has(host, source.key, kind):
                    host.give_back(handle)
                    kept[at] = True
                else:
                    on_disk = self._disk is not None and self._disk.find(source.key) is not None
                    now = Kind.SAFE if on_disk and kind is Kind.SOLE else kind
                    host.enter(source.key, source.parent, source.size_bytes, now, handle)
                    kept[at] = True
                    self._counters.lowered += 1
                    self._counters.lowered_bytes += source.size_bytes
        return kept

    def _host_has(self, host: HostTier, key: CacheKey, kind: Kind) -> bool:
        """Whether another flight brought the same meanwhile."""
        return host.index.get(key) is not None and self._is_kept(key, kind)

    def _take(self, host: HostTier, source: Source, kind: Kind) -> int | None:
        """Take memory by dropping what is lost by that nowhere, or, with no disk to save it, what is oldest."""
        kinds: tuple[Kind, ...] = (Kind.COPY, Kind.SAFE)
        if kind is Kind.SOLE and self._disk is None:
            kinds += (Kind.SOLE,)
        return host.take(source.key, source.size_bytes, kinds, self._dropped)

    async def _take_late(self, host: HostTier, source: Source, deadline: float) -> int | None:
        """Take memory once something is saved on disk, or, at the deadline, by dropping what is not."""
        loop = asyncio.get_running_loop()
        while (left_s := deadline - loop.time()) > 0 and self._save():
            self._progress.clear()
            try:
                async with asyncio.timeout(left_s):
                    await self._progress.wait()
            except TimeoutError:
                break
            handle = self._take(host, source, Kind.SOLE)
            if handle is not None:
                return handle
        kinds = (Kind.COPY, Kind.SAFE, Kind.SOLE)
        return host.take(source.key, source.size_bytes, kinds, self._dropped)

    def _dropped(self, entry: HostEntry) -> None:
        if entry.kind is Kind.SOLE:
            self._count_dropped(entry.size_bytes)
            self._on_gone((entry.key,))

    def _count_dropped(self, size_bytes: int) -> None:
        self._counters.dropped += 1
        self._counters.dropped_bytes += size_bytes

    async def _copy(self, moves: Sequence[tuple[int, int, int]]) -> None:
        """Copy ``(to, from, bytes)`` in a thread."""
        by_size: dict[int, tuple[list[int], list[int]]] = {}
        for destination, source, size_bytes in moves:
            destinations, sources = by_size.setdefault(size_bytes, ([], []))
            destinations.append(destination)
            sources.append(source)
        loop = asyncio.get_running_loop()
        for size_bytes, (destinations, sources) in by_size.items():
            await loop.run_in_executor(self._copier, copy_blocks, destinations, sources, size_bytes)

    async def _to_disk(self, sources: Sequence[Source], deadline: float) -> list[bool]:
        """Write straight from the device's memory. Those that have no thread by the deadline are given up."""
        if self._disk is None:
            return [False] * len(sources)
        writes = [
            asyncio.ensure_future(self._disk.write_back(source.key, source.parent, _view(source))) for source in sources
        ]
        left_s = max(deadline - asyncio.get_running_loop().time(), 0.0) if deadline else None
        _, late = await asyncio.wait(writes, timeout=left_s)
        for write in late:
            write.cancel()
        outcomes = await asyncio.gather(*writes, return_exceptions=True)
        kept = [outcome is True for outcome in outcomes]
        for source, is_kept in zip(sources, kept, strict=True):
            if is_kept:
                self._counters.lowered += 1
                self._counters.lowered_bytes += source.size_bytes
            else:
                self._count_dropped(source.size_bytes)
        return kept

    # -- from host memory to disk ---------------------------------------------------------------------------------

    def _save(self) -> bool:
        """Have what lies nowhere else written to disk where it is due; True while that goes on."""
        if self._saver is not None and not self._saver.done():
            return True
        host = self._host
        if host is None or self._disk is None or self._closed or not self._is_due(host):
            return False
        self._saver = asyncio.get_running_loop().create_task(self._save_all(host, self._disk))
        return True

    def _is_due(self, host: HostTier) -> bool:
        index = host.index
        rests = asyncio.get_running_loop().time() < self._rests_until
        return not rests and index.bytes_of(Kind.SOLE) > _MOST_SOLE * index.budget_bytes

    async def _save_all(self, host: HostTier, disk: DiskTier) -> None:
        writes: set[asyncio.Future[None]] = set()
        try:
            while True:
                while len(writes) < _WRITES and self._is_due(host):
                    entry = host.index.first_to_go(Kind.SOLE)  # not one that is held: some are being written
                    if entry is None:
                        break
                    host.index.hold((entry.key,))
                    writes.add(asyncio.ensure_future(self._save_one(host, disk, entry)))
                if not writes:
                    return
                _, writes = await asyncio.wait(writes, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if writes:  # cancelled by close(): their memory must outlive their threads
                await uncancelled(_all(writes))
            self._progress.set()

    async def _save_one(self, host: HostTier, disk: DiskTier, entry: HostEntry) -> None:
        flight = self._take_off((entry.key,))
        view = _view(Source(entry.key, entry.parent, host.address(entry.handle), entry.size_bytes))
        try:
            saved = await disk.write_back(entry.key, entry.parent, view)
            if entry.key in flight.removed:
                return
            if saved and entry.kind is Kind.SOLE:
                host.index.saved(entry)
            elif not saved:  # room is made by dropping meanwhile
                self._rests_until = asyncio.get_running_loop().time() + _REST_S
        finally:
            host.index.unhold((entry.key,))
            self._land(flight)
            self._progress.set()

    def _disk_lost(self, keys: Sequence[CacheKey]) -> None:
        """The disk tier no longer has these: what host memory has of them is the only one."""
        gone = []
        for key in keys:
            entry = self._host.index.get(key) if self._host is not None else None
            if self._host is None or entry is None:
                gone.append(key)
            elif entry.kind is Kind.SAFE:
                self._host.index.turn(entry, Kind.SOLE)
        if gone:
            self._on_gone(gone)

    # -- up -------------------------------------------------------------------------------------------------------

    async def fill(self, targets: Sequence[Source]) -> list[bool]:
        """Copy caches to where the targets say; True where all bytes are right, False for a miss."""
        self.hold(target.key for target in targets)
        try:
            return await uncancelled(self._go_up(targets))
        finally:
            self.unhold(target.key for target in targets)

    async def _go_up(self, targets: Sequence[Source]) -> list[bool]:
        flight = self._take_off(target.key for target in targets)
        try:
            filled = [False] * len(targets)
            moves, reads = [], []
            for place, target in enumerate(targets):
                entry = self._host.index.get(target.key) if self._host is not None else None
                if self._host is not None and entry is not None and entry.size_bytes == target.size_bytes:
                    moves.append((place, (target.address, self._host.address(entry.handle), target.size_bytes)))
                else:
                    reads.append(place)
            copying = self._copy([move for _, move in moves])
            _, *read = await asyncio.gather(copying, *(self._read(targets[place]) for place in reads))
            for place, _ in moves:
                filled[place] = True
            for place, is_read in zip(reads, read, strict=True):
                filled[place] = bool(is_read)
            for place, target in enumerate(targets):
                if target.key in flight.removed:
                    filled[place] = False
                if filled[place]:
                    self._counters.raised += 1
                    self._counters.raised_bytes += target.size_bytes
                    entry = self._host.index.get(target.key) if self._host is not None else None
                    if self._host is not None and entry is not None:
                        self._host.index.turn(entry, Kind.COPY)
                else:
                    self._counters.misses += 1
            return filled
        finally:
            self._land(flight)

    async def _read(self, target: Source) -> bool:
        if self._disk is None or self._closed:
            return False
        try:
            return await self._disk.read_into(target.key, _view(target))
        except KvpoolError as error:  # its size is another than was asked for
            logger.warning("reading from disk: %s", error.message)
            return False

    # -- for good -------------------------------------------------------------------------------------------------

    async def write_through(self, sources: Sequence[Source]) -> list[TierError | None]:
        """Write caches to disk so that they survive everything; returns for each why it is not, or None."""
        if self._disk is None:
            why = self._problem or "this pool has none: set disk_url"
            error = TierError(f"nothing can be made durable without a disk tier: {why}", cause="no_disk")
            return [error] * len(sources)
        flight = self._take_off(source.key for source in sources)
        try:
            return await uncancelled(_gather(self._write_through(self._disk, source, flight) for source in sources))
        finally:
            self._land(flight)

    async def _write_through(self, disk: DiskTier, source: Source, flight: _Flight) -> TierError | None:
        try:
            await disk.write_through(source.key, source.parent, _view(source))
        except TierError as error:
            return error
        entry = self._host.index.get(source.key) if self._host is not None else None
        if self._host is not None and entry is not None and entry.kind is Kind.SOLE:
            self._host.index.saved(entry)
        if source.key in flight.removed:
            return TierError("the content was removed while it was written", cause="removed")
        return None

    async def remove(self, keys: Iterable[CacheKey]) -> int:
        """Remove caches, and all that is chained behind them, from every tier; returns how many there were.

        They cannot be found from the call on. When this returns, host memory is zeroed and no crash brings any back.

        Raises
        ------
        TierError
            If the disk tier is not sure of that.
        """
        wanted = self._with_descendants(set(keys))
        return await uncancelled(self._remove(wanted))

    async def remove_space(self, tenant: str, fingerprint: str) -> int:
        """:meth:`remove` all content of a namespace."""
        everything = {key for key in self._keys() if key[:2] == (tenant, fingerprint)}
        return await uncancelled(self._remove(everything))

    def _keys(self) -> Iterable[CacheKey]:
        if self._host is not None:
            yield from (entry.key for entry in self._host.index)
        if self._disk is not None:
            yield from (entry.key for entry in self._disk.entries())
        for flight in self._flights:
            yield from flight.keys

    def _with_descendants(self, keys: set[CacheKey]) -> set[CacheKey]:
        children: dict[CacheKey, list[CacheKey]] = {}
        entries: list[HostEntry | DiskEntry] = [*self._host.index] if self._host is not None else []
        entries += self._disk.entries() if self._disk is not None else []
        for entry in entries:
            if entry.parent is not None:
                children.setdefault(entry.key._replace(block_hash=entry.parent), []).append(entry.key)
        behind = list(keys)
        while behind:
            for child in children.get(behind.pop(), ()):
                if child not in keys:
                    keys.add(child)
                    behind.append(child)
        return keys

    async def _remove(self, keys: set[CacheKey]) -> int:
        under_way = [flight for flight in self._flights if not flight.keys.isdisjoint(keys)]
        for flight in under_way:
            flight.removed |= flight.keys & keys
        found = {key for key in keys if self.find(key) is not None}
        graves = []
        if self._host is not None:
            for key in keys:
                entry = self._host.index.get(key)
                if entry is not None:
                    self._host.index.remove(entry)
                    graves.append(entry)
        error: TierError | None = None
        if self._disk is not None:
            try:
                await self._disk.remove(keys)
            except TierError as failed:
                error = failed
        for flight in under_way:  # they read and write the memory
            await flight.landed.wait()
        for entry in graves:
            if self._host is not None:
                self._host.wipe(entry.handle)
        if error is not None:
            raise error
        return len(found)

    def trim(self) -> int:
        """Give host memory in which nothing lies back to the system; returns its bytes."""
        return 0 if self._host is None else self._host.trim()

    # -- what is under way ----------------------------------------------------------------------------------------

    def _take_off(self, keys: Iterable[CacheKey]) -> _Flight:
        flight = _Flight(frozenset(keys))
        self._flights.add(flight)
        return flight

    def _land(self, flight: _Flight) -> None:
        self._flights.discard(flight)
        flight.landed.set()

    def statistics(self) -> dict[str, Any]:
        """Return the figures of now, as built-in types."""
        counters = self._counters
        host = self._host.index if self._host is not None else None
        disk = self._disk.statistics() if self._disk is not None else None
        return {
            "host": None
            if host is None
            else {
                "capacity_bytes": host.budget_bytes,
                "used_bytes": host.used_bytes,
                "caches": len(host),
                **{f"{kind.value}_bytes": host.bytes_of(kind) for kind in Kind},
            },
            "disk": None if disk is None else asdict(disk),
            "disk_problem": self._problem,
            "lowered": counters.lowered,
            "lowered_bytes": counters.lowered_bytes,
            "raised": counters.raised,
            "raised_bytes": counters.raised_bytes,
            "misses": counters.misses,
            "dropped": counters.dropped,
            "dropped_bytes": counters.dropped_bytes,
        }


def _view(source: Source) -> memoryview:
    return memoryview((ctypes.c_char * source.size_bytes).from_address(source.address)).cast("B")


async def _all(tasks: Iterable[asyncio.Future[Any]]) -> None:
    await asyncio.gather(*tasks, return_exceptions=True)


async def _gather(work: Iterable[Any]) -> list[Any]:
    return list(await asyncio.gather(*work))
