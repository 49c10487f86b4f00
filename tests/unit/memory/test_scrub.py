"""What is left of caches that are gone: zeroed, also while others come and go; and pages in quarantine."""

import contextlib
import ctypes
import itertools
import os
import random
from collections.abc import Iterator

import pytest

from kvpool.errors import CapacityError
from kvpool.memory.allocation import Allocation
from kvpool.memory.allocator import GPUMemoryAllocator
from kvpool.memory.host import HostBackend

PAGE = 65536
PAGES = 8
OLD, NEW = 0xAA, 0x55


@pytest.fixture
def allocator() -> Iterator[GPUMemoryAllocator]:
    backend = HostBackend()
    allocator = GPUMemoryAllocator(backend, PAGES * PAGE, PAGE)
    yield allocator
    allocator.check()
    allocator.close()
    backend.close()


def put(allocator: GPUMemoryAllocator, cache_id: int, size: int, byte: int, tenant: str = "default") -> Allocation:
    where = allocator.allocate(cache_id, size, tenant=tenant)
    ctypes.memset(allocator.address + where.offset, byte, size)
    return where


def left(allocator: GPUMemoryAllocator, byte: int) -> int:
    """How many bytes of that value are in all pages of the device."""
    address = allocator.address
    return sum(ctypes.string_at(address + i * PAGE, PAGE).count(byte) for i in allocator._table._mapped)


def export(allocator: GPUMemoryAllocator, client: str, where: Allocation) -> list[int]:
    for index, serial in where.pages:
        os.close(allocator.export(client, where.tenant, index, serial))
    return [serial for _, serial in where.pages]


def test_a_wiped_cache_leaves_nothing_also_where_its_size_was_rounded_up(allocator: GPUMemoryAllocator) -> None:
    for cache_id, size in enumerate((5000, PAGE + 5)):
        where = put(allocator, cache_id, size, OLD)
        whole = -(-size // 4096) * 4096
        ctypes.memset(allocator.address + where.offset, OLD, whole)
        allocator.wipe(cache_id)
        allocator.free(cache_id)
    assert left(allocator, OLD) == 0


def test_a_scrub_zeroes_warm_pages_holes_and_what_sizes_were_rounded_up_by(allocator: GPUMemoryAllocator) -> None:
    for cache_id in range(8):
        put(allocator, cache_id, 16384, OLD)
    put(allocator, 8, 3 * PAGE, OLD)
    for cache_id in (0, 2, 5, 8):
        allocator.free(cache_id)
    live = put(allocator, 9, 3 * PAGE - 100, NEW)  # in the warm pages of 8: its end keeps 100 bytes of it
    assert left(allocator, OLD) == 5 * 16384 + 3 * 16384 + 100
    steps = 1
    while not allocator.scrub("default", 1, PAGE):
        steps += 1
    assert left(allocator, OLD) == 5 * 16384
    assert ctypes.string_at(allocator.address + live.offset, live.size_bytes) == bytes([NEW]) * live.size_bytes


def test_old_bytes_do_not_survive_a_scrub_by_moving_into_a_new_cache(allocator: GPUMemoryAllocator) -> None:
    for cache_id in range(4):
        put(allocator, cache_id, PAGE, OLD)
    for cache_id in range(4):
        allocator.free(cache_id)
    assert not allocator.scrub("default", 1, PAGE)  # three warm pages are not reached yet
    moved = [allocator.allocate(10 + n, PAGE) for n in range(4)]
    for where in moved:
        allocator.free(where.cache_id)
    while not allocator.scrub("default", 1, PAGE):
        pass
    assert left(allocator, OLD) == 0
    put(allocator, 20, PAGE, NEW)
    allocator.free(20)
    assert ctypes.string_at(allocator.address + allocator.allocate(21, PAGE).offset, 1) == bytes([NEW]), "it has ended"


def test_a_warm_page_that_small_caches_take_into_use_between_two_steps_is_scrubbed(
    allocator: GPUMemoryAllocator,
) -> None:
    for cache_id in range(4):
        put(allocator, cache_id, PAGE, OLD)
    for cache_id in range(4):
        allocator.free(cache_id)
    assert not allocator.scrub("default", 1, PAGE)
    small = put(allocator, 10, 4096, NEW)
    assert left(allocator, OLD) == 3 * PAGE - 4096, "it lies in one that is not reached yet"
    while not allocator.scrub("default", 1, PAGE):
        pass
    assert left(allocator, OLD) == 0
    assert ctypes.string_at(allocator.address + small.offset, small.size_bytes) == bytes([NEW]) * small.size_bytes


@pytest.mark.parametrize("seed", range(20))
def test_nothing_old_survives_a_scrub_whatever_comes_and_goes_between_its_steps(
    allocator: GPUMemoryAllocator, seed: int
) -> None:
    chance = random.Random(seed)
    sizes = [4096, 5000, 16384, PAGE - 1, PAGE, PAGE + 5, 3 * PAGE]
    ids = iter(range(1000))
    live: dict[int, Allocation] = {}

    def come_and_go(byte: int) -> None:
        for _ in range(chance.randint(1, 6)):
            if live and chance.random() < 0.5:
                allocator.free(live.popitem()[0] if chance.random() < 0.5 else live.pop(next(iter(live))).cache_id)
            else:
                with contextlib.suppress(CapacityError):
                    cache_id = next(ids)
                    live[cache_id] = put(allocator, cache_id, chance.choice(sizes), byte)

    for _ in range(10):
        come_and_go(OLD)
    kept = dict(live)
    while not allocator.scrub("default", 1, PAGE):
        come_and_go(NEW)
    still = sum(cache.size_bytes for cache_id, cache in live.items() if cache_id in kept)
    fresh = sum(cache.size_bytes for cache_id, cache in kept.items() if cache_id not in live)
    assert still <= left(allocator, OLD) <= still + fresh, "what was free when it began is gone"
    allocator.check()


def test_holes_are_zeroed_a_bounded_number_of_bytes_a_step(allocator: GPUMemoryAllocator) -> None:
    for cache_id in range(2 * PAGES):
        put(allocator, cache_id, PAGE // 2, OLD)
    for cache_id in range(0, 2 * PAGES, 2):
        allocator.free(cache_id)
    lefts = [left(allocator, OLD)]
    while not allocator.scrub("default", 1, 2 * PAGE):
        lefts.append(left(allocator, OLD))
    lefts.append(left(allocator, OLD))
    assert [before - after for before, after in itertools.pairwise(lefts)] == [3 * PAGE // 2, 3 * PAGE // 2, PAGE]


def test_a_scrub_leaves_other_tenants_alone(allocator: GPUMemoryAllocator) -> None:
    put(allocator, 1, PAGE, OLD, "red")
    put(allocator, 2, PAGE, OLD, "blue")
    allocator.free(1)
    allocator.free(2)
    while not allocator.scrub("red", 1, PAGE):
        pass
    assert left(allocator, OLD) == PAGE


def test_what_a_revoked_client_may_write_to_is_given_to_nobody_before_it_is_dropped(
    allocator: GPUMemoryAllocator,
) -> None:
    mine = put(allocator, 1, 16384, OLD)
    others = put(allocator, 2, 16384, NEW)
    assert mine.pages == others.pages
    serials = export(allocator, "revoked", mine)
    allocator.quarantine("revoked", 1)
    allocator.free(1)
    # The page lives on for the other cache, but neither the hole nor the free part of it is given out.
    assert all(put(allocator, 10 + n, 16384, NEW).pages != mine.pages for n in range(6))
    allocator.check()
    usage = allocator.usage()
    assert usage.zombie_bytes == PAGE - 16384, "what is kept from everybody is not free"
    assert usage.backed_bytes + usage.reserve_bytes + usage.zombie_bytes + usage.free_bytes == PAGES * PAGE
    allocator.dropped("revoked", serials)
    assert allocator.usage().zombie_bytes == 0
    assert allocator.allocate(30, 16384).pages == allocator.allocate(31, 16384).pages == mine.pages
    for cache_id in (2, 30, 31):
        allocator.free(cache_id)


@pytest.mark.parametrize("size", [16384, 2 * PAGE])
def test_an_empty_page_in_quarantine_is_a_zombie_and_not_kept_warm(allocator: GPUMemoryAllocator, size: int) -> None:
    where = put(allocator, 1, size, OLD)
    serials = export(allocator, "revoked", where)
    allocator.quarantine("revoked", 1)
    allocator.free(1)
    usage = allocator.usage()
    assert (usage.reserve_bytes, usage.zombie_bytes) == (0, len(where.pages) * PAGE)
    assert allocator.held_bytes("revoked") == usage.zombie_bytes
    assert allocator.take_drops() == {"revoked": serials}
    allocator.holder_gone("revoked")
    assert allocator.usage().zombie_bytes == 0


def test_a_client_that_never_had_the_page_is_no_reason_for_quarantine(allocator: GPUMemoryAllocator) -> None:
    where = put(allocator, 1, PAGE, OLD)
    export(allocator, "other", where)
    allocator.quarantine("revoked", 1)
    allocator.free(1)
    assert allocator.usage().reserve_bytes == PAGE
    allocator.holder_gone("other")
