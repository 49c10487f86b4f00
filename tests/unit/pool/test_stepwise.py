"""An allocation that has to compact first: in steps, between which its device serves others."""

from __future__ import annotations

import pytest
from pool_harness import PAGE, LocalPool, keys_of

from kvpool.errors import DeviceLostError
from kvpool.pool.instructions import (
    Batch,
    BlocksRequested,
    CachesRequested,
    ChangesRequested,
    ClientGone,
    DeviceLost,
    InvalidateRequested,
    PrefixesLookedUp,
)

PAGES = 16
BLOCK = PAGE // 4
ASKED = 8 * PAGE


@pytest.fixture
def pool():
    """Of each page one half is in use, and nobody holds it."""
    pool = LocalPool(pages=PAGES)
    for client in ("c", "d"):
        pool.connect(client)
        pool.model(client, block_bytes=BLOCK)
    for number in range(PAGES * 4):
        pool.put([number])
    for number in range(0, PAGES * 4, 2):
        pool.invalidate(keys=keys_of([number]))
    assert pool.live_bytes() == pool.stores[0].allocator.usage().backed_bytes // 2
    yield pool
    pool.check()
    pool.close()


def begin(pool, event):
    """Ask, and let the device take the first step."""
    pool.handle(event)
    assert pool.step(0)
    assert event.batch not in pool.done
    return event.batch


def requested():
    return CachesRequested(Batch(1), "c", [(1, 0, ASKED, ASKED, 0.0, 0, None)])


def moved_bytes(pool):
    return pool.stores[0].allocator.compacted[0]


def test_a_request_is_met_in_steps_of_bounded_work_and_nothing_is_evicted(pool):
    pool.handle(event := requested())
    batch = event.batch
    steps = []
    while batch not in pool.done:
        before = moved_bytes(pool)
        assert pool.step(0)
        steps.append(moved_bytes(pool) - before)
    ((kind, *_),) = pool.done.pop(batch)
    assert kind == "granted"
    assert len(steps) > 2
    assert max(steps) <= PAGE
    assert pool.state.ledger.counters.evictions_by_reason["capacity"] == 0


def test_others_are_served_between_two_steps(pool):
    batch = begin(pool, requested())
    other = PrefixesLookedUp(Batch(1), "d", [(1, 0, b"".join(keys_of([1])), None)])
    pool.handle(other)
    assert pool.step(0)
    ((_, ids, *_),) = pool.done.pop(other.batch)
    assert len(ids) == 1
    assert batch not in pool.done
    pool.settle()
    assert pool.done.pop(batch)[0][0] == "granted"
    pool.release(ids, "d")


def test_blocks_are_placed_in_the_order_of_their_chain(pool):
    held = pool.request(ASKED - PAGE)  # compacts, and takes all pages that come free but one
    assert held[0] == "granted"
    chain = list(range(100, 108))  # two pages
    event = BlocksRequested(Batch(1), "c", [(1, 0, b"".join(keys_of(chain)), None, None, None)])
    pool.handle(event)
    pool.settle()
    ((kind, resident, ids, devices, places),) = pool.done.pop(event.batch)
    assert (kind, resident, len(ids), len(devices)) == ("blocks", 0, 8, 8)
    assert len({place[0] for place in places}) == 8
    assert all(place[0] == pool.stores[0].record(i).offset for i, place in zip(ids, places, strict=True))


def test_a_client_that_leaves_between_two_steps_gets_nothing_and_leaves_nothing(pool):
    live_bytes = pool.live_bytes()
    batch = begin(pool, requested())
    pool.kill("c")
    assert pool.done.pop(batch)[0][0] == "error"
    assert pool.live_bytes() == live_bytes
    assert pool.state.ledger.index.resident_bytes[0] == live_bytes


def test_a_step_is_bounded_also_when_the_plan_of_the_one_before_is_possible_no_more(pool):
    batch = begin(pool, CachesRequested(Batch(1), "c", [(1, 0, 6 * PAGE, 6 * PAGE, 0.0, 0, None)]))
    store = pool.stores[0]
    leased = [move.cache_id for move in store.allocator._mover._begun[1]]
    store.hold(leased)
    while batch not in pool.done:
        before = moved_bytes(pool)
        assert pool.step(0)
        assert moved_bytes(pool) - before <= PAGE
    assert pool.done.pop(batch)[0][0] == "granted"
    store.unhold(leased)


def lose(pool):
    """The device dies, and what it was told is never carried out."""
    sent = list(pool.outboxes[0])
    pool.outboxes[0].clear()
    pool.handle(DeviceLost(0, "killed"))
    pool.take(pool.state.fail_operations(sent, DeviceLostError("device 0 is gone"), pool.now))


def blocks_requested(pool, count):
    number = pool.model(name="whole pages", block_bytes=PAGE)
    return BlocksRequested(Batch(1), "c", [(1, number, b"".join(keys_of(range(100, 100 + count))), None, None, None)])


def run_requested(count):
    return CachesRequested(Batch(count), "c", [(number, 0, PAGE, PAGE, 0.0, 0, None) for number in range(count)])


@pytest.mark.parametrize("asked", ["cache", "run", "blocks"])
def test_what_was_placed_on_a_device_that_is_lost_between_two_steps_is_not_granted(pool, asked):
    event = {"cache": requested(), "run": run_requested(4), "blocks": blocks_requested(pool, 4)}[asked]
    begin(pool, event)
    if asked != "cache":
        assert pool.stores[0].lease_count, "some were placed"
    lose(pool)
    pool.settle()
    answers = pool.done.pop(event.batch)
    assert [answer[:2] for answer in answers] == [("error", "DeviceLostError")] * len(answers)
    assert not len(pool.state.ledger.index)
    pool.state.check()


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("asked", ["run", "blocks"])
def test_for_a_client_that_leaves_between_two_steps_nothing_is_evicted(pool, asked, known):
    """What was not placed yet was taken for short of memory, and room was made for it."""
    caches = pool.stores[0].caches
    begin(pool, event := run_requested(4) if asked == "run" else blocks_requested(pool, 4))
    ended, freed = pool.stores[0].disconnect("c")
    assert freed
    if not known:
        pool.settle()
    pool.handle(ClientGone("c", 0, ended, freed))
    pool.settle()
    assert event.batch in pool.done
    assert pool.stores[0].caches == len(pool.state.ledger.index) == caches


def test_a_change_whose_device_is_lost_between_two_steps_is_answered_once(pool):
    _, cache_id, *_ = pool.request(PAGE, max_size=ASKED)
    event = ChangesRequested(Batch(1), "c", [(2, cache_id, "resize", [(0, ASKED)], 0.0, None)])
    begin(pool, event)
    lose(pool)
    assert pool.done.pop(event.batch)[0][:2] == ("error", "DeviceLostError")
    pool.state.check()


def test_what_is_declared_void_before_it_is_placed_is_zeroed_in_the_end(pool):
    batch = begin(pool, requested())
    invalidation = InvalidateRequested(Batch(1), None, "m", None)
    pool.handle(invalidation)
    pool.settle()
    ((kind, cache_id, device, size_bytes, _, place),) = pool.done.pop(batch)
    assert kind == "granted"
    pool.fill(device, place, size_bytes, 0xAA)
    assert pool.left(0xAA) == size_bytes
    pool.release([cache_id])
    assert pool.left(0xAA) == 0


def test_for_what_others_take_meanwhile_something_is_evicted(pool):
    """Each step frees pages, and somebody of whom the books do not know takes one at once."""
    pool.handle(event := requested())
    allocator = pool.stores[0].allocator
    taken = range(1_000_000, 1_000_003)
    for cache_id in taken:
        assert pool.step(0)
        allocator.allocate(cache_id, PAGE)
    pool.settle()
    assert pool.done.pop(event.batch)[0][0] == "granted"
    assert pool.state.ledger.counters.evictions_by_reason["capacity"] > 0
    for cache_id in taken:
        allocator.free(cache_id)
