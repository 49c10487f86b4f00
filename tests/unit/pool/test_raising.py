"""What goes to the tiers below, and comes up again."""

from random import Random

import pytest
from pool_harness import PAGE, LocalPool, hashes, keys_of

from kvpool.errors import DeviceLostError
from kvpool.pool.instructions import (
    Batch,
    BlocksRequested,
    DeviceLost,
    EvictRequested,
    InvalidateRequested,
    LowerGone,
    Moved,
    PersistRequested,
    PrefixesFetched,
    TicketsCancelled,
)

PAGES = 4
BLOCKS = PAGES * 16  # of 4 KiB


@pytest.fixture
def pool():
    local = LocalPool(pages=PAGES, lower=True)
    for client in ("c", "d"):
        local.connect(client)
    local.model()
    local.model("d")
    yield local
    local.settle_all()
    local.check()
    local.close()


def full(pool, first=1):
    """Fill the device with one chain; returns its ids."""
    ids = list(range(first, first + BLOCKS))
    assert pool.store(ids) == BLOCKS
    return ids


def begin_fetch(pool, ids, first=0, client="c", timeout_s=30.0):
    answer = pool.fetch(ids, first, client, timeout_s=timeout_s)
    assert answer[0] == "queued"
    return answer[1]


def granted(pool, ticket, client="c"):
    ((_, answer),) = [grant for grant in pool.grants.get(client, []) if grant[0] == ticket]
    return answer


def test_evicted_content_comes_up_with_its_bytes(pool):
    first = full(pool)
    second = full(pool, 100)
    assert pool.read(second) == second
    assert pool.read(first) == first
    assert pool.read(second) == second
    counters = pool.state.ledger.counters
    assert counters.blocks_raised == 2 * BLOCKS
    assert counters.blocks_hit == counters.blocks_looked_up == 3 * BLOCKS


def test_a_look_up_tells_what_is_coming_and_does_not_wait(pool):
    first = full(pool)
    assert pool.store([*first[:8], *range(200, 220)]) == 28
    hit = pool.look_up(first)
    assert len(hit[1]) + hit[5] == BLOCKS
    assert hit[5] == 20
    pool.release(hit[1])
    pool.settle_all()
    assert pool.look_up(first)[5] == 0  # it came up though nobody waited
    assert pool.shelves[0].fills == 1


def test_who_asks_for_what_is_coming_joins(pool):
    first = full(pool)
    full(pool, 100)
    tickets = {client: begin_fetch(pool, first, client=client) for client in ("c", "d")}
    pool.settle_all()
    assert pool.shelves[0].fills == 1
    for client, ticket in tickets.items():
        answer = granted(pool, ticket, client)
        assert len(answer[1]) == BLOCKS
        pool.release(answer[1], client)


def test_what_was_not_kept_is_not_promised(pool):
    pool.shelves[0].refuses = True
    first = full(pool)
    full(pool, 100)
    assert pool.look_up(first)[1:2] + pool.look_up(first)[5:] == ([], 0)


def test_behind_a_block_that_is_lost_nothing_comes(pool):
    first = full(pool)
    full(pool, 100)
    model = pool.state.ledger.models[0]
    del pool.shelves[0].content[model.tenant, model.fingerprint, keys_of(first)[5]]
    assert pool.read(first) == first[:5]
    assert pool.look_up(first)[5] == 0  # and is not promised again


def test_a_device_tells_what_its_tiers_lost(pool):
    first = full(pool)
    full(pool, 100)
    model = pool.state.ledger.models[0]
    pool.handle(LowerGone(0, [(model.tenant, model.fingerprint, keys_of(first)[0])], pool.stamp()))
    assert pool.look_up(first)[5] == 0


def test_a_block_stored_while_the_same_comes_up_stays(pool):
    first = full(pool)
    full(pool, 100)
    ticket = begin_fetch(pool, first[:4])
    assert pool.store(first[:4]) == 4
    pool.settle_all()
    answer = granted(pool, ticket)
    assert len(answer[1]) == 4
    pool.release(answer[1])
    assert pool.read(first[:4]) == first[:4]


def test_content_invalidated_on_its_way_is_not_published(pool):
    first = full(pool)
    full(pool, 100)
    ticket = begin_fetch(pool, first[:4])
    batch = Batch(1)
    pool.handle(InvalidateRequested(batch, None, "m", keys_of(first[1:2])))
    pool.settle_all()
    assert pool.done.pop(batch)
    answer = granted(pool, ticket)
    assert len(answer[1]) == 1
    pool.release(answer[1])
    assert pool.read(first) == first[:1]
    assert not [key for key in pool.shelves[0].content if key[2] in keys_of(first[1:])]


def test_what_is_chained_behind_invalidated_content_goes_from_below_too(pool):
    first = full(pool)
    full(pool, 100)
    batch = Batch(1)
    pool.handle(InvalidateRequested(batch, None, "m", keys_of(first[:1])))
    pool.settle_all()
    (answer,) = pool.done[batch]
    assert (answer["caches"], answer["lower_keys"]) == (0, BLOCKS), "nothing on the device is not nothing at all"
    assert pool.look_up(first)[5] == 0
    assert not [key for key in pool.shelves[0].content if key[2] in keys_of(first)]


def test_what_is_invalidated_behind_an_eviction_that_hangs_stays_gone_when_that_completes(pool):
    ids = full(pool)
    evicted, invalidated = Batch(1), Batch(1)
    pool.handle(EvictRequested(evicted, None, None, None, None))
    pool.handle(InvalidateRequested(invalidated, None, "m", keys_of(ids[1:2])))  # the device has answered nothing yet
    assert pool.outboxes[0]
    assert len(pool.state.below) == 1
    pool.settle_all()
    assert pool.done[evicted][0]["caches"] == BLOCKS
    assert pool.done[invalidated][0]["lower_keys"] == BLOCKS - 1
    assert len(pool.state.below) == 1, "the answers of what went down before change nothing"
    assert [key[2] for key in pool.shelves[0].content] == keys_of(ids[:1])
    assert pool.read(ids) == ids[:1]


def invalidation_with(pool, lose):
    """Answer of an invalidation during which, or before which, the one device is lost."""
    full(pool)
    batch = Batch(1)
    lose(lambda: pool.handle(InvalidateRequested(batch, None, "m", None)))
    (answer,) = pool.done[batch]
    return answer


def lose_device(pool):
    pool.handle(DeviceLost(0, "killed"))
    lost = DeviceLostError("gone")
    while pool.outboxes[0] or pool.moves:
        sent = list(pool.outboxes[0])
        pool.outboxes[0].clear()
        pool.take(pool.state.fail_operations(sent, lost, pool.now))
        while pool.moves:
            pool.take(pool.state.handle(Moved(pool.moves.pop(), ("error", *lost.to_wire())), pool.now))


@pytest.mark.parametrize("order", ["before", "meanwhile"])
def test_an_invalidation_is_not_acknowledged_when_the_disk_of_a_lost_device_may_have_it(pool, order):
    """Its files would be found by the next pool of the same name."""

    def lose(invalidate):
        for step in (invalidate, lambda: lose_device(pool))[:: 1 if order == "meanwhile" else -1]:
            step()

    answer = invalidation_with(pool, lose)
    assert answer[:2] == ("error", "TierError")
    assert "/disk/host-0 may still have" in answer[2]


def test_a_lost_device_without_a_disk_takes_what_is_invalidated_with_it(pool):
    pool.state.ledger.devices[0].disk_url = None
    answer = invalidation_with(pool, lambda invalidate: (lose_device(pool), invalidate()))
    assert answer["held"] == {}


def test_a_fetch_ends_at_its_deadline_with_what_is_there(pool):
    first = full(pool)
    full(pool, 100)
    ticket = begin_fetch(pool, first, timeout_s=2.0)
    assert pool.state.next_deadline() == pool.now + 2.0
    pool.now += 2.0
    pool.tick()
    assert granted(pool, ticket)[1] == []


def test_who_gives_up_gets_no_leases(pool):
    first = full(pool)
    full(pool, 100)
    ticket = begin_fetch(pool, first)
    assert pool.state.is_waiting(ticket)
    pool.handle(TicketsCancelled("c", [ticket]))
    pool.settle_all()
    assert not pool.grants
    assert pool.stores[0].lease_count == 0


def test_who_dies_gets_no_leases(pool):
    first = full(pool)
    full(pool, 100)
    begin_fetch(pool, first, client="d")
    pool.kill("d")
    pool.settle_all()
    assert pool.stores[0].lease_count == 0


def test_a_device_lost_meanwhile_brings_nothing_up(pool):
    first = full(pool)
    full(pool, 100)
    ticket = begin_fetch(pool, first)
    pool.handle(DeviceLost(0, "killed"))
    move = pool.moves.pop()
    error = DeviceLostError("gone")
    pool.take(pool.state.handle(Moved(move, ("error", *error.to_wire())), pool.now))
    assert granted(pool, ticket)[1] == []
    pool.outboxes[0].clear()


def test_more_than_there_is_room_for_comes_as_far_as_it_fits(pool):
    first = full(pool)
    full(pool, 100)
    held = pool.look_up(list(range(100, 100 + BLOCKS // 2)))[1]
    assert len(pool.read(first)) == BLOCKS - len(held)
    pool.release(held)


def test_what_goes_next_is_copied_ahead_and_stays():
    pool = LocalPool(pages=PAGES, lower=True, gc_threshold=0.5)
    pool.connect()
    pool.model()
    ids = full(pool)
    for _ in range(8):
        pool.now += 1
        pool.tick()
        pool.settle_all()
    copied = {key[2] for key in pool.shelves[0].content}
    assert len(copied) >= BLOCKS * 0.6 - 1  # down to the low watermark
    assert copied == set(keys_of(ids[-len(copied) :]))  # the tail goes first
    assert len(pool.look_up(ids)[1]) == BLOCKS
    pool.close()


def test_a_fetch_never_makes_room_by_what_its_chain_hangs_on(pool):
    first = full(pool)
    full(pool, 100)
    held = pool.blocks(range(500, 500 + BLOCKS - 8))  # leased and not sealed: eight blocks are all the room there is
    hit = pool.look_up(first)
    assert (hit[1], hit[5]) == ([], 8)
    pool.settle_all()
    answer = pool.fetch(first, 0)  # the eight are there, held by nobody, and the chain goes on below
    assert answer[0] == "hit"
    assert len(answer[1]) == 8
    pool.release(answer[1])
    pool.release(held[2])
    pool.settle_all()
    assert pool.stores[0].caches == pool.state.ledger.index.published


def test_nothing_is_published_behind_what_somebody_stored_meanwhile(pool):
    """Else it would hang on a cache that goes, and an invalidation of the chain would not find it."""
    first = full(pool)
    full(pool, 100)
    begin_fetch(pool, first[:4])
    assert pool.store(first[:2]) == 2
    pool.settle_all()
    batch = Batch(1)
    pool.handle(InvalidateRequested(batch, None, "m", keys_of(first[:1])))
    pool.settle_all()
    assert pool.store(first[:2]) == 2
    assert pool.read(first[:4]) == first[:2]


def test_an_invalidation_reaches_what_hung_on_content_that_is_gone(pool):
    first = full(pool)
    full(pool, 100)
    model = pool.state.ledger.models[0]
    pool.handle(LowerGone(0, [(model.tenant, model.fingerprint, key) for key in keys_of(first[1:2])], pool.stamp()))
    batch = Batch(1)
    pool.handle(InvalidateRequested(batch, None, "m", keys_of(first[:1])))
    pool.settle_all()
    assert pool.store(first[:2]) == 2
    assert pool.look_up(first[:4])[5] == 0


def test_what_is_void_by_the_end_of_its_writing_leaves_the_books(pool):
    _, _, ids, _, _ = pool.blocks([1])
    pool.seal(ids, keys_of([1]))
    batch = Batch(1)
    pool.handle(PersistRequested(batch, "c", [(1, 0, hashes([1]), None)]))
    pool.settle()
    invalidated = Batch(1)
    pool.handle(InvalidateRequested(invalidated, None, "m", None))
    pool.stores[0].hold(ids)  # as the device does while it writes
    pool.release(ids)
    pool.settle()
    (move,) = [each for each in pool.moves if each.method == "persist"]
    pool.moves.remove(move)
    pool.stores[0].unhold(ids)
    pool.take(pool.state.handle(Moved(move, [True]), pool.now))
    assert pool.done[batch] == [("persisted", [True])]
    assert len(pool.state.ledger.index) == pool.stores[0].caches == 0


def test_evicted_for_nothing_it_is_evicted_all_the_same(pool):
    """Zombies take the room that the books say there is."""
    full(pool)
    pool.state.ledger.devices[0].note_zombies((1000, 3 * PAGE))
    pool._last_stamp = 1000
    pool.blocks(range(300, 303))
    pool.settle()
    pool.state.ledger.devices[0].note_zombies((2000, 0))
    pool._last_stamp = 2000
    assert pool.stores[0].caches == len(pool.state.ledger.index)


def test_a_fill_that_hangs_is_a_miss_and_leaves_the_books_while_the_device_keeps_the_memory(pool):
    first = full(pool)
    full(pool, 100)
    shelf, store = pool.shelves[0], pool.stores[0]
    held: list[int] = []

    def hangs(store, tenant, fingerprint, entries):
        held.extend(cache_id for cache_id, _ in entries)
        store.hold(held)
        return [None] * len(entries)

    real, shelf.fill = shelf.fill, hangs
    ticket = begin_fetch(pool, first[:4])
    pool.settle_all()
    assert granted(pool, ticket)[1] == []
    assert len(pool.state.ledger.index) == store.caches - 4
    assert pool.look_up(first[:4])[5] == 4  # it is told to be below still
    pool.moves.clear()
    shelf.fill = real
    store.unhold(held)
    pool.state.check()


def test_a_revoked_client_that_waits_is_told_at_once_and_others_go_on(pool):
    first = full(pool)
    full(pool, 100)
    tickets = {client: begin_fetch(pool, first, client=client) for client in ("c", "d")}
    pool.revoke("c")
    assert granted(pool, tickets["c"])[:2] == ("error", "LeaseRevokedError")
    assert tickets["c"] not in pool.state.raising
    pool.settle_all()
    assert len(pool.grants["c"]) == 1
    answer = granted(pool, tickets["d"], "d")
    assert len(answer[1]) == BLOCKS
    pool.release(answer[1], "d")


def test_a_fetch_that_begins_beyond_its_hashes_is_refused(pool):
    assert pool.fetch([1, 2], 3)[1] == "InvalidRequestError"


@pytest.mark.parametrize("seed", range(40))
def test_whatever_the_order_every_block_has_its_bytes(seed):
    """Chains that share their beginnings, stored, read, evicted and invalidated while devices and moves lag behind."""
    random = Random(seed)
    pool = LocalPool(devices=2, pages=2, lower=True, gc_threshold=0.6)
    for client in ("c", "d"):
        pool.connect(client)
        pool.model(client)
    chains = [[*range(tree * 50 + 1, tree * 50 + 9), *range(leaf * 20 + 201, leaf * 20 + 213)]
              for leaf, tree in enumerate((0, 0, 1, 1, 2))]  # fmt: skip
    waiting: list[Batch] = []
    void = 0
    for _ in range(120):
        pool.now += 0.1
        client, ids = random.choice("cd"), random.choice(chains)
        match random.randrange(7):
            case 0 | 1:
                assert pool.store(ids, client) <= len(ids)
            case 2 | 3:
                seen = pool.read(ids, client)
                assert seen == [block % 256 for block in ids[: len(seen)]]
            case 4:
                waiting.append(Batch(1))
                pool.handle(PrefixesFetched(waiting[-1], client, [(1, 0, hashes(ids), 0, 5.0, None)]))
            case 5:
                for _ in range(random.randrange(4)):
                    if pool.moves:
                        pool.move(random.randrange(len(pool.moves)))
                    pool.step(random.randrange(2))
            case 6 if random.random() < 0.2:
                batch = Batch(1)
                pool.handle(InvalidateRequested(batch, None, "m", keys_of(ids[:1])))
                pool.settle_all()
                void += len(pool.done.pop(batch))
                assert pool.read(ids, client) == []
    pool.now += 10
    pool.tick()
    pool.settle_all()
    for store in pool.stores:
        assert not any(name.startswith("raise:") for name in store.leases())
    pool.check()
    pool.close()


@pytest.mark.parametrize("block_bytes", [12 << 10, 20 << 10, 28 << 10, 36 << 10])
def test_blocks_that_leave_holes_in_pages_come_up_into_a_full_device(block_bytes):
    """The last free bytes are holes smaller than a block, which the books take for room."""
    local = LocalPool(pages=8, lower=True)
    local.connect()
    model = local.model(block_bytes=block_bytes)
    count = 5 * PAGE // block_bytes
    chains = [list(range(first, first + count)) for first in (0, 1000, 2000, 3000)]
    for ids in chains:
        assert local.store(ids, model=model, block_bytes=block_bytes) == count
    for ids in chains * 2:
        assert local.read(ids, model=model) == [block % 256 for block in ids]
    local.check()
    local.close()


@pytest.mark.parametrize("size_bytes", [PAGE + 4096, 3 * PAGE // 2, 2 * PAGE + 1])
def test_caches_of_a_size_that_is_no_whole_number_of_pages_come_up(size_bytes):
    local = LocalPool(pages=8, lower=True)
    local.connect()
    model = local.model(block_bytes=size_bytes)
    chains = [[number] for number in range(0, 3000, 100)]
    for ids in chains:
        assert local.store(ids, model=model, block_bytes=size_bytes) == 1
    for ids in chains * 2:
        assert local.read(ids, model=model) == [ids[0] % 256]
    local.check()
    local.close()


def test_what_went_down_again_since_a_device_lost_it_is_there(pool):
    """Answers overtake what a device tells by itself: it had dropped its copy of what was in use above."""
    first = full(pool)
    full(pool, 100)
    assert pool.read(first) == first
    lost_at = pool.stamp()
    full(pool, 200)
    model = pool.state.ledger.models[0]
    late = LowerGone(0, [(model.tenant, model.fingerprint, key) for key in keys_of(first)], lost_at)
    pool.handle(late)
    assert pool.read(first) == first


def test_what_is_on_its_way_down_is_not_taken_for_lost(pool):
    first = full(pool)
    others = b"".join(keys_of(range(300, 300 + BLOCKS)))
    pool.handle(BlocksRequested(Batch(1), "c", [(1, 0, others, None, None, None)]))
    model = pool.state.ledger.models[0]
    pool.handle(LowerGone(0, [(model.tenant, model.fingerprint, key) for key in keys_of(first)], pool.stamp()))
    pool.settle_all()
    assert all(pool.state.below.find(model.space, key) for key in keys_of(first))
    pool.handle(LowerGone(0, [(model.tenant, model.fingerprint, key) for key in keys_of(first)], pool.stamp()))
    assert not any(pool.state.below.find(model.space, key) for key in keys_of(first))
