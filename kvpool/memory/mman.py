"""The calls of ``sys/mman.h`` that Python's ``mmap`` does not offer: mapping at a given address, access, advice.

Each call takes page-aligned addresses and sizes in bytes, and raises :class:`kvpool.errors.BackendError` with the
``errno`` when the system refuses.
"""

from __future__ import annotations

import ctypes
import errno
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


def map_shared(address: int, size_bytes: int, descriptor: int, access: Access = Access.NONE) -> None:
    """Map a whole file over reserved addresses, not inherited by forks."""
    if _mmap(address, size_bytes, _PROTECTION[access], mmap.MAP_SHARED | _MAP_FIXED, descriptor, 0) == _MAP_FAILED:
        refused("mmap", ctypes.get_errno())
    if _madvise(address, size_bytes, _MADV_DONTFORK):
        code = ctypes.get_errno()
        reserve_addresses(size_bytes, address, access)
        refused("madvise", code)


def map_again(address: int, source: int, size_bytes: int) -> bool:
    """Map what is mapped at ``source`` over reserved addresses as well, as it is there, forks included.

    The page tables go along, so that nothing at ``address`` faults that was touched at ``source``; there it does again.
    Returns whether the kernel knows how to: for shared memory since Linux 5.13. Else nothing is changed.
    """
    flags = _MREMAP_MAYMOVE | _MREMAP_FIXED | _MREMAP_DONTUNMAP
    if _mremap(source, size_bytes, size_bytes, flags, address) != _MAP_FAILED:
        return True
    code = ctypes.get_errno()
    if code != errno.EINVAL:
        refused("mremap", code)
    return False


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


def _check(result: int, what: str) -> None:
    if result:
        refused(what, ctypes.get_errno())
