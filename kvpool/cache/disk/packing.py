"""Caches that wait for a thread, written by it together: small ones as one file."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from kvpool.cache.disk.batches import Batches, Request
from kvpool.cache.disk.file_names import new_pack_name
from kvpool.cache.disk.index import DiskEntry
from kvpool.cache.disk.pack import MOST_CACHES
from kvpool.cache.disk.threads import Threads
from kvpool.cache.disk.writer import Writer
from kvpool.cache.key import BlockHash, CacheKey, check_hash
from kvpool.errors import InvalidSizeError, KvpoolError, TierError

MOST_PACKED_BYTES = 512 << 10
"""Caches of more bytes have files of their own: several that are synced together reach what the disk does."""
_MOST_BYTES = 16 << 20
"""Of what is written together. More is not faster, and whoever waits for it waits longer."""
_WORTH_A_THREAD_BYTES = 4 << 20
"""What waits is shared among the threads that are free, so much for each at least: a sync has its price, too."""
_BUDGET_SHARE = 16
"""Of the budget what is written together takes one part in so many: meanwhile none of it can go for others."""


class Write(Request[None]):
    """A cache to be written.

    Parameters
    ----------
    key, parent, view
        Its names, and memory that holds its bytes and stays as it is until :attr:`done`.
    durable
        It is done when it survives a failure of power; else when it can be found.

    Raises
    ------
    InvalidRequestError
        If a hash is none.
    InvalidSizeError
        If there are no bytes.
    """

    def __init__(self, key: CacheKey, parent: BlockHash | None, view: memoryview, durable: bool) -> None:
        check_hash(key.block_hash)
        if parent is not None:
            check_hash(parent)
        super().__init__()
        self.payload = memoryview(view).cast("B")
        if not self.payload.nbytes:
            raise InvalidSizeError("a cache of no bytes cannot be stored", asked_bytes=0)
        self.entry, self.durable = DiskEntry(key, parent, self.payload.nbytes), durable
        self.victims: Sequence[DiskEntry] = ()
        """What goes for it."""

    @property
    def stored(self) -> bool:
        """Whether it is done, and well."""
        return self.done.done() and not self.done.cancelled() and self.done.exception() is None


class Packing(Batches[Write, None]):
    """Writes together what waits of one tenant and fingerprint: small caches as a pack, larger ones as a file each.

    A small one that is alone has its own file, too. Of these caches nothing is on disk, and their keys are held.

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
    budget_bytes
        Of the tier.
    """

    def __init__(
        self,
        threads: Threads,
        writer: Writer,
        refused: Callable[[CacheKey], TierError | None],
        writing: dict[CacheKey, DiskEntry],
        budget_bytes: int,
    ) -> None:
        super().__init__(threads)
        self._most_bytes = min(_MOST_BYTES, budget_bytes // _BUDGET_SHARE)
        self._writer, self._refused, self._writing = writer, refused, writing

    def take(self, waiting: deque[Write]) -> list[Write]:
        batch: list[Write] = []
        others: list[Write] = []
        size_bytes = 0
        most_bytes = min(self._most_bytes, max(_WORTH_A_THREAD_BYTES, self._share_bytes(waiting)))
        kind: object = None
        while waiting and len(batch) < MOST_CACHES:
            write = waiting.popleft()
            entry = write.entry
            if write.done.done():
                continue
            if (refusal := self._refused(entry.key)) is not None:
                write.fail(refusal)
                continue
            its_kind = _kind(entry)
            if batch and its_kind != kind:
                others.append(write)
                continue
            file_bytes = entry.file_bytes
            if batch and size_bytes + file_bytes > most_bytes:
                others.append(write)
                break  # what is behind it would come before it; and to look at all of that for each batch takes time
            victims = self._writer.claim(entry)
            if victims is not None:
                write.victims = victims
                batch.append(write)
                size_bytes += file_bytes
                kind = its_kind
            elif batch:  # there may be room when these are there, and can go for it
                others.append(write)
                break
            else:
                write.fail(self._writer.no_room())
        waiting.extendleft(reversed(others))
        pack = new_pack_name() if len(batch) > 1 and _is_small(batch[0].entry) else None
        for write in batch:  # before anybody can ask for its removal
            key, parent, size_bytes, _ = write.entry
            self._writing[key] = write.entry = DiskEntry(key, parent, size_bytes, pack)
        return batch

    def _share_bytes(self, waiting: deque[Write]) -> int:
        waiting_bytes = sum(write.payload.nbytes for write in waiting)
        threads = self._threads.free + 1  # and the one that is held for this
        # Caches are not divided, and each has a header.
        return waiting_bytes // threads + waiting_bytes // MOST_CACHES

    async def do(self, batch: list[Write]) -> None:
        try:
            await self._writer.write_claimed(
                [write.entry for write in batch],
                [write.payload for write in batch],
                [victim for write in batch for victim in write.victims],
            )
        finally:
            for write in batch:
                del self._writing[write.entry.key]
        for write in batch:
            if not write.durable:
                write.succeed(None)

    async def finish(self, batch: list[Write]) -> None:
        durable = [write for write in batch if write.durable and not write.done.done()]
        if not durable:
            return
        try:
            await self._writer.make_durable(durable[0].entry)  # all have the same folder
        except KvpoolError as error:
            for write in durable:
                write.fail(error)
        for write in durable:
            write.succeed(None)


def _kind(entry: DiskEntry) -> tuple[str, str, bool]:
    """Return what those that are written together have in common."""
    return entry.key.tenant, entry.key.fingerprint, _is_small(entry)


def _is_small(entry: DiskEntry) -> bool:
    return entry.size_bytes <= MOST_PACKED_BYTES
