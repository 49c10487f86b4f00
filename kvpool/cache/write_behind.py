"""Writing what lies in the host tier alone to the disk, before its room is needed."""

from __future__ import annotations

import asyncio
import logging

from kvpool.cache.disk.packing import Write
from kvpool.cache.disk.tier import DiskTier
from kvpool.cache.host_index import HostEntry, Kind
from kvpool.cache.host_tier import HostTier
from kvpool.cache.under_way import UnderWay, Work
from kvpool.errors import TierError, ensure

logger = logging.getLogger("kvpool.host")

_WRITES_AT_ONCE = 8
"""Twice the threads of a disk tier: while four write, the next four are there."""
_SMALL_WRITES_AT_ONCE = 192
"""Of small caches, which a thread takes many of. Well below the bound of the disk tier's queue."""
_SMALL_BYTES_AT_ONCE = 16 << 20


class WriteBehind:
    """Keeps the host tier's sole entries below a watermark by saving the oldest.

    Each wake-up pays for twice what has come since, no more: where the disk is so small that saving one entry evicts
    another, the two would go round for ever.

    Parameters
    ----------
    host, disk
        From where to where.
    under_way
        Where each write is entered: a removal cancels it.
    watermark
        Share of the host tier's capacity that sole entries may take.
    """

    def __init__(self, host: HostTier, disk: DiskTier, under_way: UnderWay, watermark: float) -> None:
        self._host, self._disk, self._under_way = host, disk, under_way
        self._most_bytes = int(watermark * host.capacity_bytes)
        self._credit_bytes = 0
        self._writes: dict[asyncio.Future[None], HostEntry] = {}
        self._parties: set[asyncio.Task[None]] = set()
        self._writing_bytes = 0
        self._stalled = self._saving_soon = False

    def wake(self, new_bytes: int) -> None:
        """Save what is too much, in the background, now that so many bytes have come."""
        excess_bytes = self._host.index.kind_bytes(Kind.SOLE) - self._writing_bytes - self._most_bytes
        self._save(min(excess_bytes, self._credit_bytes + 2 * new_bytes))

    async def saved_one(self, room_bytes: int, deadline: float) -> bool:
        """Save so much now, and wait until one write is done; False if none will be, or not in time.

        Once a write has not been done in time, nobody waits until the store answers again: a foreground allocation
        must not pay for it each time.

        Parameters
        ----------
        room_bytes
            What is needed.
        deadline
            In seconds of the loop's clock.
        """
        self._save(max(room_bytes, self._credit_bytes))
        if not self._writes or self._stalled:
            return False
        left_s = deadline - asyncio.get_running_loop().time()
        done, _ = await asyncio.wait(self._writes, timeout=max(left_s, 0.0), return_when=asyncio.FIRST_COMPLETED)
        if not done:
            self._stalled = True
        return any(_stored(write) for write in done)

    def _save(self, credit_bytes: int) -> None:
        self._credit_bytes = max(credit_bytes, 0)
        party: list[Write] = []
        while self._credit_bytes > 0 and self._may_write():
            entry = self._host.index.oldest_of(Kind.SOLE)
            if entry is None:
                self._credit_bytes = 0
                break
            work = self._under_way.begin(entry.key)
            if work is None:  # closed: what is being removed is in the index no more
                break
            self._credit_bytes -= entry.room_bytes
            self._host.index.hold(entry)
            write = Write(entry.key, entry.parent, self._host.view(entry), durable=False)
            work.task = write
            self._writes[write.done] = entry
            self._writing_bytes += entry.room_bytes
            # Not in the task: one that is cancelled before its first step never runs.
            write.done.add_done_callback(lambda done, work=work: self._written(done, work))  # type: ignore[misc]
            party.append(write)
        if party:
            writing = asyncio.ensure_future(self._disk.write(party))
            self._parties.add(writing)
            writing.add_done_callback(self._parties.discard)

    def _may_write(self) -> bool:
        small = self._writing_bytes < _SMALL_BYTES_AT_ONCE and len(self._writes) < _SMALL_WRITES_AT_ONCE
        return len(self._writes) < _WRITES_AT_ONCE or small

    def _written(self, done: asyncio.Future[None], work: Work) -> None:
        entry, index = self._writes.pop(done), self._host.index
        self._writing_bytes -= entry.room_bytes
        stored = _stored(done)
        index.release(entry)
        if index.get(entry.key) is entry and entry.kind is Kind.SOLE:
            if stored:
                index.use(entry, Kind.SAVED)
            else:
                index.make_oldest(entry)
        self._under_way.end(work)
        self._stalled = False
        error = None if done.cancelled() else done.exception()
        if error is not None and not isinstance(error, TierError):  # those are counted
            logger.error("writing a cache to the disk tier failed", exc_info=error)
        if stored:
            self._save_soon()
        elif not work.void:
            self._credit_bytes = 0  # a store that refuses is asked again when there is more to save

    def _save_soon(self) -> None:
        """Save more once all that were written together are counted as written, so that as many go together again."""
        if not self._saving_soon:
            self._saving_soon = True
            asyncio.get_running_loop().call_soon(self._save_more)

    def _save_more(self) -> None:
        self._saving_soon = False
        self._save(self._credit_bytes)

    def check(self) -> None:
        """Raise InvariantError unless all that is being written is held. For tests."""
        ensure(all(entry.holds for entry in self._writes.values()), "what is written is held")
        writing_bytes = sum(entry.room_bytes for entry in self._writes.values())
        ensure(writing_bytes == self._writing_bytes, "the bytes that are being written")


def _stored(done: asyncio.Future[None]) -> bool:
    return not done.cancelled() and done.exception() is None
