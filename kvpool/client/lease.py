"""This process's right to keep caches mapped, and the tensors that hang on it."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kvpool.errors import CacheStateError, DoubleReleaseError
from kvpool.sizes import format_count

if TYPE_CHECKING:
    from kvpool.client.connection import Connection


class Lease:
    """A lease on some caches. It ends by :meth:`release`, but not before the last tensor over their memory is gone.

    A tensor's storage holds the lease, so a lease whose handle was dropped lives as long as the tensors do.

    Parameters
    ----------
    connection
        Through which it was granted.
    ids
        The caches, in the order of their chain.
    size_bytes
        What they hold together.
    """

    def __init__(self, connection: Connection, ids: Sequence[int], size_bytes: int) -> None:
        self.ids = list(ids)
        self.size_bytes = size_bytes
        self.views = 0
        """Tensors (storages) over the leased memory that are alive in this process."""
        self.released = False
        """Released by word; with :attr:`views` left, the lease ends with the last of them."""
        self.addressed = False
        """Bare addresses of the memory were handed out, so it may be in use until the lease is released."""
        self.on_end: Callable[[], None] | None = None
        """Called once, when nothing may use the memory any more. Any thread. To be set where the lease is held."""
        self._connection = connection
        # A storage may die in any thread, also within another one's garbage collection.
        self._lock = threading.RLock()
        connection.leases.add(self)

    def extend(self, ids: Sequence[int], size_bytes: int) -> bool:
        """Make more caches part of the lease; False if it has ended by word meanwhile."""
        with self._lock:
            if self.released:
                return False
            self.ids += ids
            self.size_bytes += size_bytes
            return True

    @property
    def in_use(self) -> bool:
        """Whether anything may still read or write the memory by what this lease gave."""
        return self.views > 0 or (self.addressed and not self.released)

    def check_held(self) -> None:
        """Raise unless the leased memory may be used here and now."""
        self._connection.check_usable()
        self._connection.check_not_revoked()
        if self.released:
            raise _released()

    def view_opened(self) -> None:
        """Count a tensor over the leased memory.

        Raises
        ------
        CacheStateError
            If it was released: a thread that opens tensors may have been overtaken by the event loop's release since
            :meth:`check_held`, and the memory may be another's by now.
        """
        with self._lock:
            if self.released:
                raise _released()
            self.views += 1

    def view_closed(self) -> None:
        """Count the end of a tensor; the last one ends a lease that was released. Any thread."""
        with self._lock:
            self.views -= 1
            ends = self.released and not self.views
            unused = not self.views
        if ends:
            self._ended()
            self._connection.release_soon(self.ids)
        if unused:
            self._connection.lease_unused()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let the lease not end within the block, whoever releases it meanwhile. Raises as :meth:`view_opened`."""
        self.view_opened()
        try:
            yield
        finally:
            self.view_closed()

    def _ended(self) -> None:
        on_end, self.on_end = self.on_end, None
        if on_end is not None:
            on_end()

    async def release(self) -> None:
        """End the lease, now or with the last tensor over its memory; it has ended already with a closed connection.

        Raises
        ------
        DoubleReleaseError
            If it was released before.
        """
        if self._connection.ended:
            self.released = True
            return
        self._connection.check_loop()
        if self.release_by_word():
            await self._connection.release(self.ids)

    def release_by_word(self) -> bool:
        """Note that the lease is to end; True if nothing hangs on it, so that it can end at once."""
        self._connection.check_usable()
        with self._lock:
            if self.released:
                raise DoubleReleaseError(f"released already: {self.ids[:4]}", ids=self.ids[:4])
            self.released = True
            unused = not self.views
        if unused:
            self._ended()
            self._connection.lease_unused()
        return unused

    @contextmanager
    def given_back_on_failure(self) -> Iterator[None]:
        """End the lease if the block fails or is cancelled: its handle will reach nobody."""
        try:
            yield
        except BaseException:
            if self.release_by_word():
                self._connection.release_soon(self.ids)
            raise

    def __del__(self) -> None:
        if self.addressed and not self.released:
            self._connection.lease_unused()
        if not self.released and self.ids and not self._connection.closed:
            warnings.warn(
                f"a lease on {format_count(len(self.ids), 'cache')} was dropped without release(): use 'async with'",
                ResourceWarning,
                stacklevel=2,
            )
            self._ended()
            self._connection.release_soon(self.ids)


def _released() -> CacheStateError:
    return CacheStateError("this cache was released: look it up or ask for it again")
