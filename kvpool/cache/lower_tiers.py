"""What lies below one device: the host tier, the disk below it, and how caches move between them and the device.

One event loop takes all decisions, threads only move bytes. Each operation on a key is entered in
:class:`~kvpool.cache.under_way.UnderWay`, where a removal makes it void: it ends without a trace, and the removal waits
for that.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from kvpool.cache.arrivals import Arrivals
from kvpool.cache.chains import with_successors
from kvpool.cache.disk.index import DiskEntry
from kvpool.cache.disk.threads import uncancelled
from kvpool.cache.disk.tier import DiskTier
from kvpool.cache.disk_calls import DiskCalls
from kvpool.cache.gathering import all_of, settle
from kvpool.cache.host_index import HostEntry, Kind
from kvpool.cache.host_tier import HostMemory, HostTier
from kvpool.cache.key import BlockHash, CacheKey
from kvpool.cache.mover import Move, Mover
from kvpool.cache.source import Source, check_sources
from kvpool.cache.staging import StagedWrites
from kvpool.cache.tier_statistics import TierCounters, tier_statistics
from kvpool.cache.under_way import UnderWay, Work
from kvpool.cache.write_behind import WriteBehind
from kvpool.errors import TierError

logger = logging.getLogger("kvpool.tiers")


class Below(NamedTuple):
    """A cache that can be found below the device."""

    tier: str
    """``"host"`` or ``"disk"``."""
    parent: BlockHash | None
    size_bytes: int


class LowerTiers:
    """The tiers below one device. No fault of theirs is an error of :meth:`demote` or :meth:`fill`: it is a miss.

    All methods belong to one event loop. Memory named in a call must stay as it is until the call returns, also when
    that is cancelled: the cancellation takes effect when no thread uses the memory any more.

    Parameters
    ----------
    host
        The host tier, this device's alone, or None.
    disk
        The disk tier, not started yet, this device's alone, or None.
    on_gone
        Called with keys that could be found below until now and no longer can: dropped from the host and not on disk,
        evicted from the disk and not in the host. Not for :meth:`remove`. (By the time that a caller reads that
        a cache was kept, it may have gone again, and this have been called.)
    patience_s
        How long :meth:`demote` waits for a slow store, at most.
    watermark
        Share of the host tier beyond which the oldest caches that lie there alone are written to the disk.
    """

    def __init__(
        self,
        host: HostTier | None,
        disk: DiskTier | None,
        on_gone: Callable[[Sequence[CacheKey]], None],
        *,
        patience_s: float = 1.0,
        watermark: float = 0.9,
    ) -> None:
        self._host, self._disk, self._on_gone = host, disk, on_gone
        self._patience_s, self._watermark = patience_s, watermark
        self._problem: str | None = None
        self.problem_cause: str | None = None
        """Why the disk could not be started."""
        self._under_way = UnderWay()
        self._removals: set[asyncio.Future[None]] = set()
        self._untold: dict[CacheKey, None] = {}
        self._down, self._up = Mover("kvpool-demote"), Mover("kvpool-fill")
        self._calls = None if disk is None else DiskCalls(disk, self._under_way)
        self._behind: WriteBehind | None = None
        self._staged: StagedWrites | None = None
        self._counters = TierCounters()
        self._promised: dict[CacheKey, list[HostEntry]] = {}
        self._closed = False
        self._arrivals: Arrivals | None = None
        if host is not None:
            host.on_drop = self._dropped
            self._arrivals = Arrivals(host, self._down, self._under_way, self._kind_alone, self._dropped)
        if disk is not None:
            disk.on_gone = self._gone_from_disk

    async def start(self) -> list[CacheKey]:
        """Start the disk; returns what it has found again, the oldest first (:meth:`below` tells sizes and parents).

        A disk that cannot be used is logged, told by :meth:`statistics`, and done without.
        """
        if self._disk is None:
            return []
        try:
            found = await self._disk.start()
        except TierError as error:
            logger.warning("going on without the disk tier: %s", error)
            self._problem, self._disk, self._calls = str(error), None, None
            self.problem_cause = error.details.get("cause")
            return []
        if self._host is not None and self._arrivals is not None:
            self._behind = WriteBehind(self._host, self._disk, self._under_way, self._watermark)
            self._arrivals.behind = self._behind
        else:
            self._staged = StagedWrites(self._disk, self._down, self._under_way)
        return [entry.key for entry in found]

    async def close(self) -> None:
        """Give up what waits, finish what has a thread, and give the host memory back. Files stay. Idempotent."""
        if self._closed:
            return
        self._closed = True
        await self._under_way.close()
        while self._removals:
            await asyncio.wait(self._removals)
        if self._disk is not None:
            await self._disk.close()
        self._down.close()
        self._up.close()
        if self._host is not None:
            self._host.close()
        self._untold.clear()

    # -- finding --------------------------------------------------------------------------------------------------

    def find(self, key: CacheKey) -> str | None:
        """Return the tier in which a cache can be found, ``"host"`` or ``"disk"``, or None. No use, no hit."""
        found = self.below(key)
        return None if found is None else found.tier

    def below(self, key: CacheKey) -> Below | None:
        """Return what is known of a cache that can be found below, or None. No use, no hit."""
        if self._under_way.refuses(key):
            return None
        entry = self._host_entry(key)
        if entry is not None:
            return Below("host", entry.parent, entry.size_bytes)
        saved = self._disk.find(key) if self._disk is not None else None
        return None if saved is None else Below("disk", saved.parent, saved.size_bytes)

    def statistics(self) -> dict[str, Any]:
        """Return the figures of now; built-in types only."""
        return tier_statistics(self._host, self._disk, self._problem, self._counters)

    def trim(self) -> int:
        """Give host memory in which nothing lies back to the system; returns its bytes."""
        return 0 if self._host is None else self._host.trim()

    def hold(self, keys: Iterable[CacheKey]) -> None:
        """Keep caches from being pushed out of the host tier until :meth:`unhold`: they are wanted above.

        What goes down to make room for them on the device could push out the very content that is wanted.
        """
        for key in keys:
            entry = self._host_entry(key)
            if entry is not None and self._host is not None:
                self._host.index.hold(entry)
                self._promised.setdefault(key, []).append(entry)

    def unhold(self, keys: Iterable[CacheKey]) -> None:
        """End what :meth:`hold` began, if it did."""
        for key in keys:
            held = self._promised.get(key)
            if held and self._host is not None:
                self._host.index.release(held.pop())
                if not held:
                    del self._promised[key]

    def with_descendants(self, keys: Iterable[CacheKey]) -> set[CacheKey]:
        """Return these keys, and those of all that lies below and is chained behind them. O(entries)."""
        children: dict[CacheKey, list[CacheKey]] = {}
        for entry in (*(self._host.index if self._host is not None else ()), *self._saved()):
            if entry.parent is not None:
                children.setdefault(entry.key._replace(block_hash=entry.parent), []).append(entry.key)
        return with_successors(keys, children)

    def _saved(self) -> list[DiskEntry]:
        return self._disk.entries() if self._disk is not None else []

    # -- down -----------------------------------------------------------------------------------------------------

    async def demote(self, sources: Sequence[Source]) -> list[bool]:
        """Keep caches whose memory is about to be used again; for each, whether it can be found below.

        Returns when the memory is no longer needed: at once for what is below already, after copying, and after
        waiting for a slow store for ``patience_s`` at most, then without what could not be kept.

        Parameters
        ----------
        sources
            In the order in which they are given up: of these, the first will be dropped first.

        Raises
        ------
        InvalidRequestError
            If a source cannot be one; nothing was changed.
        """
        return await uncancelled(self._demote(check_sources(sources)))

    async def copy_ahead(self, sources: Sequence[Source]) -> list[bool]:
        """Copy caches that the device keeps, ahead of need; for each, whether it can be found below.

        Only what can be had elsewhere makes room for them. Without a host tier they are written to the disk.

        Raises
        ------
        InvalidRequestError
            If a source cannot be one; nothing was changed.
        """
        checked = check_sources(sources)
        if self._arrivals is not None:
            return await uncancelled(self._copy_ahead(self._arrivals, checked))
        staged = self._staged
        if staged is None:
            return [False] * len(checked)
        # Through a buffer, and in bounded time: what stands behind this in line must not wait for a store that hangs.
        deadline = asyncio.get_running_loop().time() + self._patience_s
        stored = await all_of([staged.write(source, deadline) for source in checked])
        self._counters.copied_ahead += stored.count(True)
        return stored

    async def write_through(self, sources: Sequence[Source]) -> list[TierError | None]:
        """Write caches to the disk; None for each that survives the death of every process and a failure of power.

        Raises
        ------
        InvalidRequestError
            If a source cannot be one; nothing was changed.
        """
        checked = check_sources(sources)
        calls = self._calls
        if calls is None:
            why = "set disk_url" if self._problem is None else self._problem
            return [TierError(f"a cache cannot be stored durably without a disk tier: {why}", cause="no_disk")] * len(
                checked
            )
        return await all_of([self._write_through(calls, source) for source in checked])

    async def _demote(self, sources: list[Source]) -> list[bool]:
        deadline = asyncio.get_running_loop().time() + self._patience_s
        unique = {source.key: source for source in sources}
        if self._arrivals is not None:
            unique = await self._in_turn(self._arrivals, unique)
        kept = {key for key, source in unique.items() if self._is_below(source, None)}
        new = [source for key, source in unique.items() if key not in kept]
        if new and self._arrivals is not None:
            kept |= await self._arrivals.bring(new, Kind.SOLE, deadline)
        elif new and self._staged is not None:
            staged = self._staged
            stored = await all_of([staged.write(source, deadline) for source in new])
            kept |= {source.key for source, there in zip(new, stored, strict=True) if there}
        if self._behind is not None:
            self._behind.wake(sum(source.size_bytes for source in unique.values()))
        kept = self._still_below(kept)
        self._counters.demoted += len(kept)
        self._counters.not_kept += sum(key not in kept and not self._under_way.refuses(key) for key in unique)
        return [source.key in kept for source in sources]

    async def _in_turn(self, arrivals: Arrivals, sources: dict[CacheKey, Source]) -> dict[CacheKey, Source]:
        """Wait until none of these keys is on its way here by another call; leaves out what was removed meanwhile.

        Entered as under way for that time: a removal that began and ended within it must find them.
        """
        works = {key: self._under_way.begin(key) for key in sources}
        try:
            await arrivals.all_arrived(sources)
        finally:
            for work in works.values():
                if work is not None:
                    self._under_way.end(work)
        return {key: sources[key] for key, work in works.items() if work is not None and not work.void}

    async def _copy_ahead(self, arrivals: Arrivals, sources: list[Source]) -> list[bool]:
        unique = await self._in_turn(arrivals, {source.key: source for source in sources})
        kept = {key for key, source in unique.items() if self._is_below(source, Kind.COPY)}
        new = [source for key, source in unique.items() if key not in kept]
        if new:
            arrived = await arrivals.bring(new, Kind.COPY, 0.0)
            self._counters.copied_ahead += len(arrived)
            kept |= arrived
        kept = self._still_below(kept)
        return [source.key in kept for source in sources]

    def _still_below(self, keys: Iterable[CacheKey]) -> set[CacheKey]:
        """Leave out what was removed, or dropped again, while others of the batch were on their way."""
        return {key for key in keys if self.below(key) is not None}

    def _is_below(self, source: Source, kind: Kind | None) -> bool:
        """Whether a cache lies below; if in the host, as the newest of a kind (None: it leaves the device)."""
        if self._under_way.refuses(source.key):
            return False
        entry = self._host_entry(source.key)
        if entry is not None and entry.size_bytes == source.size_bytes and self._host is not None:
            self._host.index.use(entry, self._kind_alone(source) if kind is None else kind)
            return True
        if self._disk is None or not self._is_on_disk(source):
            return False
        self._disk.touch(source.key)
        return True

    async def _write_through(self, calls: DiskCalls, source: Source) -> TierError | None:
        error = await calls.write_through(source)
        entry = self._host_entry(source.key)
        if error is None and entry is not None and entry.kind is Kind.SOLE and self._host is not None:
            self._host.index.use(entry, self._kind_alone(source))
        return error

    # -- up -------------------------------------------------------------------------------------------------------

    async def fill(self, targets: Sequence[Source]) -> list[bool]:
        """Bring caches up into memory of the device; for each, whether all its bytes are there.

        False is a miss, and what the memory holds then is worth nothing. What lies in the host tier stays there as a
        copy. One that is removed meanwhile is a miss.

        Raises
        ------
        InvalidRequestError
            If a target cannot be one; nothing was changed.
        """
        checked = check_sources(targets)
        filled = [False] * len(checked)
        held: list[tuple[int, HostEntry, Work]] = []
        reads: dict[int, asyncio.Task[bool]] = {}
        for number, target in enumerate(checked):
            entry = self._host_entry(target.key)
            if entry is None or entry.size_bytes != target.size_bytes:
                if self._calls is not None:
                    reads[number] = asyncio.ensure_future(self._calls.read(target))
            elif self._host is not None and (work := self._under_way.begin(target.key)) is not None:
                self._host.index.hold(entry)
                held.append((number, entry, work))
        try:
            if held and self._host is not None:
                await self._copy_up(self._host, checked, held, filled)
            if reads:
                await asyncio.wait(reads.values())
        finally:
            await settle(reads.values())
        for number, read in reads.items():
            filled[number] = read.result()
        self._counters.fills += filled.count(True)
        self._counters.misses += filled.count(False)
        return filled

    async def _copy_up(
        self, host: HostTier, targets: list[Source], held: list[tuple[int, HostEntry, Work]], filled: list[bool]
    ) -> None:
        try:
            moves = [Move(targets[number].address, entry.address, entry.size_bytes) for number, entry, _ in held]
            await self._up.copy(sorted(moves))
            for number, entry, work in held:
                if not work.void:
                    host.index.use(entry, Kind.COPY)
                    filled[number] = True
                    self._counters.host_hits += 1
        finally:
            for _, entry, work in held:
                host.index.release(entry)
                self._under_way.end(work)

    # -- removing -------------------------------------------------------------------------------------------------

    async def remove(self, keys: Iterable[CacheKey]) -> int:
        """Remove caches from every tier for good; returns how many could be found.

        They cannot be found from the call on. What is under way on them ends without a trace, and is waited for. When
        this returns, their host memory is zero, no crash brings a file back, and they may be stored anew.

        Raises
        ------
        TierError
            If it is not sure that the disk keeps none. They are not found in this life: call again.
        """
        wanted = set(keys)
        found = {key for key in wanted if self.below(key) is not None}
        with self._removing(), self._under_way.removal(wanted):
            memories = self._take_out(wanted)
            await uncancelled(self._remove(wanted, memories, partial(self._remove_files, wanted)))
        return len(found)

    async def remove_space(self, tenant: str, fingerprint: str) -> int:
        """Remove all caches of a tenant and fingerprint, as :meth:`remove` does; returns how many could be found.

        Raises
        ------
        TierError
            As :meth:`remove`.
        """
        in_host = [entry.key for entry in (self._host.index if self._host is not None else ())]
        wanted = {key for key in in_host if (key.tenant, key.fingerprint) == (tenant, fingerprint)}
        found = {key for key in wanted if self.below(key) is not None}
        wanted.update(self._under_way.keys_of(tenant, fingerprint))
        if self._disk is not None:
            found |= {key for key in self._disk.keys_of(tenant, fingerprint) if not self._under_way.refuses(key)}
        with self._removing(), self._under_way.removal_of_space(tenant, fingerprint):
            memories = self._take_out(wanted)
            files = partial(self._remove_space_files, tenant, fingerprint, wanted)
            await uncancelled(self._remove(wanted, memories, files))
        return len(found)

    def scrub(self, tenant: str, number: int, most_bytes: int) -> bool:
        """Zero what caches of a tenant that were dropped from the host tier have left there, one step; True: done.

        As :meth:`~kvpool.memory.allocator.GPUMemoryAllocator.scrub` for the device's own memory.
        """
        return self._host is None or self._closed or self._host.scrub(tenant, number, most_bytes)

    def _take_out(self, keys: Iterable[CacheKey]) -> list[HostMemory]:
        """Let nobody find these in the host any more; returns their memory, which may still be read."""
        if self._host is None or self._closed:
            return []
        entries = [entry for key in keys if (entry := self._host.index.get(key)) is not None]
        return [self._host.take_out(entry) for entry in entries]

    @contextmanager
    def _removing(self) -> Iterator[None]:
        """Keep :meth:`close` waiting until the end of the block."""
        if self._closed and self._disk is not None:
            raise TierError("caches cannot be removed: the tiers are closed", cause="closed")
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._removals.add(done)
        try:
            yield
        finally:
            self._removals.discard(done)
            done.set_result(None)

    async def _remove(
        self, keys: Collection[CacheKey], memories: list[HostMemory], files: Callable[[], Coroutine[Any, Any, None]]
    ) -> None:
        await self._under_way.idle(keys)
        if memories and self._host is not None:
            await self._down.run(self._host.wipe, memories)
            for memory in memories:
                self._host.give_back(memory)
        await files()

    async def _remove_files(self, keys: Collection[CacheKey]) -> None:
        if self._disk is not None:
            await self._disk.remove(keys)
        elif self._problem is not None:
            raise TierError(f"files of removed caches may be left in the disk tier: {self._problem}", cause="no_disk")

    async def _remove_space_files(self, tenant: str, fingerprint: str, keys: Collection[CacheKey]) -> None:
        found = await self._disk.space(tenant, fingerprint) if self._disk is not None else set()
        await self._remove_files(found.union(keys))

    # -- what happened below --------------------------------------------------------------------------------------

    def _dropped(self, entry: HostEntry) -> None:
        """Note that the host tier has dropped an entry for room."""
        if self._disk is None or self._disk.find(entry.key) is None:
            self._counters.dropped += entry.kind is Kind.SOLE
            self._tell((entry.key,))

    def _gone_from_disk(self, keys: Sequence[CacheKey]) -> None:
        for key in keys:
            entry = self._host_entry(key)
            if entry is None or self._host is None:
                self._tell((key,))
            elif entry.kind is Kind.SAVED:
                self._host.index.use(entry, Kind.SOLE)
                self._host.index.make_oldest(entry)

    def _tell(self, keys: Iterable[CacheKey]) -> None:
        """Tell that keys are gone, all of one turn of the event loop together."""
        if not self._untold:
            asyncio.get_running_loop().call_soon(self._tell_now)
        self._untold.update(dict.fromkeys(keys))

    def _tell_now(self) -> None:
        # Not what has come back in this turn, nor what is being removed.
        gone = [key for key in self._untold if not self._under_way.refuses(key) and self.below(key) is None]
        self._untold.clear()
        if gone:
            self._on_gone(gone)

    # -- one key --------------------------------------------------------------------------------------

    def _host_entry(self, key: CacheKey) -> HostEntry | None:
        return None if self._host is None else self._host.index.get(key)

    def _is_on_disk(self, source: Source) -> bool:
        saved = None if self._disk is None else self._disk.find(source.key)
        return saved is not None and saved.size_bytes == source.size_bytes

    def _kind_alone(self, source: Source) -> Kind:
        """What a host entry is once the device does not have it."""
        return Kind.SAVED if self._is_on_disk(source) else Kind.SOLE
