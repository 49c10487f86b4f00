"""What is cut short between two of its steps is undone, or goes on where it was."""

import itertools
from collections.abc import Iterator

import pytest
from cut_memory import Cut, CutMemory, Interrupted, filled, read, write

from kvpool.errors import BackendError
from kvpool.memory.allocation import Allocation
from kvpool.memory.allocator import GPUMemoryAllocator
from kvpool.memory.compaction import Plan
from kvpool.memory.moves import Move, Moves

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


@pytest.mark.parametrize("size", [3, 4, 5, 6])
@pytest.mark.parametrize("after", range(4))
def test_caches_that_slide_together_are_whole_wherever_it_ends(
    memory: GPUMemoryAllocator, backend: CutMemory, after: int, size: int
) -> None:
    """One that does not slide over its own place lost its first bytes to the piece of the copy that was under way."""
    sizes = [5 * MIN, 3 * MIN, size * MIN, 7 * MIN - 100, 3 * MIN]
    live = {}
    for cache_id, size_bytes in enumerate(sizes):
        where = memory.allocate(cache_id, size_bytes)
        write(memory.address + where.offset, filled(cache_id, "a", size_bytes))
        live[cache_id] = size_bytes
    memory.free(0)
    del live[0]
    moves = []
    for cache_id in sorted(live, key=lambda each: memory.allocation(each).offset):
        offset = memory.allocation(cache_id).offset
        moves.append(Move(cache_id, offset, offset - 5 * MIN, -(-live[cache_id] // MIN) * MIN))
    backend.cut, backend.calls = Cut(after, Interrupted, 0.7), 0
    with pytest.raises(Interrupted):
        memory._mover._carry_out("default", Plan(Moves.of(moves), ()), Owner())
    backend.cut = None
    assert intact(memory, live)


def halves(memory: GPUMemoryAllocator, backend: CutMemory) -> Iterator[dict[int, int]]:
    """Interrupt compaction at each of its calls; yields what lives when a cache is half here and half there."""
    for after in itertools.count():
        live = fill(memory, [3 * MIN, 11 * MIN - 100], goes=2)
        backend.cut, backend.calls = Cut(after, Interrupted, 0.5), 0
        try:
            memory.compact()
        except Interrupted:
            backend.cut = None
            if memory._mover.unfinished is not None:
                yield live
        else:
            break
        for cache_id in live:
            memory.free(cache_id)


def test_a_scrub_spares_what_a_move_has_copied_so_far(memory: GPUMemoryAllocator, backend: CutMemory) -> None:
    """It lies before the place that the cache has by the account, and was zeroed as nobody's."""
    scrubs = 0
    for live in halves(memory, backend):
        scrubs += 1
        assert memory.scrub("default", scrubs, 4 * PAGES * PAGE)
        assert intact(memory, live)
    assert scrubs


def test_a_move_that_is_finished_later_is_counted_and_holds_the_reserve_to_its_bound(backend: CutMemory) -> None:
    memory = GPUMemoryAllocator(backend, PAGES * PAGE, PAGE, MIN, reserve_bytes=PAGE, owner=Owner())
    try:
        finished = 0
        for live in halves(memory, backend):
            usage, counted = memory.usage(), memory._mover.net_pages
            moved_bytes = memory.compacted[0]
            intact(memory, live)
            memory.check()
            freed_bytes = (memory._mover.net_pages - counted) * PAGE
            assert usage.backed_bytes - memory.usage().backed_bytes == freed_bytes
            assert memory.compacted[0] > moved_bytes
            finished += 1
        assert finished
    finally:
        memory.close()


@pytest.mark.parametrize(
    "cut",
    [
        pytest.param(None, id="moved twice"),
        pytest.param(Cut(0, BackendError, 1.0), id="copied, and not moved"),
        pytest.param(Cut(1, BackendError), id="not zeroed"),
    ],
)
def test_what_a_scrub_is_about_does_not_survive_behind_a_cache_that_moves_into_a_page_it_has_done(
    memory: GPUMemoryAllocator, backend: CutMemory, cut: Cut | None
) -> None:
    """The end of what is copied is nobody's, and stayed wherever it was copied to but in the last place."""
    first = memory.allocate(0, 2 * MIN).offset
    for cache_id, blocks in ((1, 8), (2, 4), (3, 2)):
        memory.allocate(cache_id, blocks * MIN)
    second = memory.allocate(4, 5 * MIN - 100).offset
    for cache_id in (1, 2, 3):
        memory.free(cache_id)
    assert second // PAGE != first // PAGE
    write(memory.address + second, b"v" * 5 * MIN)
    assert not memory.scrub("default", 1, PAGE)
    there = first + 2 * MIN
    moves = [Move(4, second, there, 5 * MIN), Move(4, there, there + 6 * MIN, 5 * MIN)]
    backend.cut, backend.calls = cut, 0
    try:
        memory._mover._carry_out("default", Plan(Moves.of(moves if cut is None else moves[:1]), ()), Owner())
    except BackendError:
        assert cut is not None
    else:
        assert cut is None
    backend.cut = None
    while not memory.scrub("default", 1, PAGE):
        pass
    live = memory.allocation(4)
    for page in (first, second, live.offset):
        page &= -PAGE
        content = bytearray(read(memory.address + page, PAGE))
        if live.offset & -PAGE == page:
            start = live.offset - page
            assert content[start : start + live.size_bytes] == b"v" * live.size_bytes
            content[start : start + live.size_bytes] = bytes(live.size_bytes)
        assert b"v" not in content


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
