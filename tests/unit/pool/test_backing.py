"""Growth in place, as the pool decides it."""

import os

import pytest
from pool_harness import PAGE, LocalPool, keys_of

from kvpool.errors import CapacityError, LimitError, from_wire
from kvpool.pool.instructions import (
    Batch,
    CachesRequested,
    ChangesRequested,
    DeviceFreed,
    DeviceLost,
    PrefixesLookedUp,
    QuotaSet,
    ReleaseRequested,
    TicketsCancelled,
)


@pytest.fixture
def pool():
    pool = LocalPool(pages=8)
    pool.connect()
    pool.model()
    yield pool
    pool.check()
    pool.close()


def change(pool, cache_id, kind, ranges, timeout_s=0.0, client="c"):
    return pool.ask(ChangesRequested, client, [(1, cache_id, kind, ranges, timeout_s, None)])[0]


def resize(pool, cache_id, size_bytes, timeout_s=0.0, client="c"):
    return change(pool, cache_id, "resize", [(0, size_bytes)] if size_bytes else [], timeout_s, client)


def growing(pool, size_bytes=PAGE, max_size_bytes=8 * PAGE, client="c"):
    kind, cache_id, *_ = pool.request(size_bytes, client, max_size=max_size_bytes)
    assert kind == "granted"
    return cache_id


def error_of(answer):
    assert answer[0] == "error", answer
    return from_wire(answer[1:])


def free_bytes(pool, device=0):
    return pool.state.ledger.free_bytes(pool.state.ledger.devices[device])


def test_books_and_device_follow_each_change(pool):
    cache_id = growing(pool)
    kind, same_id, size_bytes, extents, place = resize(pool, cache_id, 3 * PAGE + 1)
    assert (kind, same_id, size_bytes, extents) == ("changed", cache_id, 3 * PAGE + 1, ((0, 3 * PAGE + 1),))
    assert len(place[1]) == 4
    assert place[2] == 1
    assert free_bytes(pool) == 4 * PAGE
    *_, size_bytes, extents, place = change(pool, cache_id, "unback", [(0, 2 * PAGE)])
    assert (size_bytes, extents, len(place[1]), place[2]) == (PAGE + 1, ((2 * PAGE, 3 * PAGE + 1),), 2, 2)
    assert free_bytes(pool) == 6 * PAGE
    change(pool, cache_id, "back", [(7 * PAGE, 8 * PAGE)])
    assert free_bytes(pool) == 5 * PAGE
    resize(pool, cache_id, 0)
    assert free_bytes(pool) == 8 * PAGE
    pool.release([cache_id])
    assert pool.live_bytes() == 0


def test_growing_evicts_what_nobody_holds_on_its_device(pool):
    cache_id = growing(pool)
    pool.put(range(1, 100))
    assert free_bytes(pool) < PAGE
    assert resize(pool, cache_id, 6 * PAGE)[0] == "changed"
    assert pool.state.ledger.counters.evictions > 0


def test_growing_waits_in_line_and_is_told_by_its_ticket(pool):
    cache_id, other = growing(pool), growing(pool, 6 * PAGE)
    kind, ticket = resize(pool, cache_id, 5 * PAGE, timeout_s=5.0)
    assert kind == "queued"
    behind = pool.request(PAGE, timeout_s=5.0)
    assert behind[0] == "queued", "nobody overtakes"
    resize(pool, other, 2 * PAGE)  # gives back at once, though others wait
    told = dict(pool.grants["c"])
    assert told[ticket][:3] == ("changed", cache_id, 5 * PAGE)
    assert told[behind[1]][0] == "granted"


def test_growing_waits_with_the_priority_that_its_cache_was_asked_with(pool):
    _, urgent, *_ = pool.request(PAGE, max_size=8 * PAGE, priority=2)
    other = growing(pool, 7 * PAGE)
    first = pool.request(PAGE, timeout_s=5.0)
    grows = resize(pool, urgent, 2 * PAGE, timeout_s=5.0)
    last = pool.request(PAGE, timeout_s=5.0, priority=2)
    assert [answer[0] for answer in (first, grows, last)] == ["queued"] * 3
    resize(pool, other, 6 * PAGE)
    assert [ticket for ticket, _ in pool.grants.pop("c")] == [grows[1]]
    resize(pool, other, 5 * PAGE)
    assert [ticket for ticket, _ in pool.grants.pop("c")] == [last[1]]


def test_no_room_in_time_is_an_error_with_figures_of_its_device():
    pool = LocalPool(devices=2, pages=8)
    pool.connect()
    pool.model()
    cache_id = growing(pool)
    growing(pool, 6 * PAGE), growing(pool, 6 * PAGE)
    refused = error_of(resize(pool, cache_id, 5 * PAGE))
    device = pool.state.ledger.index.device[pool.state.ledger.index.row_of(cache_id)]
    assert refused.details["asked_bytes"] == 4 * PAGE
    assert refused.details["free_bytes"] == free_bytes(pool, device)
    resize(pool, cache_id, 5 * PAGE, timeout_s=0.999842)
    pool.now = 3.0
    pool.tick()
    pool.settle()
    told = error_of(pool.grants["c"][0][1])
    assert isinstance(told, CapacityError)
    assert "no room within 1 s:" in told.message
    assert f"on device host-{device}, on which its cache lies and stays, " in told.message
    assert resize(pool, cache_id, 2 * PAGE)[0] == "changed", "it is as it was"
    pool.check()
    pool.close()


def test_who_dies_or_cancels_while_waiting_waits_no_more(pool):
    pool.connect("d")
    holder, mine, its = growing(pool, 4 * PAGE), growing(pool), growing(pool, client="d")
    kind, _ = resize(pool, its, 6 * PAGE, timeout_s=50.0, client="d")
    _, ticket = resize(pool, mine, 6 * PAGE, timeout_s=50.0)
    assert kind == "queued"
    pool.kill("d")
    assert len(pool.state.allocations.queue) == 1
    pool.handle(TicketsCancelled("c", [ticket]))
    assert not pool.state.allocations.queue
    pool.release([holder])
    assert pool.state.ledger.index.asked_bytes[pool.state.ledger.index.row_of(mine)] == PAGE


def test_a_cache_that_ends_while_its_growth_waits(pool):
    cache_id, _other = growing(pool), growing(pool, 6 * PAGE)
    resize(pool, cache_id, 6 * PAGE, timeout_s=50.0)
    pool.release([cache_id])
    assert pool.grants["c"][0][1][1] == "StaleCacheError"


def test_a_device_that_has_less_than_the_books_say(pool):
    """Pages that a client still maps are zombies of which the pool does not know yet."""
    cache_id, other = growing(pool), growing(pool, 7 * PAGE)
    store = pool.stores[0]
    for index, serial in store.record(other).pages:
        os.close(store.allocator.export("c", "default", index, serial))
    batch = Batch(2)
    shrink = (1, other, "resize", [(0, PAGE)], 0.0, None)
    grow = (2, cache_id, "resize", [(0, 7 * PAGE)], 5.0, None)
    pool.handle(ChangesRequested(batch, "c", [shrink, grow]))
    pool.settle()
    shrunk, (kind, ticket) = pool.done.pop(batch)
    assert shrunk[0] == "changed"
    assert kind == "queued"
    for client, serials in store.allocator.take_drops().items():
        store.allocator.dropped(client, serials)
    pool.handle(DeviceFreed(0, (pool.stamp(), 0)))
    pool.settle()
    ((told, answer),) = pool.grants["c"]
    assert (told, answer[2]) == (ticket, 7 * PAGE)


def test_changes_of_one_cache_that_are_under_way_together(pool):
    cache_id = growing(pool)
    batch = Batch(3)
    ranges = [("back", [(2 * PAGE, 4 * PAGE)]), ("unback", [(3 * PAGE, 4 * PAGE)]), ("back", [(6 * PAGE, 7 * PAGE)])]
    pool.handle(ChangesRequested(batch, "c", [(n, cache_id, *each, 0.0, None) for n, each in enumerate(ranges)]))
    pool.settle()
    *_, last = pool.done.pop(batch)
    assert last[3] == ((0, PAGE), (2 * PAGE, 3 * PAGE), (6 * PAGE, 7 * PAGE))
    assert free_bytes(pool) == 5 * PAGE


@pytest.mark.parametrize(("pages", "timeout_s"), [((6, 7), 0.0), ((6, 6), 0.0), ((6, 6, 7), 5.0)])
def test_changes_of_one_cache_on_a_device_that_is_short_come_to_an_end(pool, pages, timeout_s):
    """They do not take each other for the one that has found the memory, again and again."""
    cache_id, other = growing(pool), growing(pool, 7 * PAGE)
    store = pool.stores[0]
    for index, serial in store.record(other).pages:
        os.close(store.allocator.export("c", "default", index, serial))
    batch = Batch(1 + len(pages))
    items = [(1, other, "resize", [(0, PAGE)], 0.0, None)]
    items += [(2 + n, cache_id, "resize", [(0, size * PAGE)], timeout_s, None) for n, size in enumerate(pages)]
    pool.handle(ChangesRequested(batch, "c", items))
    rounds = 0
    while pool.step(0):
        rounds += 1
        assert rounds < 100, "the device is asked again and again"
    _, *answers = pool.done.pop(batch)
    if not timeout_s:
        assert [answer[1] for answer in answers] == ["CapacityError"] * len(pages)
    else:
        assert [answer[0] for answer in answers] == ["queued"] * len(pages)
    for client, serials in store.allocator.take_drops().items():
        store.allocator.dropped(client, serials)
    pool.handle(DeviceFreed(0, (pool.stamp(), 0)))
    pool.settle()
    if timeout_s:
        told = dict(pool.grants["c"])
        assert [told[ticket][2] for _, ticket in answers] == [size * PAGE for size in pages]
    assert resize(pool, cache_id, 2 * PAGE)[0] == "changed"


def test_a_change_behind_another_finds_what_has_become_of_the_cache(pool):
    cache_id = growing(pool)
    batches = [Batch(1) for _ in range(3)]
    for batch, pages in zip(batches, (4, 5, 6), strict=True):
        pool.handle(ChangesRequested(batch, "c", [(1, cache_id, "resize", [(0, pages * PAGE)], 0.0, None)]))
    pool.handle(ReleaseRequested(Batch(1), "c", [(1, [cache_id], None)]))
    pool.settle()
    assert [pool.done[batch][0][0] for batch in batches[1:]] == ["error", "error"], "it has ended"
    assert pool.live_bytes() == 0


@pytest.mark.parametrize("quotas", [False, True])
def test_a_growth_that_waits_on_its_device_holds_up_nobody_who_has_room_on_another(quotas):
    pool = LocalPool(devices=2, pages=8, placement="least_loaded")
    pool.connect()
    pool.model()
    if quotas:
        pool.administer(QuotaSet(Batch(1), "default", None, "0%", "100%", None))
    mine, its, filler = growing(pool), growing(pool), growing(pool, 6 * PAGE)
    index = pool.state.ledger.index
    here, there, also_here = (index.device[index.row_of(each)] for each in (mine, its, filler))
    assert here == also_here != there
    kind, ticket = resize(pool, mine, 4 * PAGE, timeout_s=50.0)
    assert kind == "queued"
    assert resize(pool, its, 2 * PAGE)[0] == "changed", "it grows on the other device"
    assert pool.request(6 * PAGE)[2] == there
    assert free_bytes(pool, here) == PAGE
    behind = pool.request(PAGE, timeout_s=50.0)
    assert behind[0] == "queued", "what is free there is for the growth that waits"
    assert pool.grants == {}
    pool.release([filler])
    told = dict(pool.grants["c"])
    assert told[ticket][0] == "changed"
    assert told[behind[1]][2] == here
    pool.check()
    pool.close()


def test_a_growth_does_not_overtake_a_new_cache_that_would_fit_on_no_device():
    pool = LocalPool(devices=2, pages=8, placement="least_loaded")
    pool.connect()
    pool.model()
    mine, its = growing(pool, 4 * PAGE), growing(pool, 4 * PAGE)
    _, first = pool.request(6 * PAGE, timeout_s=50.0)
    _, second = resize(pool, mine, 5 * PAGE, timeout_s=50.0)
    pool.release([its])
    told = dict(pool.grants["c"])
    assert (told[first][0], told[second][0]) == ("granted", "changed")
    pool.check()
    pool.close()


def test_what_may_not_be_changed(pool):
    cache_id = growing(pool)
    pool.connect("d")
    for client, wrong, name in [
        ("c", (cache_id, "resize", [(0, 9 * PAGE)], 0.0), "InvalidSizeError"),
        ("c", (cache_id, "resize", [(1, PAGE)], 0.0), "InvalidRequestError"),
        ("c", (cache_id, "shrink", [], 0.0), "InvalidRequestError"),
        ("c", (cache_id, "back", [(5, 5)], 0.0), "InvalidSizeError"),
        ("c", (cache_id, "back", [(0, PAGE)], -1.0), "InvalidRequestError"),
        ("c", (cache_id + 1, "back", [(0, PAGE)], 0.0), "UnknownCacheError"),
        ("d", (cache_id, "back", [(0, PAGE)], 0.0), "UnknownCacheError"),
    ]:
        assert pool.ask(ChangesRequested, client, [(1, *wrong, None)])[0][1] == name
    fixed = pool.request(PAGE)[1]
    assert error_of(resize(pool, fixed, 2 * PAGE)).details["max_size_bytes"] == PAGE
    assert resize(pool, fixed, 100)[0] == "changed", "what may not grow may shrink"
    assert pool.state.ledger.index.asked_bytes[pool.state.ledger.index.row_of(fixed)] == 100


def test_sealing_keeps_the_size_and_wants_a_whole_front(pool):
    model = pool.model(name="caches", block_bytes=None)
    cache_id = pool.request(PAGE, max_size=8 * PAGE, model=model)[1]
    key = keys_of([1])
    change(pool, cache_id, "back", [(3 * PAGE, 4 * PAGE)])
    refused = pool.seal([cache_id], key, model=model)
    assert error_of(refused).message.startswith(f"cache {cache_id} is backed at")
    resize(pool, cache_id, 2 * PAGE)
    batch = Batch(1)
    pool.handle(ChangesRequested(batch, "c", [(1, cache_id, "resize", [(0, 3 * PAGE)], 0.0, None)]))
    assert "is being changed" in error_of(pool.seal([cache_id], key, model=model)).message
    pool.settle()
    assert pool.seal([cache_id], key, model=model) == ("sealed", [True])
    assert error_of(resize(pool, cache_id, PAGE)).message.startswith(f"cache {cache_id} is sealed")
    pool.ask(ReleaseRequested, "c", [(1, [cache_id], None)])
    _, ids, _, places, sizes, _ = pool.ask(PrefixesLookedUp, "c", [(1, model, key[0], None)])[0]
    assert (ids, sizes, len(places[0][1])) == ([cache_id], [3 * PAGE], 3)


def test_a_device_that_is_lost_answers_its_changes(pool):
    cache_id, _ = growing(pool), growing(pool, 6 * PAGE)
    resize(pool, cache_id, 6 * PAGE, timeout_s=50.0)
    pool.handle(DeviceLost(0, "killed"))
    pool.tick()
    assert pool.grants["c"][0][1][1] == "StaleCacheError"


def waiting(pool, kind, ranges):
    """Return a cache of two pages whose growth waits for memory, with its ticket and who has that memory."""
    cache_id, other = growing(pool, 2 * PAGE), growing(pool, 6 * PAGE)
    queued, ticket = change(pool, cache_id, kind, ranges, timeout_s=50.0)
    assert queued == "queued"
    return cache_id, ticket, other


def test_shrinking_passes_growth_of_the_same_cache_that_waits(pool):
    cache_id, ticket, other = waiting(pool, "back", [(4 * PAGE, 8 * PAGE)])
    assert change(pool, cache_id, "unback", [(PAGE, 2 * PAGE)])[3] == ((0, PAGE),)
    assert "c" not in pool.grants
    resize(pool, other, PAGE)
    assert dict(pool.grants["c"])[ticket][3] == ((0, PAGE), (4 * PAGE, 8 * PAGE))


def test_what_is_given_back_is_no_longer_waited_for(pool):
    cache_id, ticket, _ = waiting(pool, "back", [(4 * PAGE, 8 * PAGE)])
    behind = pool.request(PAGE, timeout_s=50.0)[1]
    assert change(pool, cache_id, "unback", [(5 * PAGE, 8 * PAGE)])[3] == ((0, 2 * PAGE),)
    assert "c" not in pool.grants
    change(pool, cache_id, "unback", [(PAGE, 2 * PAGE)])
    ((told, answer),) = pool.grants["c"]
    assert (told, answer[3]) == (ticket, ((0, PAGE), (4 * PAGE, 5 * PAGE))), "it waits for less, and where it stood"
    assert next(iter(pool.state.allocations.queue.items()))[0] == behind


def test_growth_of_which_nothing_is_left_ends_though_others_stand_before_it(pool):
    before = growing(pool)
    growing(pool, PAGE), growing(pool, 5 * PAGE)
    cache_id = growing(pool)
    resize(pool, before, 4 * PAGE, timeout_s=50.0)
    _, ticket = change(pool, cache_id, "back", [(4 * PAGE, 8 * PAGE)], timeout_s=50.0)
    change(pool, cache_id, "unback", [(2 * PAGE, 8 * PAGE)])
    ((told, answer),) = pool.grants["c"]
    assert (told, answer[0], answer[3]) == (ticket, "changed", ((0, PAGE),))


def test_the_last_resize_counts(pool):
    cache_id, ticket, other = waiting(pool, "resize", [(0, 8 * PAGE)])
    assert resize(pool, cache_id, PAGE)[2] == PAGE
    assert dict(pool.grants["c"])[ticket][2] == PAGE
    assert not pool.state.allocations.queue
    resize(pool, other, PAGE)
    assert free_bytes(pool) == 6 * PAGE


def test_a_shrink_takes_from_growth_that_its_device_refuses(pool):
    """It is at the device already when the shrink comes, and is planned again afterwards."""
    cache_id, other = growing(pool), growing(pool, 7 * PAGE)
    store = pool.stores[0]
    for index, serial in store.record(other).pages:
        os.close(store.allocator.export("c", "default", index, serial))
    both, last = Batch(2), Batch(1)
    shrink = (1, other, "resize", [(0, PAGE)], 0.0, None)
    grow = (2, cache_id, "resize", [(0, 6 * PAGE)], 5.0, None)
    pool.handle(ChangesRequested(both, "c", [shrink, grow]))
    pool.handle(ChangesRequested(last, "c", [(3, cache_id, "resize", [], 0.0, None)]))
    pool.settle()
    assert [answer[2] for answer in pool.done.pop(both)] == [PAGE, PAGE]
    assert pool.done.pop(last)[0][3] == ()


@pytest.mark.parametrize("key", [keys_of([1])[0], None])
def test_sealing_ends_growth_that_waits(pool, key):
    model = pool.model(name="caches", block_bytes=None)
    cache_id = pool.request(2 * PAGE, max_size=8 * PAGE, model=model)[1]
    growing(pool, 6 * PAGE)
    _, ticket = resize(pool, cache_id, 8 * PAGE, timeout_s=50.0)
    assert pool.seal([cache_id], [key], model=model) == ("sealed", [True])
    ((told, answer),) = pool.grants["c"]
    assert (told, answer[1]) == (ticket, "SealedError")


def test_nothing_is_known_of_changes_that_are_answered_or_cancelled(pool):
    cache_id, ticket, _ = waiting(pool, "resize", [(0, 8 * PAGE)])
    pool.handle(TicketsCancelled("c", [ticket]))
    resize(pool, cache_id, 8 * PAGE, timeout_s=1.0)
    pool.now = 2.0
    pool.tick()
    change(pool, cache_id, "unback", [(0, PAGE)])
    assert not pool.state.changes._growing


# -- limits -----------------------------------------------------------------------------------------------------------


def limit(pool, limit, model="m", tenant="default"):
    pool.administer(QuotaSet(Batch(1), tenant, model, 0, limit, None))


@pytest.mark.parametrize("kind", ["resize", "back"])
@pytest.mark.parametrize("model", ["m", None], ids=["model", "tenant"])
def test_growth_above_a_limit_is_refused_at_once_and_holds_up_nobody(pool, kind, model):
    limit(pool, 4 * PAGE, model)
    cache_id = growing(pool)
    refused = error_of(change(pool, cache_id, kind, [(0, 5 * PAGE)], timeout_s=50.0))
    assert isinstance(refused, LimitError)
    assert refused.details == {"asked_bytes": 5 * PAGE, "limit_bytes": 4 * PAGE}
    assert f"of cache {cache_id} to be backed" in refused.message
    assert pool.request(PAGE)[0] == "granted"
    assert change(pool, cache_id, kind, [(0, 3 * PAGE)])[0] == "changed"


def test_growth_for_which_others_of_its_model_leave_no_room_below_the_limit_waits(pool):
    limit(pool, 4 * PAGE)
    cache_id, other = growing(pool), growing(pool, 2 * PAGE)
    kind, ticket = resize(pool, cache_id, 4 * PAGE, timeout_s=50.0)
    assert kind == "queued"
    pool.release([other])
    assert dict(pool.grants["c"])[ticket][0] == "changed"


def test_what_is_above_a_lowered_limit_shrinks_and_keeps_what_it_has(pool):
    cache_id = growing(pool, 6 * PAGE)
    limit(pool, 4 * PAGE)
    assert resize(pool, cache_id, 6 * PAGE)[0] == "changed", "as it is"
    assert resize(pool, cache_id, 5 * PAGE)[0] == "changed"
    assert isinstance(error_of(resize(pool, cache_id, 6 * PAGE)), LimitError)
    assert resize(pool, cache_id, 4 * PAGE)[0] == "changed"


def test_a_lowered_limit_refuses_who_waits_for_more(pool):
    cache_id, other = growing(pool), growing(pool, 5 * PAGE)
    _, grows = resize(pool, cache_id, 6 * PAGE, timeout_s=50.0)
    _, large = pool.request(5 * PAGE, timeout_s=50.0)
    _, small = pool.request(3 * PAGE, timeout_s=50.0)
    limit(pool, "50%")
    told = dict(pool.grants.pop("c"))
    assert sorted(told) == [grows, large]
    assert all(isinstance(error_of(answer), LimitError) for answer in told.values())
    pool.release([other])
    assert dict(pool.grants["c"])[small][0] == "granted"


def test_who_waits_for_more_than_a_limit_lets_others_pass_when_it_is_lowered(pool):
    pool.model(name="other")
    cache_id, _ = growing(pool), growing(pool, 5 * PAGE)
    _, grows = resize(pool, cache_id, 6 * PAGE, timeout_s=50.0)
    _, behind = pool.request(2 * PAGE, model=1, timeout_s=50.0)
    limit(pool, 4 * PAGE)
    told = dict(pool.grants.pop("c"))
    assert isinstance(error_of(told[grows]), LimitError)
    assert told[behind][0] == "granted"


def test_a_limit_that_shrinks_with_a_lost_device_refuses_who_waits_for_more():
    pool = LocalPool(devices=2, pages=8)
    pool.connect()
    pool.model()
    limit(pool, "50%")
    held = [growing(pool, 3 * PAGE), growing(pool, 3 * PAGE)]
    lost = pool.state.ledger.index.device[pool.state.ledger.index.row_of(held[1])]
    kind, ticket = pool.request(5 * PAGE, timeout_s=50.0)
    assert kind == "queued"
    pool.handle(DeviceLost(lost, "test"))
    pool.settle()
    told = error_of(dict(pool.grants["c"])[ticket])
    assert isinstance(told, LimitError)
    assert told.details["limit_bytes"] == 4 * PAGE
    pool.close()


def test_a_limit_that_is_lowered_while_a_device_looks_for_room(pool):
    """It has less than the books say: pages that a client still maps are zombies of which these do not know yet."""
    other = growing(pool, 7 * PAGE)
    store = pool.stores[0]
    for index, serial in store.record(other).pages:
        os.close(store.allocator.export("c", "default", index, serial))
    batch = Batch(1)
    pool.handle(ChangesRequested(Batch(1), "c", [(1, other, "resize", [(0, PAGE)], 0.0, None)]))
    pool.handle(CachesRequested(batch, "c", [(2, 0, 6 * PAGE, 6 * PAGE, 50.0, 0, None)]))
    pool.handle(QuotaSet(Batch(1), "default", "m", 0, 4 * PAGE, None))
    pool.settle()
    assert isinstance(error_of(pool.done[batch][0]), LimitError)
    for client, serials in store.allocator.take_drops().items():
        store.allocator.dropped(client, serials)
