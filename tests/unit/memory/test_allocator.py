"""GPUMemoryAllocator over real host memory: what is reused, what is given back, who waits, and what is refused."""

import ctypes
import itertools
import os
import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from kvpool.errors import (
    AddressSpaceError,
    BackendError,
    CacheStateError,
    CapacityError,
    ConfigError,
    DoubleReleaseError,
    InvalidSizeError,
    QueueFullError,
    UnknownCacheError,
)
from kvpool.memory.allocation import Allocation
from kvpool.memory.allocator import GPUMemoryAllocator
from kvpool.memory.host import HostBackend

PAGE = 65536
PAGES = 8


class CountingBackend(HostBackend):
    """Host memory that counts the pages it creates and maps."""

    created = mapped = 0

    def create(self, size_bytes: int) -> int:
        self.created += 1
        return super().create(size_bytes)

    def map(self, address: int, handle: int) -> None:
        self.mapped += 1
        super().map(address, handle)


class Victims:
    """Names caches in the order they were added."""

    def __init__(self) -> None:
        self.order: deque[int] = deque()

    def next_victim(self) -> int | None:
        return self.order.popleft() if self.order else None


@pytest.fixture
def backend() -> Iterator[CountingBackend]:
    backend = CountingBackend(budget_bytes=64 * PAGE)
    yield backend
    assert backend.mem_info().free_bytes == 64 * PAGE
    backend.close()


@pytest.fixture
def make(backend: CountingBackend) -> Iterator[Callable[..., GPUMemoryAllocator]]:
    made: list[GPUMemoryAllocator] = []

    def build(**settings: object) -> GPUMemoryAllocator:
        made.append(GPUMemoryAllocator(backend, PAGES * PAGE, PAGE, **settings))  # type: ignore[arg-type]
        return made[-1]

    yield build
    for allocator in made:
        allocator.check()
        allocator.close()


def fill(allocator: GPUMemoryAllocator, where: Allocation, byte: int) -> None:
    ctypes.memset(allocator.address + where.offset, byte, where.size_bytes)


def read(allocator: GPUMemoryAllocator, where: Allocation) -> bytes:
    return ctypes.string_at(allocator.address + where.offset, where.size_bytes)


def test_small_caches_of_a_tenant_share_a_page(make: Callable[..., GPUMemoryAllocator]) -> None:
    allocator = make()
    places = [allocator.allocate(i, 16384) for i in range(5)]
    assert len({place.pages for place in places[:4]}) == 1
    assert allocator.usage().backed_bytes == 2 * PAGE
    other = allocator.allocate(5, 16384, tenant="other")
    assert other.pages[0][0] not in {place.pages[0][0] for place in places}
    assert allocator.usage().backed_bytes == 3 * PAGE
    for i, place in enumerate(places):
        fill(allocator, place, i + 1)
    assert [read(allocator, place) for place in places] == [bytes([i + 1]) * 16384 for i in range(5)]
    assert read(allocator, other) == bytes(16384)


def test_a_page_is_backed_exactly_while_something_lives_in_it(make: Callable[..., GPUMemoryAllocator]) -> None:
    allocator = make(reserve_bytes=0)
    for i in range(4):
        allocator.allocate(i, 16384)
    for i in range(3):
        allocator.free(i)
        assert allocator.usage().backed_bytes == PAGE
    allocator.free(3)
    usage = allocator.usage()
    assert (usage.live_bytes, usage.backed_bytes, usage.reserve_bytes, usage.free_bytes) == (0, 0, 0, PAGES * PAGE)


def test_the_same_shape_gets_the_same_pages_without_a_system_call(
    make: Callable[..., GPUMemoryAllocator], backend: CountingBackend
) -> None:
    allocator = make()
    for size in (1000, PAGE, 3 * PAGE - 5):
        first = allocator.allocate(0, size)
        allocator.free(0)
        before = backend.created, backend.mapped
        again = allocator.allocate(0, size)
        assert again == first
        assert (backend.created, backend.mapped) == before
        allocator.free(0)
        allocator.check()


def test_the_tenants_other_warm_pages_move_before_any_is_created(
    make: Callable[..., GPUMemoryAllocator], backend: CountingBackend
) -> None:
    allocator = make()
    three = allocator.allocate(0, 3 * PAGE)
    one = allocator.allocate(1, PAGE)
    allocator.free(0)
    allocator.free(1)
    two = allocator.allocate(2, 2 * PAGE)
    assert backend.created == 4
    assert {serial for _, serial in two.pages} < {serial for _, serial in three.pages}
    # Of the broken range the front stays warm in its place.
    assert allocator.allocate(3, PAGE).pages == three.pages[:1]
    assert allocator.allocate(4, PAGE).pages == one.pages
    assert backend.created == 4
    allocator.check()


def test_a_full_device_can_be_one_large_cache_again(
    make: Callable[..., GPUMemoryAllocator], backend: CountingBackend
) -> None:
    allocator = make()
    for i in range(PAGES):
        allocator.allocate(i, PAGE)
    for i in range(PAGES):
        allocator.free(i)
    whole = allocator.allocate(PAGES, PAGES * PAGE)
    assert backend.created == PAGES
    fill(allocator, whole, 5)
    assert read(allocator, whole) == b"\x05" * (PAGES * PAGE)


def test_what_another_tenant_keeps_warm_is_given_back_and_comes_zeroed(
    make: Callable[..., GPUMemoryAllocator],
) -> None:
    allocator = make()
    fill(allocator, allocator.allocate(0, PAGES * PAGE, tenant="a"), 0xEE)
    allocator.free(0)
    place = allocator.allocate(1, PAGES * PAGE, tenant="b")
    assert read(allocator, place) == bytes(PAGES * PAGE)


def test_a_page_that_a_client_maps_is_there_for_nobody_until_dropped(
    make: Callable[..., GPUMemoryAllocator],
) -> None:
    allocator = make()
    place = allocator.allocate(0, PAGES * PAGE, tenant="a")
    serials = [serial for _, serial in place.pages]
    for ref in place.pages[:2]:
        os.close(allocator.export("client", "a", *ref))
    allocator.free(0)
    with pytest.raises(CapacityError) as caught:
        allocator.allocate(1, 7 * PAGE, tenant="b")
    assert caught.value.details["zombie_bytes"] == 2 * PAGE
    assert caught.value.details["largest_bytes"] == 6 * PAGE
    assert allocator.take_drops() == {"client": serials[:2]}
    allocator.allocate(2, 6 * PAGE, tenant="b")
    allocator.dropped("client", serials[:1])
    allocator.allocate(3, PAGE, tenant="b")
    allocator.holder_gone("client")
    allocator.allocate(4, PAGE, tenant="b")
    assert allocator.usage().backed_bytes == PAGES * PAGE


def test_pages_that_no_client_maps_are_taken_from_others_first(make: Callable[..., GPUMemoryAllocator]) -> None:
    allocator = make()
    held = allocator.allocate(0, 4 * PAGE, tenant="a")
    os.close(allocator.export("client", "a", *held.pages[0]))
    allocator.allocate(1, 4 * PAGE, tenant="a")
    allocator.free(0)
    allocator.free(1)
    allocator.allocate(2, 4 * PAGE, tenant="b")
    assert allocator.usage().zombie_bytes == 0
    assert allocator.allocate(3, 4 * PAGE, tenant="a") == held._replace(cache_id=3)


def test_the_reserve_is_bounded_and_the_oldest_leaves_first(make: Callable[..., GPUMemoryAllocator]) -> None:
    allocator = make(reserve_bytes=2 * PAGE)
    places = [allocator.allocate(i, PAGE) for i in range(4)]
    for i in range(4):
        allocator.free(i)
    assert allocator.usage().reserve_bytes == 2 * PAGE
    assert [allocator.allocate(4 + i, PAGE).pages for i in range(2)] == [places[3].pages, places[2].pages]
    assert allocator.usage().free_bytes == 6 * PAGE


def test_what_is_freed_within_a_change_is_warm_for_who_comes_next(make: Callable[..., GPUMemoryAllocator]) -> None:
    """The bound must not send pages away that the same change needs: a client maps them, so they would be zombies."""
    allocator = make(reserve_bytes=PAGE)
    for cache_id in range(PAGES):
        where = allocator.allocate(cache_id, PAGE)
        os.close(allocator.export("client", "default", *where.pages[0]))
    with allocator.change():
        for cache_id in range(PAGES):
            allocator.free(cache_id)
        for cache_id in range(100, 100 + PAGES - 3):
            allocator.allocate(cache_id, PAGE)
        assert allocator.usage().zombie_bytes == 0
    assert allocator.usage().reserve_bytes == PAGE
    assert allocator.usage().zombie_bytes == 2 * PAGE
    allocator.check()


def test_an_eviction_above_the_bound_makes_room_at_once(make: Callable[..., GPUMemoryAllocator]) -> None:
    victims = Victims()
    allocator = make(reserve_bytes=PAGE, victims=victims)
    for cache_id in range(PAGES):
        where = allocator.allocate(cache_id, PAGE)
        os.close(allocator.export("client", "default", *where.pages[0]))
        victims.order.append(cache_id)
    assert len(allocator.allocate(100, (PAGES - 1) * PAGE).pages) == PAGES - 1
    assert allocator.usage().zombie_bytes == 0
    allocator.check()


def test_trim_gives_back_what_one_or_all_keep_warm(make: Callable[..., GPUMemoryAllocator]) -> None:
    allocator = make()
    for i, tenant in enumerate("aab"):
        place = allocator.allocate(i, 2 * PAGE, tenant=tenant)
    os.close(allocator.export("client", "b", *place.pages[0]))
    for i in range(3):
        allocator.free(i)
    assert allocator.trim("a") == 4 * PAGE
    assert allocator.usage().reserve_bytes == 2 * PAGE
    assert allocator.trim() == 2 * PAGE  # one of them is a zombie first
    assert allocator.usage().zombie_bytes == PAGE
    assert allocator.trim("nobody") == 0
    allocator.holder_gone("client")
    assert allocator.usage().free_bytes == PAGES * PAGE


def test_eviction_goes_on_until_it_fits_and_no_further(make: Callable[..., GPUMemoryAllocator]) -> None:
    victims = Victims()
    allocator = make(victims=victims)
    for i in range(PAGES):
        allocator.allocate(i, PAGE, tenant="ab"[i % 2])
        victims.order.append(i)
    kept = allocator.allocation(5)
    fill(allocator, kept, 6)
    place = allocator.allocate(100, 3 * PAGE, tenant="a")
    assert list(victims.order) == [3, 4, 5, 6, 7]
    assert len(place.pages) == 3
    assert read(allocator, kept) == b"\x06" * PAGE
    with pytest.raises(DoubleReleaseError, match="evicted"):
        allocator.free(0)


def test_a_full_device_says_what_there_is(make: Callable[..., GPUMemoryAllocator]) -> None:
    allocator = make()
    allocator.allocate(0, 5 * PAGE)
    allocator.allocate(1, 10_000)
    allocator.allocate(2, PAGE, tenant="b")
    allocator.free(2)
    with pytest.raises(CapacityError, match="would fit") as caught:
        allocator.allocate(3, 3 * PAGE)
    assert type(caught.value) is CapacityError
    assert caught.value.details == {
        "asked_bytes": 3 * PAGE,
        "max_size_bytes": 3 * PAGE,
        "free_bytes": 2 * PAGE,
        "reserve_bytes": 0,
        "live_bytes": 5 * PAGE + 10_000,
        "zombie_bytes": 0,
        "largest_bytes": 2 * PAGE,
    }
    allocator.allocate(3, 2 * PAGE)
    with pytest.raises(CapacityError) as caught:
        allocator.allocate(4, PAGE)
    assert caught.value.details["largest_bytes"] == PAGE - 3 * 4096  # the hole beside cache 1
    allocator.allocate(4, PAGE - 3 * 4096)


def test_addresses_for_growth_cost_no_memory(make: Callable[..., GPUMemoryAllocator]) -> None:
    allocator = make(arena_bytes=32 * PAGE)
    place = allocator.allocate(0, 2 * PAGE, max_size_bytes=9 * PAGE)
    assert place.extents == ((0, 2 * PAGE),)
    assert len(place.pages) == 2
    assert place.max_size_bytes == 9 * PAGE
    assert allocator.usage().backed_bytes == 2 * PAGE
    with pytest.raises(AddressSpaceError):
        allocator.allocate(1, PAGE, max_size_bytes=17 * PAGE)
    second = allocator.allocate(2, PAGE, max_size_bytes=16 * PAGE)
    assert abs(second.offset - place.offset) >= 16 * PAGE
    allocator.free(0)
    allocator.free(2)
    allocator.allocate(3, 2 * PAGE, max_size_bytes=32 * PAGE)  # takes the addresses of what was warm


def test_a_small_cache_that_may_grow_keeps_its_part_of_the_page(make: Callable[..., GPUMemoryAllocator]) -> None:
    allocator = make()
    place = allocator.allocate(0, 4096, max_size_bytes=20_000)
    next_to = allocator.allocate(1, 4096)
    assert place.offset // PAGE == next_to.offset // PAGE
    assert abs(next_to.offset - place.offset) >= 32768


@pytest.mark.parametrize(
    ("size", "maximum"), [(0, None), (-5, None), (PAGES * PAGE + 1, None), (PAGE, PAGE - 1), (1, 65 * PAGE)]
)
def test_impossible_sizes_change_nothing(
    make: Callable[..., GPUMemoryAllocator], size: int, maximum: int | None
) -> None:
    allocator = make()
    before = allocator.usage()
    with pytest.raises(InvalidSizeError, match="asked for"):
        allocator.allocate(0, size, max_size_bytes=maximum)
    with pytest.raises(InvalidSizeError):
        allocator.request(0, size, max_size_bytes=maximum, now=0.0, deadline=1.0)
    assert allocator.usage() == before


def test_ids_that_are_not_live(make: Callable[..., GPUMemoryAllocator]) -> None:
    allocator = make()
    allocator.allocate(3, 100)
    with pytest.raises(CacheStateError, match="lives or waits"):
        allocator.allocate(3, 100)
    allocator.free(3)
    for use in (allocator.free, allocator.allocation):
        with pytest.raises(DoubleReleaseError):
            use(3)
        with pytest.raises(UnknownCacheError):
            use(4)


def test_a_refusal_of_the_system_changes_nothing(make: Callable[..., GPUMemoryAllocator]) -> None:
    backend = HostBackend(budget_bytes=3 * PAGE)
    allocator = GPUMemoryAllocator(backend, PAGES * PAGE, PAGE)
    allocator.allocate(0, 2 * PAGE)
    allocator.free(0)
    before = allocator.usage()
    with pytest.raises(BackendError):
        allocator.allocate(1, 4 * PAGE)
    assert allocator.usage() == before
    allocator.check()
    allocator.allocate(1, 3 * PAGE)
    allocator.close()
    allocator.close()
    backend.close()


def test_settings_that_do_not_fit_together_leave_no_addresses_reserved() -> None:
    backend = HostBackend()
    for page_bytes, block_bytes in ((0, 4096), (3 * 4096, 4096), (PAGE, 2 * PAGE), (PAGE, 1000)):
        with pytest.raises(ConfigError):
            GPUMemoryAllocator(backend, PAGES * PAGE, page_bytes, block_bytes)
    with pytest.raises(InvalidSizeError):
        GPUMemoryAllocator(backend, PAGE - 1, PAGE)
    assert not backend._reservations
    backend.close()


def test_who_waits_is_served_in_turn_when_memory_comes_free(make: Callable[..., GPUMemoryAllocator]) -> None:
    allocator = make()
    allocator.allocate(0, 6 * PAGE)
    allocator.allocate(1, PAGE)
    large = allocator.request(2, 4 * PAGE, now=0.0, deadline=10.0)
    small = allocator.request(3, PAGE, now=0.0, deadline=10.0)  # would fit, and still waits its turn
    assert isinstance(large, int)
    assert isinstance(small, int)
    assert allocator.poll(1.0) == []
    with pytest.raises(CacheStateError, match="lives or waits"):
        allocator.allocate(3, PAGE)
    allocator.free(0)
    answers = allocator.poll(2.0)
    assert answers == [(large, allocator.allocation(2)), (small, allocator.allocation(3))]
    assert allocator.next_deadline() is None
    assert isinstance(allocator.request(4, PAGE, now=2.0, deadline=2.0), Allocation)


def test_dropping_a_zombie_serves_who_waits(make: Callable[..., GPUMemoryAllocator]) -> None:
    allocator = make()
    place = allocator.allocate(0, PAGES * PAGE, tenant="a")
    os.close(allocator.export("client", "a", *place.pages[3]))
    allocator.free(0)
    ticket = allocator.request(1, PAGES * PAGE, tenant="b", now=0.0, deadline=5.0)
    assert allocator.poll(0.0) == []
    for client, serials in allocator.take_drops().items():
        allocator.dropped(client, serials)
    assert [each for each, _ in allocator.poll(0.1)] == [ticket]


def test_deadlines_cancels_and_the_bound_of_the_line(make: Callable[..., GPUMemoryAllocator]) -> None:
    allocator = make(queue_limit=2)
    allocator.allocate(0, PAGES * PAGE)
    with pytest.raises(CapacityError):
        allocator.request(1, PAGE, now=3.0, deadline=3.0)
    late = allocator.request(1, PAGE, now=0.0, deadline=2.0)
    gone = allocator.request(2, PAGE, now=0.0, deadline=1.0)
    with pytest.raises(QueueFullError):
        allocator.request(3, PAGE, now=0.0, deadline=9.0)
    with pytest.raises(CapacityError):
        allocator.request(3, PAGE, now=0.0, deadline=0.0)  # would have to stand in line, and has no time
    assert allocator.next_deadline() == 1.0
    assert isinstance(gone, int)
    assert allocator.cancel(gone)
    assert not allocator.cancel(gone)
    assert allocator.poll(1.5) == []
    [(ticket, error)] = allocator.poll(2.0)
    assert ticket == late
    assert type(error) is CapacityError
    assert error.details["asked_bytes"] == PAGE
    allocator.check()
    assert isinstance(allocator.request(2, PAGE, now=2.0, deadline=3.0), int)  # its id is free again


def test_figures(make: Callable[..., GPUMemoryAllocator]) -> None:
    allocator = make()
    empty = allocator.usage()
    assert (empty.utilization, empty.fragmentation, empty.external_fragmentation) == (0.0, 0.0, 0.0)
    allocator.allocate(0, PAGE // 2)
    allocator.allocate(1, PAGE)
    allocator.allocate(2, 2 * PAGE)
    allocator.free(2)
    usage = allocator.usage()
    assert usage.utilization == pytest.approx(1.5 / 8)
    assert usage.fragmentation == pytest.approx(0.25)
    assert usage.largest_bytes == 6 * PAGE
    assert usage.external_fragmentation == 0.0
    total = usage.backed_bytes + usage.reserve_bytes + usage.zombie_bytes + usage.free_bytes
    assert total == usage.capacity_bytes
    scattered = make(arena_bytes=PAGES * PAGE)
    for i in range(PAGES):
        scattered.allocate(i, PAGE)
    for i in range(0, PAGES, 2):
        scattered.free(i)
    scattered.trim()
    assert scattered.usage().external_fragmentation == pytest.approx(0.75)  # 4 pages free, no two addresses together


def test_its_own_warm_pages_and_others_together(
    make: Callable[..., GPUMemoryAllocator], backend: CountingBackend
) -> None:
    allocator = make()
    own = allocator.allocate(0, 2 * PAGE, tenant="a")
    allocator.allocate(1, 3 * PAGE, tenant="b")
    allocator.free(0)
    allocator.free(1)
    place = allocator.allocate(2, PAGES * PAGE, tenant="a")
    assert {serial for _, serial in own.pages} < {serial for _, serial in place.pages}
    assert backend.created == 5 + 6  # b's three left it and were created anew, a's two moved


def fill_up(allocator, sizes, first_id=0):
    """Allocate until there is no room; returns how many caches that were, and the error."""
    for count, size_bytes in enumerate(sizes):
        try:
            allocator.allocate(first_id + count, size_bytes)
        except CapacityError as full:
            return count, full
    return None


@pytest.mark.parametrize(
    ("blocks", "pages"),
    [((5,), 32), ((9,), 32), ((15,), 32), ((17,), 32), ((5, 9, 17), 32), ((5, 9, 17), 64), ((33,), 64), ((41, 5), 64)],
)
def test_leased_caches_of_any_size_fill_the_device(blocks, pages):
    """Nothing can move them together, so where each begins must leave no gap."""
    with closing(GPUMemoryAllocator(HostBackend(), pages * 32 * 4096, 32 * 4096)) as allocator:
        placed, full = fill_up(allocator, itertools.cycle([count * 4096 for count in blocks]))
        assert allocator.usage().live_bytes >= 0.95 * allocator.capacity_bytes
        allocator.check()
        if full.details["largest_bytes"]:
            allocator.allocate(placed, full.details["largest_bytes"])
        for cache_id in range(0, placed, 2):
            allocator.free(cache_id)
            allocator.check()
        again, _ = fill_up(allocator, itertools.cycle([count * 4096 for count in blocks]), first_id=1000)
        assert again >= placed // 2 - 1, "what was freed is found again"
        allocator.check()


def test_small_caches_do_not_lie_in_what_large_ones_left_while_there_is_a_hole_of_their_size():
    """Holes were taken the latest first: leased caches of random sizes filled 0.79 of a device after four rounds."""
    rng = random.Random(1)
    with closing(GPUMemoryAllocator(HostBackend(), 64 * 32 * 4096, 32 * 4096)) as allocator:
        first_id, live = 0, []
        for _ in range(5):
            placed, _ = fill_up(allocator, (rng.choice((5, 9, 17)) * 4096 for _ in itertools.count()), first_id)
            live += range(first_id, first_id + placed)
            first_id += placed + 1
            assert allocator.usage().utilization >= 0.93
            rng.shuffle(live)
            for cache_id in live[len(live) // 2 :]:
                allocator.free(cache_id)
            del live[len(live) // 2 :]
            allocator.check()
