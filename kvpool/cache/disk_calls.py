"""Calls of the disk tier with memory of a caller, which a removal, a cancellation or a deadline ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Coroutine, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, NamedTuple

from kvpool.cache.disk.advice import advice_on
from kvpool.cache.disk.batches import Request
from kvpool.cache.disk.packing import Write
from kvpool.cache.disk.reading import Read
from kvpool.cache.disk.threads import uncancelled
from kvpool.cache.disk.tier import DiskTier
from kvpool.cache.disk.writer import FULL, NO_ROOM
from kvpool.cache.fronts import Fronts, cause_of
from kvpool.cache.gathering import all_of, settle
from kvpool.cache.key import CacheKey
from kvpool.cache.parties import is_small, parties
from kvpool.cache.source import Source
from kvpool.cache.under_way import UnderWay, Work
from kvpool.errors import InvalidSizeError, KvpoolError, TierError

_LARGE_AT_ONCE = 16
"""Reads, and writes, of large caches. All that are admitted must be done within a deadline."""
_PARTIES_AT_ONCE = 4
"""Of small caches, which the tier does together: as many as it has threads."""
_PARTY_CACHES, _PARTY_BYTES = 128, 8 << 20
"""All of them are well below the bound of the tier's queue, where more would be misses."""
_SILENT_SHARE = 10
"""A tenth of the deadline is waited for a store that let one pass: or a flush would wait for each thread in turn."""
_LONE_PARTY_CACHES = 16
"""Where each is a call of the store by itself, and all must be done within a deadline."""


class _Lanes:
    """Calls of one kind."""

    def __init__(self) -> None:
        self.large, self.small = asyncio.Semaphore(_LARGE_AT_ONCE), asyncio.Semaphore(_PARTIES_AT_ONCE)
        self.silent = False
        """Whether the store has answered nothing since one of them was given up."""
        self.late: dict[asyncio.Future[Any], object] = {}
        """Those that nobody waits for any more, with what stands for the thread that each still has, or a part of."""

    @property
    def late_threads(self) -> int:
        """How many threads they have."""
        return len(set(self.late.values()))


class _Call(NamedTuple):
    """One cache of a party."""

    source: Source
    work: Work
    request: Request[Any]


class DiskCalls:
    """Reads and writes a bounded number of caches at a time, small ones in parties.

    What the store does not answer in time is given up: the call returns, but the thread cannot be stopped and goes on
    with the caller's memory until :meth:`late` ends. Once caches that are late have all threads, others are given up
    at once. Any other call returns when no thread uses the memory any more.

    Parameters
    ----------
    disk
        The tier.
    under_way
        Where each cache is entered: a removal gives it up.
    deadline_s
        How long a party, or one large cache, may take, from when its turn has come; a tenth of that while the store has
        answered nothing since one was given up.
    """

    def __init__(self, disk: DiskTier, under_way: UnderWay, deadline_s: float) -> None:
        self._disk, self._under_way, self._deadline_s = disk, under_way, deadline_s
        self._reads, self._writes = _Lanes(), _Lanes()
        self._late: dict[int, asyncio.Future[Any]] = {}
        self.gave_way = 0
        """Caches that were stored and went for one before them in their chain: they are evicted, and an error says so,
        or are stored again."""

    def late(self, address: int) -> asyncio.Future[Any] | None:
        """Return what ends with the call that was given up and still uses the memory at an address, None if none is."""
        return self._late.get(address)

    async def check_there(self) -> TierError | None:
        """Return why what the tier has cannot be counted on, if so: the folder is gone, the store hangs."""
        return await self._in_time("looking for the folder", self._disk.check_there())

    async def _in_time(self, what: str, doing: Coroutine[Any, Any, None]) -> TierError | None:
        """Do what may end late, as it uses nobody's memory; returns why it has failed, or that it has not ended."""
        task = asyncio.ensure_future(doing)
        await uncancelled(asyncio.wait((task,), timeout=self._deadline_s))
        if not task.done():
            task.add_done_callback(lambda late: late.cancelled() or late.exception())
            return self._disk.overdue(what, self._deadline_s)
        error = task.exception()
        if error is not None and not isinstance(error, TierError):
            raise error
        return error

    async def read(self, targets: Sequence[Source]) -> list[bool]:
        """Fill memory with caches' bytes; False is a miss."""

        def made(target: Source) -> Read:
            return Read(target.key, target.view())

        def outcome(call: _Call | None, error: Exception | None) -> bool:
            # Of an InvalidSizeError: what is there is another cache than the caller thinks.
            if error is not None and not isinstance(error, TierError | InvalidSizeError):
                raise error
            return call is not None and error is None and call.request.done.result() is True

        async def read(party: Sequence[_Call]) -> None:
            await self._disk.read([call.request for call in party if isinstance(call.request, Read)])

        return [outcome(*each) for each in await self._call(targets, "reading", self._reads, made, read)]

    async def write_through(self, sources: Sequence[Source]) -> list[TierError | None]:
        """Store caches together so that they survive a failure of power; returns for each why not, if not.

        None of them goes for another but for one that it is of no use without: where not all have room, the front of
        a chain is stored, as much as fits.
        """
        with self._watching(sources) as removed, self._keeping(sources):
            return await self._front_first(sources, await self._write(sources), removed)

    async def write_each(self, sources: Sequence[Source]) -> list[TierError | None]:
        """Store caches as :meth:`write_through` does, but one may go for those behind it if the budget is too small."""
        with self._watching(sources) as removed:
            errors = await self._write(sources)
            with self._keeping(sources):  # or what is stored would go for what is tried again
                return await self._front_first(sources, errors, removed)

    def _watching(self, sources: Sequence[Source]) -> AbstractContextManager[Collection[CacheKey]]:
        """Know of what is removed between two tries: its memory may be another's by then."""
        return self._under_way.watching(source.key for source in sources)

    @contextmanager
    def _keeping(self, sources: Sequence[Source]) -> Iterator[None]:
        keys = [source.key for source in sources]
        self._disk.keep(keys)
        try:
            yield
        finally:
            self._disk.unkeep(keys)

    async def _front_first(
        self, sources: Sequence[Source], errors: list[TierError | None], removed: Collection[CacheKey]
    ) -> list[TierError | None]:
        """Try again what found no room, the front first; returns the errors that are left.

        What is written at the same moment fills a disk together, a pack is there as a whole or not at all, and what
        went for one write may have made room for another. So some are refused though they would fit, and others are
        stored behind them. Those go first for what is tried again: as many as they make room for, then by halves. Each
        round fills the first gap, or is half of the one before. Where one alone has no room, all behind it goes before
        it is tried for the last time: nobody can use that.
        """
        if not any(errors):
            return errors
        fronts = Fronts(sources, NO_ROOM)
        most = len(sources)
        while refused := fronts.refused(self._without(removed, sources, errors)):
            cause = cause_of(errors[refused[0]])
            behind = fronts.behind(errors)
            tried = fronts.worth_filling(refused, behind)[:most]
            if not tried and cause in FULL:
                tried = refused[: min(most, (len(refused) + 1) // 2)]
            if not tried:
                break
            cut_off = [sources[place].key for place in behind]
            with self._disk.giving_way(cut_off):
                again = await self._write([sources[place] for place in tried])
                if cut_off and len(tried) == 1 and cause_of(again[0]) in NO_ROOM:
                    await self._in_time("evicting", self._disk.evict(cut_off))
            for place, error in zip(tried, again, strict=True):
                errors[place] = error
            went = [place for place in behind if self._disk.find(sources[place].key) is None]
            self.gave_way += sum(sources[place].key not in removed for place in went)
            for place in went:
                errors[place] = TierError(
                    "a cache is not on disk any more: it went for one before it in its chain, as the disk tier at "
                    f"{self._disk.url} has no room for both: {advice_on(str(cause))}",
                    cause=cause,
                )
            if any(again):
                if len(tried) == 1 and not went:
                    break
                most = max(len(tried) // 2, 1)
        return errors

    def _without(
        self, removed: Collection[CacheKey], sources: Sequence[Source], errors: list[TierError | None]
    ) -> list[TierError | None]:
        """Return the errors, in which it is entered of what was removed."""
        for place, source in enumerate(sources):
            if source.key in removed:
                errors[place] = self._void()
        return errors

    def _void(self) -> TierError:
        """Return why a cache is not written on which work is refused, or became void."""
        if self._under_way.closed:
            return TierError("a cache is not written to disk: the tiers are closed", cause="closed")
        return TierError("a cache is not written to disk: it was removed meanwhile", cause="removed")

    async def _write(self, sources: Sequence[Source]) -> list[TierError | None]:
        def made(source: Source) -> Write:
            return Write(source.key, source.parent, source.view(), durable=True)

        def outcome(call: _Call | None, error: Exception | None) -> TierError | None:
            if call is None:
                return self._void()
            if error is not None and not isinstance(error, TierError):
                raise error
            return error

        async def write(party: Sequence[_Call]) -> None:
            await self._disk.write([call.request for call in party if isinstance(call.request, Write)])

        return [outcome(*each) for each in await self._call(sources, "writing", self._writes, made, write)]

    async def _call(
        self,
        sources: Sequence[Source],
        what: str,
        lanes: _Lanes,
        made: Callable[[Source], Request[Any]],
        do: Callable[[Sequence[_Call]], Any],
    ) -> list[tuple[_Call | None, Exception | None]]:
        """Do calls when their turn has come.

        Returns
        -------
        list[tuple[_Call | None, Exception | None]]
            For each the call, which is done and not cancelled, or else why not; None if the key is being removed, or
            was meanwhile.
        """
        calls: list[_Call | None] = []
        for source in sources:
            request = made(source)
            # Before anything is waited for: a removal that began and ended within that time must find it.
            work = self._under_way.begin(source.key)
            if work is None:
                calls.append(None)
                continue
            work.task = request
            request.done.add_done_callback(lambda _, work=work: self._under_way.end(work))  # type: ignore[misc]
            calls.append(_Call(source, work, request))
        begun = [call for call in calls if call is not None]
        overdue: dict[int, TierError] = {}
        try:
            most = _PARTY_CACHES if self._disk.takes_packs else _LONE_PARTY_CACHES
            grouped = parties(begun, lambda call: call.source.size_bytes, most, _PARTY_BYTES)
            await all_of([self._in_turn(party, what, lanes, do, overdue) for party in grouped])
        finally:
            for call in begun:  # one whose party was cancelled before its first step
                call.request.cancel()
        return [self._outcome(call, overdue) for call in calls]

    def _outcome(self, call: _Call | None, overdue: dict[int, TierError]) -> tuple[_Call | None, Exception | None]:
        if call is None or call.work.void:
            return None, None
        done = call.request.done
        if done.done() and not done.cancelled():  # also one that came at the last moment
            error = done.exception()
            if error is not None and not isinstance(error, KvpoolError):
                raise error
            return call, error
        return call, overdue[id(call)]

    async def _in_turn(
        self,
        party: Sequence[_Call],
        what: str,
        lanes: _Lanes,
        do: Callable[[Sequence[_Call]], Any],
        overdue: dict[int, TierError],
    ) -> None:
        async with lanes.small if is_small(party[0].source.size_bytes) else lanes.large:
            if lanes.late_threads >= self._disk.threads:
                self._give_up(party, what, lanes, overdue, self._deadline_s)
                return
            doing = asyncio.ensure_future(do(party))
            patience_s = self._deadline_s / _SILENT_SHARE if lanes.silent else self._deadline_s
            try:
                await asyncio.wait((doing,), timeout=patience_s)
            except asyncio.CancelledError:
                await settle((doing,))
                raise
            lanes.silent = not any(call.request.done.done() for call in party)
            if doing.done():
                doing.result()
            else:
                self._give_up(party, what, lanes, overdue, patience_s)

    def _give_up(
        self, party: Sequence[_Call], what: str, lanes: _Lanes, overdue: dict[int, TierError], waited_s: float
    ) -> None:
        """Wait no more for what is not done."""
        for call in party:
            done = call.request.done
            if done.done():
                continue
            call.request.cancel()
            if not call.work.void:
                name = call.source.key.block_hash.hex()
                overdue[id(call)] = self._disk.overdue(f"{what} cache {name}", waited_s)
            if not done.done():
                lanes.late[done] = call.request.holder
                self._late[call.source.address] = done
                done.add_done_callback(partial(self._ended, lanes, call.source.address))

    def _ended(self, lanes: _Lanes, address: int, done: asyncio.Future[Any]) -> None:
        lanes.silent = False
        del lanes.late[done]
        del self._late[address]
