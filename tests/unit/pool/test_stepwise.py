"""An allocation that has to compact first: in steps, between which its device serves others."""

from __future__ import annotations

import pytest
from pool_harness import PAGE, LocalPool, keys_of

from kvpool.pool.instructions import Batch, BlocksRequested, CachesRequested, InvalidateRequested, PrefixesLookedUp

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
