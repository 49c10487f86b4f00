"""Host memory as a backend: one ``memfd`` a page, mapped with ``mmap(MAP_FIXED)``.

Not one file for all pages: after a hole is punched into it, a stale client's access would silently bring memory back.

A page that moves takes its page tables along (12 us for 2 MiB, and 160 for the next write of all; mapped anew it is
140, most of it for unmapping, and 800).
"""

from __future__ import annotations

import bisect
import ctypes
import errno
import fcntl
import mmap
import os
from collections.abc import Iterable
from dataclasses import dataclass, field

from kvpool.errors import BackendError, DoubleReleaseError, ForkedHandleError, InvalidRequestError, InvalidSizeError
from kvpool.memory import limits, mman
from kvpool.memory.backend import Access, Copy, MemoryInfo
from kvpool.memory.fork import fork_guard, watch_forks
from kvpool.memory.page import runs
from kvpool.memory.page_tables import PAGE_TABLES, WINDOW_BITS
from kvpool.sizes import format_size

# Against a client's ftruncate, which would kill the owner with SIGBUS at its next access.
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

_SHORT_BYTES = 256 << 10
"""Copies up to this keep the interpreter lock: to let go of it and take it again costs more than a small one takes."""


@dataclass(slots=True)
class _Page:
    """A page that this process holds (``descriptor``) or only still maps (``descriptor`` is -1)."""

    descriptor: int
    inode: int
    size_bytes: int
    created: bool
    mappings: int = 0


@dataclass(slots=True)
class _Mapping:
    """One page at one address: mapped when it exists, accessible when ``access`` says so."""

    page: _Page
    access: Access = Access.NONE


@dataclass(slots=True)
class _Reservation:
    """A range of addresses, and what is mapped in it (by address)."""

    start: int
    size_bytes: int
    page_size_bytes: int
    mappings: dict[int, _Mapping] = field(default_factory=dict)
    zeros: list[tuple[int, int]] = field(default_factory=list)
    """Parts that read as zeros where nothing is mapped: (start, end), ascending."""

    def unmapped_access(self, address: int) -> Access:
        """Return what may be done at a page where nothing is mapped."""
        position = bisect.bisect_right(self.zeros, address, key=lambda part: part[0]) - 1
        return Access.READ if position >= 0 and address < self.zeros[position][1] else Access.NONE

    def set_unmapped(self, start: int, end: int, access: Access) -> None:
        """Set what may be done at the pages of a part where nothing is mapped."""
        unmapped = [page for page in range(start, end, self.page_size_bytes) if page not in self.mappings]
        for first, count in runs(page // self.page_size_bytes for page in unmapped):
            mman.protect(first * self.page_size_bytes, count * self.page_size_bytes, access)


class HostBackend:
    """Host memory, shared between processes by descriptors. Safe to use from several threads.

    Parameters
    ----------
    budget_bytes
        Most that this process may create; by default all that the system and the control group allow.
    """

    name = "host"

    def __init__(self, budget_bytes: int | None = None) -> None:
        if budget_bytes is not None and budget_bytes <= 0:
            raise InvalidSizeError(f"a budget must be positive, asked for {budget_bytes}", asked_bytes=budget_bytes)
        self._budget_bytes = limits.memory_info().total_bytes if budget_bytes is None else budget_bytes
        self._created_bytes = 0
        self._pages: dict[int, _Page] = {}
        self._next_handle = 1
        self._reservations: dict[int, _Reservation] = {}
        self._starts: list[int] = []
        self._pid = os.getpid()
        watch_forks(self)

    def granularity(self) -> int:
        return mmap.PAGESIZE

    def mem_info(self) -> MemoryInfo:
        system = limits.memory_info()
        free = min(system.free_bytes, self._budget_bytes - self._created_bytes)
        return MemoryInfo(max(free, 0), min(system.total_bytes, self._budget_bytes))

    def probe(self, *, pages: int, mapped_pages: int, page_size_bytes: int) -> None:
        limits.require_descriptors(pages)
        limits.require_mappings(mapped_pages)
        limits.require_memory(pages, page_size_bytes, self.mem_info())

    def reserve(self, size_bytes: int, page_size_bytes: int) -> int:
        self._check_process()
        self._check_size(page_size_bytes, mmap.PAGESIZE)
        self._check_size(size_bytes, page_size_bytes)
        with fork_guard:
            # One page more than asked, to cut an aligned range out of it.
            first = mman.reserve_addresses(size_bytes + page_size_bytes)
            start = -(-first // page_size_bytes) * page_size_bytes
            for address, length in ((first, start - first), (start + size_bytes, first + page_size_bytes - start)):
                if length:
                    mman.unmap_addresses(address, length)
            self._reservations[start] = _Reservation(start, size_bytes, page_size_bytes)
            bisect.insort(self._starts, start)
        return start

    def unreserve(self, address: int) -> None:
        self._check_process()
        with fork_guard:
            reservation = self._reservations.get(address)
            if reservation is None:
                raise InvalidRequestError(f"no range is reserved at {address:#x}", address=address)
            if reservation.mappings:
                count = len(reservation.mappings)
                raise InvalidRequestError(
                    f"{count} pages are still mapped at {address:#x}: unmap them first", mapped=count
                )
            mman.unmap_addresses(address, reservation.size_bytes)
            del self._reservations[address]
            self._starts.remove(address)

    def create(self, size_bytes: int) -> int:
        self._check_process()
        self._check_size(size_bytes, mmap.PAGESIZE)
        with fork_guard:
            if self._created_bytes + size_bytes > self._budget_bytes:
                raise BackendError(
                    f"a page of {format_size(size_bytes)} is beyond the budget: {format_size(self._created_bytes)} of "
                    f"{format_size(self._budget_bytes)} are in use",
                    errno=errno.ENOMEM,
                )
            try:
                descriptor = os.memfd_create("kvpool-page", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            except OSError as error:
                mman.refused("memfd_create", error.errno)
            handle = self._add(_Page(descriptor, os.fstat(descriptor).st_ino, size_bytes, created=True))
            self._created_bytes += size_bytes
        # Not under the guard: this takes a millisecond. A fork now closes the descriptor, which is in the table.
        try:
            # Its size first: by that alone Linux before 6.12 decides whether huge pages are "within_size".
            os.ftruncate(descriptor, size_bytes)
            # Allocates and charges the memory now, to this process; touching the page later cannot fail.
            os.posix_fallocate(descriptor, 0, size_bytes)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
        except OSError as error:
            self.release(handle)
            mman.refused(f"allocating {format_size(size_bytes)}", error.errno)
        return handle

    def release(self, handle: int) -> None:
        self._check_process()
        with fork_guard:
            page = self._page(handle)
            del self._pages[handle]
            os.close(page.descriptor)
            page.descriptor = -1
            self._forget(page)

    def map(self, address: int, handle: int) -> None:
        self._check_process()
        with fork_guard:
            page = self._page(handle)
            reservation = self._open(address, page)
            unmapped = reservation.unmapped_access(address)
            mman.map_shared(address, page.size_bytes, page.descriptor, unmapped, unmapped)
            PAGE_TABLES.forget(address, page.size_bytes)
            page.mappings += 1
            reservation.mappings[address] = _Mapping(page)

    def remap(self, address: int, handle: int, source: int) -> None:
        self._check_process()
        with fork_guard:
            page = self._page(handle)
            mapping = self._reservation(source, page.size_bytes).mappings.get(source)
            if mapping is None or mapping.page.inode != page.inode:
                raise InvalidRequestError(f"page {handle} is not mapped at {source:#x}", handle=handle, address=source)
            reservation = self._open(address, page)
            unmapped = reservation.unmapped_access(address)
            if not mman.map_again(address, source, page.size_bytes, unmapped):
                mman.map_shared(address, page.size_bytes, page.descriptor, mapping.access, unmapped)
            PAGE_TABLES.forget(address, page.size_bytes)
            page.mappings += 1
            reservation.mappings[address] = _Mapping(page, mapping.access)

    def set_access(self, address: int, size_bytes: int, access: Access) -> None:
        self._check_process()
        with fork_guard:
            reservation, addresses = self._run(address, size_bytes)
            try:
                mman.protect(address, size_bytes, access)
            except BackendError:
                for each in addresses:  # the kernel may have changed some of them before it refused
                    mman.protect(each, reservation.page_size_bytes, reservation.mappings[each].access)
                raise
            for each in addresses:
                reservation.mappings[each].access = access

    def unmap(self, address: int, size_bytes: int) -> None:
        self._check_process()
        with fork_guard:
            reservation, addresses = self._run(address, size_bytes)
            if reservation.zeros:
                for each in addresses:
                    mman.reserve_addresses(reservation.page_size_bytes, each, reservation.unmapped_access(each))
            else:
                mman.reserve_addresses(size_bytes, address)
            for each in addresses:
                page = reservation.mappings.pop(each).page
                page.mappings -= 1
                self._forget(page)

    def show_zeros(self, address: int, size_bytes: int) -> None:
        self._check_process()
        with fork_guard:
            reservation = self._reservation(address, size_bytes)
            self._check_size(size_bytes, reservation.page_size_bytes)
            end = address + size_bytes
            if any(start < end and address < stop for start, stop in reservation.zeros):
                raise InvalidRequestError(f"a part of {address:#x} + {size_bytes} bytes shows zeros already")
            reservation.set_unmapped(address, end, Access.READ)
            bisect.insort(reservation.zeros, (address, end))

    def hide_zeros(self, address: int, size_bytes: int) -> None:
        self._check_process()
        with fork_guard:
            reservation, part = self._reservation(address, size_bytes), (address, address + size_bytes)
            if part not in reservation.zeros:
                raise InvalidRequestError(f"{address:#x} + {size_bytes} bytes were not told to show zeros")
            reservation.zeros.remove(part)
            reservation.set_unmapped(*part, Access.NONE)

    def export(self, handle: int) -> int:
        self._check_process()
        with fork_guard:
            page = self._page(handle)
            try:
                return os.dup(page.descriptor)
            except OSError as error:
                mman.refused("dup", error.errno)

    def import_(self, descriptor: int, size_bytes: int) -> int:
        self._check_process()
        try:
            found = os.fstat(descriptor)
            seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
        except OSError as error:
            if error.errno != errno.EBADF:
                os.close(descriptor)
            raise InvalidRequestError(f"descriptor {descriptor} is no page: {error.strerror}") from error
        if found.st_size != size_bytes or seals & _SEALS != _SEALS:
            os.close(descriptor)
            raise InvalidRequestError(
                f"descriptor {descriptor} is no page of {size_bytes} bytes: it has {found.st_size} and seals {seals:#x}"
            )
        with fork_guard:
            return self._add(_Page(descriptor, found.st_ino, size_bytes, created=False))

    def copy(self, copies: Iterable[Copy]) -> None:
        self._check_process()  # a system call: once for all
        memmove, view = ctypes.memmove, mman.ADDRESSES
        entered, enter = PAGE_TABLES.entered, PAGE_TABLES.enter
        PAGE_TABLES.limit()
        for destination, source, size_bytes in copies:
            first, last = destination >> WINDOW_BITS, destination + size_bytes - 1 >> WINDOW_BITS
            if first == last:
                if first not in entered:  # a call takes longer than that
                    _ = view[destination]
                    entered.add(first)
            elif first not in entered or last not in entered or last - first > 1:
                enter(destination, size_bytes)
            if size_bytes > _SHORT_BYTES:
                memmove(destination, source, size_bytes)
            else:
                view[destination : destination + size_bytes] = view[source : source + size_bytes]

    def zero(self, address: int, size_bytes: int) -> None:
        self._check_process()
        PAGE_TABLES.enter(address, size_bytes)
        ctypes.memset(address, 0, size_bytes)

    def close(self) -> None:
        if self._pid != os.getpid():
            return  # a forked child has neither mappings nor descriptors to give back
        with fork_guard:
            for start, reservation in list(self._reservations.items()):
                for address in list(reservation.mappings):
                    self.unmap(address, reservation.page_size_bytes)
                self.unreserve(start)
            for handle in list(self._pages):
                self.release(handle)

    def after_fork_in_child(self) -> None:
        """Close inherited descriptors: each would keep its page's memory alive. Mappings are not inherited."""
        for page in self._pages.values():
            os.close(page.descriptor)
        self._pages.clear()
        self._reservations.clear()
        self._starts.clear()
        PAGE_TABLES.forget_all()

    def _add(self, page: _Page) -> int:
        handle = self._next_handle
        self._next_handle += 1
        self._pages[handle] = page
        return handle

    def _forget(self, page: _Page) -> None:
        """Give the budget back once a page is neither held nor mapped here."""
        if page.created and page.descriptor == -1 and page.mappings == 0:
            self._created_bytes -= page.size_bytes

    def _page(self, handle: int) -> _Page:
        page = self._pages.get(handle)
        if page is None:
            if 0 < handle < self._next_handle:  # handles are never used again
                raise DoubleReleaseError(f"page {handle} was released already", handle=handle)
            raise InvalidRequestError(f"no page has the handle {handle}", handle=handle)
        return page

    def _open(self, address: int, page: _Page) -> _Reservation:
        """Return the range in which a page may be mapped at ``address``."""
        reservation = self._reservation(address, page.size_bytes)
        if page.size_bytes != reservation.page_size_bytes:
            raise InvalidRequestError(
                f"a page of {page.size_bytes} bytes does not fit a range of pages of {reservation.page_size_bytes}"
            )
        if address in reservation.mappings:
            raise InvalidRequestError(f"a page is mapped at {address:#x} already: unmap it first", address=address)
        return reservation

    def _reservation(self, address: int, size_bytes: int) -> _Reservation:
        position = bisect.bisect_right(self._starts, address) - 1
        reservation = self._reservations[self._starts[position]] if position >= 0 else None
        if reservation is None or address + size_bytes > reservation.start + reservation.size_bytes:
            raise InvalidRequestError(
                f"{address:#x} + {size_bytes} bytes is not within a reserved range", address=address
            )
        if (address - reservation.start) % reservation.page_size_bytes:
            raise InvalidRequestError(
                f"{address:#x} is not at a page boundary (pages of {reservation.page_size_bytes} bytes)",
                address=address,
            )
        return reservation

    def _run(self, address: int, size_bytes: int) -> tuple[_Reservation, range]:
        """Return the range and the page addresses of a contiguous run, all of them mapped."""
        reservation = self._reservation(address, size_bytes)
        self._check_size(size_bytes, reservation.page_size_bytes)
        addresses = range(address, address + size_bytes, reservation.page_size_bytes)
        for each in addresses:
            if each not in reservation.mappings:
                raise InvalidRequestError(f"no page is mapped at {each:#x}", address=each)
        return reservation, addresses

    def _check_process(self) -> None:
        if self._pid != os.getpid():
            raise ForkedHandleError("this memory belongs to the parent process: connect anew in the forked child")

    @staticmethod
    def _check_size(size_bytes: int, multiple: int) -> None:
        if size_bytes <= 0 or size_bytes % multiple:
            raise InvalidSizeError(
                f"a size must be a positive multiple of {multiple} bytes here, asked for {size_bytes}",
                asked_bytes=size_bytes,
            )
