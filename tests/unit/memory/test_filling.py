"""Holes beside leased caches: what is planned for them, and what that gives on real memory."""

import itertools
import random
from collections.abc import Callable, Iterable
from contextlib import closing

import pytest

from kvpool.errors import BackendError, CapacityError
from kvpool.memory import mover
from kvpool.memory.allocation import Allocation
from kvpool.memory.allocator import GPUMemoryAllocator
from kvpool.memory.backend import Copy
from kvpool.memory.compaction import Move, Part, Plan, Snapshot, choose_join
from kvpool.memory.evacuation import plan_evacuation
from kvpool.memory.exchange import plan_exchange
from kvpool.memory.filling import plan_filling
from kvpool.memory.host import HostBackend
from kvpool.memory.pages import PageTable
from kvpool.memory.ranges import RangeAllocator
from kvpool.memory.reserve import Shape
from kvpool.memory.shelves import Gaps

MIN = 4096
BLOCKS = 32
PAGE = BLOCKS * MIN
PAGES = 64
EVERYTHING = 1 << 40


def snapshot(*pages: tuple[int, str], room: tuple[int, ...] = (), spare_pages: int = 0) -> Snapshot:
    """Pages by index; a letter is a block of a cache, a capital one of a cache that stays, a dot is free."""
    blocks = {index * 8 + position: each for index, text in pages for position, each in enumerate(text)}
    where = {name: sorted(block for block in blocks if blocks[block] == name) for name in set(blocks.values()) - {"."}}
    parts = sorted(Part(each[0], len(each), ord(name), name.islower()) for name, each in where.items())
    free = frozenset(index * 8 for index in room)
    return Snapshot(8, tuple(index * 8 for index, _ in pages), tuple(parts), free, spare_pages)


def test_a_hole_at_the_end_of_a_page_that_stays_goes_on_in_a_page_that_is_added() -> None:
    """No cache of five blocks fits beside A; two lie behind it, across the border, in its page and one more."""
    pages = [(0, "AAAAA..."), (9, "ccccc..."), (12, "ddddd...")]
    assert not plan_filling(snapshot(*pages)).moves, "nothing may be added"
    plan = plan_filling(snapshot(*pages, room=(1, 2), spare_pages=2))
    assert {move.destination for move in plan.moves} == {5, 10}
    assert plan.added == (8,)


def test_of_shelves_that_keep_as_many_pages_one_is_looked_at() -> None:
    """Between the two that stay, one shelf over two pages takes more, but two shelves are worth more."""
    sizes = {680: 7, 832: 3, 835: 9, 2012: 7, 2019: 17, 2044: 3}
    parts = tuple(Part(offset, size, offset, offset not in (2012, 2044)) for offset, size in sizes.items())
    found = Snapshot(16, tuple(index * 16 for index in (42, 52, 125, 126, 127)), parts)
    assert len(plan_filling(found).freed) <= 3
    for each in Gaps(found).choices(9):
        kept = [len(shelves.kept) for shelves in each]
        assert kept == sorted(set(kept))


def test_as_many_pages_are_added_as_there_are_where_more_would_be_better() -> None:
    """None was added then."""
    loose = [(9, "cccccccc"), (10, "ccccc..."), (12, "dddddddd"), (13, "ddddd...")]
    pages = [(0, "AAA....."), *loose, (20, "BBB.....")]
    assert plan_filling(snapshot(*pages, room=(1, 21), spare_pages=2)).added == (8, 168)
    assert plan_filling(snapshot(*pages, room=(1, 21), spare_pages=1)).added == (8,)


def test_a_gap_between_two_pages_that_stay_is_closed_where_sizes_add_up_to_it() -> None:
    """From A to B are 20 blocks: four caches of five, which leave nothing free."""
    pages = [
        (0, "..AAAA.."),
        (3, "..BBBB.."),
        *((index, f"{name * 5}...") for index, name in zip((9, 12, 15, 18), "cdef", strict=True)),
    ]
    plan = plan_filling(snapshot(*pages, room=(1, 2), spare_pages=2))
    assert {move.destination for move in plan.moves} == {6, 11, 16, 21}


def test_a_smaller_cache_makes_room_for_a_larger_one() -> None:
    """The three blocks of d fit nowhere, before c leaves the stretch behind A for the hole behind B."""
    pages = [(0, "AAAAcc.."), (2, "BBBBBB.."), (4, "ddd.....")]
    assert not plan_evacuation(snapshot(*pages), EVERYTHING, 9).moves
    plan = plan_exchange(snapshot(*pages), 9)
    assert plan.freed == (32,)
    assert [(chr(move.cache_id), move.destination) for move in plan.moves] == [("c", 22), ("d", 4)]


def test_a_gap_is_filled_from_both_ends() -> None:
    """A cache of five lies behind A already, across the border. One more fits behind it, and one before B."""
    pages = [(0, "AAAAAAcc"), (1, "ccc....."), (3, "......BB"), (10, "ddddd..."), (12, "eeeee...")]
    plan = plan_filling(snapshot(*pages, room=(2,), spare_pages=1))
    assert {move.destination for move in plan.moves} == {11, 25}
    assert not plan.added


def test_a_page_is_taken_out_of_the_middle_of_a_warm_range() -> None:
    backend = HostBackend()
    table = PageTable(backend, 8, PAGE, 32)
    ranges = RangeAllocator(table, 8)
    with closing(table):
        index = ranges.take("a", Shape(4 * PAGE, 4)).index
        ranges.put(index)
        serials = [page.serial for page in ranges.warm_pages("a")]
        assert ranges.is_open_at("a", index + 1)
        assert not ranges.is_open_at("b", index + 1), "another tenant's warm pages stay where they are"
        assert ranges.take_at("b", index + 1) is None
        taken = ranges.take_at("a", index + 1)
        assert taken.refs == ((index + 1, serials[1]),)
        ranges.check()
        assert table.warm_pages == 3
        assert ranges.take_at("a", index + 1) is None, "it is in use"
        ranges.put(index + 1)
        ranges.check()
    backend.close()


class Leases:
    """Says which caches may move."""

    def __init__(self) -> None:
        self.leased: set[int] = set()

    def may_move(self, cache_id: int) -> bool:
        return cache_id not in self.leased

    def moved(self, allocation: Allocation) -> None:
        assert allocation.cache_id not in self.leased


class RefusingBackend(HostBackend):
    """Host memory that refuses one copy, once it is told to."""

    refuses = False

    def copy(self, copies: Iterable[Copy]) -> None:
        for each in copies:
            if self.refuses:
                self.refuses = False
                raise BackendError("refused", errno=5)
            super().copy([each])


def any_size(number: int) -> int:
    return random.Random(number).randint(1, BLOCKS - 1)


def churn(memory: GPUMemoryAllocator, leases: Leases, size: Callable[[int], int], rounds: int, seed: int = 2) -> None:
    """Fill memory, lease a tenth at random, and free every other cache of the rest, several times."""
    live, next_id, rng = {}, 0, random.Random(seed)
    for _ in range(rounds):
        while True:
            try:
                memory.allocate(next_id, size(next_id) * MIN)
            except CapacityError:
                break
            live[next_id] = size(next_id)
            next_id += 1
        next_id += 1
        assert memory.usage().utilization >= 0.95
        memory.check()
        leases.leased, left = set(), PAGES * BLOCKS // 10
        for cache_id in rng.sample(sorted(live), len(live)):
            left -= live[cache_id]
            if left < 0:
                break
            leases.leased.add(cache_id)
        for cache_id in [each for number, each in enumerate(live) if number % 2 and each not in leases.leased]:
            memory.free(cache_id)
            del live[cache_id]


def compact_all(memory: GPUMemoryAllocator, budget_bytes: int | None) -> None:
    while memory.compact(budget_bytes).more:
        pass


def fewest_pages(anchors: list[tuple[int, int]], size: int, count: int) -> int:
    """Return in how few pages caches of one size can lie beside what stays; all in blocks, anchors ascending."""

    def under(start: int, end: int) -> set[int]:
        return set(range(start // BLOCKS, -(-end // BLOCKS))) if end > start else set()

    far = 10 * count * size  # from the first and the last anchor on there is room for all
    anchors = [(-far, -far), *anchors, (anchors[-1][1] + far,) * 2]
    fixed = set().union(*(under(*anchor) for anchor in anchors))
    best = [0] + [PAGES * BLOCKS] * count  # pages beside the fixed ones, by caches placed in gaps
    for (_, start), (end, _) in itertools.pairwise(anchors):
        after = best[:]
        for placed in range(1, min((end - start) // size, count) + 1):
            added = min(
                len((under(start, start + left * size) | under(end - (placed - left) * size, end)) - fixed)
                for left in range(placed + 1)
            )
            for before in range(count + 1 - placed):
                after[before + placed] = min(after[before + placed], best[before] + added)
        best = after
    return len(fixed) + min(pages - (placed - count) * size // BLOCKS for placed, pages in enumerate(best))


@pytest.mark.parametrize("size", [9, 17, 23, BLOCKS + 3])
@pytest.mark.parametrize("seed", range(3))
def test_caches_of_one_size_take_as_few_pages_as_those_that_stay_allow(size: int, seed: int) -> None:
    leases, backend = Leases(), HostBackend()
    with closing(GPUMemoryAllocator(backend, PAGES * PAGE, PAGE, MIN, owner=leases)) as memory:
        churn(memory, leases, lambda _: size, 2, seed)
        while memory.compact().more:
            pass
        memory.check()
        usage = memory.usage()
        places = sorted(memory.allocation(cache_id).offset // MIN for cache_id in leases.leased)
    backend.close()
    anchors = [(place, place + size) for place in places]
    count = usage.live_bytes // (size * MIN) - len(anchors)
    assert usage.backed_bytes // PAGE == fewest_pages(anchors, size, count)


@pytest.mark.parametrize("size", [lambda _: BLOCKS + 2, any_size], ids=["just above a page", "any"])
def test_in_small_steps_no_more_is_copied_than_at_once(size: Callable[[int], int]) -> None:
    moved_bytes, pages = [], []
    for budget_bytes in (None, PAGE):
        leases, backend = Leases(), HostBackend()
        with closing(GPUMemoryAllocator(backend, PAGES * PAGE, PAGE, MIN, owner=leases)) as memory:
            churn(memory, leases, size, 1)
            before = memory.compacted[0]
            compact_all(memory, budget_bytes)
            moved_bytes.append(memory.compacted[0] - before)
            pages.append(memory.usage().backed_bytes // PAGE)
        backend.close()
    assert moved_bytes[1] <= 1.3 * moved_bytes[0]
    assert abs(pages[1] - pages[0]) <= 1


@pytest.mark.parametrize(
    ("size", "most_wasted"),
    [
        (lambda number: (2, 3, 5, 9, 17)[number % 5], 0.05),
        (lambda _: 9, 0.05),
        (lambda _: 23, 0.06),
        (any_size, 0.05),
        (lambda number: (BLOCKS + 2, 3, 7)[number % 3], 0.08),
    ],
    ids=["above each power of two", "a quarter and a block", "most of a page", "any", "just above a page, and small"],
)
def test_little_is_wasted_though_a_tenth_is_leased(size: Callable[[int], int], most_wasted: float) -> None:
    leases, backend = Leases(), HostBackend()
    with closing(GPUMemoryAllocator(backend, PAGES * PAGE, PAGE, MIN, owner=leases)) as memory:
        churn(memory, leases, size, 3)
        places = {cache_id: memory.allocation(cache_id) for cache_id in leases.leased}
        usage = memory.usage()
        done = memory.compact()
        memory.check()
        assert usage.backed_bytes - memory.usage().backed_bytes == done.freed_pages * PAGE
        assert all(memory.allocation(cache_id) == place for cache_id, place in places.items())
        assert memory.usage().fragmentation <= most_wasted
        assert memory.compact() == (0, 0, False)
    backend.close()


@pytest.mark.parametrize("budget_bytes", [None, PAGE // 4])
def test_pages_added_for_a_fill_that_the_system_refuses_do_not_stay(
    budget_bytes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Holes were not filled again until bytes changed, as if the copy had not been refused."""
    backed = []
    for refusal in (False, True):
        leases, backend = Leases(), RefusingBackend()
        refusals = [refusal]

        def plan(snapshot: Snapshot, backend: RefusingBackend = backend, refusals: list[bool] = refusals) -> Plan:
            found = plan_filling(snapshot)
            if found.moves and refusals:
                backend.refuses = refusals.pop()
            return found

        monkeypatch.setattr(mover, "plan_filling", plan)
        with closing(GPUMemoryAllocator(backend, PAGES * PAGE, PAGE, MIN, owner=leases)) as memory:
            churn(memory, leases, lambda _: 9, 2)
            if refusal:
                with pytest.raises(BackendError):
                    compact_all(memory, budget_bytes)
                memory.check()
            compact_all(memory, budget_bytes)
            memory.check()
            backed.append(memory.usage().backed_bytes)
        assert not refusals
        backend.close()
    assert backed[1] == backed[0]


def test_a_step_in_the_background_after_a_fill_plans_for_one_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """It planned for all pages that the fill had left loose, whatever it was told."""
    filled: list[Move] = []
    asked: list[int] = []

    def plan(snapshot: Snapshot) -> Plan:
        found = plan_filling(snapshot)
        filled.extend(found.moves)
        return found

    def choose(snapshot: Snapshot, budget_bytes: int, most_pages: int) -> tuple[int, ...]:
        asked.append(most_pages)
        return choose_join(snapshot, budget_bytes, most_pages)

    monkeypatch.setattr(mover, "plan_filling", plan)
    monkeypatch.setattr(mover, "choose_join", choose)
    leases, backend = Leases(), HostBackend()
    with closing(GPUMemoryAllocator(backend, PAGES * PAGE, PAGE, MIN, owner=leases)) as memory:
        churn(memory, leases, lambda _: 17, 2)
        while not filled:
            assert memory.compact(PAGE // 4).more
        asked.clear()
        while memory.compact_a_little(PAGE).more:
            pass
        assert set(asked) == {1}
        memory.check()
    backend.close()


def test_pages_added_for_a_fill_that_leases_stop_half_way_do_not_stay_when_the_leases_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Holes were not filled again until bytes changed, as if that fill had been carried out as a whole."""
    filled: list[Move] = []

    def plan(snapshot: Snapshot) -> Plan:
        found = plan_filling(snapshot)
        filled.extend(found.moves)
        return found

    monkeypatch.setattr(mover, "plan_filling", plan)
    backed = []
    for stop in (False, True):
        leases, backend = Leases(), HostBackend()
        with closing(GPUMemoryAllocator(backend, PAGES * PAGE, PAGE, MIN, owner=leases)) as memory:
            churn(memory, leases, lambda _: 9, 2)
            before = leases.leased
            filled.clear()
            while memory.compact(PAGE // 4).more:
                if filled and stop:
                    left = {move.cache_id for move in filled if memory.allocation(move.cache_id).offset == move.source}
                    assert 0 < len(left) < len(filled), "half-way"
                    leases.leased = before | left
                    stop = False
            assert filled
            leases.leased = before
            memory.compact()
            memory.check()
            backed.append(memory.usage().backed_bytes)
        backend.close()
    assert backed[1] == backed[0]


def test_what_a_filling_promised_is_not_searched_for_more_until_something_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Half of the time of a compaction was looking again where nothing could be left to find."""
    plans: list[str] = []

    def count(name: str) -> None:
        plan = getattr(mover, name)

        def counted(*asked: object) -> Plan:
            plans.append(name)
            return plan(*asked)

        monkeypatch.setattr(mover, name, counted)

    for name in ("plan_evacuation", "plan_slide", "plan_exchange", "plan_filling", "plan_regrouping"):
        count(name)
    leases, backend = Leases(), HostBackend()
    with closing(GPUMemoryAllocator(backend, PAGES * PAGE, PAGE, MIN, owner=leases)) as memory:
        churn(memory, leases, lambda _: 17, 2)
        plans.clear()
        memory.compact()
        assert plans.count("plan_filling") == 1
        assert plans[-1] == "plan_filling"
        backed_bytes = memory.usage().backed_bytes
        leases.leased = set()
        assert memory.compact().freed_pages > 0, "leases end, and not a byte came or went"
        assert memory.usage().backed_bytes < backed_bytes
        memory.check()
    backend.close()


def test_the_last_page_of_what_a_filling_promised_is_searched_for_only_where_it_is_needed() -> None:
    """To find it took as long as to find ten before it."""
    leases, backend = Leases(), HostBackend()
    with closing(GPUMemoryAllocator(backend, PAGES * PAGE, PAGE, MIN, owner=leases)) as memory:
        churn(memory, leases, any_size, 1, seed=4)
        memory.compact()
        pages = memory.usage().backed_bytes // PAGE
        memory.allocate(1 << 20, (PAGES - pages + 1) * PAGE)
        memory.free(1 << 20)
        assert memory.usage().backed_bytes // PAGE == pages - 1
        memory.check()
    backend.close()
