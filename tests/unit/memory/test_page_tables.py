"""A byte of each 64 KiB is read before it is written, once for each time that it is mapped."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from kvpool.memory import mman, page_tables
from kvpool.memory.backend import Access
from kvpool.memory.copying import copy_blocks
from kvpool.memory.host import HostBackend
from kvpool.memory.page_tables import PAGE_TABLES, PageTables

WINDOW = 1 << page_tables.WINDOW_BITS
PAGE = 4 * WINDOW

_FIRST_WRITE = """
import ctypes, os, resource, sys
from kvpool.memory.backend import Access
from kvpool.memory.copying import copy_blocks
from kvpool.memory.host import HostBackend

size_bytes = 2 << 20
backend, source = HostBackend(), ctypes.create_string_buffer(os.urandom(size_bytes), size_bytes)
address = backend.reserve(size_bytes, size_bytes)


def faults_of_a_copy():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    copy_blocks([address], [ctypes.addressof(source)], size_bytes)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


for _ in range(2):
    backend.map(address, backend.import_(os.dup(int(sys.argv[1])), size_bytes))
    backend.set_access(address, size_bytes, Access.READ_WRITE)
    print(faults_of_a_copy(), faults_of_a_copy())
    backend.unmap(address, size_bytes)
"""


class _Reads:
    """All addresses, of which nothing is read: only which byte should have been."""

    def __init__(self) -> None:
        self.addresses: list[int] = []

    def __getitem__(self, where: int) -> int:
        self.addresses.append(where)
        return 0


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> _Reads:
    reads = _Reads()
    monkeypatch.setattr(mman, "ADDRESSES", reads)
    return reads


@pytest.fixture
def mapped() -> Iterator[tuple[HostBackend, int, int]]:
    """A backend, a page that is mapped writable, and its address."""
    backend = HostBackend()
    address, handle = backend.reserve(2 * PAGE, PAGE), backend.create(PAGE)
    backend.map(address, handle)
    backend.set_access(address, PAGE, Access.READ_WRITE)
    yield backend, handle, address
    backend.close()


def test_the_first_write_of_a_page_that_another_process_wrote_does_not_fault_for_each_page_of_the_system() -> None:
    size_bytes = 2 << 20
    backend = HostBackend()
    descriptor = backend.export(backend.create(size_bytes))
    try:
        os.pwrite(descriptor, os.urandom(size_bytes), 0)
        command = [sys.executable, "-c", _FIRST_WRITE, str(descriptor)]
        told = subprocess.run(command, pass_fds=[descriptor], capture_output=True, text=True, check=True).stdout
    finally:
        os.close(descriptor)
        backend.close()
    system_pages = size_bytes // mmap.PAGESIZE
    for first, second in (map(int, line.split()) for line in told.splitlines()):  # mapped once, and once more
        assert first <= system_pages // 4
        assert second <= system_pages // 16


def test_windows_are_entered_once_where_they_are_written(reads: _Reads) -> None:
    tables = PageTables()
    tables.enter(WINDOW + 10, 20)
    tables.enter(WINDOW, WINDOW)
    assert reads.addresses == [WINDOW + 10]
    tables.enter(WINDOW + 30, 2 * WINDOW)
    tables.enter(WINDOW, 3 * WINDOW)
    assert reads.addresses == [WINDOW + 10, 2 * WINDOW, 3 * WINDOW]


def test_what_is_mapped_anew_is_entered_again_and_nothing_else(reads: _Reads) -> None:
    tables = PageTables()
    tables.enter(0, 6 * WINDOW)
    tables.forget(2 * WINDOW, 2 * WINDOW)
    reads.addresses.clear()
    tables.enter(0, 6 * WINDOW)
    assert reads.addresses == [2 * WINDOW, 3 * WINDOW]
    tables.forget_all()
    tables.enter(5 * WINDOW, 1)
    assert reads.addresses == [2 * WINDOW, 3 * WINDOW, 5 * WINDOW]


def test_memory_that_lay_there_before_does_not_count(reads: _Reads) -> None:
    backend = HostBackend()
    address, handle = backend.reserve(PAGE, PAGE), backend.create(PAGE)
    PAGE_TABLES.enter(address, PAGE)
    reads.addresses.clear()
    backend.map(address, handle)
    PAGE_TABLES.enter(address, WINDOW)
    assert reads.addresses == [address]
    backend.close()


def test_of_a_bounded_number_of_windows_it_is_known(reads: _Reads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_tables, "_MOST_WINDOWS", 3)
    tables = PageTables()
    tables.enter(0, 4 * WINDOW)
    assert len(tables.entered) == 4
    tables.enter(9 * WINDOW, 1)
    assert tables.entered == {9}


def test_blocks_are_copied_to_where_a_byte_was_read_once_for_each_mapping(
    mapped: tuple[HostBackend, int, int], reads: _Reads
) -> None:
    backend, handle, address = mapped
    blocks = np.random.default_rng(1).integers(0, 255, (4, WINDOW), np.uint8)
    destinations = [address + WINDOW * number for number in range(4)]
    for _ in range(2):
        for _ in range(2):
            copy_blocks(destinations, [block.ctypes.data for block in blocks], WINDOW)
        assert reads.addresses == destinations
        assert ctypes.string_at(address, PAGE) == blocks.tobytes()
        backend.unmap(address, PAGE)
        backend.map(address, handle)
        backend.set_access(address, PAGE, Access.READ_WRITE)
        reads.addresses.clear()
    backend.remap(address + PAGE, handle, address)
    backend.unmap(address, PAGE)
    copy_blocks([address + PAGE], [blocks.ctypes.data], WINDOW)
    assert reads.addresses == [address + PAGE]
