"""Small caches that wait for a thread, written by it together."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvpool.cache.disk.index import DiskEntry
from kvpool.cache.disk.names import new_pack_name
from kvpool.cache.disk.pack import MOST_CACHES
from kvpool.cache.disk.threads import Threads, uncancelled
from kvpool.cache.disk.writer import Writer
from kvpool.cache.key import CacheKey
from kvpool.errors import KvpoolError, TierError

MOST_PACKED_BYTES = 512 << 10
"""Caches of more bytes have files of their own: those reach what the disk does."""
_MOST_BYTES = 4 << 20
"""Of a pack. Larger ones are not faster, and whoever waits for one waits longer."""


@dataclass(eq=False, slots=True)
class _Write:
    entry: DiskEntry
    payload: memoryview
    done: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def fail(self, error: BaseException) -> None:
        self.done.set_exception(error)
        self.done.exception()  # one that nobody waits for any more is not reported


class Packing:
    """Packs whatever waits of one tenant and fingerprint when a thread comes free; alone, a cache gets its own file.

    So nobody waits for others to come: with a thread to spare what came first goes at once, and the more there is to
    be written the larger packs are.

    Parameters
    ----------
    threads
        That write.
    writer
        Of the tier.
    refused
        Returns why a key is not to be written now that its turn has come, if so.
    writing
        Where what is being written is entered, for removals.
    """

    def __init__(
        self,
        threads: Threads,
        writer: Writer,
        refused: Callable[[CacheKey], TierError | None],
        writing: dict[CacheKey, DiskEntry],
    ) -> None:
        self._threads, self._writer, self._refused, self._writing = threads, writer, refused, writing
        self._waiting: deque[_Write] = deque()
        self._coming: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def store(self, entry: DiskEntry, payload: memoryview) -> None:
        """Write a cache of which nothing is known, and whose key the caller holds.

        Cancelled while it waits, it ends at once; else when the thread is done with the memory.

        Raises
        ------
        TierError
            If it is not there.
        """
        write = _Write(entry, payload)
        self._waiting.append(write)
        self._call_thread()
        try:
            await asyncio.wait((write.done,))
        except asyncio.CancelledError:
            if write in self._waiting:
                self._waiting.remove(write)
            else:
                await uncancelled(_end(write.done))
            raise
        write.done.result()

    def _call_thread(self) -> None:
        if self._waiting and self._coming is None:
            self._coming = asyncio.ensure_future(self._serve())
            self._tasks.add(self._coming)
            self._coming.add_done_callback(self._tasks.discard)

    async def _serve(self) -> None:
        """Write a batch once there is a thread; what does not go with it is the next one's."""
        async with self._threads.one():
            self._coming = None
            batch, victims = self._take()
            self._call_thread()
            if batch:
                await self._write(batch, victims)

    def _take(self) -> tuple[list[_Write], list[DiskEntry]]:
        """Take from those that wait what makes one file, and room for it; also returns what must go for it."""
        batch: list[_Write] = []
        victims: list[DiskEntry] = []
        others: deque[_Write] = deque()
        size_bytes = 0
        while self._waiting and len(batch) < MOST_CACHES:
            write = self._waiting.popleft()
            entry = write.entry
            if (refusal := self._refused(entry.key)) is not None:
                write.fail(refusal)
                continue
            fits = not batch or size_bytes + entry.file_bytes <= _MOST_BYTES
            if not fits or (batch and entry.key[:2] != batch[0].entry.key[:2]):
                others.append(write)
                continue
            room = self._writer.claim(entry)
            if room is not None:
                victims += room
                batch.append(write)
                size_bytes += entry.file_bytes
            elif batch:  # there may be room when these are there, and can go for it
                others.append(write)
                break
            else:
                write.fail(self._writer.no_room())
        others.extend(self._waiting)
        self._waiting = others
        pack = new_pack_name() if len(batch) > 1 else None
        for write in batch:  # before anybody can ask for its removal
            write.entry = write.entry._replace(pack=pack)
            self._writing[write.entry.key] = write.entry
        return batch, victims

    async def _write(self, batch: Sequence[_Write], victims: Sequence[DiskEntry]) -> None:
        failed: BaseException | None = None
        try:
            entries, payloads = [write.entry for write in batch], [write.payload for write in batch]
            await uncancelled(self._writer.write_claimed(entries, payloads, victims))
        except BaseException as error:
            failed = error
            if not isinstance(error, KvpoolError):
                raise
        finally:
            for write in batch:
                del self._writing[write.entry.key]
                if failed is None:
                    write.done.set_result(None)
                else:
                    write.fail(failed)


async def _end(done: asyncio.Future[None]) -> None:
    await asyncio.wait((done,))
