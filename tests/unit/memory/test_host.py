"""What is special about host memory: seals, budget, limits of the system, forks."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kvpool
from kvpool.errors import BackendError, ForkedHandleError, InvalidRequestError, InvalidSizeError, SystemLimitError
from kvpool.memory import limits, mman
from kvpool.memory.backend import Access
from kvpool.memory.host import HostBackend
from kvpool.memory.page_tables import PAGE_TABLES

SIZE = 65536
PAGE = 4 * SIZE
ADDRESSES = mman.ADDRESSES


@pytest.fixture
def backend() -> HostBackend:
    backend = HostBackend(budget_bytes=4 * SIZE)
    yield backend
    backend.close()


def test_nobody_can_cut_a_page_short(backend: HostBackend) -> None:
    descriptor = backend.export(backend.create(SIZE))
    for change in (lambda: os.ftruncate(descriptor, 0), lambda: os.ftruncate(descriptor, 2 * SIZE)):
        with pytest.raises(PermissionError):
            change()
    with pytest.raises(PermissionError):
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    os.close(descriptor)


def test_a_file_that_could_be_cut_short_is_not_taken_for_a_page(backend: HostBackend) -> None:
    descriptor = os.memfd_create("not sealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, SIZE)
    with pytest.raises(InvalidRequestError, match="seals"):
        backend.import_(descriptor, SIZE)


def test_memory_is_allocated_when_a_page_is_created(backend: HostBackend) -> None:
    descriptor = backend.export(backend.create(SIZE))
    assert os.fstat(descriptor).st_blocks * 512 == SIZE
    os.close(descriptor)


def test_a_page_has_its_size_before_its_memory(backend: HostBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    found, allocate = [], os.posix_fallocate

    def look(descriptor: int, *range_: int) -> None:
        found.append(os.fstat(descriptor).st_size)
        allocate(descriptor, *range_)

    monkeypatch.setattr(os, "posix_fallocate", look)
    backend.create(SIZE)
    assert found == [SIZE]


def test_budget_counts_pages_until_they_are_unmapped(backend: HostBackend) -> None:
    address = backend.reserve(SIZE, SIZE)
    handles = [backend.create(SIZE) for _ in range(4)]
    assert backend.mem_info() == (0, 4 * SIZE)
    with pytest.raises(BackendError, match="budget") as refused:
        backend.create(SIZE)
    assert refused.value.details["errno"] == errno.ENOMEM
    backend.map(address, handles[0])
    backend.release(handles[0])
    assert backend.mem_info().free_bytes == 0
    backend.unmap(address, SIZE)
    assert backend.mem_info().free_bytes == SIZE


def test_an_imported_page_does_not_count(backend: HostBackend) -> None:
    handle = backend.create(SIZE)
    backend.import_(backend.export(handle), SIZE)
    assert backend.mem_info().free_bytes == 3 * SIZE


@pytest.mark.parametrize("budget", [0, -1])
def test_a_budget_is_positive(budget: int) -> None:
    with pytest.raises(InvalidSizeError):
        HostBackend(budget)


def test_access_that_the_system_refuses_is_undone(backend: HostBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    address = backend.reserve(3 * SIZE, SIZE)
    for index in range(3):
        backend.map(address + index * SIZE, backend.create(SIZE))
    backend.set_access(address, SIZE, Access.READ_WRITE)
    protect = mman.protect

    def fails_half_way(start: int, size_bytes: int, access: Access) -> None:
        if access is Access.READ:
            protect(start, SIZE, access)
            raise BackendError("refused", errno=errno.ENOMEM)
        protect(start, size_bytes, access)

    monkeypatch.setattr(mman, "protect", fails_half_way)
    with pytest.raises(BackendError):
        backend.set_access(address, 3 * SIZE, Access.READ)
    ctypes.memset(address, 1, SIZE)  # still writable
    monkeypatch.undo()
    backend.set_access(address, 3 * SIZE, Access.READ_WRITE)


def faults_of_writing(address: int, size_bytes: int) -> int:
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    ctypes.memset(address, 1, size_bytes)
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before


def test_a_page_that_moves_takes_its_page_tables_along(monkeypatch: pytest.MonkeyPatch) -> None:
    size = 1 << 21
    backend = HostBackend()
    address = backend.reserve(3 * size, size)
    handle = backend.create(size)
    backend.map(address, handle)
    backend.set_access(address, size, Access.READ_WRITE)
    first = faults_of_writing(address, size)
    backend.remap(address + size, handle, address)
    backend.unmap(address, size)
    moved = faults_of_writing(address + size, size)
    # A kernel that cannot do that maps the page anew.
    monkeypatch.setattr(mman, "map_again", lambda *_: False)
    backend.remap(address + 2 * size, handle, address + size)
    backend.unmap(address + size, size)
    anew = faults_of_writing(address + 2 * size, size)
    assert ctypes.string_at(address + 2 * size, size) == b"\1" * size
    backend.close()
    # The kernel may map some of them at once; all, if it has made them one huge page: then nothing is to be seen here.
    if first > 16 and tuple(map(int, os.uname().release.split(".")[:2])) >= (5, 13):
        assert moved < 16 < anew


def mremap_of(monkeypatch: pytest.MonkeyPatch, code: int, asked_anywhere: bool) -> list[int]:
    """Let mremap refuse ``code``, but ask it anywhere first if so. Returns the addresses that are unmapped by that.

    That is what Linux does from 5.7 on: it unmaps the new address, and then looks whether it can do what is asked.
    """
    unmapped: list[int] = []
    mremap = mman._mremap

    def refuses(source: int, old_bytes: int, new_bytes: int, flags: int, address: int | None) -> int:
        if address is None and asked_anywhere:
            return mremap(source, old_bytes, new_bytes, flags, address)
        if address is not None:
            mman.unmap_addresses(address, new_bytes)
            unmapped.append(address)
        ctypes.set_errno(code)
        return mman._MAP_FAILED

    monkeypatch.setattr(mman, "_mremap", refuses)
    mman._knows_map_again.cache_clear()
    return unmapped


@pytest.fixture
def page(backend: HostBackend) -> Iterator[tuple[int, int]]:
    """A page, written, at the first address of room for two that shows zeros: its handle, and that address."""
    address, handle = backend.reserve(2 * SIZE, SIZE), backend.create(SIZE)
    backend.show_zeros(address, 2 * SIZE)
    backend.map(address, handle)
    backend.set_access(address, SIZE, Access.READ_WRITE)
    ctypes.memmove(address, b"words", 5)
    yield handle, address
    mman._knows_map_again.cache_clear()


def test_addresses_stay_while_a_kernel_that_cannot_move_a_page_is_asked(
    backend: HostBackend, page: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    handle, address = page
    unmapped = mremap_of(monkeypatch, errno.EINVAL, asked_anywhere=False)
    backend.remap(address + SIZE, handle, address)
    assert not unmapped  # where nothing is mapped, another thread's read of zeros is a fault
    assert ctypes.string_at(address + SIZE, 5) == b"words"
    ctypes.memset(address + SIZE, 1, SIZE)


@pytest.mark.parametrize("code", [errno.EFAULT, errno.EAGAIN])
def test_a_page_that_the_system_does_not_move_is_mapped_anew(
    backend: HostBackend, page: tuple[int, int], monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    handle, address = page
    mremap_of(monkeypatch, code, asked_anywhere=True)
    backend.remap(address + SIZE, handle, address)
    backend.unmap(address, SIZE)
    assert ctypes.string_at(address + SIZE, 5) == b"words"
    ctypes.memset(address + SIZE, 1, SIZE)


def test_a_page_of_which_a_part_is_locked_moves(backend: HostBackend, page: tuple[int, int]) -> None:
    handle, address = page
    assert mman._libc.mlock(ctypes.c_void_p(address + mmap.PAGESIZE), mmap.PAGESIZE) == 0
    backend.remap(address + SIZE, handle, address)
    backend.unmap(address, SIZE)
    assert ctypes.string_at(address + SIZE, 5) == b"words"


@pytest.mark.parametrize("call", ["_mremap", "_mmap", "_madvise"])
def test_addresses_are_as_before_when_a_move_is_refused(
    backend: HostBackend, page: tuple[int, int], monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    handle, address = page
    mremap_of(monkeypatch, errno.ENOMEM if call == "_mremap" else errno.EINVAL, asked_anywhere=True)
    monkeypatch.setattr(mman, "_knows_map_again", lambda: True)
    real, refusals = getattr(mman, call), iter([errno.ENOMEM])

    def refuses_once(*arguments: Any) -> int:
        code = next(refusals, None)
        if code is None:
            return real(*arguments)
        ctypes.set_errno(code)
        return -1 if call == "_madvise" else mman._MAP_FAILED

    if call != "_mremap":
        monkeypatch.setattr(mman, call, refuses_once)
    with pytest.raises(BackendError):
        backend.remap(address + SIZE, handle, address)
    mapping = next(line for line in Path("/proc/self/maps").read_text().splitlines() if holds(line, address + SIZE))
    assert mapping.split()[1] == "r--p"  # zeros, not memory that takes what is written
    assert not any(ctypes.string_at(address + SIZE, SIZE))
    assert ctypes.string_at(address, 5) == b"words"
    monkeypatch.undo()
    backend.remap(address + SIZE, handle, address)
    assert ctypes.string_at(address + SIZE, 5) == b"words"


def holds(mapping: str, address: int) -> bool:
    first, end = (int(number, 16) for number in mapping.split()[0].split("-"))
    return first <= address < end


def test_a_forked_child_has_neither_descriptors_nor_mappings(backend: HostBackend) -> None:
    address = backend.reserve(SIZE, SIZE)
    handle = backend.create(SIZE)
    backend.map(address, handle)
    backend.set_access(address, SIZE, Access.READ_WRITE)
    child = os.fork()
    if not child:
        status = 1
        try:
            links = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
            clean = not any("kvpool-page" in link for link in links)
            clean = clean and "kvpool-page" not in Path("/proc/self/maps").read_text()
            for use in (lambda: backend.export(handle), lambda: backend.create(SIZE)):
                try:
                    use()
                    clean = False
                except ForkedHandleError:
                    continue
            backend.close()
            status = 0 if clean else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    ctypes.memset(address, 1, SIZE)  # the parent keeps what it had


def test_soft_limit_of_open_files_is_raised_when_the_hard_one_allows() -> None:
    script = """
import resource
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
from kvpool.memory.host import HostBackend
from kvpool.memory.page_tables import PAGE_TABLES
HostBackend().probe(pages=300, mapped_pages=1, page_size_bytes=4096)
assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= 300
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(kvpool.__file__).parent.parent)}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=240)


def test_limits_say_what_to_do(backend: HostBackend) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with pytest.raises(SystemLimitError, match=r"ulimit -n") as found:
        backend.probe(pages=hard + 1, mapped_pages=1, page_size_bytes=4096)
    assert found.value.details["needed"] > found.value.details["hard"] == hard
    with pytest.raises(SystemLimitError, match=r"sysctl -w vm.max_map_count"):
        backend.probe(pages=1, mapped_pages=1 << 30, page_size_bytes=4096)


@pytest.mark.parametrize(
    ("group", "mount", "files", "expected"),
    [
        (
            "0::/pod/box",
            "30 20 0:1 / {root} rw - cgroup2 none rw",
            {"pod/memory.max": "1000", "pod/memory.current": "700", "pod/memory.stat": "inactive_file 100\n"},
            [(1000, 600)],
        ),
        (
            "4:memory:/pod",
            "30 20 0:1 / {root} rw - cgroup none rw,memory",
            {
                "pod/memory.limit_in_bytes": "1000",
                "pod/memory.usage_in_bytes": "10",
                "memory.limit_in_bytes": "9000",
                "memory.usage_in_bytes": "20",
            },
            [(1000, 10), (9000, 20)],
        ),
        (  # a container that sees only its own group
            "0::/host/path/of/box",
            "30 20 0:1 /host/other {root} rw - cgroup2 none rw",
            {"memory.max": "500", "memory.current": "5"},
            [(500, 5)],
        ),
        ("0::/", "30 20 0:1 / {root} rw - cgroup2 none rw", {"memory.max": "max", "memory.current": "5"}, []),
    ],
    ids=["v2 ancestor", "v1", "container", "unlimited"],
)
def test_limits_of_control_groups(
    tmp_path: Path, group: str, mount: str, files: dict[str, str], expected: list[tuple[int, int]]
) -> None:
    process, root = tmp_path / "proc", tmp_path / "cgroup"
    process.mkdir()
    (process / "cgroup").write_text(group + "\n")
    (process / "mountinfo").write_text(mount.format(root=root) + "\n")
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    assert list(limits._control_group_limits(process)) == expected


class _Reads:
    """All addresses, as :data:`mman.ADDRESSES`, and which bytes are read by themselves."""

    def __init__(self) -> None:
        self.addresses: list[int] = []

    def __getitem__(self, where: int | slice) -> int | memoryview:
        if isinstance(where, int):
            self.addresses.append(where)
        return ADDRESSES[where]

    def __setitem__(self, where: slice, content: memoryview) -> None:
        ADDRESSES[where] = content


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> _Reads:
    reads = _Reads()
    monkeypatch.setattr(mman, "ADDRESSES", reads)
    return reads


@pytest.fixture
def places() -> Iterator[tuple[HostBackend, int, int]]:
    """A backend, and where two pages of 256 KiB are that another process could have written."""
    backend = HostBackend()
    address = backend.reserve(2 * PAGE, PAGE)
    _map_written(backend, address)
    _map_written(backend, address + PAGE)
    yield backend, address, address + PAGE
    backend.close()


def _map_written(backend: HostBackend, address: int) -> None:
    """Map a page that is written through its descriptor, so that nothing of it is in page tables."""
    handle = backend.create(PAGE)
    descriptor = backend.export(handle)
    os.pwrite(descriptor, os.urandom(PAGE), 0)
    os.close(descriptor)
    backend.map(address, handle)
    backend.set_access(address, PAGE, Access.READ_WRITE)
    backend.release(handle)


def _faults(backend: HostBackend, copy: tuple[int, int, int]) -> int:
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    backend.copy([copy])
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before


@pytest.mark.parametrize("size_bytes", [PAGE, PAGE - SIZE])  # a long copy and a short one
def test_memory_that_another_process_wrote_does_not_fault_for_each_page_of_the_system(
    places: tuple[HostBackend, int, int], size_bytes: int
) -> None:
    backend, source, destination = places
    ctypes.string_at(source, PAGE)  # so that the source's faults are over
    assert _faults(backend, (destination, source, size_bytes)) <= size_bytes // mmap.PAGESIZE // 2
    assert ctypes.string_at(destination, size_bytes) == ctypes.string_at(source, size_bytes)


def test_what_is_copied_to_is_read_once_first_and_nothing_else_is(
    places: tuple[HostBackend, int, int], reads: _Reads
) -> None:
    backend, source, destination = places
    copies = [(destination + 100, source, 50), (destination + 150, source, 50), (destination + 300, source, SIZE)]
    backend.copy(copies)
    assert reads.addresses == [destination + 100, destination + SIZE]
    backend.copy([*copies, (destination, source, PAGE)])
    assert reads.addresses == [destination + 100, destination + SIZE, destination + 2 * SIZE, destination + 3 * SIZE]


def test_what_is_mapped_anew_is_read_again(places: tuple[HostBackend, int, int], reads: _Reads) -> None:
    backend, source, destination = places
    backend.copy([(destination, source, 50), (source + SIZE, source, 50)])
    backend.unmap(destination, PAGE)
    _map_written(backend, destination)
    reads.addresses.clear()
    backend.copy([(destination, source, 50), (source + SIZE, source, 50)])
    assert reads.addresses == [destination]


def test_what_is_zeroed_is_read_first(places: tuple[HostBackend, int, int], reads: _Reads) -> None:
    backend, _, destination = places
    backend.zero(destination + 100, SIZE)
    assert reads.addresses == [destination + 100, destination + SIZE]
    assert ctypes.string_at(destination + 100, SIZE) == bytes(SIZE)


def test_a_forked_child_knows_of_nothing_that_was_entered(places: tuple[HostBackend, int, int]) -> None:
    backend, source, destination = places
    backend.copy([(destination, source, 50)])
    child = os.fork()
    if child == 0:
        os._exit(len(PAGE_TABLES.entered))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert PAGE_TABLES.entered
