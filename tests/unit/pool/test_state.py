"""The pool's decisions with real devices behind them, step by step."""

from __future__ import annotations

import pytest
from pool_harness import PAGE, LocalPool, hashes, keys_of

from kvpool.errors import (
    AddressSpaceError,
    CacheStateError,
    CapacityError,
    DeviceLostError,
    InvalidRequestError,
    InvalidSizeError,
    LimitError,
    NotSealedError,
    ParentNotResidentError,
    ProtocolError,
    QueueFullError,
    SealedError,
    StaleCacheError,
    UnknownCacheError,
    from_wire,
)
from kvpool.pool.instructions import (
    Batch,
    BlocksRequested,
    CachesRequested,
    DeviceLost,
    PrefixesLookedUp,
    Tick,
    TicketsCancelled,
)


@pytest.fixture
def pool():
    pool = LocalPool(devices=1, pages=4)
    pool.connect()
    pool.model()
    yield pool
    pool.check()
    pool.close()


def error_of(answer):
    assert answer[0] == "error", answer
    return from_wire(answer[1:])


def test_a_cache_is_granted_leased_and_gone_after_release(pool):
    kind, cache_id, device, size, max_size, (_offset, pages, generation) = pool.request(10_000)
    assert (kind, device, size, max_size, generation) == ("granted", 0, 10_000, 10_000, 0)
    assert len(pages) == 1
    assert pool.stores[0].leases() == {"c": 10_000}
    assert pool.release([cache_id]) == ("released", [True])
    assert pool.live_bytes() == 0
    assert isinstance(error_of(pool.release([cache_id])), StaleCacheError)


@pytest.mark.parametrize(
    ("size", "max_size", "error"),
    [
        (0, 0, InvalidSizeError),
        (-1, 5, InvalidSizeError),
        (8, 4, InvalidSizeError),
        (5 * PAGE, 5 * PAGE, InvalidSizeError),
    ],
)
def test_impossible_sizes_are_refused_and_change_nothing(pool, size, max_size, error):
    assert isinstance(error_of(pool.request(size, max_size=max_size)), error)
    assert pool.live_bytes() == 0


def test_more_than_the_models_limit_is_refused(pool):
    number = pool.model(name="small", limit_bytes=1000)
    error = error_of(pool.request(1001, model=number))
    assert isinstance(error, LimitError)
    assert error.details == {"asked_bytes": 1001, "limit_bytes": 1000}


def test_full_of_leases_explains_itself(pool):
    held = pool.request(4 * PAGE)
    error = error_of(pool.request(PAGE))
    assert isinstance(error, CapacityError)
    assert error.details["pinned_bytes"] == 4 * PAGE
    assert error.details["free_bytes"] == error.details["largest_bytes"] == 0
    pool.release([held[1]])
    assert pool.request(PAGE)[0] == "granted"


def test_a_waiting_request_is_granted_by_a_release_in_order(pool):
    held = pool.request(4 * PAGE)
    first = pool.request(3 * PAGE, timeout_s=10)
    second = pool.request(PAGE, timeout_s=10)
    assert (first[0], second[0]) == ("queued", "queued")
    pool.release([held[1]])
    assert [(ticket, answer[0]) for ticket, answer in pool.grants["c"]] == [
        (first[1], "granted"),
        (second[1], "granted"),
    ]


def test_a_small_request_does_not_overtake_a_large_one(pool):
    pool.request(PAGE)
    large = pool.request(4 * PAGE, timeout_s=10)
    small = pool.request(PAGE, timeout_s=10)
    assert (large[0], small[0]) == ("queued", "queued")


def test_a_waiting_request_ends_at_its_deadline(pool):
    pool.request(4 * PAGE)
    pool.now = 5.0
    ticket = pool.request(PAGE, timeout_s=2.0)[1]
    assert pool.state.next_deadline() == 7.0
    pool.now = 6.9
    pool.handle(Tick())
    assert pool.grants == {}
    pool.now = 7.0
    pool.handle(Tick())
    pool.settle()  # who holds what is asked of the devices
    ((answered, answer),) = pool.grants["c"]
    assert answered == ticket
    assert isinstance(error_of(answer), CapacityError)
    assert pool.state.next_deadline() is None


def test_a_request_that_waits_does_not_go_on_evicting_when_leases_are_in_the_way():
    """Each page has a leased cache in it, so no page comes free, whatever goes. Else nothing would stay cached."""
    pool = LocalPool(pages=32)
    pool.connect()
    pool.model()
    leased, blocks = [], PAGE // 4096 - 1
    for page in range(32):
        leased.append(pool.request(4096)[1])
        pool.put(range(1000 * page, 1000 * page + blocks))
    counters, index = pool.state.ledger.counters, pool.state.ledger.index
    assert (index.resident_bytes, counters.evictions) == ([32 * PAGE], 0)
    assert pool.request(PAGE, timeout_s=60.0)[0] == "queued"
    tried = counters.evictions
    assert tried < 32 * blocks
    for number in range(10):
        pool.put([5000 + number])  # each is a reason to try again
    assert (counters.evictions, index.published) == (tried, 32 * blocks - tried + 10)
    pool.release([leased.pop()])
    assert [answer[0] for _, answer in pool.grants["c"]] == ["granted"], "a page comes free"
    pool.check()
    pool.close()


def test_new_blocks_are_not_in_the_way_of_a_large_request_for_the_second_half_of_its_time(pool):
    """There is always one put under way: without this rule the request would see its deadline."""
    under_way = pool.blocks([1])
    ticket = pool.request(4 * PAGE, timeout_s=10.0)[1]
    for number in range(2, 30):
        pool.now += 0.3
        begun = pool.blocks([number])
        assert bool(begun[2]) == (pool.now < 5.0), "blocks pass while it has waited for less than half of its time"
        pool.seal(under_way[2], keys_of([number - 1]), finish=True)
        under_way = begun
        if pool.grants:
            break
    assert [told for told, answer in pool.grants["c"] if answer[0] == "granted"] == [ticket]
    assert pool.now == pytest.approx(5.1)
    assert pool.blocks([1000])[2] == [], "it has all of the memory"


def test_new_blocks_pass_who_waits_with_a_lower_priority(pool):
    held = pool.request(3 * PAGE)
    pool.request(4 * PAGE, timeout_s=10.0, priority=-1)
    pool.now = 9.0
    assert len(pool.blocks([1])[2]) == 1
    pool.release([held[1]])


def test_the_queue_has_a_bound():
    pool = LocalPool(pages=1, queue_limit=2)
    pool.connect()
    pool.model()
    pool.request(PAGE)
    answers = [pool.request(PAGE, timeout_s=9) for _ in range(3)]
    assert [answer[0] for answer in answers] == ["queued", "queued", "error"]
    assert isinstance(error_of(answers[2]), QueueFullError)
    pool.close()


def test_a_cancelled_ticket_is_never_granted(pool):
    held = pool.request(4 * PAGE)
    ticket = pool.request(PAGE, timeout_s=9)[1]
    pool.handle(TicketsCancelled("c", [ticket]))
    pool.release([held[1]])
    assert pool.grants == {}


def test_nobody_cancels_anothers_ticket(pool):
    pool.connect("other")
    held = pool.request(4 * PAGE)
    ticket = pool.request(PAGE, timeout_s=9)[1]
    pool.handle(TicketsCancelled("other", [ticket]))
    pool.release([held[1]])
    assert len(pool.grants["c"]) == 1


def test_a_chain_is_stored_found_and_evicted_tail_first(pool):
    pool.put(range(60))
    assert pool.look_up(range(60))[0] == "hit"
    hit = pool.look_up(range(64))
    assert len(hit[1]) == 60
    pool.release(hit[1])
    pool.release(hit[1])
    assert pool.put(range(100, 110))[1] == 0  # 4 pages hold 64 blocks: six of the old chain go, its tail
    left = pool.look_up(range(60))
    assert len(left[1]) == 54
    pool.release(left[1])
    assert pool.state.ledger.counters.evictions == 6


def test_a_chain_evicts_no_more_than_it_needs_all_at_once(pool):
    pool.put(range(60))  # of 64
    pool.put(range(100, 110))
    assert pool.state.ledger.counters.evictions == 6
    _, ids, *_ = pool.look_up(range(60))
    assert len(ids) == 54
    assert len(pool.look_up(range(100, 110))[1]) == 10
    assert len(pool.blocks(range(200, 210))[2]) == 0  # what is leased now leaves no room, and nothing goes for it


def test_leased_blocks_are_never_evicted(pool):
    pool.put(range(64))
    hit = pool.look_up(range(64))
    assert pool.put(range(100, 110))[2] == []  # everything is leased: nothing of the new chain fits
    pool.release(hit[1])
    assert len(pool.put(range(100, 110))[2]) == 10


def test_what_fits_of_a_chain_is_stored(pool):
    answer = pool.blocks(range(80))
    assert answer[0] == "blocks"
    assert len(answer[2]) == 64
    pool.release(answer[2])
    assert pool.live_bytes() == 0


def test_unsealed_blocks_are_not_found_and_vanish(pool):
    ids = pool.blocks(range(4))[2]
    assert pool.look_up(range(4))[1] == []
    pool.release(ids)
    assert pool.live_bytes() == 0


def test_a_parent_must_be_resident(pool):
    error = error_of(pool.blocks([7], parent=keys_of([6])[0]))
    assert isinstance(error, ParentNotResidentError)
    pool.put([6])
    assert pool.blocks([7], parent=keys_of([6])[0])[0] == "blocks"


def test_the_first_sealed_of_a_key_stays(pool):
    first, second = pool.blocks([1]), pool.blocks([1])
    assert second[1] == 0  # the first is not sealed yet, so the second gets memory of its own
    assert pool.seal(first[2], keys_of([1])) == ("sealed", [True])
    assert pool.seal(second[2], keys_of([1])) == ("sealed", ["duplicate"])
    pool.release(second[2])
    pool.release(first[2])
    assert pool.look_up([1])[1] == first[2]


def test_a_seal_and_a_lookup_in_flight_together_agree(pool):
    """The key is published at the decision; the lease that follows reaches the device after the seal."""
    ids = pool.blocks([1])[2]
    from kvpool.pool.instructions import SealRequested

    seal, look_up = Batch(1), Batch(1)
    pool.handle(SealRequested(seal, "c", [(1, 0, ids, keys_of([1]), None)], False))
    pool.handle(PrefixesLookedUp(look_up, "c", [(2, 0, hashes([1]), None)]))
    pool.settle()
    assert pool.done[seal] == [("sealed", [True])]
    assert pool.done[look_up][0][1] == ids
    pool.release(ids)
    pool.release(ids)


def test_sealing_again(pool):
    ids = pool.blocks([1])[2]
    key, other = keys_of([1]), keys_of([2])
    assert pool.seal(ids, key) == ("sealed", [True])
    assert pool.seal(ids, key) == ("sealed", [True])
    assert isinstance(error_of(pool.seal(ids, other)), SealedError)
    assert pool.look_up([2])[1] == []


def test_another_clients_unsealed_cache_cannot_be_published(pool):
    pool.connect("thief")
    ids = pool.blocks([1])[2]
    from kvpool.pool.instructions import SealRequested

    seal, look_up = Batch(1), Batch(1)
    pool.handle(SealRequested(seal, "thief", [(1, 0, ids, keys_of([5]), None)], False))
    pool.handle(PrefixesLookedUp(look_up, "c", [(2, 0, hashes([5]), None)]))
    pool.settle()
    assert isinstance(error_of(pool.done[seal][0]), UnknownCacheError)
    assert pool.done[look_up] == [("hit", [], [], [], [], 0)]  # not for one moment
    assert isinstance(error_of(pool.seal(ids, keys_of([5]), client="thief", finish=True)), UnknownCacheError)
    assert pool.seal(ids, keys_of([1]), finish=True) == ("sealed", [True])  # and its writer goes on undisturbed


def test_a_foreign_tenant_sees_and_names_nothing(pool):
    pool.put(range(3))
    hit = pool.look_up(range(3))
    pool.connect("stranger", tenant="other")
    number = pool.model("stranger")
    assert pool.look_up(range(3), client="stranger", model=number)[1] == []
    assert isinstance(error_of(pool.release(hit[1], client="stranger")), UnknownCacheError)
    assert isinstance(error_of(pool.look_up(range(3), client="stranger", model=0)), InvalidRequestError)
    pool.release(hit[1])


def test_foreign_ids_are_refused(pool):
    assert isinstance(error_of(pool.release([123456789])), UnknownCacheError)
    assert isinstance(error_of(pool.release([-1])), UnknownCacheError)


def test_releasing_twice_in_one_batch_gives_one_error(pool):
    pool.put([1])
    ids = pool.look_up([1])[1]
    _, outcomes = pool.release([ids[0], ids[0]])
    assert outcomes[0] is True
    assert error_of(outcomes[1]).__class__.__name__ == "DoubleReleaseError"
    assert pool.look_up([1])[1] == ids  # a lease that was never held was not taken off the books


def test_a_dead_clients_leases_end(pool):
    pool.connect("mortal")
    pool.put(range(3))
    pool.look_up(range(3), client="mortal")
    pool.request(PAGE, client="mortal")
    pool.blocks(range(10, 12), client="mortal")
    pool.kill("mortal")
    assert pool.stores[0].leases() == {}
    assert pool.live_bytes() == 3 * 4096
    assert isinstance(error_of_batch(pool, "mortal"), ProtocolError)


def error_of_batch(pool, client):
    with pytest.raises(ProtocolError) as caught:
        pool.request(PAGE, client=client)
    return caught.value


def test_a_client_that_dies_with_its_request_on_the_way(pool):
    pool.connect("mortal")
    batch = Batch(1)
    pool.handle(BlocksRequested(batch, "mortal", [(1, 0, hashes(range(5)), None, None, None)]))
    pool.kill("mortal")
    assert pool.done[batch][0][:2] == ("error", "ProtocolError")
    assert pool.live_bytes() == 0


def test_a_waiting_client_that_dies_frees_the_line(pool):
    pool.connect("mortal")
    held = pool.request(3 * PAGE)
    pool.request(4 * PAGE, client="mortal", timeout_s=9)
    small = pool.request(PAGE, timeout_s=9)
    assert small[0] == "queued"
    pool.kill("mortal")
    assert [answer[0] for _, answer in pool.grants["c"]] == ["granted"]
    pool.release([held[1]])


def test_pins_outlive_leases(pool):
    pool.put([1])
    ids = pool.look_up([1])[1]
    assert pool.pin(ids, True) == ("pinned", [True])
    pool.release(ids)
    pool.put(range(100, 164))
    assert pool.look_up([1])[1] == ids
    pool.release(ids)
    assert pool.pin(ids, False) == ("released", [True])
    pool.put(range(200, 264))
    assert pool.look_up([1])[1] == []


def test_only_sealed_caches_are_pinned(pool):
    granted = pool.request(PAGE)
    assert isinstance(error_of(pool.pin([granted[1]], True)), NotSealedError)
    pool.release([granted[1]])


def test_two_devices_behave_as_one_cache():
    pool = LocalPool(devices=2, pages=2)
    pool.connect()
    pool.model()
    pool.put(range(64))
    assert {pool.state.ledger.index.device[row] for row in range(64)} == {0, 1}
    pool.put(range(100, 110))
    assert len(pool.look_up(range(64))[1]) == 54
    pool.check()
    pool.close()


def test_room_on_one_device_is_made_though_chains_go_on_on_another():
    pool = LocalPool(devices=2, pages=4)
    pool.connect()
    pool.model()
    held = pool.request(4096)
    pool.put(range(64))  # its blocks lie on both devices in turns: on each only the last could go
    pool.put([100, 101])
    answer = pool.request(4 * PAGE)
    assert answer[0] == "granted"
    assert answer[2] != held[2]
    assert pool.state.ledger.counters.evictions == 66  # what went here was in front of all that lay there
    pool.release([answer[1], held[1]])
    assert pool.live_bytes() == 0
    pool.check()
    pool.close()


def test_what_a_held_block_hangs_on_is_not_evicted_with_its_descendants():
    pool = LocalPool(devices=2, pages=1)
    pool.connect()
    pool.model()
    pool.put(range(20))
    assert len(pool.blocks([100, 101], parent=keys_of([19])[0])[2]) == 2  # leased, and behind the whole chain
    assert isinstance(error_of(pool.request(PAGE)), CapacityError)
    assert len(pool.look_up(range(20))[1]) == 20
    pool.check()
    pool.close()


def test_nothing_is_evicted_for_what_would_not_fit_all_the_same():
    pool = LocalPool(devices=1, pages=16)
    pool.connect()
    pool.model()
    pool.put(range(32))
    assert len(pool.blocks([32], parent=keys_of([31])[0])[2]) == 1  # being written: what lies before it stays
    pool.put(range(100, 228))
    assert isinstance(error_of(pool.request(15 * PAGE)), CapacityError)
    assert len(pool.look_up(range(100, 228))[1]) == 128
    pool.check()
    pool.close()


def test_no_cache_is_forgotten_where_evicting_would_not_make_room_for_a_block(pool):
    large, small = pool.model(name="large", block_bytes=PAGE), pool.model(name="small")
    pool.put([1], model=small)
    held = pool.request(4096, model=small)
    pool.put([10, 11], model=large)
    writing = pool.blocks([12], model=large, parent=keys_of([11])[0])[2]
    assert pool.blocks([99], model=large)[2] == []
    assert pool.stores[0].caches == len(pool.state.ledger.index)
    pool.release([held[1], *writing])
    assert len(pool.look_up([1], model=small)[1]) == 1


def test_round_robin_takes_turns():
    pool = LocalPool(devices=3, pages=2, placement="round_robin")
    pool.connect()
    pool.model()
    assert [pool.request(4096)[2] for _ in range(6)] == [0, 1, 2, 0, 1, 2]
    pool.close()


def test_a_lost_device_takes_its_caches_and_nothing_else():
    pool = LocalPool(devices=2, pages=2)
    pool.connect()
    pool.model()
    pool.put(range(64))
    pool.handle(DeviceLost(1, "killed"))
    left = pool.look_up(range(64))
    assert all(device == 0 for device in left[2])
    assert pool.request(PAGE)[2] == 0
    pool.state.check()
    pool.close()


def test_a_hole_in_another_tenants_page_leads_to_more_eviction(pool):
    """Bytes are free, but in pages that another tenant's caches keep: the device says so, and more is evicted."""
    pool.connect("b", tenant="other")
    model = pool.model("b")
    pool.put(range(64))
    for block in (0, 16, 32, 48):
        pool.look_up([*range(block + 1)])  # roots stay leased
    answer = pool.put([900, 901], client="b", model=model)
    assert answer[0] == "blocks"
    pool.check()


def test_a_batch_of_thousands(pool):
    batch = Batch(1000)
    pool.handle(CachesRequested(batch, "c", [(n, 0, 128, 128, 0.0, 0, None) for n in range(1000)]))
    pool.settle()
    answers = pool.done[batch]
    granted = [answer[1] for answer in answers if answer[0] == "granted"]
    assert len(granted) == 64  # what takes a minimum block each
    assert len(set(granted)) == 64
    pool.release(granted)
    assert pool.live_bytes() == 0


def test_what_was_returned_can_be_trimmed(pool):
    granted = pool.request(3 * PAGE)
    pool.release([granted[1]])
    allocator = pool.stores[0].allocator
    assert allocator.usage().reserve_bytes == 3 * PAGE
    pool.stores[0].apply([("trim",)])
    assert allocator.usage().reserve_bytes == 0


@pytest.mark.parametrize("timeout_s", [-1.0, float("nan"), float("inf")])
def test_a_wait_has_an_end(pool, timeout_s):
    assert isinstance(error_of(pool.request(PAGE, timeout_s=timeout_s)), InvalidRequestError)


def test_nobody_connects_as_the_holder_of_pins(pool):
    with pytest.raises(ProtocolError):
        pool.connect("pin:default")


def test_a_key_means_one_size(pool):
    """Whoever finds a key takes the size from its own side: another size would be other caches' bytes."""
    whole = pool.request(8192)[1]
    assert isinstance(error_of(pool.seal([whole], keys_of([1]))), SealedError)  # the model's blocks have 4096
    plain = pool.model(name="plain", block_bytes=None)
    small, large, same = (pool.request(size, model=plain)[1] for size in (4096, 8192, 4096))
    assert pool.seal([small], keys_of([1]), model=plain) == ("sealed", [True])
    assert isinstance(error_of(pool.seal([large], keys_of([1]), model=plain)), SealedError)
    assert pool.seal([same], keys_of([1]), model=plain) == ("sealed", ["duplicate"])
    pool.release([whole, small, large, same])


def test_addresses_that_do_not_exist_are_refused_before_anything_goes(pool):
    pool.put(range(64))
    error = error_of(pool.request(PAGE, max_size=1000 * PAGE))
    assert isinstance(error, InvalidSizeError)
    assert pool.state.ledger.counters.evictions == 0


def test_addresses_are_not_what_a_limit_counts_unless_they_are_memory(pool):
    number = pool.model(name="small", limit_bytes=2 * PAGE)
    kind, cache_id, *_ = pool.request(PAGE, max_size=16 * PAGE, model=number)
    assert kind == "granted"
    pool.release([cache_id])
    below = pool.model(name="below", limit_bytes=PAGE // 4)
    error = error_of(pool.request(1, max_size=PAGE // 2, model=below))  # takes its whole range of a shared page
    assert isinstance(error, LimitError)
    assert "(32 KiB of a device)" in error.message
    assert "at most 16 KiB" in error.message


def test_out_of_addresses_evicts_nothing(pool):
    """The arena is eight times the memory: caches that may grow use it up long before the memory."""
    growing = [pool.request(1, max_size=16 * PAGE)[1] for _ in range(2)]
    pool.put(range(16))
    before = pool.state.ledger.counters.evictions
    error = error_of(pool.request(4096, max_size=16 * PAGE))
    assert isinstance(error, AddressSpaceError)
    assert pool.state.ledger.counters.evictions == before
    pool.release(growing)


def test_a_block_larger_than_any_device_is_refused(pool):
    number = pool.model(name="huge", block_bytes=5 * PAGE)
    assert isinstance(error_of(pool.blocks([1], model=number)), InvalidSizeError)


def test_only_what_is_pinned_is_unpinned(pool):
    pool.put([1])
    ids = pool.look_up([1])[1]
    assert isinstance(error_of(pool.pin(ids, False)), CacheStateError)
    pool.release(ids)


def test_without_a_device_the_loss_is_named(pool):
    pool.handle(DeviceLost(0, "killed"))
    assert isinstance(error_of(pool.request(PAGE)), DeviceLostError)
