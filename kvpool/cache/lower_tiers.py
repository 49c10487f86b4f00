"""What lies below one device: the host tier, the disk below it, and how caches move between them and the device.

One event loop takes all decisions, threads only move bytes. Each operation on a key is entered in
:class:`~kvpool.cache.under_way.UnderWay`, where a removal makes it void: it ends without a trace, and the removal waits
for that.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from kvpool.cache.contents import Location, LowerContents
from kvpool.cache.demotion import Demotion
from kvpool.cache.disk.index import DiskEntry
from kvpool.cache.disk.leftovers import Leftovers
from kvpool.cache.disk.models_file import NotedModel
from kvpool.cache.disk.threads import uncancelled
from kvpool.cache.disk.tier import DiskTier
from kvpool.cache.disk_calls import DiskCalls
from kvpool.cache.filling import Filling
from kvpool.cache.host_tier import HostTier
from kvpool.cache.key import CacheKey
from kvpool.cache.mover import Mover
from kvpool.cache.saving import Saving
from kvpool.cache.source import Source, check_sources
from kvpool.cache.tier_removal import TierRemoval
from kvpool.cache.tier_statistics import tier_statistics
from kvpool.errors import TierError

logger = logging.getLogger("kvpool.tiers")

STORE_DEADLINE_S = 30.0
"""After this a store is taken to hang: a slow one takes a second or two for a large cache."""

_START_FACTOR = 10
"""How much longer a start may take: it reads the names of all files, and of a million on a network that takes long."""


class LowerTiers:
    """The tiers below one device. No fault of theirs is an error of :meth:`demote` or :meth:`fill`: it is a miss.

    All methods belong to one event loop. Memory named in a call must stay as it is until the call returns, also when
    that is cancelled: the cancellation takes effect when no thread uses the memory any more. There is one exception: a
    call that the store did not answer in time returns, and its memory is in use until :meth:`late` ends.

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
    leftovers
        Folders of devices that are no more, from which is removed, too, what is removed here.
    patience_s
        How long :meth:`demote` waits for a slow store, at most.
    watermark
        Share of the host tier beyond which the oldest caches that lie there alone are written to the disk.
    deadline_s
        How long the store may take for one cache that is filled or written through, and for a removal; ten times as
        long for the start.
    """

    def __init__(
        self,
        host: HostTier | None,
        disk: DiskTier | None,
        on_gone: Callable[[Sequence[CacheKey]], None],
        leftovers: Leftovers | None = None,
        *,
        patience_s: float = 1.0,
        watermark: float = 0.9,
        deadline_s: float = STORE_DEADLINE_S,
    ) -> None:
        self._contents = LowerContents(host, disk, on_gone, leftovers)
        self.problem_cause: str | None = None
        """Why the disk could not be started."""
        self._down, self._up = Mover("kvpool-demote"), Mover("kvpool-fill")
        self._demotion = Demotion(self._contents, self._down, patience_s, watermark)
        self._filling = Filling(self._contents, self._up)
        self._saving = Saving(self._contents)
        self._removal = TierRemoval(self._contents, self._down, deadline_s)
        self._calls = None if disk is None else DiskCalls(disk, self._contents.under_way, deadline_s)
        self._start_deadline_s = _START_FACTOR * deadline_s
        self._closing: asyncio.Task[None] | None = None
        self._closed = False

    async def start(self) -> list[CacheKey]:
        """Start the disk; returns what it has found again, the oldest first (:meth:`locate` tells sizes and parents).

        A disk that cannot be used is logged, told by :meth:`statistics`, and done without.
        """
        contents = self._contents
        if contents.disk is None:
            return []
        if contents.leftovers is not None:
            try:
                await asyncio.wait_for(contents.leftovers.look(), self._start_deadline_s)
            except (TierError, TimeoutError) as error:
                logger.warning("whether there are folders of devices that are no more is not known: %s", error)
        try:
            found = await self._start(contents.disk)
        except TierError as error:
            logger.warning("going on without the disk tier: %s", error)
            contents.disk_problem, contents.disk, self._calls = str(error), None, None
            self.problem_cause = error.details.get("cause")
            return []
        self._demotion.use_disk(contents.disk)
        return [entry.key for entry in found]

    async def _start(self, disk: DiskTier) -> Sequence[DiskEntry]:
        starting = asyncio.ensure_future(disk.start())
        await uncancelled(asyncio.wait((starting,), timeout=self._start_deadline_s))
        if starting.done():
            return starting.result()

        def started_late(starting: asyncio.Future[Sequence[DiskEntry]]) -> None:
            if not starting.cancelled() and starting.exception() is None:
                self._closing = asyncio.ensure_future(disk.close())  # nobody uses it any more: let others have it

        starting.add_done_callback(started_late)
        raise disk.overdue("starting", self._start_deadline_s)

    async def close(self) -> None:
        """Give up what waits, finish what has a thread, and give the host memory back. Files stay. Idempotent."""
        if self._closed:
            return
        self._closed = True
        contents = self._contents
        await contents.under_way.close()
        if contents.leftovers is not None:
            contents.leftovers.close()
        await self._removal.close()
        if contents.disk is not None:
            await contents.disk.close()
        self._down.close()
        self._up.close()
        if contents.host is not None:
            contents.host.close()
        contents.forget_untold()

    # -- finding --------------------------------------------------------------------------------------------------

    def find(self, key: CacheKey) -> str | None:
        """Return the tier in which a cache can be found, ``"host"`` or ``"disk"``, or None. No use, no hit."""
        found = self.locate(key)
        return None if found is None else found.tier

    def locate(self, key: CacheKey) -> Location | None:
        """Return where a cache can be found below, or None. No use, no hit."""
        return self._contents.locate(key)

    def spaces(self) -> list[tuple[str, str, list[NotedModel]]]:
        """Return the tenants and fingerprints of which the start found content, also in folders of devices that are no
        more, with their models as far as an earlier life has noted them.
        """
        contents = self._contents
        left = contents.leftovers.spaces if contents.leftovers is not None else ()
        return [*(contents.disk.spaces() if contents.disk is not None else ()), *left]

    @property
    def unread(self) -> list[str]:
        """The folders of devices that are no more of which it is not known what they have content of."""
        return list(self._contents.leftovers.unread) if self._contents.leftovers is not None else []

    def name(self, tenant: str, fingerprint: str, models: Sequence[NotedModel]) -> None:
        """Say which models the content of a tenant and fingerprint is of, before any of it comes."""
        if self._contents.disk is not None:
            self._contents.disk.name(tenant, fingerprint, models)

    def with_descendants(self, keys: Iterable[CacheKey]) -> set[CacheKey]:
        """Return these keys, and those of all that lies below and is chained behind them. O(entries)."""
        return self._contents.with_descendants(keys)

    def statistics(self) -> dict[str, Any]:
        """Return the figures of now; built-in types only."""
        contents = self._contents
        figures = tier_statistics(contents.host, contents.disk, contents.disk_problem, contents.counters)
        left = contents.leftovers
        urls, removals = ([], 0) if left is None else (list(left.urls), left.pending)
        return figures | {"leftover_folders": urls, "leftover_removals": removals}

    # -- moving ---------------------------------------------------------------------------------------------------

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
        return await uncancelled(self._demotion.demote(check_sources(sources)))

    async def copy_ahead(self, sources: Sequence[Source]) -> list[bool]:
        """Copy caches that the device keeps, ahead of need; for each, whether it can be found below.

        Only what can be had elsewhere makes room for them. Without a host tier they are written to the disk.

        Raises
        ------
        InvalidRequestError
            If a source cannot be one; nothing was changed.
        """
        return await uncancelled(self._demotion.copy_ahead(check_sources(sources)))

    async def write_through(self, sources: Sequence[Source]) -> list[TierError | None]:
        """Write caches to the disk; None for each that survives the death of every process and a failure of power.

        What this call has written does not go for what it writes next: where the disk has no room for all, the front of
        a chain is stored, as much as fits.

        Raises
        ------
        InvalidRequestError
            If a source cannot be one; nothing was changed.
        """
        return await self._demotion.write_through(self._calls, check_sources(sources))

    @property
    def mark(self) -> int:
        """What tells what lies in the host tier from what comes there from now on, for :meth:`save`."""
        return 0 if self._contents.host is None else self._contents.host.index.next_serial

    async def save(
        self, tenant: str | None, since: int = 0, again: Collection[CacheKey] = ()
    ) -> dict[CacheKey, TierError]:
        """Write what a tenant, or anyone, has in the host tier through to the disk; returns why not, of what is not.

        With ``since``, what has come there since :attr:`mark` was that, and what has the keys ``again``.
        """
        if self._calls is None:
            return dict.fromkeys(self._saving.alone(tenant), self._demotion.no_disk())
        return await self._saving.save(self._calls, tenant, since, again)

    async def on_disk(self, tenant: str | None) -> tuple[list[DiskEntry], TierError | None]:
        """Return what of a tenant, or of anyone, lies on the disk, and why that cannot be counted on, if so. O(files).

        The store is asked: a folder may have vanished since something was last read there or written.
        """
        disk, calls = self._contents.disk, self._calls
        if disk is None or calls is None:
            return [], None
        unsure = await calls.check_there()
        return [entry for entry in disk.entries() if tenant in (None, entry.key.tenant)], unsure

    @property
    def displaced(self) -> int:
        """How many caches the disk has dropped for want of room, without those of which a durable write told that."""
        disk, calls = self._contents.disk, self._calls
        return 0 if disk is None or calls is None else disk.statistics().evicted_files - calls.gave_way

    async def fill(self, targets: Sequence[Source]) -> list[bool]:
        """Bring caches up into memory of the device; for each, whether all its bytes are there.

        False is a miss, and what the memory holds then is worth nothing. What lies in the host tier stays there as a
        copy. One that is removed before its bytes are there is a miss; whoever lets others find it looks once more.

        Raises
        ------
        InvalidRequestError
            If a target cannot be one; nothing was changed.
        """
        return await self._filling.fill(self._calls, check_sources(targets))

    def late(self, source: Source) -> asyncio.Future[Any] | None:
        """Return what ends when the store lets go of this memory, of a call that returned without waiting for it.

        None if the memory is free, as it is after all calls that the store has answered.
        """
        return None if self._calls is None else self._calls.late(source.address)

    def hold(self, keys: Iterable[CacheKey]) -> None:
        """Keep caches from being pushed out of the tiers until :meth:`unhold`: they are wanted above.

        What goes down to make room for them on the device could push out the very content that is wanted.
        """
        self._contents.hold(keys)

    def unhold(self, keys: Iterable[CacheKey]) -> None:
        """End what :meth:`hold` began, if it did."""
        self._contents.unhold(keys)

    # -- removing -------------------------------------------------------------------------------------------------

    async def remove(self, keys: Iterable[CacheKey]) -> int:
        """Remove caches from every tier for good; returns how many could be found.

        They cannot be found from the call on. What is under way on them ends without a trace, and is waited for. When
        this returns, their host memory is zero, no crash brings a file back, and they may be stored anew.

        Raises
        ------
        TierError
            If it is not sure that the disk keeps none: call again. They are not found in this life, nor stored anew
            before they are gone. A removal that the store does not answer in time goes on.
        """
        return await self._removal.remove(keys)

    async def remove_space(self, tenant: str, fingerprint: str) -> int:
        """Remove all caches of a tenant and fingerprint, as :meth:`remove` does; returns how many could be found.

        Raises
        ------
        TierError
            As :meth:`remove`.
        """
        return await self._removal.remove_space(tenant, fingerprint)

    async def complete_removals(self) -> None:
        """Try again the removals that the disk's store has refused, if there are any; to be called now and then."""
        if self._contents.disk is not None:
            await self._contents.disk.complete_removals()

    async def remove_from_leftovers(self) -> None:
        """Try again what could not be removed from folders of devices that are no more; to be called now and then."""
        if self._contents.leftovers is not None:
            await self._contents.leftovers.remove_again()

    def scrub(self, tenant: str, number: int, most_bytes: int) -> bool:
        """Zero what caches of a tenant that were dropped from the host tier have left there, one step; True: done.

        As :meth:`~kvpool.memory.allocator.GPUMemoryAllocator.scrub` for the device's own memory.
        """
        host = self._contents.host
        return host is None or self._closed or host.scrub(tenant, number, most_bytes)

    def trim(self) -> int:
        """Give host memory in which nothing lies back to the system; returns its bytes."""
        return 0 if self._contents.host is None else self._contents.host.trim()
