"""The rules of every backend, one test each. A backend is added by one line in ``BACKENDS``."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import kvpool
from kvpool.errors import BackendError, DoubleReleaseError, InvalidRequestError, InvalidSizeError, SystemLimitError
from kvpool.memory import channel
from kvpool.memory.backend import Access, Backend
from kvpool.memory.host import HostBackend

BACKENDS = {"host": HostBackend}

# Another process: takes a page from the socket on standard input, maps it, answers each line with what it reads.
PEER = """
import ctypes, socket, sys
from kvpool.memory import channel
from kvpool.memory.backend import Access
backend = BACKEND()
connection = socket.socket(fileno=0)
message, descriptors = channel.recv_pages(connection)
size = message["size"]
handle = backend.import_(descriptors[0], size)
address = backend.reserve(size, size)
backend.map(address, handle)
backend.release(handle)
backend.set_access(address, size, Access.READ_WRITE)
connection.send(b"mapped")
while text := connection.recv(100):
    before = ctypes.string_at(address, 5)
    ctypes.memmove(address, text, len(text))
    connection.send(before)
"""


@pytest.fixture(params=BACKENDS.values(), ids=BACKENDS.keys())
def backend(request: pytest.FixtureRequest) -> Backend:
    backend = request.param()
    yield backend
    backend.close()


@pytest.fixture
def size(backend: Backend) -> int:
    """Size of a page, bytes."""
    return max(backend.granularity(), 65536)


def mapped(backend: Backend, address: int, size: int, access: Access = Access.READ_WRITE) -> int:
    handle = backend.create(size)
    backend.map(address, handle)
    backend.set_access(address, size, access)
    return handle


def accessible(address: int) -> bool:
    """Whether a byte can be read; the kernel answers EFAULT where a load would end the process."""
    reader, writer = os.pipe()
    try:
        return ctypes.CDLL(None).write(writer, ctypes.c_void_p(address), 1) == 1
    finally:
        os.close(reader)
        os.close(writer)


def writable(address: int) -> bool:
    reader, writer = os.pipe()
    try:
        os.write(writer, b"w")
        return ctypes.CDLL(None).read(reader, ctypes.c_void_p(address), 1) == 1
    finally:
        os.close(reader)
        os.close(writer)


def test_reserving_costs_no_memory_and_is_aligned(backend: Backend, size: int) -> None:
    addresses = [backend.reserve(1 << 38, 1 << 21) for _ in range(4)]  # a TiB
    assert all(address % (1 << 21) == 0 for address in addresses)
    assert not any(accessible(address) for address in addresses)
    for address in addresses:
        backend.unreserve(address)


def test_a_new_page_is_zeroed(backend: Backend, size: int) -> None:
    address = backend.reserve(size, size)
    handle = mapped(backend, address, size)
    ctypes.memset(address, 1, size)
    backend.unmap(address, size)
    backend.release(handle)
    mapped(backend, address, size)
    assert ctypes.string_at(address, size) == bytes(size)


def test_a_mapped_page_is_touched_only_after_access_is_set(backend: Backend, size: int) -> None:
    address = backend.reserve(2 * size, size)
    handle = backend.create(size)
    backend.map(address, handle)
    assert not accessible(address)
    backend.set_access(address, size, Access.READ)
    assert accessible(address)
    assert not writable(address)
    backend.set_access(address, size, Access.READ_WRITE)
    assert writable(address)
    backend.set_access(address, size, Access.NONE)
    assert not accessible(address)


def test_access_is_set_for_a_run_of_pages(backend: Backend, size: int) -> None:
    address = backend.reserve(4 * size, size)
    for index in (0, 1, 3):
        backend.map(address + index * size, backend.create(size))
    backend.set_access(address, 2 * size, Access.READ_WRITE)
    assert [accessible(address + index * size) for index in range(4)] == [True, True, False, False]
    with pytest.raises(InvalidRequestError):
        backend.set_access(address, 4 * size, Access.READ)  # page 2 is not mapped
    assert writable(address)


def test_unmapped_addresses_stay_reserved(backend: Backend, size: int) -> None:
    address = backend.reserve(3 * size, size)
    for index in range(3):
        mapped(backend, address + index * size, size)
    backend.unmap(address + size, size)
    assert [accessible(address + index * size) for index in range(3)] == [True, False, True]
    again = backend.create(size)
    backend.map(address + size, again)
    backend.set_access(address, 3 * size, Access.READ)
    backend.unmap(address, 3 * size)
    assert not any(accessible(address + index * size) for index in range(3))


def test_one_page_at_two_addresses_is_the_same_memory(backend: Backend, size: int) -> None:
    address = backend.reserve(2 * size, size)
    handle = mapped(backend, address, size)
    backend.map(address + size, handle)
    backend.set_access(address + size, size, Access.READ)
    ctypes.memmove(address, b"hello", 5)
    assert ctypes.string_at(address + size, 5) == b"hello"


def test_a_page_that_moves_keeps_its_bytes_and_access(backend: Backend, size: int) -> None:
    here, there = (backend.reserve(2 * size, size) for _ in range(2))
    for access in (Access.READ_WRITE, Access.READ):
        handle = mapped(backend, here, size)
        ctypes.memmove(here, b"words", 5)
        backend.set_access(here, size, access)
        backend.remap(there + size, handle, here)
        for address in (here, there + size):  # both, until it is unmapped at one
            assert ctypes.string_at(address, 5) == b"words"
            assert writable(address) == (access is Access.READ_WRITE)
        backend.unmap(here, size)
        assert not accessible(here)
        backend.release(handle)
        assert ctypes.string_at(there + size, 5) == b"words"
        assert writable(there + size) == (access is Access.READ_WRITE)
        backend.unmap(there + size, size)
        assert not accessible(there + size)
    backend.unreserve(here)
    backend.unreserve(there)


def test_a_page_that_was_imported_twice_moves(backend: Backend, size: int) -> None:
    address = backend.reserve(2 * size, size)
    first = backend.create(size)
    backend.map(address, first)
    backend.set_access(address, size, Access.READ_WRITE)
    again = backend.import_(backend.export(first), size)
    backend.release(first)
    backend.remap(address + size, again, address)
    backend.release(again)
    backend.unmap(address, size)
    ctypes.memset(address + size, 1, size)


def test_misplaced_moves_are_refused(backend: Backend, size: int) -> None:
    address, large = backend.reserve(3 * size, size), backend.reserve(2 * size, 2 * size)
    handle, other = mapped(backend, address, size), mapped(backend, address + size, size)
    for place, page, source in (
        (address + size, handle, address),  # over a mapped page
        (address, handle, address),
        (address + 2 * size, handle, address + size // 2),  # off the boundary
        (address + 2 * size - size // 2, handle, address),
        (address + 3 * size, handle, address),  # outside
        (address + 2 * size, handle, address + 2 * size),  # nothing is mapped there
        (address + 2 * size, handle, large),
        (large, handle, address),  # a range of pages of another size
        (address + 2 * size, other, address),  # another page is mapped there
        (address + 2 * size, 999_999, address),  # no such page
    ):
        with pytest.raises(InvalidRequestError):
            backend.remap(place, page, source)
    assert not accessible(address + 2 * size)
    assert writable(address)


def test_a_page_released_while_mapped_lives_on(backend: Backend, size: int) -> None:
    address = backend.reserve(size, size)
    handle = mapped(backend, address, size)
    ctypes.memmove(address, b"hello", 5)
    backend.release(handle)
    assert ctypes.string_at(address, 5) == b"hello"
    assert writable(address)
    backend.unmap(address, size)
    assert not accessible(address)


def test_zero(backend: Backend, size: int) -> None:
    address = backend.reserve(size, size)
    page = backend.create(size)
    backend.map(address, page)
    backend.set_access(address, size, Access.READ_WRITE)
    ctypes.memset(address, 7, size)
    backend.zero(address + 10, size - 20)
    assert ctypes.string_at(address, size) == b"\7" * 10 + bytes(size - 20) + b"\7" * 10


def test_copy(backend: Backend, size: int) -> None:
    address = backend.reserve(2 * size, size)
    for index in range(2):
        mapped(backend, address + index * size, size)
    data = os.urandom(size)
    ctypes.memmove(address, data, size)
    # In order: the second reads what the first has written, the third writes where the first has read.
    half = size // 2
    backend.copy(
        [
            (address + size, address, half),
            (address + size + half, address + size, half - 1),
            (address, address + half, half),
        ]
    )
    assert ctypes.string_at(address + size, size - 1) == data[:half] + data[: half - 1]
    assert ctypes.string_at(address, half) == data[half:]
    backend.copy([])


@pytest.mark.parametrize("number", [0, -65536, 100])
def test_sizes_that_are_no_whole_pages_are_refused(backend: Backend, size: int, number: int) -> None:
    address = backend.reserve(2 * size, size)
    mapped(backend, address, size)
    for refused in (
        lambda: backend.create(number),
        lambda: backend.reserve(number, size),
        lambda: backend.reserve(size, number),
        lambda: backend.unmap(address, number),
        lambda: backend.set_access(address, number, Access.READ),
    ):
        with pytest.raises(InvalidSizeError):
            refused()
    assert writable(address)


def test_misplaced_mappings_are_refused(backend: Backend, size: int) -> None:
    address = backend.reserve(2 * size, size)
    first = mapped(backend, address, size)
    ctypes.memmove(address, b"first", 5)
    second, large = backend.create(size), backend.create(2 * size)
    for place, handle in (
        (address, second),  # over a mapped page
        (address, first),
        (address + size // 2, second),  # off the boundary
        (address + 2 * size, second),  # outside
        (address - size, second),
        (address, large),  # a page of another size
        (address + size, 999_999),  # no such page
    ):
        with pytest.raises(InvalidRequestError):
            backend.map(place, handle)
    assert ctypes.string_at(address, 5) == b"first"
    assert not accessible(address + size)


def test_unmapping_what_is_not_mapped_is_refused(backend: Backend, size: int) -> None:
    address = backend.reserve(2 * size, size)
    mapped(backend, address, size)
    for place, length in ((address + size, size), (address, 2 * size), (address + 1, size), (1 << 20, size)):
        with pytest.raises(InvalidRequestError):
            backend.unmap(place, length)
    assert accessible(address)


def test_releasing_twice_is_refused(backend: Backend, size: int) -> None:
    handle = backend.create(size)
    backend.release(handle)
    for use in (backend.release, backend.export):
        with pytest.raises(DoubleReleaseError):
            use(handle)
    for never in (0, -1, handle + 1):
        with pytest.raises(InvalidRequestError):
            backend.release(never)


def test_addresses_with_pages_are_not_given_back(backend: Backend, size: int) -> None:
    address = backend.reserve(size, size)
    mapped(backend, address, size)
    with pytest.raises(InvalidRequestError):
        backend.unreserve(address)
    assert accessible(address)
    backend.unmap(address, size)
    backend.unreserve(address)
    with pytest.raises(InvalidRequestError):
        backend.unreserve(address)


def test_an_exported_page_is_shared_with_another_process(backend: Backend, size: int) -> None:
    address = backend.reserve(size, size)
    handle = mapped(backend, address, size)
    ctypes.memmove(address, b"owner", 5)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    kind = type(backend)
    script = f"from {kind.__module__} import {kind.__name__} as BACKEND\n{PEER}"
    environment = {**os.environ, "PYTHONPATH": str(Path(kvpool.__file__).parent.parent)}
    with ours, subprocess.Popen([sys.executable, "-c", script], stdin=theirs, env=environment) as peer:
        theirs.close()
        ours.settimeout(30)
        descriptor = backend.export(handle)
        channel.send_pages(ours, channel.encode("pages", size=size, descriptors=1), [descriptor])
        os.close(descriptor)
        assert ours.recv(100) == b"mapped"
        ours.send(b"other")
        assert ours.recv(100) == b"owner"
        assert ctypes.string_at(address, 5) == b"other"
        # Given up here, it lives on there.
        backend.unmap(address, size)
        backend.release(handle)
        ours.send(b"still")
        assert ours.recv(100) == b"other"
        ours.send(b"x")
        assert ours.recv(100) == b"still"
        ours.shutdown(socket.SHUT_RDWR)
        assert peer.wait(60) == 0


def test_importing_what_is_no_page_is_refused_and_closes_it(backend: Backend, size: int) -> None:
    handle = backend.create(size)
    wrong_size = backend.export(handle)
    reader, writer = os.pipe()
    for descriptor in (wrong_size, reader):
        with pytest.raises(InvalidRequestError):
            backend.import_(descriptor, 2 * size)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)
    os.close(writer)


def test_descriptors_and_mappings_are_not_leaked(backend: Backend, size: int) -> None:
    def footprint() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(Path("/proc/self/maps").read_text().splitlines())

    before = footprint()
    for _ in range(3):
        address = backend.reserve(64 * size, size)
        handles = [backend.create(size) for _ in range(64)]
        for index, handle in enumerate(handles):
            backend.map(address + index * size, handle)
        backend.set_access(address, 64 * size, Access.READ_WRITE)
        imported = backend.import_(backend.export(handles[0]), size)
        backend.unmap(address, 64 * size)
        for handle in [*handles, imported]:
            backend.release(handle)
        backend.unreserve(address)
    after = footprint()
    assert after[0] == before[0]
    assert after[1] <= before[1] + 1  # the interpreter's own heap may have grown


def test_close_gives_everything_back(size: int) -> None:
    for make in BACKENDS.values():
        backend = make()
        before = len(os.listdir("/proc/self/fd"))
        address = backend.reserve(2 * size, size)
        mapped(backend, address, size)
        backend.create(size)
        backend.close()
        backend.close()
        assert not accessible(address)
        assert len(os.listdir("/proc/self/fd")) == before


def test_memory_is_accounted(backend: Backend, size: int) -> None:
    free, total = backend.mem_info()
    assert 0 < free <= total


def test_probe_names_the_limit_that_is_too_low(backend: Backend, size: int) -> None:
    backend.probe(pages=10, mapped_pages=20, page_size_bytes=size)
    with pytest.raises(SystemLimitError) as found:
        backend.probe(pages=1, mapped_pages=1, page_size_bytes=backend.mem_info().total_bytes + size)
    assert found.value.details["limit"] == "memory"
    assert found.value.details["needed_bytes"] > found.value.details["free_bytes"]


def test_creating_more_than_there_is_fails_cleanly(backend: Backend, size: int) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(BackendError):
        backend.create(backend.mem_info().total_bytes // size * size + size)
    assert len(os.listdir("/proc/self/fd")) == before


def test_addresses_show_zeros_where_nothing_is_mapped(backend, size):
    start = backend.reserve(6 * size, size)
    mapped(backend, start + size, size)
    ctypes.memset(start + size, 7, size)
    backend.show_zeros(start, 4 * size)
    assert not any(ctypes.string_at(start, size) + ctypes.string_at(start + 2 * size, 2 * size))
    assert ctypes.string_at(start + size, size) == b"\7" * size
    mapped(backend, start + 2 * size, size)
    ctypes.memset(start + 2 * size, 9, size)
    backend.unmap(start + size, size)
    assert not any(ctypes.string_at(start, 2 * size))
    assert ctypes.string_at(start + 2 * size, size) == b"\11" * size
    with pytest.raises(InvalidRequestError):
        backend.show_zeros(start + 3 * size, 2 * size)
    with pytest.raises(InvalidRequestError):
        backend.hide_zeros(start, size)
    backend.hide_zeros(start, 4 * size)
    backend.show_zeros(start + 4 * size, size)
    backend.unmap(start + 2 * size, size)
    backend.unreserve(start)


@pytest.mark.parametrize("where", ["write to zeros", "read beyond", "read after"])
def test_zeros_cannot_be_written_and_end_where_they_end(backend, size, where):
    code = f"""
import ctypes
from {type(backend).__module__} import {type(backend).__name__} as Backend
backend = Backend()
start = backend.reserve(4 * {size}, {size})
backend.show_zeros(start, {size})
print("read", ctypes.string_at(start, 3), flush=True)
match "{where}":
    case "write to zeros":
        ctypes.memset(start, 1, 1)
    case "read beyond":
        ctypes.string_at(start + {size}, 1)
    case _:
        backend.hide_zeros(start, {size})
        ctypes.string_at(start, 1)
print("survived")
"""
    environment = os.environ | {"PYTHONPATH": str(Path(kvpool.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout == "read b'\\x00\\x00\\x00'\n"
    assert done.returncode == -11
