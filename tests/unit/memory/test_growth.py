"""A cache that grows and shrinks in its place."""

import ctypes
import os

import pytest

from kvpool.errors import AddressSpaceError, BackendError, CapacityError, DoubleReleaseError, InvalidSizeError
from kvpool.memory.allocator import GPUMemoryAllocator
from kvpool.memory.host import HostBackend

PAGE = 65536


@pytest.fixture
def backend():
    backend = HostBackend(budget_bytes=16 * PAGE)
    yield backend
    backend.close()


@pytest.fixture
def memory(backend):
    memory = GPUMemoryAllocator(backend, 16 * PAGE, PAGE)
    yield memory
    memory.check()
    memory.close()


def address(memory, where, page=0):
    return memory.address + where.offset + page * PAGE


def test_bytes_and_addresses_stay_over_a_hundred_rounds(memory):
    where = memory.allocate(1, 2 * PAGE, max_size_bytes=64 * PAGE)
    ctypes.memset(address(memory, where), 7, 2 * PAGE)
    for _ in range(100):
        grown = memory.resize(1, 10 * PAGE)
        assert (grown.offset, grown.pages[:2], len(grown.pages)) == (where.offset, where.pages, 10)
        ctypes.memset(address(memory, where, 9), 9, PAGE)
        assert memory.resize(1, 2 * PAGE) == where
        assert ctypes.string_at(address(memory, where), 2 * PAGE) == b"\7" * (2 * PAGE)
        assert memory.usage().free_bytes == 14 * PAGE, "what shrinking gives up is free at once"


def test_parts_are_backed_where_a_tensor_of_the_largest_shape_needs_them(memory):
    """Two planes (keys and values) of 32 pages each, and a page of blocks in each."""
    where = memory.allocate(1, 1, max_size_bytes=64 * PAGE)
    where = memory.resize(1, 0)
    assert (where.size_bytes, where.pages) == (0, ())
    where = memory.back(1, [(3 * PAGE, 4 * PAGE), (35 * PAGE, 36 * PAGE)])
    first = where.offset // PAGE
    assert [index - first for index, _ in where.pages] == [3, 35]
    assert where.size_bytes == memory.usage().live_bytes == memory.usage().backed_bytes == 2 * PAGE
    where = memory.unback(1, [(3 * PAGE, 3 * PAGE + 100)])
    assert len(where.pages) == 2, "a page stays while anything in it is wanted"
    where = memory.unback(1, [(0, 34 * PAGE)])
    assert [index - first for index, _ in where.pages] == [35]
    memory.free(1)
    assert memory.usage().free_bytes == 16 * PAGE, "a range with gaps is of no use to the reserve"


def test_growing_takes_what_a_new_cache_would_get(memory):
    """The tenant's warm pages, then fresh ones, then those kept warm for others."""
    memory.allocate(1, PAGE, max_size_bytes=16 * PAGE)
    memory.allocate(2, 4 * PAGE)
    memory.allocate(3, 10 * PAGE, tenant="other")
    memory.free(2)
    memory.free(3)
    assert memory.usage().reserve_bytes == 14 * PAGE
    memory.resize(1, 6 * PAGE)  # four warm ones, the last one that is free
    assert (memory.usage().free_bytes, memory.usage().reserve_bytes) == (0, 10 * PAGE)
    memory.resize(1, 16 * PAGE)
    assert (memory.usage().free_bytes, memory.usage().reserve_bytes) == (0, 0)


def test_growing_evicts_or_changes_nothing(backend):
    class Victims:
        def __init__(self):
            self.ids = [2, 3]

        def next_victim(self):
            return self.ids.pop() if self.ids else None

    memory = GPUMemoryAllocator(backend, 16 * PAGE, PAGE, victims=Victims())
    where = memory.allocate(1, PAGE, max_size_bytes=32 * PAGE)
    memory.allocate(2, 4 * PAGE)
    memory.allocate(3, 4 * PAGE)
    memory.allocate(4, 4 * PAGE)
    memory.resize(1, 6 * PAGE)
    with pytest.raises(DoubleReleaseError):
        memory.free(3)
    with pytest.raises(CapacityError) as refused:
        memory.back(1, [(16 * PAGE, 26 * PAGE)])
    assert not isinstance(refused.value, AddressSpaceError)
    assert memory.allocation(1).size_bytes == 6 * PAGE
    assert refused.value.details["free_bytes"] + refused.value.details["reserve_bytes"] == 6 * PAGE
    assert memory.allocation(1).offset == where.offset
    memory.check()
    memory.close()


def test_what_the_system_refuses_half_way_changes_nothing(memory, backend, monkeypatch):
    where = memory.allocate(1, PAGE, max_size_bytes=16 * PAGE)
    calls = []

    def refuse(at, handle):
        calls.append(at)
        if len(calls) == 3:
            raise BackendError("no", errno=12)
        return mapped(at, handle)

    mapped = backend.map
    monkeypatch.setattr(backend, "map", refuse)
    with pytest.raises(BackendError):
        memory.back(1, [(2 * PAGE, 3 * PAGE), (4 * PAGE, 6 * PAGE), (8 * PAGE, 9 * PAGE)])
    assert memory.allocation(1) == where
    assert memory.usage().free_bytes == 15 * PAGE
    memory.check()


def test_what_came_is_the_caches_also_when_the_system_refuses_to_take_the_rest_back(memory, backend, monkeypatch):
    memory.allocate(1, 2 * PAGE, max_size_bytes=16 * PAGE)
    memory.back(1, [(8 * PAGE, 10 * PAGE)])

    def refuse(at, size_bytes):
        raise BackendError("no", errno=12)

    with monkeypatch.context() as patched:
        patched.setattr(backend, "unmap", refuse)
        with pytest.raises(BackendError):
            memory.resize(1, 6 * PAGE)
    assert memory.allocation(1).extents == ((0, 6 * PAGE), (8 * PAGE, 10 * PAGE))
    memory.check()
    assert len(memory.resize(1, 6 * PAGE).pages) == 6
    memory.free(1)
    assert memory.usage().live_bytes == 0


def test_pages_that_a_client_maps_are_asked_back_and_are_zombies_until_then(memory):
    where = memory.allocate(1, 3 * PAGE, max_size_bytes=16 * PAGE)
    for index, serial in where.pages:
        os.close(memory.export("client", "default", index, serial))
    memory.resize(1, PAGE)
    gone = [serial for _, serial in where.pages[1:]]
    assert memory.take_drops() == {"client": gone}
    assert memory.usage().zombie_bytes == 2 * PAGE
    memory.dropped("client", gone)
    assert memory.usage().free_bytes == 15 * PAGE


def test_a_cache_within_a_page_changes_its_size_alone(memory):
    where = memory.allocate(1, 100, max_size_bytes=5000)
    changed = memory.resize(1, 5000)
    assert changed == where._replace(size_bytes=5000, extents=((0, 5000),))
    assert memory.unback(1, [(0, 4000)]).pages == where.pages
    assert memory.usage().live_bytes == 1000


def test_sizes_that_cannot_be_are_refused(memory):
    memory.allocate(1, PAGE, max_size_bytes=64 * PAGE)
    for size in (-1, 64 * PAGE + 1, 17 * PAGE, 1.5, None):
        with pytest.raises(InvalidSizeError):
            memory.resize(1, size)
    with pytest.raises(InvalidSizeError):
        memory.back(1, [(0, 17 * PAGE)])
    assert memory.allocation(1).size_bytes == PAGE


def test_addresses_for_twenty_times_the_memory(backend):
    memory = GPUMemoryAllocator(backend, 16 * PAGE, PAGE, arena_bytes=512 * PAGE)
    for number in range(20):
        memory.allocate(number, 100, max_size_bytes=16 * PAGE)
        memory.resize(number, 0)
    for number in range(20):  # each can have all of the memory, one after the other
        where = memory.resize(number, 16 * PAGE)
        ctypes.memset(address(memory, where), number, 16 * PAGE)
        memory.resize(number, 0)
    assert memory.usage().free_bytes == 16 * PAGE
    for number in range(20, 32):
        memory.allocate(number, 1, max_size_bytes=16 * PAGE)
    with pytest.raises(AddressSpaceError, match=r"raise arena_factor") as refused:
        memory.allocate(32, 1, max_size_bytes=15 * PAGE)
    details = refused.value.details
    assert details["used_addresses_bytes"] == details["arena_bytes"] == 512 * PAGE
    assert (details["range_bytes"], details["free_addresses_bytes"]) == (16 * PAGE, 0)
    memory.close()


def test_warm_pages_that_nobody_uses_go_back_after_a_while(memory):
    for number in range(4):
        memory.allocate(number, 2 * PAGE)
    memory.free(0)
    memory.free(1)
    assert memory.trim_idle(0.0, 60.0, PAGE) == 0
    memory.free(2)
    assert memory.trim_idle(30.0, 60.0, PAGE) == 0
    memory.allocate(5, 2 * PAGE)  # the newest: what was put away before lies idle on
    assert memory.trim_idle(59.0, 60.0, 16 * PAGE) == 0
    assert memory.trim_idle(60.0, 60.0, PAGE) == 2 * PAGE, "in steps, each of a whole range"
    assert memory.trim_idle(60.0, 60.0, PAGE) == 2 * PAGE
    assert memory.trim_idle(60.0, 60.0, PAGE) == 0
    memory.free(5)
    assert memory.trim_idle(100.0, 60.0, 16 * PAGE) == 0, "used at 59, put away after 60"
    assert memory.usage().reserve_bytes == 2 * PAGE
    assert memory.trim_idle(160.0, 60.0, 16 * PAGE) == 2 * PAGE
    memory.check()
