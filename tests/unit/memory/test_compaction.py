"""What compaction plans, and what it does to real memory: patterns made against it, leases, refusals, remains."""

import ctypes
import random
from collections.abc import Callable, Iterable, Iterator

import pytest

from kvpool.errors import BackendError, CapacityError
from kvpool.memory import mover
from kvpool.memory.allocation import Allocation
from kvpool.memory.allocator import GPUMemoryAllocator
from kvpool.memory.backend import Copy
from kvpool.memory.compaction import Part, Plan, Snapshot, choose_join, plan_slide
from kvpool.memory.evacuation import plan_evacuation
from kvpool.memory.host import HostBackend
from kvpool.memory.mover import Mover
from kvpool.memory.moves import Move, Moves

MIN = 4096
BLOCKS = 32
PAGE = BLOCKS * MIN
PAGES = 48

EVERYTHING = 1 << 40


def snapshot(*pages: tuple[int, str]) -> Snapshot:
    """Pages by index; a letter is a block of a cache, a capital one of a cache that stays, a dot is free."""
    blocks = {index * 8 + position: each for index, text in pages for position, each in enumerate(text)}
    parts = []
    for name in sorted(set(blocks.values()) - {"."}):
        where = sorted(block for block, each in blocks.items() if each == name)
        assert where == list(range(where[0], where[0] + len(where)))
        parts.append(Part(where[0], len(where), ord(name), name.islower()))
    return Snapshot(8, tuple(index * 8 for index, _ in pages), tuple(sorted(parts)))


def test_the_emptiest_page_goes_into_the_smallest_holes_that_fit() -> None:
    plan = plan_evacuation(snapshot((0, "aaaa.bb."), (3, "....cd.."), (5, "eeeeee..")), EVERYTHING, 9)
    assert plan.freed == (24,)
    assert sorted((chr(move.cache_id), move.destination) for move in plan.moves) == [("c", 4), ("d", 7)]


def test_a_page_with_something_unmovable_stays_and_its_holes_are_used() -> None:
    plan = plan_evacuation(snapshot((0, "A......."), (3, "bbbbbbb.")), EVERYTHING, 9)
    assert (plan.freed, [move.destination for move in plan.moves]) == ((24,), [1])


def test_a_page_that_does_not_fit_elsewhere_as_a_whole_stays_whole() -> None:
    plan = plan_evacuation(snapshot((0, "aaa..bbb"), (3, "ccc..d.."), (5, "eee..fff")), EVERYTHING, 9)
    assert not plan.moves


def test_holes_across_borders_of_pages_are_used_so_that_one_odd_size_takes_the_fewest_pages() -> None:
    size, pages, page = 3, 16, 64
    parts = tuple(Part(start, size, start, True) for start in range(0, pages * page - size + 1, 2 * size))
    plan = plan_evacuation(Snapshot(page, tuple(range(0, pages * page, page)), parts), EVERYTHING, pages)
    assert pages - len(plan.freed) == -(-len(parts) * size // page)
    places = {part.cache_id: part.offset for part in parts} | {move.cache_id: move.destination for move in plan.moves}
    used = [block for offset in places.values() for block in range(offset, offset + size)]
    assert len(set(used)) == len(used) == len(parts) * size
    assert {block & -page for block in used}.isdisjoint(plan.freed)


def test_where_holes_do_not_fit_fewer_pages_are_emptied_than_the_sums_allow() -> None:
    plan = plan_evacuation(snapshot((0, "a.b.c.d."), (2, "ee......"), (4, "ff......")), EVERYTHING, 9)
    assert (plan.freed, [move.destination for move in plan.moves]) == ((32, 0), [18, 20, 21, 22, 23])


def test_evacuation_keeps_to_its_budget_but_for_one_page() -> None:
    pages = [(index, f"{chr(97 + index)}.......") for index in range(0, 8, 2)]
    assert len(plan_evacuation(snapshot(*pages), 1, 9).freed) == 1
    assert len(plan_evacuation(snapshot(*pages), 2, 9).freed) == 2
    assert len(plan_evacuation(snapshot(*pages), EVERYTHING, 9).freed) == 3


def test_caches_slide_together_across_the_borders_of_pages() -> None:
    plan = plan_slide(snapshot((2, "aaaaa..."), (3, "bbbbb..."), (4, "ccccc...")), EVERYTHING, 9)
    assert [(chr(move.cache_id), move.destination) for move in plan.moves] == [("b", 21), ("c", 26)]
    assert plan.freed == (32,)


def test_what_slides_goes_around_what_stays() -> None:
    plan = plan_slide(snapshot((0, "..A...bb"), (1, "..cc...."), (2, "dd......")), EVERYTHING, 9)
    assert [(chr(m.cache_id), m.destination) for m in plan.moves] == [("b", 0), ("c", 3), ("d", 5)]
    assert plan.freed == (8, 16)


def test_scattered_pages_are_joined_only_if_one_comes_free_by_it() -> None:
    pages = [(0, "aaaaa..."), (2, "bbbbb..."), (4, "ccccc..."), (6, "D.......")]
    assert set(choose_join(snapshot(*pages), EVERYTHING, 9)) == {0, 16, 32}
    assert choose_join(snapshot(*pages[1:]), EVERYTHING, 9) == ()


# -- on real memory ---------------------------------------------------------------------------------------------------


class Owner:
    """Holds leases, and knows what is in each cache."""

    def __init__(self) -> None:
        self.leased: set[int] = set()
        self.moved_ids: list[int] = []

    def may_move(self, cache_id: int) -> bool:
        return cache_id not in self.leased

    def moved(self, allocation: Allocation) -> None:
        self.moved_ids.append(allocation.cache_id)


class RefusingBackend(HostBackend):
    """Host memory that refuses the copy after ``left`` more."""

    left = 1 << 30

    def copy(self, copies: Iterable[Copy]) -> None:
        for each in copies:
            if self.left <= 0:
                raise BackendError("refused", errno=5)
            self.left -= 1
            super().copy([each])


@pytest.fixture
def backend() -> Iterator[RefusingBackend]:
    backend = RefusingBackend()
    yield backend
    backend.close()


@pytest.fixture
def memory(backend: RefusingBackend) -> Iterator[GPUMemoryAllocator]:
    memory = GPUMemoryAllocator(backend, PAGES * PAGE, PAGE, MIN, owner=Owner())
    yield memory
    memory.check()
    memory.close()


def put(memory: GPUMemoryAllocator, cache_id: int, blocks: int, tenant: str = "default") -> None:
    where = memory.allocate(cache_id, blocks * MIN, tenant=tenant)
    ctypes.memmove(memory.address + where.offset, content(cache_id, blocks), where.size_bytes)


def content(cache_id: int, blocks: int) -> bytes:
    return random.Random(cache_id).randbytes(blocks * MIN)


def intact(memory: GPUMemoryAllocator, live: dict[int, int]) -> bool:
    places = {cache_id: memory.allocation(cache_id).offset for cache_id in live}
    return all(
        ctypes.string_at(memory.address + places[cache_id], blocks * MIN) == content(cache_id, blocks)
        for cache_id, blocks in live.items()
    )


def fill(memory: GPUMemoryAllocator, size: Callable[[int], int], live: dict[int, int], first: int) -> int:
    cache_id = first
    while True:
        try:
            put(memory, cache_id, size(cache_id))
        except CapacityError:
            return cache_id + 1
        live[cache_id] = size(cache_id)
        cache_id += 1


PATTERNS: dict[str, Callable[[int], int]] = {
    "smallest": lambda _: 1,
    "half a page and a block": lambda _: 17,
    "a quarter and a block": lambda _: 9,
    "above each power of two": lambda i: (2, 3, 5, 9, 17)[i % 5],
    "sawtooth": lambda i: i % 31 + 1,
    "all but a block, and a block": lambda i: (31, 1)[i % 2],
    "any": lambda i: random.Random(i).randint(1, 31),
    "just above a page": lambda _: BLOCKS + 2,
    "large and small": lambda i: (BLOCKS + 1, 2 * BLOCKS + 5, 3)[i % 3],
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("goes", ["every other", "most, at random"])
def test_all_memory_is_used_whatever_comes_and_goes(memory: GPUMemoryAllocator, pattern: str, goes: str) -> None:
    live: dict[int, int] = {}
    next_id = 0
    for _ in range(3):
        next_id = fill(memory, PATTERNS[pattern], live, next_id)
        assert memory.usage().utilization >= 0.95
        memory.check()
        rng = random.Random(next_id)
        for number, cache_id in enumerate(list(live)):
            if number % 2 if goes == "every other" else rng.random() < 0.7:
                memory.free(cache_id)
                del live[cache_id]
    free_bytes = memory.capacity_bytes - memory.usage().live_bytes
    memory.allocate(next_id, free_bytes * 9 // 10)
    assert intact(memory, live)
    memory.free(next_id)
    memory.compact()
    pages = sum(live.values()) / BLOCKS
    assert memory.usage().backed_bytes <= (pages + 1) * PAGE + pages * PAGE / 31
    assert intact(memory, live)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("batch_moves", [1, 3])
def test_no_page_is_given_back_that_a_later_batch_of_the_plan_goes_to(
    memory: GPUMemoryAllocator, monkeypatch: pytest.MonkeyPatch, pattern: str, batch_moves: int
) -> None:
    monkeypatch.setattr(mover, "_BATCH_MOVES", batch_moves)
    live: dict[int, int] = {}
    fill(memory, PATTERNS[pattern], live, 0)
    for number, cache_id in enumerate(list(live)):
        if number % 9:  # so much that a slide empties pages before it comes to their end
            memory.free(cache_id)
            del live[cache_id]
    memory.compact()
    memory.check()
    assert intact(memory, live)


def test_leased_caches_stay_where_they_are_and_all_others_make_room(memory: GPUMemoryAllocator) -> None:
    live: dict[int, int] = {}
    fill(memory, lambda _: 4, live, 0)
    memory.compactor.owner.leased.update(range(0, len(live), 40))
    places = {cache_id: memory.allocation(cache_id) for cache_id in memory.compactor.owner.leased}
    for cache_id in [each for each in live if each % 4]:
        memory.free(cache_id)
        del live[cache_id]
    done = memory.compact()
    assert done.freed_pages
    assert not done.more
    assert all(memory.allocation(cache_id) == place for cache_id, place in places.items())
    assert memory.usage().fragmentation <= 0.05
    assert intact(memory, live)


def test_of_many_caches_a_plan_looks_at_a_part_and_the_next_step_at_the_next(
    memory: GPUMemoryAllocator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 100,000 caches beside leased ones a plan took six seconds, in which the device answered nobody."""
    live: dict[int, int] = {}
    fill(memory, lambda i: (3, 5, 7)[i % 3], live, 0)
    for cache_id in [each for each in live if each % 3 == 1]:
        memory.free(cache_id)
        del live[cache_id]
    memory.compactor.owner.leased.update(each for each in live if each % 2)
    seen: list[tuple[int, ...]] = []

    def plan_filling(snapshot: Snapshot) -> Plan:
        seen.append(snapshot.pages)
        return mover.NOTHING

    monkeypatch.setattr(mover, "plan_filling", plan_filling)
    monkeypatch.setattr(mover, "_MOST_CACHES", 16)
    while memory.compact(PAGE).more:
        pass
    seen.clear()
    steps = 1
    while memory.compact(PAGE).more:
        steps += 1
    assert len(seen) == steps > 4
    assert all(len(pages) <= PAGES // 4 for pages in seen)
    everything = {page for allocation in map(memory.allocation, live) for page, _ in allocation.pages}
    assert {page // PAGE for pages in seen for page in pages} == everything
    before = memory.usage()
    assert not memory.compact().moved_bytes
    assert memory.usage() == before
    assert intact(memory, live)


def test_without_an_owner_nothing_moves(backend: HostBackend) -> None:
    memory = GPUMemoryAllocator(backend, 2 * PAGE, PAGE, MIN)
    for cache_id in range(4):
        memory.allocate(cache_id, 16 * MIN)
    memory.free(0), memory.free(2)
    assert memory.compact() == (0, 0, False)
    with pytest.raises(CapacityError):
        memory.allocate(4, 17 * MIN)
    memory.close()


def test_compaction_comes_before_eviction(backend: HostBackend) -> None:
    victims = iter([0])

    class Victims:
        def next_victim(self) -> int | None:
            return next(victims, None)

    memory = GPUMemoryAllocator(backend, 4 * PAGE, PAGE, MIN, victims=Victims(), owner=Owner())
    for cache_id in range(6):
        memory.allocate(cache_id, 17 * MIN)  # six in four pages: nobody has to go for the fifth
    assert memory.allocation(0).size_bytes == 17 * MIN
    memory.close()


def test_tenants_do_not_share_pages_by_moving(memory: GPUMemoryAllocator) -> None:
    for cache_id in range(40):
        put(memory, cache_id, 17, "ab"[cache_id % 2])
    for cache_id in range(40, 50):
        put(memory, cache_id, 16 * BLOCKS // 16 - 15, "ab"[cache_id % 2])
    memory.compact()
    pages = {name: {ref for i in range(n, 50, 2) for ref in memory.allocation(i).pages} for n, name in enumerate("ab")}
    assert pages["a"].isdisjoint(pages["b"])
    memory.check()


def test_a_move_over_its_own_place_that_is_interrupted_is_finished_before_anything_else(
    memory: GPUMemoryAllocator, backend: RefusingBackend
) -> None:
    live = {}
    for cache_id in range(16):
        live[cache_id] = (31, 3)[cache_id % 2]
        put(memory, cache_id, live[cache_id])
    for cache_id in range(1, 16, 2):
        memory.free(cache_id)
        del live[cache_id]
    put(memory, 20, 25)
    put(memory, 21, 2)
    live |= {20: 25, 21: 2}
    interrupted = 0
    for left in range(60):
        backend.left = left % 12
        try:
            memory.compact()
        except BackendError:
            interrupted += memory._mover.unfinished is not None
        backend.left = 1 << 30
        assert intact(memory, live)
        memory.check()
        for _ in range(2):  # holes again, so that there is something to slide over
            cache_id = min(live)
            memory.free(cache_id)
            blocks = live.pop(cache_id)
            live[100 + left * 2 + _] = max(1, (blocks + left) % 31)
            put(memory, 100 + left * 2 + _, live[100 + left * 2 + _])
    assert interrupted
    assert intact(memory, live)


def test_a_cache_of_which_nothing_is_backed_moves_too_also_when_a_copy_is_refused(
    memory: GPUMemoryAllocator, backend: RefusingBackend
) -> None:
    live = {}
    for cache_id in range(48):
        live[cache_id] = 9
        put(memory, cache_id, 9)
    for cache_id in range(1, 48, 2):
        memory.free(cache_id)
        del live[cache_id]
    empty = set(range(2, 48, 4))
    for cache_id in empty:
        memory.resize(cache_id, 0)
        del live[cache_id]
    for left in (0, 1):
        backend.left = left
        with pytest.raises(BackendError):
            memory.compact()
        backend.left = 1 << 30
        assert intact(memory, live)
        memory.check()
    memory.compact()
    assert empty & set(memory.compactor.owner.moved_ids)
    assert intact(memory, live)


def test_a_plan_in_which_a_cache_moves_twice_is_carried_out(memory: GPUMemoryAllocator) -> None:
    live = dict.fromkeys(range(8), 8)
    for cache_id in live:
        put(memory, cache_id, 8)
    for cache_id in (1, 2, 5):
        memory.free(cache_id)
        del live[cache_id]
    size, page = 8 * MIN, memory.allocation(0).offset
    assert {each: memory.allocation(each).offset - page for each in live} == {0: 0, 3: 24 * MIN} | {
        each: PAGE + (each - 4) * size for each in (4, 6, 7)
    }
    moves = [  # 3 makes room for 6, and follows it
        Move(3, page + 3 * size, page + size, size),
        Move(6, page + PAGE + 2 * size, page + 3 * size, size),
        Move(3, page + size, page + 2 * size, size),
        Move(4, page + PAGE, page + size, size),
        Move(7, page + PAGE + 3 * size, page + PAGE, size),
    ]
    memory._mover._carry_out("default", Plan(Moves.of(moves), ()), memory.compactor.owner)
    assert {each: memory.allocation(each).offset - page for each in live} == {
        0: 0, 4: size, 3: 2 * size, 6: 3 * size, 7: PAGE
    }  # fmt: skip
    assert intact(memory, live)


def test_a_small_step_goes_on_when_what_it_had_planned_has_gone_or_is_leased(memory: GPUMemoryAllocator) -> None:
    live = dict.fromkeys(range(4 * BLOCKS), 1)
    for cache_id in live:
        put(memory, cache_id, 1)
    for cache_id in range(1, 4 * BLOCKS, 2):
        memory.free(cache_id)
        del live[cache_id]
    step_bytes = 4 << 13  # four moves
    assert memory.compact_a_little(step_bytes).moved_bytes == 4 * MIN
    planned = list(memory._mover._begun[1].ids)
    memory.free(planned[0])
    del live[planned[0]]
    memory.compactor.owner.leased.add(planned[1])
    place = memory.allocation(planned[1])
    assert memory.compact_a_little(step_bytes).moved_bytes == 2 * MIN, "of four two are left"
    while memory.compact_a_little(step_bytes).more:
        assert memory.allocation(planned[1]) == place
        assert intact(memory, live)
    assert memory.usage().backed_bytes == 2 * PAGE


@pytest.mark.parametrize("blocks", [1, 4, 9, 16])
def test_between_steps_in_the_background_an_allocation_waits_for_no_plan_no_move_and_no_mapping(
    memory: GPUMemoryAllocator, monkeypatch: pytest.MonkeyPatch, blocks: int
) -> None:
    """What compaction costs others is the step that is under way, and never anything that it left to be done."""
    live: dict[int, int] = {}
    next_id = fill(memory, lambda _: blocks, live, 0)
    for cache_id in list(live)[1::2]:
        memory.free(cache_id)
    calls: list[str] = []

    def count(of: type, name: str) -> None:
        real = getattr(of, name)
        monkeypatch.setattr(of, name, lambda *args: (calls.append(name), real(*args))[1])

    count(Mover, "_plan")
    for name in ("create", "map", "set_access", "unmap", "release", "copy"):
        count(HostBackend, name)
    moved_bytes = 0
    while True:
        done = memory.compact_a_little(4 * MIN)
        moved_bytes += done.moved_bytes
        if not done.more:
            break
        assert "copy" in calls
        calls.clear()
        for _ in range(3):
            memory.allocate(next_id, blocks * MIN)
            memory.free(next_id)
            next_id += 1
        assert calls == []
    assert moved_bytes >= (PAGES // 2 - 2) * PAGE // 2
    memory.check()


def test_a_scrub_finds_what_a_move_left_behind(memory: GPUMemoryAllocator) -> None:
    for cache_id in range(30):
        where = memory.allocate(cache_id, 17 * MIN)
        ctypes.memset(memory.address + where.offset, 0xAA, where.size_bytes)
    for cache_id in range(1, 30, 3):
        memory.free(cache_id)
    assert memory.compact().moved_bytes
    for cache_id in set(range(30)) - set(range(1, 30, 3)):
        memory.wipe(cache_id)
    while not memory.scrub("default", 1, PAGE):
        pass
    mapped = memory._table._mapped
    assert not any(any(ctypes.string_at(memory.address + index * PAGE, PAGE)) for index in mapped)


def test_a_budget_is_kept_step_by_step(memory: GPUMemoryAllocator) -> None:
    for cache_id in range(PAGES * 8):
        put(memory, cache_id, 4)
    for cache_id in range(PAGES * 8):
        if cache_id % 8:
            memory.free(cache_id)
    steps = []
    while (done := memory.compact(2 * PAGE)).more:
        steps.append(done)
    assert all(0 < step.moved_bytes <= 2 * PAGE for step in steps)
    assert memory.usage().fragmentation == 0


def test_a_step_that_goes_on_with_a_plan_does_not_count_what_another_could_reach(
    memory: GPUMemoryAllocator, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cache_id in range(PAGES * 8):
        put(memory, cache_id, 4)
    for cache_id in range(PAGES * 8):
        if cache_id % 8:
            memory.free(cache_id)
    counted: list[bool] = []
    real = Mover.within_reach
    monkeypatch.setattr(Mover, "within_reach", lambda mover, tenant: counted.append(mover.begun) or real(mover, tenant))
    while memory.compact(PAGE // 4).more:
        pass
    assert counted
    assert not any(counted)
