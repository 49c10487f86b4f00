"""Content that goes by word: evicted, or invalidated so that nobody finds it and nothing of it is left."""

from __future__ import annotations

import pytest
from pool_harness import PAGE, LocalPool, hashes, keys_of

import kvpool.pool.invalidation
import kvpool.pool.removal
import kvpool.pool.void_marks
from kvpool.errors import (
    InvalidatedError,
    InvalidRequestError,
    InvalidSizeError,
    ParentNotResidentError,
    from_wire,
)
from kvpool.pool.instructions import (
    Batch,
    BlocksRequested,
    CachesRequested,
    DeviceLost,
    EvictRequested,
    InvalidateRequested,
    PrefixesLookedUp,
    SealRequested,
)

BLOCK = 4096
OLD, NEW = 0xAA, 0x55


@pytest.fixture
def pool():
    pool = LocalPool(devices=2, pages=4)
    pool.connect()
    pool.model()
    yield pool
    pool.check()
    pool.close()


def error_of(answer):
    assert answer[0] == "error", answer
    return from_wire(answer[1:])


def put(pool, ids, byte, client="c", model=0):
    """Store a chain whose bytes all have one value."""
    pool.now += 1
    _, resident, cache_ids, devices, places = pool.blocks(ids, client, model)
    for device, place in zip(devices, places, strict=True):
        pool.fill(device, place, BLOCK, byte)
    if cache_ids:
        assert pool.seal(cache_ids, keys_of(ids)[resident:], client, model, finish=True)[0] == "sealed"
    return cache_ids


def found(pool, ids, client="c", model=0):
    """How many blocks a look-up finds; they are released again."""
    pool.now += 1
    _, cache_ids, *_ = pool.look_up(ids, client, model)
    if cache_ids:
        pool.release(cache_ids, client)
    return len(cache_ids)


# -- evict ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tenant", [None, "default"])
def test_evict_takes_the_least_recently_used_until_enough_is_found(pool, tenant):
    for chain in ([1, 2], [3, 4], [5, 6]):
        put(pool, chain, OLD)
    assert found(pool, [1, 2]) == 2
    answer = pool.evict(tenant, size_bytes=3 * BLOCK)
    assert answer == {"caches": 3, "bytes": 3 * BLOCK, "leased_caches": 0, "leased_bytes": 0}
    assert [found(pool, chain) for chain in ([1, 2], [3, 4], [5, 6])] == [2, 0, 1]
    counters = pool.state.ledger.counters
    assert (counters.evictions, counters.evictions_by_reason) == (3, {"capacity": 0, "request": 3, "invalidate": 0})


def test_evict_leaves_what_is_held_and_what_leads_to_it_and_says_so(pool):
    put(pool, [1, 2, 3, 4], OLD)
    _, leased, *_ = pool.look_up([1, 2])
    request = pool.request(PAGE)
    answer = pool.evict()
    assert answer == {"caches": 2, "bytes": 2 * BLOCK, "leased_caches": 3, "leased_bytes": 2 * BLOCK + PAGE}
    assert pool.live_bytes() == 2 * BLOCK + PAGE
    pool.release([*leased, request[1]])
    assert pool.evict()["caches"] == 2
    assert pool.live_bytes() == 0


def test_evict_can_be_for_one_model_device_or_tenant(pool):
    other = pool.model(name="other")
    pool.connect("x", "elsewhere")
    theirs = pool.model("x")
    put(pool, [1, 2], OLD)
    put(pool, [1, 2], OLD, model=other)
    put(pool, [1, 2], OLD, client="x", model=theirs)
    assert pool.evict(model="other")["caches"] == 2
    assert (found(pool, [1, 2]), found(pool, [1, 2], model=other)) == (2, 0)
    assert pool.evict(tenant="elsewhere")["caches"] == 2
    assert found(pool, [1, 2]) == 2
    on = {pool.state.ledger.devices[device].name: block for block, device in enumerate(pool.look_up([1, 2])[2], 1)}
    pool.release(pool.look_up([1, 2])[1] * 2)
    assert on.keys() == {"host-0", "host-1"}
    first, last = sorted(on, key=on.__getitem__)
    assert pool.evict(model="m", device=first)["caches"] == 0, "its child, on the other device, could not be hit then"
    assert pool.evict(model="m", device=last)["caches"] == 1
    assert pool.evict(model="m", device=first)["caches"] == 1
    for refused in ({"model": "none"}, {"device": "host-9"}, {"tenant": "default", "model": theirs}):
        with pytest.raises(InvalidRequestError, match=r"no model|no device"):
            pool.evict(**refused)
    with pytest.raises(InvalidSizeError):
        pool.evict(size_bytes=0)


def test_a_chain_over_two_devices_goes_from_its_tail(pool, monkeypatch):
    monkeypatch.setattr(kvpool.pool.removal, "STEP_CACHES", 2)
    put(pool, range(10), OLD)
    index = pool.state.ledger.index
    assert {index.device[row] for row in range(10)} == {0, 1}
    assert pool.evict(size_bytes=4 * BLOCK)["caches"] == 4
    assert found(pool, range(10)) == 6
    assert pool.evict()["caches"] == 6


def test_evicting_grants_who_waits(pool):
    put(pool, range(4), OLD)
    held = [pool.request(3 * PAGE), pool.request(3 * PAGE)]
    pool.look_up(range(4))  # held: so the next must wait
    waiting = pool.request(PAGE + 1, timeout_s=9)
    assert waiting[0] == "queued"
    pool.release([held[0][1]])
    assert pool.grants["c"][0][1][0] == "granted"


# -- invalidate -------------------------------------------------------------------------------------------------------


def test_nothing_of_an_invalidated_model_is_found_or_left(pool):
    put(pool, range(8), OLD)
    put(pool, range(100, 104), OLD)
    pool.evict(size_bytes=3 * BLOCK)  # what went before leaves its bytes in free memory
    other = pool.model(name="other")
    put(pool, [1, 2], NEW, model=other)
    assert pool.left(OLD) == 10 * BLOCK
    answer = pool.invalidate()
    assert answer == {"caches": 9, "bytes": 9 * BLOCK, "unsealed": 0, "lower_keys": 0, "held": {}}
    assert pool.left(OLD) == 0
    assert found(pool, range(8)) == 0
    assert found(pool, [1, 2], model=other) == 2
    assert pool.left(NEW) == 2 * BLOCK
    put(pool, range(8), NEW)
    assert found(pool, range(8)) == 8


def test_a_key_takes_what_is_chained_behind_it_and_nothing_else(pool):
    put(pool, [1, 2, 3, 4], OLD)
    put(pool, [1, 2, 33, 44], OLD)
    put(pool, [5], OLD)
    answer = pool.invalidate(keys=keys_of([3, 77]))
    assert (answer["caches"], answer["held"]) == (2, {})
    assert [found(pool, ids) for ids in ([1, 2, 3, 4], [1, 2, 33, 44], [5], [4])] == [2, 4, 1, 0]
    assert pool.left(OLD) == 5 * BLOCK
    assert pool.invalidate(keys=keys_of([1]))["caches"] == 4
    assert pool.left(OLD) == BLOCK


def test_who_holds_invalidated_content_keeps_it_and_it_is_zeroed_at_the_end(pool):
    put(pool, [1, 2], OLD)
    pool.connect("reader")
    _, leased, *_ = pool.look_up([1, 2], "reader")
    answer = pool.invalidate()
    assert (answer["caches"], answer["held"]) == (2, {"reader": (2, 2 * BLOCK)})
    assert pool.left(OLD) == 2 * BLOCK
    assert found(pool, [1, 2]) == 0
    put(pool, [1, 2], NEW)  # the same keys, while the old content is still held
    assert found(pool, [1, 2]) == 2
    again = pool.invalidate()
    assert again["held"] == {}
    assert isinstance(error_of(pool.seal(leased, keys_of([1, 2]), "reader")), InvalidatedError)
    assert isinstance(error_of(pool.pin(leased, True, "reader")), InvalidatedError)
    assert pool.release(leased, "reader") == ("released", [True, True])
    assert (pool.left(OLD), pool.live_bytes()) == (0, 0)


@pytest.mark.parametrize("ending", ["killed", "revoked"])
def test_it_is_zeroed_when_its_holder_ends_in_another_way(pool, ending):
    put(pool, [1, 2], OLD)
    pool.connect("reader")
    pool.look_up([1, 2], "reader")
    pool.invalidate()
    if ending == "killed":
        pool.kill("reader")
    else:
        pool.revoke("reader")
    assert (pool.left(OLD), pool.live_bytes()) == (0, 0)


def test_pins_end(pool):
    (cache_id,) = put(pool, [1], OLD)
    pool.look_up([1])
    pool.pin([cache_id], True)
    pool.pin([cache_id], True)
    pool.release([cache_id])
    assert pool.state.leases.pinned == {cache_id: 2}
    assert pool.invalidate()["held"] == {}
    assert (pool.state.leases.pinned, pool.live_bytes(), pool.left(OLD)) == ({}, 0, 0)
    (cache_id,) = put(pool, [1], NEW)
    pool.look_up([1])
    assert pool.pin([cache_id], True) == ("pinned", [True])


@pytest.mark.parametrize("keys", [None, keys_of([2])], ids=["model", "key"])
def test_what_was_asked_for_before_cannot_be_sealed_after(pool, keys):
    _, _, cache_ids, devices, places = pool.blocks([1, 2, 3])
    for device, place in zip(devices, places, strict=True):
        pool.fill(device, place, BLOCK, OLD)
    answer = pool.invalidate(keys=keys)
    assert answer["unsealed"] == (3 if keys is None else 2)
    for finish in (False, True):
        assert isinstance(error_of(pool.seal(cache_ids, keys_of([1, 2, 3]), finish=finish)), InvalidatedError)
    assert isinstance(error_of(pool.seal(cache_ids[2:], keys_of([3]))), InvalidatedError), "behind the one named"
    if keys is not None:
        assert pool.seal(cache_ids[:1], keys_of([1])) == ("sealed", [True]), "in front of it: not concerned"
    pool.release(cache_ids)
    assert pool.left(OLD) == (0 if keys is None else BLOCK)
    put(pool, [1, 2, 3], NEW)
    assert found(pool, [1, 2, 3]) == 3


def test_a_whole_cache_asked_for_before_cannot_get_an_invalidated_key(pool):
    whole = pool.model(name="whole", block_bytes=None)
    before = pool.request(BLOCK, model=whole)
    (key, other) = keys_of([1, 2])
    pool.invalidate("whole", [key])
    assert isinstance(error_of(pool.seal([before[1]], [key], model=whole)), InvalidatedError)
    assert pool.seal([before[1]], [other], model=whole) == ("sealed", [True])
    after = pool.request(BLOCK, model=whole)
    assert pool.seal([after[1]], [key], model=whole) == ("sealed", [True])
    pool.release([before[1], after[1]])
    pool.invalidate("whole", keys_of([9]))
    assert len(pool.state.ledger.void_marks) == 0, "nobody is old enough to heed any of it"


def test_a_key_that_is_invalidated_again_is_heeded_by_who_asked_between(pool):
    whole = pool.model(name="whole", block_bytes=None)
    pool.request(BLOCK, model=whole)
    pool.invalidate("whole", keys_of([1]))
    pool.invalidate("whole", keys_of([2]))
    (first, *_), cache = pool.state.ledger.writers, pool.request(BLOCK, model=whole)
    pool.release([first])
    pool.invalidate("whole", keys_of([1]))
    assert isinstance(error_of(pool.seal([cache[1]], keys_of([1]), model=whole)), InvalidatedError)
    assert pool.seal([cache[1]], keys_of([2]), model=whole) == ("sealed", [True])


def test_what_one_must_heed_who_never_seals_is_bounded_and_does_not_concern_others(pool, monkeypatch):
    monkeypatch.setattr(kvpool.pool.void_marks, "MOST_HASHES", 100)
    marks = pool.state.ledger.void_marks
    whole = pool.model(name="whole", block_bytes=None)
    pool.request(BLOCK)  # a working cache of another model
    for n in range(3):
        pool.invalidate("whole", keys_of(range(100 * n, 100 * n + 100)))
    assert len(marks) == 0
    before = pool.request(BLOCK, model=whole)
    for n in range(10):
        pool.invalidate("whole", keys_of(range(10 * n, 10 * n + 10)))
    assert len(marks) == 100
    between = [pool.request(BLOCK, model=whole) for _ in range(2)]
    assert pool.seal([between[0][1]], keys_of([5]), model=whole) == ("sealed", [True]), "invalidated before it"
    pool.invalidate("whole", keys_of(range(1000, 1001)))
    assert len(marks) == 1, "all of the model from now on, for who asked before"
    for cache in (before, between[1]):
        assert isinstance(error_of(pool.seal([cache[1]], keys_of([77]), model=whole)), InvalidatedError)
    after = pool.request(BLOCK, model=whole)
    assert pool.seal([after[1]], keys_of([1000]), model=whole) == ("sealed", [True])
    pool.release([before[1], between[1][1]])
    pool.invalidate("whole", keys_of([9]))
    assert len(marks) == 0


def test_marks_that_nobody_heeds_any_more_do_not_count(pool, monkeypatch):
    monkeypatch.setattr(kvpool.pool.void_marks, "MOST_HASHES", 100)
    whole = pool.model(name="whole", block_bytes=None)
    cache = pool.request(BLOCK, model=whole)
    for n in range(100):  # there is always one who writes, but none for long
        pool.invalidate("whole", keys_of(range(10 * n, 10 * n + 10)))
        cache, old = pool.request(BLOCK, model=whole), cache
        assert pool.seal([old[1]], keys_of([9999 + n]), model=whole) == ("sealed", [True])
        assert len(pool.state.ledger.void_marks) <= 100


def test_a_request_that_waited_meanwhile_counts_as_asked_for_before(pool):
    whole = pool.model(name="whole", block_bytes=None)
    held = [pool.request(4 * PAGE), pool.request(4 * PAGE)]
    assert pool.request(PAGE, model=whole, timeout_s=9)[0] == "queued"
    pool.invalidate("whole")
    pool.release([held[0][1]])
    ((_, granted),) = pool.grants["c"]
    assert isinstance(error_of(pool.seal([granted[1]], keys_of([1]), model=whole)), InvalidatedError)


def test_an_invalidated_parent_is_not_resident(pool):
    put(pool, [1, 2], OLD)
    pool.invalidate(keys=keys_of([2]))
    assert isinstance(error_of(pool.blocks([3], parent=keys_of([2])[0])), ParentNotResidentError)
    assert pool.blocks([3], parent=keys_of([1])[0])[0] == "blocks"


def test_a_look_up_that_was_decided_before_is_answered_before_and_finds_nothing(pool):
    """The lease is on its way to one device while another one already answers the invalidation."""
    put(pool, range(4), OLD)
    other = pool.model(name="other")
    put(pool, [9], OLD, model=other)
    look_ups, invalidated = Batch(2), Batch(1)
    items = [(1, 0, hashes(range(4)), None), (2, other, hashes([9]), None)]
    pool.handle(PrefixesLookedUp(look_ups, "c", items))
    pool.handle(InvalidateRequested(invalidated, None, "m", None))
    for device in (1, 0, 1, 0, 1, 0, 1, 0):
        if invalidated in pool.done:
            break
        pool.step(device)
    assert look_ups in pool.done, "whoever was asked before has answered"
    (_, old, *_), (_, others, *_) = pool.done[look_ups]
    assert (old, len(others)) == ([], 1)
    pool.settle()
    assert pool.done.pop(invalidated)[0]["caches"] == 4
    pool.release(others)
    assert pool.live_bytes() == BLOCK


@pytest.mark.parametrize("finish", [True, False])
def test_a_seal_decided_before_is_invalidated_as_well(pool, finish):
    _, _, cache_ids, devices, places = pool.blocks([1, 2])
    for device, place in zip(devices, places, strict=True):
        pool.fill(device, place, BLOCK, OLD)
    sealed, invalidated = Batch(1), Batch(1)
    pool.handle(SealRequested(sealed, "c", [(1, 0, cache_ids, keys_of([1, 2]), None)], finish))
    pool.handle(InvalidateRequested(invalidated, None, "m", None))
    pool.settle()
    assert pool.done.pop(sealed) == [("sealed", [True, True])]
    assert pool.done.pop(invalidated)[0]["caches"] == 2
    assert found(pool, [1, 2]) == 0
    if not finish:
        pool.release(cache_ids)
    assert (pool.live_bytes(), pool.left(OLD)) == (0, 0)


def test_blocks_on_their_way_when_the_model_is_invalidated_are_void(pool):
    asked, invalidated = Batch(1), Batch(1)
    pool.handle(BlocksRequested(asked, "c", [(1, 0, hashes([1, 2]), None, None, None)]))
    pool.handle(InvalidateRequested(invalidated, None, "m", None))
    pool.settle()
    ((_, _, cache_ids, _, _),) = pool.done.pop(asked)
    assert pool.done.pop(invalidated)[0]["unsealed"] == 2
    assert isinstance(error_of(pool.seal(cache_ids, keys_of([1, 2]))), InvalidatedError)
    pool.release(cache_ids)


def test_void_content_evicted_for_somebody_between_two_steps_is_zeroed(pool, monkeypatch):
    monkeypatch.setattr(kvpool.pool.removal, "STEP_CACHES", 1)
    pool.handle(DeviceLost(1, "killed"))  # else the chain lies on both, and its root is no victim
    put(pool, range(16), OLD)
    assert pool.left(OLD) == 16 * BLOCK
    invalidated, asked = Batch(1), Batch(1)
    pool.handle(InvalidateRequested(invalidated, None, "m", None))
    pool.handle(CachesRequested(asked, "c", [(1, 0, 4 * PAGE, 4 * PAGE, 0.0, 0, None)]))
    pool.settle()
    (granted,) = pool.done.pop(asked)
    assert granted[0] == "granted"
    assert pool.state.ledger.counters.evictions_by_reason["capacity"] > 0
    assert pool.done.pop(invalidated)[0]["caches"] == 16
    assert pool.left(OLD) == 0
    pool.release([granted[1]])


def test_many_steps_leave_nothing(pool, monkeypatch):
    monkeypatch.setattr(kvpool.pool.invalidation, "STEP_BYTES", BLOCK)
    put(pool, range(20), OLD)
    put(pool, [0, 1, 2, 30, 31], OLD)
    assert pool.invalidate()["caches"] == 22
    assert (pool.live_bytes(), pool.left(OLD), len(pool.state.ledger.index)) == (0, 0, 0)
    assert pool.state.ledger.counters.evictions_by_reason["invalidate"] == 22


def test_a_second_invalidation_ends_after_the_first(pool, monkeypatch):
    """It finds nothing to do, as the first has it all; but what it was asked for is not gone yet."""
    monkeypatch.setattr(kvpool.pool.removal, "STEP_CACHES", 1)
    put(pool, range(8), OLD)
    batches = [Batch(1) for _ in range(3)]
    for batch in batches:
        pool.handle(InvalidateRequested(batch, None, "m", None))
    while batches[1] not in pool.done:
        assert batches[2] not in pool.done
        assert pool.step(0) + pool.step(1)
    assert batches[0] in pool.done
    assert pool.left(OLD) == 0
    pool.settle()
    assert [pool.done.pop(batch)[0]["caches"] for batch in batches] == [8, 0, 0]


def test_what_leads_to_content_that_is_void_already_can_be_invalidated_before_that_is_gone(pool):
    put(pool, [1, 2, 3, 4, 5], OLD)
    _, leased, *_ = pool.look_up([1, 2, 3])
    first, second = (InvalidateRequested(Batch(1), None, "m", keys_of([key])) for key in (3, 1))
    pool.handle(first)
    pool.handle(second)
    pool.settle()
    assert [pool.done.pop(event.batch)[0] for event in (first, second)] == [
        {"caches": 3, "bytes": 3 * BLOCK, "unsealed": 0, "lower_keys": 0, "held": {"c": (1, BLOCK)}},
        {"caches": 2, "bytes": 2 * BLOCK, "unsealed": 0, "lower_keys": 0, "held": {"c": (2, 2 * BLOCK)}},
    ]
    pool.check()
    put(pool, [1, 2, 3], NEW)
    assert found(pool, [1, 2, 3]) == 3
    pool.release(leased)
    assert (pool.left(OLD), pool.live_bytes()) == (0, 3 * BLOCK)


def test_what_leads_to_content_that_is_void_and_still_leased_can_be_invalidated(pool):
    put(pool, [100], OLD)
    put(pool, [101], OLD)
    pool.evict()  # so that the next rows come in descending order
    leaf = put(pool, [1, 2], OLD)[1]
    pool.release([pool.look_up([1, 2])[1][0]])
    assert pool.invalidate(keys=keys_of([2]))["held"] == {"c": (1, BLOCK)}
    assert pool.invalidate(keys=keys_of([1])) == {
        "caches": 1,
        "bytes": BLOCK,
        "unsealed": 0,
        "lower_keys": 0,
        "held": {},
    }
    assert found(pool, [1]) == 0
    pool.release([leaf])
    assert (pool.left(OLD), pool.live_bytes()) == (0, 0)


def test_a_device_lost_meanwhile_does_not_keep_the_answer(pool):
    put(pool, range(8), OLD)
    invalidated = Batch(1)
    pool.handle(InvalidateRequested(invalidated, None, "m", None))
    sent = list(pool.outboxes[1])
    pool.outboxes[1].clear()
    pool.handle(DeviceLost(1, "killed"))
    from kvpool.errors import DeviceLostError

    pool.take(pool.state.fail_operations(sent, DeviceLostError("gone"), pool.now))
    for _ in range(4):
        pool.step(0)
        sent = list(pool.outboxes[1])
        pool.outboxes[1].clear()
        pool.take(pool.state.fail_operations(sent, DeviceLostError("gone"), pool.now))
    assert pool.done.pop(invalidated)[0]["caches"] == 8


def test_tenants_are_invalidated_apart_or_all_together(pool):
    pool.connect("x", "elsewhere")
    theirs = pool.model("x")
    put(pool, [1], OLD)
    put(pool, [1], OLD, client="x", model=theirs)
    assert pool.invalidate(tenant="elsewhere")["caches"] == 1
    assert (found(pool, [1]), found(pool, [1], "x", theirs)) == (1, 0)
    put(pool, [1], OLD, client="x", model=theirs)
    assert pool.invalidate()["caches"] == 2
    assert pool.left(OLD) == 0
    with pytest.raises(InvalidRequestError, match="no model 'absent'"):
        pool.invalidate("absent")
    for keys in ([], [b"short"], "text", 5):
        with pytest.raises(InvalidRequestError):
            pool.invalidate(keys=keys)
    assert pool.state.ledger.invalidations == 2


def test_a_void_space_is_used_again(pool):
    for _ in range(20):
        put(pool, [1, 2], OLD)
        pool.invalidate()
        put(pool, [1, 2], OLD)
        pool.invalidate(keys=keys_of([1]))
    assert len(pool.state.ledger.index.spaces.of(None)) <= 3


def test_what_is_leased_between_two_steps_is_replaced_by_others(monkeypatch):
    monkeypatch.setattr("kvpool.pool.removal.STEP_CACHES", 2)
    pool = LocalPool(devices=1, pages=4)
    pool.connect()
    pool.model()
    for number in range(10):
        pool.now = float(number)
        pool.put([number])
    evicted = Batch(1)
    pool.handle(EvictRequested(evicted, None, "m", None, 4 * 4096))
    for number in (2, 3):  # next in turn
        pool.handle(PrefixesLookedUp(Batch(1), "c", [(1, 0, hashes([number]), None)]))
    pool.settle()
    assert pool.done[evicted][0]["caches"] == 4
    pool.close()


def test_blocks_whose_parent_went_with_its_device_go_with_any_key_of_their_model(pool):
    """Stored anew, what they were chained behind would lead to them again."""
    put(pool, [1, 2, 3, 4], OLD)
    index = pool.state.ledger.index
    of = [index.device[index.find(0, block_hash)] for block_hash in keys_of([1, 2, 3, 4])]
    assert of == [of[0], 1 - of[0], of[0], 1 - of[0]]
    pool.handle(DeviceLost(of[1], "killed"))
    assert found(pool, [3]) == 1
    pool.invalidate(keys=keys_of([1]))
    put(pool, [1, 2], NEW)
    assert found(pool, [1, 2, 3, 4]) == 2


@pytest.mark.parametrize("finish", [True, False])
def test_blocks_chained_behind_a_duplicate_go_with_any_key_of_their_model(finish):
    """Two store overlapping chains at once: with the duplicates, what tells behind which keys the others come goes."""
    pool = LocalPool(pages=8)
    for client in "ab":
        pool.connect(client)
        pool.model(client)
    first, second = pool.blocks([1, 2], "a")[2], pool.blocks([1, 2, 3], "b")[2]
    pool.seal(first, keys_of([1, 2]), "a", finish=True)
    pool.seal(second, keys_of([1, 2, 3]), "b", finish=finish)
    if not finish:
        pool.release(second, "b")
    assert len(pool.read([1, 2, 3], "a")) == 3
    pool.invalidate(keys=keys_of([100]))
    assert len(pool.read([1, 2, 3], "a")) == 3, "they are chained behind what has the key"
    assert pool.evict(size_bytes=1)["caches"] == 1
    assert len(pool.read([1, 2, 3], "a")) == 2, "the tail goes first"
    pool.seal(pool.blocks([3], "a", parent=keys_of([2])[0])[2], keys_of([3]), "a", finish=True)
    pool.invalidate(keys=keys_of([1]))
    assert pool.read([1, 2, 3], "a") == []
    pool.seal(pool.blocks([1, 2], "a")[2], keys_of([1, 2]), "a", finish=True)
    assert len(pool.read([1, 2, 3], "a")) == 2, "not 3, of which one was declared void"
    pool.check()
    pool.close()
