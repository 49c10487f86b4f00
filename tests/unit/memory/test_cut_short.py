"""What is cut short between two of its steps is undone, or goes on where it was."""

import itertools
from collections.abc import Iterator

import pytest
from cut_memory import Cut, CutMemory, Interrupted, filled, read, write

from kvpool.errors import BackendError
from kvpool.memory.allocation import Allocation
from kvpool.memory.allocator import GPUMemoryAllocator

MIN = 256
PAGE = 16 * MIN
PAGES = 8


class Owner:
    """Lets everything move."""

    def may_move(self, cache_id: int) -> bool:
        return True

    def moved(self, allocation: Allocation) -> None:
        pass


@pytest.fixture
def backend() -> Iterator[CutMemory]:
    backend = CutMemory(PAGES * PAGE)
    yield backend
    backend.close()


@pytest.fixture
def memory(backend: CutMemory) -> Iterator[GPUMemoryAllocator]:
    memory = GPUMemoryAllocator(backend, PAGES * PAGE, PAGE, MIN, owner=Owner())
    yield memory
    backend.cut = None
    memory.check()
    memory.close()


def fill(memory: GPUMemoryAllocator, sizes: list[int], goes: int) -> dict[int, int]:
    """Fill memory with caches of these sizes in turns, free every so many; returns the rest by id, with their sizes."""
    live = {}
    for cache_id in range(PAGES * PAGE // (sum(sizes) // len(sizes) + MIN)):
        size_bytes = live[cache_id] = sizes[cache_id % len(sizes)]
        where = memory.allocate(cache_id, size_bytes)
        write(memory.address + where.offset, filled(cache_id, "a", size_bytes))
    for cache_id in list(live)[::goes]:
        memory.free(cache_id)
        del live[cache_id]
    return live


def intact(memory: GPUMemoryAllocator, live: dict[int, int]) -> bool:
    return all(
        read(memory.address + memory.allocation(cache_id).offset, size) == filled(cache_id, "a", size)
        for cache_id, size in live.items()
    )


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("error", [BackendError, Interrupted])
def test_compaction_goes_on_where_any_call_of_the_memory_ended_it(
    memory: GPUMemoryAllocator, backend: CutMemory, error: type[BaseException], share: float
) -> None:
    """Also a cache that slides over a part of its own place: an interrupt left it half here and half there."""
    halfway = 0
    for after in itertools.count():
        live = fill(memory, [3 * MIN, 11 * MIN - 100], goes=2)
        backend.cut, backend.calls = Cut(after, error, share), 0
        try:
            memory.compact()
        except (BackendError, Interrupted):
            halfway += memory._mover.unfinished is not None
            backend.cut = None
            memory.check()
            assert intact(memory, live)
        else:
            break
        memory.compact()
        assert intact(memory, live)
        for cache_id in live:
            memory.free(cache_id)
    assert halfway


def test_a_move_whose_end_is_not_zeroed_during_a_scrub_is_made_all_the_same(
    memory: GPUMemoryAllocator, backend: CutMemory
) -> None:
    """The cache was in its new place by one account, and in the old one by another; then a page was left empty."""
    live = fill(memory, [9 * MIN - 100], goes=2)
    assert not memory.scrub("default", 1, PAGE)
    refused = 0
    for after in range(40):
        backend.cut, backend.calls = Cut(after, BackendError), 0
        try:
            memory.compact(PAGE)
        except BackendError:
            refused += 1
        backend.cut = None
        memory.check()
        assert intact(memory, live)
    assert refused


def begin_scrub(memory: GPUMemoryAllocator) -> None:
    """Begin one that has more to do: pages that are kept warm."""
    memory.allocate(0, 3 * PAGE)
    memory.free(0)
    assert not memory.scrub("default", 1, PAGE)


@pytest.mark.parametrize("size_bytes", [5 * MIN, 2 * PAGE])
def test_a_cache_that_cannot_be_zeroed_during_a_scrub_is_not_there(
    memory: GPUMemoryAllocator, backend: CutMemory, size_bytes: int
) -> None:
    """It was told to nobody, and nobody could free it."""
    begin_scrub(memory)
    before = memory.usage().live_bytes
    for after in range(12):
        backend.cut, backend.calls = Cut(after, BackendError), 0
        try:
            memory.allocate(3, size_bytes)
        except BackendError:
            assert memory.usage().live_bytes == before
            continue
        break
    assert memory.usage().live_bytes == before + size_bytes


def test_what_grows_and_cannot_be_zeroed_during_a_scrub_stays_as_it_was(
    memory: GPUMemoryAllocator, backend: CutMemory
) -> None:
    begin_scrub(memory)
    before = memory.allocate(1, PAGE, max_size_bytes=4 * PAGE)
    for after in range(12):
        backend.cut, backend.calls = Cut(after, BackendError), 0
        try:
            memory.resize(1, 3 * PAGE)
        except BackendError:
            assert memory.allocation(1) == before
            memory.check()
            continue
        break
    assert memory.allocation(1).size_bytes == 3 * PAGE
