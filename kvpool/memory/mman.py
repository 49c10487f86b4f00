"""The calls of ``sys/mman.h`` that Python's ``mmap`` does not offer: mapping at a given address, access, advice.

Each call takes page-aligned addresses and sizes in bytes, and raises :class:`kvpool.errors.BackendError` with the
``errno`` when the system refuses.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import mmap
import os
import sys
from typing import NoReturn

from kvpool.errors import BackendError
from kvpool.memory.backend import Access
from kvpool.sizes import format_size

_PROT_NONE = 0
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000
_MADV_DONTFORK = 10
_MREMAP_MAYMOVE, _MREMAP_FIXED, _MREMAP_DONTUNMAP = 1, 2, 4
_MAP_FAILED = ctypes.c_void_p(-1).value
_PROTECTION = {
    Access.NONE: _PROT_NONE,
    Access.READ: mmap.PROT_READ,
    Access.READ_WRITE: mmap.PROT_READ | mmap.PROT_WRITE,
}

# These calls take microseconds and keep the interpreter lock (PyDLL): to give it up could cost a whole switch
# interval (5 ms).
_libc = ctypes.PyDLL(None, use_errno=True)
_mmap = _libc.mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_mremap = _libc.mremap
_mremap.restype = ctypes.c_void_p
_mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
ADDRESSES = memoryview((ctypes.c_char * sys.maxsize).from_address(0)).cast("B")
"""All bytes that this process may address: a slice names them by their addresses.

Copying between two slices keeps the interpreter lock, and takes 0.3 us less than a call through ctypes.
"""

_munmap, _mprotect, _madvise = _libc.munmap, _libc.mprotect, _libc.madvise
_munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
for _function in (_mprotect, _madvise):
    _function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def reserve_addresses(size_bytes: int, address: int | None = None, access: Access = Access.NONE) -> int:
    """Map addresses without memory, not inherited by forks; over ``address`` when given.

    They can be read if ``access`` says so, and are zero then: the kernel has one page of zeros for all. Over existing
    mappings this is one step: no other thread's ``mmap`` can take the addresses in between.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | (0 if address is None else _MAP_FIXED)
    found = _mmap(address, size_bytes, _PROTECTION[access], flags, -1, 0)
    if found == _MAP_FAILED:
        refused(f"reserving {format_size(size_bytes)} of addresses", ctypes.get_errno())
    _check(_madvise(found, size_bytes, _MADV_DONTFORK), "madvise")
    return int(found)


def map_shared(address: int, size_bytes: int, descriptor: int, access: Access, unmapped: Access) -> None:
    """Map a whole file over reserved addresses, not inherited by forks.

    If the system refuses, the addresses are reserved as before: ``unmapped`` is what may be done with them then.
    """
    call = "mmap"
    if _mmap(address, size_bytes, _PROTECTION[access], mmap.MAP_SHARED | _MAP_FIXED, descriptor, 0) != _MAP_FAILED:
        call = "madvise"
        if not _madvise(address, size_bytes, _MADV_DONTFORK):
            return
    _refused_over(address, size_bytes, unmapped, call)


def map_again(address: int, source: int, size_bytes: int, unmapped: Access) -> bool:
    """Map what is mapped at ``source`` over reserved addresses as well, as it is there, forks included.

    The page tables go along, so that nothing at ``address`` faults that was touched at ``source``; there it does again.

    Returns whether the system can do that with ``source``: not before Linux 5.13, nor before 6.17 if something was set
    for a part of it only (by ``mlock``, say). If not, the caller is to map over ``address`` in the other way, at once:
    it may be unmapped. If the system has no more mappings or memory, that raises, as :func:`map_shared` does.
    """
    if not _knows_map_again():
        return False
    flags = _MREMAP_MAYMOVE | _MREMAP_FIXED | _MREMAP_DONTUNMAP
    if _mremap(source, size_bytes, size_bytes, flags, address) != _MAP_FAILED:
        return True
    if ctypes.get_errno() == errno.ENOMEM:
        _refused_over(address, size_bytes, unmapped, "mremap")
    return False


@functools.cache
def _knows_map_again() -> bool:
    """Return whether the kernel maps shared memory again: since Linux 5.13.

    Asked with memory and a place that nobody else uses. For Linux 5.7 to 5.12 unmap the new address before they refuse,
    and until it is mapped it would be a fault to those who read zeros there, and free to be taken by other threads.
    """
    source = _mmap(None, mmap.PAGESIZE, _PROT_NONE, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS, -1, 0)
    if source == _MAP_FAILED:
        refused("mmap", ctypes.get_errno())
    again = _mremap(source, mmap.PAGESIZE, mmap.PAGESIZE, _MREMAP_MAYMOVE | _MREMAP_DONTUNMAP, None)
    unmap_addresses(source, mmap.PAGESIZE)
    if again == _MAP_FAILED:
        return False
    unmap_addresses(again, mmap.PAGESIZE)
    return True


def protect(address: int, size_bytes: int, access: Access) -> None:
    """Set what may be done with mapped addresses."""
    _check(_mprotect(address, size_bytes, _PROTECTION[access]), "mprotect")


def unmap_addresses(address: int, size_bytes: int) -> None:
    """Give addresses back to the process."""
    _check(_munmap(address, size_bytes), "munmap")


def refused(what: str, code: int | None) -> NoReturn:
    """Raise :class:`kvpool.errors.BackendError` for a system call that failed with ``code``."""
    code = code or 0
    raise BackendError(f"the system refused {what}: {os.strerror(code)}", errno=code)


def _refused_over(address: int, size_bytes: int, unmapped: Access, what: str) -> NoReturn:
    """Raise for a mapping over reserved addresses that the system refused, perhaps after it had unmapped them."""
    code = ctypes.get_errno()
    with contextlib.suppress(BackendError):  # at the limit of mappings: then it has refused before that
        reserve_addresses(size_bytes, address, unmapped)
    refused(what, code)


def _check(result: int, what: str) -> None:
    if result:
        refused(what, ctypes.get_errno())
