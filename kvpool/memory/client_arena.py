"""The client's side of a device: the owner's pages in this process's address space, at the owner's offsets."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from kvpool.errors import DeviceLostError, ForkedHandleError, InvalidRequestError, KvpoolError, PoolUnavailableError
from kvpool.memory.backend import Access, Backend
from kvpool.memory.channel import MAX_DESCRIPTORS
from kvpool.memory.covers import Covers
from kvpool.memory.page import runs
from kvpool.memory.page_client import PageClient, PageRequest

_log = logging.getLogger(__name__)


class ClientArena:
    """Two views of a device's arena, writable and read-only, in which pages are mapped when they are needed.

    A page is named by its index in the arena and the serial of the physical page that the owner keeps there. Pages
    stay mapped until the owner asks for them back. A page that the owner moved to another index, or an index that got
    another page, is mapped anew at the next :meth:`ensure`; its old place is unmapped. (So there are never more
    mappings than pages in each view, however far the owner moves them.)

    Safe to use from several threads. In a forked child every method raises :class:`ForkedHandleError`.

    Parameters
    ----------
    backend
        Memory of this process.
    socket_path
        The owner's page socket.
    client_id, token
        What the owner's ``authorize`` is asked.
    arena_bytes
        Size of the owner's arena.
    page_size_bytes
        Size of its pages.
    capacity_pages
        Pages that the device has: as many may be mapped in each view.
    on_revoked
        Called, in the reading thread, when the owner has ended this client's leases. Nothing is unmapped then before
        :meth:`close`.

    Raises
    ------
    SystemLimitError
        If the limits of this process do not allow ``capacity_pages`` mappings in two views.
    DeviceLostError, PoolUnavailableError, ProtocolError
        If the owner cannot be reached, or what it refuses with.
    """

    def __init__(
        self,
        backend: Backend,
        socket_path: Path,
        client_id: str,
        token: str,
        arena_bytes: int,
        page_size_bytes: int,
        capacity_pages: int,
        on_revoked: Callable[[], None] | None = None,
    ) -> None:
        if page_size_bytes <= 0 or arena_bytes <= 0 or arena_bytes % page_size_bytes:
            raise InvalidRequestError(
                f"an arena is a multiple of its pages, not {arena_bytes} bytes in pages of {page_size_bytes}"
            )
        backend.probe(pages=0, mapped_pages=2 * capacity_pages, page_size_bytes=page_size_bytes)
        self._backend = backend
        self._path = socket_path
        self._client_id = client_id
        self._token = token
        self._arena_bytes = arena_bytes
        self._page_size_bytes = page_size_bytes
        self._pid = os.getpid()
        # Serial by index in each view, and index by serial. Changed under the lock, by the reading thread and by
        # withdraw (and by close, which ends that thread first); others look a single entry up, which needs no lock.
        self._serials: dict[Access, dict[int, int]] = {Access.READ: {}, Access.READ_WRITE: {}}
        self._indexes: dict[Access, dict[int, int]] = {Access.READ: {}, Access.READ_WRITE: {}}
        self._mapping = threading.Lock()
        self._covers = Covers(backend, page_size_bytes)
        self._bases: dict[Access, int] = {}
        self._bases_lock = threading.Lock()
        self._requesting = threading.Lock()  # one request at a time; also held to reconnect and to close
        self._closed = False
        self._on_revoked = on_revoked
        self._lost: DeviceLostError | None = None
        self._connection = self._connect()
        self._instance = self._connection.instance

    @property
    def mapped_pages(self) -> int:
        """Mappings in both views."""
        return len(self._serials[Access.READ]) + len(self._serials[Access.READ_WRITE])

    def check_alive(self) -> None:
        """Raise :class:`DeviceLostError` if the owner is gone, as far as is known without asking it."""
        self._check_usable()
        if not self._connection.live:
            raise DeviceLostError(
                f"the owner at {self._path} does not answer: what it held is lost if it died; ask for the caches again"
            )

    def address(self, offset: int, access: Access) -> int:
        """Return the address of an offset of the arena in the view with that access."""
        self._check_usable()
        if not 0 <= offset < self._arena_bytes:
            raise InvalidRequestError(f"offset {offset} is not within the arena of {self._arena_bytes} bytes")
        return self._base(access) + offset

    def is_mapped(self, pages: Sequence[tuple[int, int]], access: Access) -> bool:
        """Return whether :meth:`ensure` would have nothing to do (then it does not block)."""
        self._check_usable()
        serials = self._view(access)
        if not self._connection.live:
            return False
        for index, serial in pages:  # noqa: SIM110 - all() over a generator takes twice as long
            if serials.get(index) != serial:
                return False
        return True

    def ensure(self, pages: Sequence[tuple[int, int]], access: Access, timeout_s: float = 30.0) -> None:
        """Map those of ``pages`` (index and serial) that are not mapped yet in the view with that access.

        Blocks while it asks the owner; returns at once when nothing is missing. A page that is in use under a lease
        stays where it is: the owner asks back, and moves, only pages that no lease needs.

        Raises
        ------
        DeviceLostError
            If the connection is lost and cannot be made again, or the owner there is another one.
        PoolUnavailableError
            If the owner does not answer within ``timeout_s``.
        KvpoolError
            What the owner refused with (a page that is not there any more), or what failed when mapping.
        ForkedHandleError
            In a forked child.
        """
        if self.is_mapped(pages, access):
            return
        deadline = time.monotonic() + timeout_s
        self._check_pages(pages)
        if not self._requesting.acquire(timeout=timeout_s):
            raise PoolUnavailableError(
                f"pages could not be asked for within {timeout_s:g} s: requests of other threads wait for the owner"
            )
        try:
            self._check_usable()
            self._base(access)
            if not self._connection.live:  # also when all is mapped: a dead owner's pages are lost, and it says so
                self._reconnect()
            try:
                self._request(pages, access, deadline)
            except DeviceLostError:
                self._reconnect()
                self._request(pages, access, deadline)
        finally:
            self._requesting.release()

    def cover(self, first: int, count: int, access: Access) -> None:
        """Let a range of indexes read as zeros in a view, where no page is mapped, until :meth:`uncover`. Idempotent.

        Writing to such zeros is a fault, also in the writable view.
        """
        self._check_usable()
        self._covers.show(self._base(access), first, count, access)

    def uncover(self, first: int, count: int) -> None:
        """End :meth:`cover` in both views. Any thread, also in a finalizer, and after :meth:`close`."""
        if self._pid == os.getpid():  # else nothing of this was inherited
            self._covers.end(first, count)

    def withdraw(self, pages: Sequence[tuple[int, int]]) -> None:
        """Unmap pages (index and serial) that the owner has taken from under a cache, ahead of being asked for them.

        The owner is not told: it asks for them all the same, and takes only that answer for their end. (Told now, it
        might have handed one out again in the meantime, and would forget that.)
        """
        self._check_usable()
        with self._mapping:
            for index, serial in pages:
                for access, serials in self._serials.items():
                    if serials.get(index) == serial:
                        self._unmap(access, index)

    def close(self, timeout_s: float = 2.0) -> None:
        """Unmap everything and say goodbye to the owner, so that its pages are free. Idempotent.

        Views of the memory that are still in use fault from now on.
        """
        if self._pid != os.getpid():
            return  # nothing of this was inherited
        with self._requesting:
            if self._closed:
                return
            self._closed = True
            if not self._connection.live and self._lost is None:
                try:
                    self._reconnect()  # or the owner would count our pages as zombies until this process ends
                except (KvpoolError, OSError) as failure:
                    _log.info("cannot tell the owner at %s that its pages are unmapped: %s", self._path, failure)
            self._connection.stop(timeout_s)
            self._covers.close()
            for access, base in self._bases.items():
                for start, count in runs(sorted(self._serials[access])):
                    self._backend.unmap(base + start * self._page_size_bytes, count * self._page_size_bytes)
                self._serials[access].clear()
                self._indexes[access].clear()
                self._backend.unreserve(base)
            with self._bases_lock:
                self._bases.clear()
            self._connection.say_goodbye(timeout_s)

    def map_pages(self, request: PageRequest, handles: list[int]) -> list[int]:
        """Map pages that the owner handed out; see :class:`kvpool.memory.page_client.PageHandler`."""
        with self._mapping:
            return self._map_pages(request, handles)

    def _map_pages(self, request: PageRequest, handles: list[int]) -> list[int]:
        access = request.access
        base, serials, indexes = self._bases[access], self._serials[access], self._indexes[access]
        came = request.pages[: len(handles)]
        replaced: dict[int, None] = {}
        mapped: dict[int, int] = {}
        try:
            for (index, serial), handle in zip(came, handles, strict=True):
                if serials.get(index) == serial:
                    continue  # came with an earlier request that had timed out, and may be in use since
                if index in serials:
                    replaced[serials[index]] = None
                    self._unmap(access, index)
                for view in self._indexes:
                    if view != access and self._indexes[view].get(serial, index) != index:
                        self._unmap_serial(view, serial)  # the owner moved it: nothing of its old place is in use
                before = indexes.get(serial)
                if before is None:
                    self._backend.map(base + index * self._page_size_bytes, handle)
                    mapped[index] = serial
                else:  # here, too: what was read there is read here without a fault
                    source = base + before * self._page_size_bytes
                    self._backend.remap(base + index * self._page_size_bytes, handle, source)
                    mapped[index] = serial
                    self._unmap(access, before)
            for start, count in runs(sorted(mapped)):
                self._backend.set_access(base + start * self._page_size_bytes, count * self._page_size_bytes, access)
        except BaseException:
            for index in mapped:
                self._backend.unmap(base + index * self._page_size_bytes, self._page_size_bytes)
            raise
        # Only now: from here on ensure() lets other threads use them.
        for index, serial in mapped.items():
            indexes[serial] = index
            serials[index] = serial
        return [serial for serial in replaced if not any(serial in view for view in self._indexes.values())]

    def drop_pages(self, serials: list[int]) -> None:
        """Unmap pages that the owner asks back; see :class:`kvpool.memory.page_client.PageHandler`."""
        with self._mapping:
            for serial in serials:
                for access in self._indexes:
                    self._unmap_serial(access, serial)

    def revoked(self) -> None:
        """Pass on that the leases are over; see :class:`kvpool.memory.page_client.PageHandler`."""
        if self._on_revoked is not None:
            self._on_revoked()

    def _unmap_serial(self, access: Access, serial: int) -> None:
        index = self._indexes[access].get(serial)
        if index is not None:
            self._unmap(access, index)

    def _unmap(self, access: Access, index: int) -> None:
        serial = self._serials[access].pop(index)
        del self._indexes[access][serial]
        self._backend.unmap(self._bases[access] + index * self._page_size_bytes, self._page_size_bytes)

    def _request(self, pages: Sequence[tuple[int, int]], access: Access, deadline: float) -> None:
        serials = self._serials[access]
        missing = [(index, serial) for index, serial in dict.fromkeys(pages) if serials.get(index) != serial]
        for start in range(0, len(missing), MAX_DESCRIPTORS):
            request = PageRequest(missing[start : start + MAX_DESCRIPTORS], access)
            self._connection.request(request, max(0.0, deadline - time.monotonic()))

    def _connect(self) -> PageClient:
        return PageClient(self._path, self._client_id, self._token, self._backend, self._page_size_bytes, self)

    def _reconnect(self) -> None:
        """Connect once more; the mappings are still valid if the owner is the same."""
        self._connection.stop(1.0)
        self._connection.close()
        try:
            self._connection = self._connect()
        except DeviceLostError as failure:
            self._lost = failure
            raise
        if self._connection.instance != self._instance:
            self._connection.stop(1.0)
            self._connection.say_goodbye(1.0)
            self._lost = DeviceLostError(
                f"the owner at {self._path} was restarted: what this process had mapped is gone; open the caches again"
            )
            raise self._lost

    def _base(self, access: Access) -> int:
        self._view(access)
        base = self._bases.get(access)
        if base is None:
            with self._bases_lock:
                base = self._bases.get(access)
                if base is None:
                    base = self._bases[access] = self._backend.reserve(self._arena_bytes, self._page_size_bytes)
        return base

    def _view(self, access: Access) -> dict[int, int]:
        serials = self._serials.get(access)
        if serials is None:
            raise InvalidRequestError(f"a view is read-only or writable, not {access!r}")
        return serials

    def _check_pages(self, pages: Sequence[tuple[int, int]]) -> None:
        count = self._arena_bytes // self._page_size_bytes
        for index, _ in pages:
            if not 0 <= index < count:
                raise InvalidRequestError(f"page {index} is not within the arena of {count} pages")
        distinct = set(pages)
        if not len(distinct) == len({index for index, _ in distinct}) == len({serial for _, serial in distinct}):
            raise InvalidRequestError("an index has one page, and a page one index: one was named twice")

    def _check_usable(self) -> None:
        if self._pid != os.getpid():
            raise ForkedHandleError("this arena belongs to the parent process: connect anew in the forked child")
        if self._closed:
            raise InvalidRequestError("this arena is closed")
        if self._lost is not None:
            raise self._lost
