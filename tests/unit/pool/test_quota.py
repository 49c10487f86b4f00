"""Quotas: guarantees that are met by eviction alone, limits that hold, what is borrowed and what goes first."""

from __future__ import annotations

import pytest
from pool_harness import PAGE, LocalPool, keys_of
from quota_pool import PAGES, A, B, error_of, guarantee_both, held, lease, put, set_quota, two_models

from kvpool.errors import CapacityError, LimitError
from kvpool.pool.instructions import Batch, CachesRequested, DeviceLost
from kvpool.pool.reclaim import Reclaim
from kvpool.sizes import format_size


@pytest.fixture
def pool():
    with two_models() as pool:
        yield pool


# -- guarantees -------------------------------------------------------------------------------------------------------


def test_an_idle_guarantee_is_borrowed_by_caches_and_given_back_when_its_owner_asks(pool):
    guarantee_both(pool)
    assert put(pool, B, 100, PAGES) == PAGES
    assert held(pool, "b") == PAGES
    assert len(lease(pool, A, 4)) == 4
    assert (held(pool, "a"), held(pool, "b")) == (4, 6)


def test_leases_never_eat_into_what_others_are_guaranteed(pool):
    guarantee_both(pool)
    mine = lease(pool, B, PAGES)
    assert len(mine) == 6  # its own 40 %, and the 20 % that nobody is guaranteed
    error = error_of(pool.request(PAGE, model=B))
    assert isinstance(error, CapacityError)
    assert "guaranteed" in error.message
    assert error.details["leasable_bytes"] == 0
    assert error.details["free_bytes"] == 4 * PAGE
    assert len(lease(pool, A, PAGES)) == 4


@pytest.mark.parametrize(("limit", "figure"), [(None, "leasable_bytes"), ("60%", "limit_bytes")])
def test_what_would_have_fitted_is_no_more_than_quotas_allow(pool, limit, figure):
    guarantee_both(pool)
    set_quota(pool, "b", "40%", limit)
    put(pool, A, 0, 4)
    assert len(lease(pool, B, 5)) == 5
    error = error_of(pool.request(2 * PAGE, model=B))
    assert isinstance(error, CapacityError)
    assert figure in error.details
    assert error.details["evictable_bytes"] + error.details["free_bytes"] == 5 * PAGE
    assert error.details["largest_bytes"] == PAGE


def test_no_guarantee_is_blamed_where_leases_alone_are_in_the_way(pool):
    guarantee_both(pool)
    assert (len(lease(pool, A, 4)), len(lease(pool, B, 6))) == (4, 6)
    error = error_of(pool.request(PAGE, model=B))
    assert isinstance(error, CapacityError)
    assert "guaranteed" not in error.message
    assert "on 1 device, " in error.message
    assert "leasable_bytes" not in error.details


def test_a_hit_ends_where_leasing_it_would_take_what_others_are_guaranteed(pool):
    guarantee_both(pool)
    chain = list(range(1, PAGES + 1))
    assert pool.store(chain, model=B, block_bytes=PAGE) == 6  # who writes holds
    assert pool.store(chain, model=B, block_bytes=PAGE) == PAGES
    hit = pool.look_up(chain, model=B)
    assert len(hit[1]) == 6
    assert len(pool.look_up(chain, model=B)[1]) == 6  # these are leased already
    assert len(lease(pool, A, 4)) == 4


def test_pinning_by_word_counts_as_leasing(pool):
    guarantee_both(pool)
    put(pool, B, 100, PAGES)
    found = pool.state.ledger.index.find_all(pool.state.ledger.models[B].space, keys_of(range(100, 100 + PAGES)))
    ids = [pool.state.ledger.index.id_of(row) for row in found]
    assert isinstance(error_of(pool.pin(ids, held=True)), CapacityError)
    assert pool.pin(ids[:6], held=True)[1] == [True] * 6


def test_the_borrower_goes_first_and_nobody_falls_below_its_guarantee(pool):
    guarantee_both(pool)
    put(pool, A, 0, 4)  # the oldest, by LRU the first to go
    put(pool, B, 100, 6)
    pool.model(name="c", block_bytes=PAGE)
    assert put(pool, 2, 200, 5) == 5  # has no guarantee: takes the 20 % that are lent, its own from then on
    assert (held(pool, "a"), held(pool, "b")) == (4, 4)
    assert pool.look_up([0], model=A)[1]


def test_who_is_over_its_guarantee_evicts_by_the_policy_among_all_that_borrow(pool):
    set_quota(pool, "a", "20%")
    put(pool, A, 0, 5)
    put(pool, B, 100, 5)
    put(pool, B, 200, 2)
    assert (held(pool, "a")) == 3  # 2 of its 3 borrowed ones were the oldest


def test_a_small_guarantee_is_met_though_all_that_is_borrowed_is_one_large_cache(pool):
    large = pool.model(name="large", block_bytes=None)
    set_quota(pool, "large", "50%")
    set_quota(pool, "a", "40%")
    _, cache_id, *_ = pool.request(6 * PAGE, model=large)
    pool.seal([cache_id], keys_of([7]), model=large, finish=True)
    put(pool, B, 100, 4)
    assert len(lease(pool, A, 4)) == 4
    assert held(pool, "large") == 6  # what has no guarantee went, and that was enough
    put_again = pool.request(PAGE, model=B)
    assert put_again[0] == "error"  # who has no guarantee does not get it
    set_quota(pool, "a", "50%")
    assert len(lease(pool, A, 1)) == 1
    assert held(pool, "large") == 0


def test_a_tenants_guarantee_covers_those_of_its_models(pool):
    pool.connect("x", "x")
    set_quota(pool, None, "60%")
    set_quota(pool, "a", "40%")
    assert [q["guaranteed_bytes"] // PAGE for q in pool.state.quotas()] == [6, 4]
    other = pool.model("x", name="a", block_bytes=PAGE)
    answers = [pool.request(PAGE, client="x", model=other) for _ in range(PAGES)]
    assert [answer[0] for answer in answers] == ["granted"] * 4 + ["error"] * 6
    assert len(lease(pool, B, PAGES)) == 2  # of the tenant's 60 %, 40 are kept for a
    assert len(lease(pool, A, PAGES)) == 4


def test_guarantees_that_exceed_the_memory_are_split_in_proportion(pool):
    set_quota(pool, "a", 8 * PAGE)
    set_quota(pool, "b", 12 * PAGE)
    assert [q["guaranteed_bytes"] for q in pool.state.quotas()] == [4 * PAGE, 6 * PAGE]


def test_guarantees_that_exceed_the_memory_are_accepted_and_the_answer_says_so(pool):
    assert set_quota(pool, "a", 8 * PAGE)["warning"] is None
    holds = set_quota(pool, "b", 12 * PAGE)
    assert holds["applied"]
    assert f"{format_size(20 * PAGE)}, and the pool has {format_size(10 * PAGE)}" in holds["warning"]
    pool.model(name="c")
    assert set_quota(pool, "c", 0, 2 * PAGE)["warning"] is None, "it is guaranteed nothing"
    assert [q["warning"] for q in pool.state.quotas()] == [holds["warning"]] * 2 + [None]
    assert set_quota(pool, "b", 2 * PAGE)["warning"] is None
    assert [q["warning"] for q in pool.state.quotas()] == [None] * 3


def test_a_lost_device_shrinks_shares_and_splits_bytes():
    pool = LocalPool(devices=2, pages=PAGES)
    pool.connect()
    set_quota(pool, "a", "50%")
    set_quota(pool, "b", 10 * PAGE)
    assert [q["guaranteed_bytes"] for q in pool.state.quotas()] == [10 * PAGE, 10 * PAGE]
    pool.handle(DeviceLost(1, "killed"))
    split = [5 * PAGE * 10 // 15, 10 * PAGE * 10 // 15]
    assert [q["guaranteed_bytes"] for q in pool.state.quotas()] == split
    assert all(f"the pool has {format_size(10 * PAGE)} of memory" in q["warning"] for q in pool.state.quotas())
    pool.close()


# -- limits -----------------------------------------------------------------------------------------------------------


def test_at_its_limit_a_model_evicts_its_own(pool):
    set_quota(pool, "a", 0, "30%")
    put(pool, B, 100, 2)
    for n in range(6):
        put(pool, A, n, 1)
        assert held(pool, "a") <= 3
    assert [bool(pool.look_up([n], model=A)[1]) for n in range(6)] == [False] * 3 + [True] * 3
    assert all(pool.look_up([100 + n], model=B)[1] for n in range(2))


def test_with_nothing_of_its_own_to_evict_it_waits_and_the_error_says_so(pool):
    set_quota(pool, "a", 0, 3 * PAGE)
    mine = lease(pool, A, 3)
    error = error_of(pool.request(PAGE, model=A))
    assert isinstance(error, CapacityError)
    assert "limit" in error.message
    assert (error.details["limit_bytes"], error.details["held_bytes"]) == (3 * PAGE, 3 * PAGE)
    assert pool.request(PAGE, model=A, timeout_s=5.0)[0] == "queued"
    assert pool.request(PAGE, model=B)[0] == "granted"  # nobody else is held up
    pool.release(mine[:1])
    assert [answer[0] for _, answer in pool.grants["c"]] == ["granted"]


def test_who_waited_for_a_limit_that_is_lifted_is_told_what_it_lacks_now(pool):
    """It waits behind one of a higher priority by then, and is not tried again before that one was."""
    set_quota(pool, "a", 0, 3 * PAGE)
    lease(pool, A, 3)
    lease(pool, B, 7)
    assert pool.request(PAGE, model=A, timeout_s=5.0)[0] == "queued"
    assert pool.request(PAGE, model=A, timeout_s=9.0, priority=1)[0] == "queued"
    set_quota(pool, "a", 0, None)
    pool.now += 5.0
    pool.tick()
    pool.now += 1.0  # devices have told who holds what
    pool.tick()
    ((_, answer),) = pool.grants["c"]
    error = error_of(answer)
    assert isinstance(error, CapacityError)
    assert "limit_bytes" not in error.details
    assert error.details["free_bytes"] == 0


def test_blocks_are_stored_up_to_the_limit(pool):
    set_quota(pool, "a", 0, 3 * PAGE)
    answer = pool.blocks(range(1, 8), model=A)
    assert len(answer[2]) == 3


def test_what_could_never_be_granted_is_refused(pool):
    set_quota(pool, "a", 0, 3 * PAGE)
    error = error_of(pool.request(4 * PAGE, model=A, timeout_s=5.0))
    assert isinstance(error, LimitError)
    assert error.details == {"asked_bytes": 4 * PAGE, "limit_bytes": 3 * PAGE}
    set_quota(pool, "a", 0, "80%")
    assert pool.request(4 * PAGE, model=A)[0] == "granted"


def test_a_limit_below_use_drains_and_revokes_nothing(pool):
    put(pool, A, 0, 3)
    mine = lease(pool, A, 4)
    for n, cache_id in enumerate(mine):
        pool.seal([cache_id], keys_of([50 + n]), model=A)
    holds = set_quota(pool, "a", 0, 2 * PAGE)
    assert holds["applied"]
    assert held(pool, "a") == 4  # what nobody held went at once
    assert holds["warning"] == pool.state.quotas()[0]["warning"]
    assert (
        "model 'a' of tenant 'default' holds more than its limit, 256 KiB of at most 128 KiB, and drains"
        in (holds["warning"])
    )
    for left, cache_id in zip((3, 2, 2), mine, strict=False):
        pool.release([cache_id])
        assert held(pool, "a") == left
    assert not pool.state.ledger.quotas.draining
    assert pool.state.quotas()[0]["warning"] is None
    assert pool.request(PAGE, model=A)[0] == "granted"


def test_what_drains_is_looked_at_only_when_more_of_it_can_go(pool, monkeypatch):
    looked = []
    own = Reclaim.own
    monkeypatch.setattr(Reclaim, "own", lambda self, *arguments: (looked.append(arguments), own(self, *arguments))[1])
    mine = lease(pool, A, 4)
    set_quota(pool, "a", 0, PAGE)
    put(pool, B, 100, 2)
    for _ in range(3):
        pool.tick()
    assert not looked, "all of it is leased"
    pool.seal(mine[:1], keys_of([50]), model=A)
    pool.release(mine[:1])
    assert (held(pool, "a"), bool(looked)) == (3, True)
    set_quota(pool, "a", 0, None)
    parent, child = pool.blocks([1, 2], model=A)[2]
    pool.seal([parent, child], keys_of([1, 2]), model=A)
    pool.release([parent])
    set_quota(pool, "a", 0, PAGE)
    pool.tick()
    looked.clear()
    for _ in range(3):
        pool.tick()
    assert (held(pool, "a"), looked) == (5, []), "what leads to a leased block stays"
    pool.release([child])
    assert held(pool, "a") == 3


@pytest.mark.parametrize("guaranteed", [2, 1])
def test_a_shortage_of_what_is_in_the_books_takes_of_a_guarantee_only_for_ones_own(pool, guaranteed):
    """A device has less than the books say: what lies partly within another's guarantee goes for a guarantee only."""
    whole = pool.model(name="whole", block_bytes=None)
    pool.seal([pool.request(3 * PAGE, model=whole)[1]], keys_of([9]), model=whole, finish=True)
    set_quota(pool, "whole", 2 * PAGE)
    set_quota(pool, "a", guaranteed * PAGE)
    assert len(lease(pool, A, 2)) == 2  # these, as though the device had no room for them
    room, device, model = pool.state.blocks._room, pool.state.ledger.devices[0], pool.state.ledger.models[A]
    going = room.evict_for(model, device, 2 * PAGE, 2 * PAGE)
    assert len(going) == (1 if guaranteed == 2 else 0)
    pool.stores[0].apply([("evict", going)])


def test_the_limit_of_a_spec_is_a_quota_until_somebody_sets_one(pool):
    small = pool.model(name="small", block_bytes=PAGE, limit_bytes=2 * PAGE)
    assert len(lease(pool, small, 4)) == 2
    assert next(q for q in pool.state.quotas() if q["model"] == "small")["revision"] == 0
    assert set_quota(pool, "small", 0, 4 * PAGE, revision=1)["applied"]
    assert len(lease(pool, small, 4)) == 2
    pool.state.register_model(
        "c",
        {"name": "small", "identity": {"model": "small", "revision": "2"}, "block_bytes": PAGE, "limit_bytes": PAGE},
    )
    assert next(q for q in pool.state.quotas() if q["model"] == "small")["limit_bytes"] == 4 * PAGE


def test_a_tenants_limit_counts_all_its_models(pool):
    set_quota(pool, None, 0, 5 * PAGE)
    assert len(lease(pool, A, 3)) == 3
    assert len(lease(pool, B, 3)) == 2


def test_quotas_set_before_or_after_content_count_the_same(pool):
    put(pool, A, 0, 3)
    mine = lease(pool, A, 2)
    set_quota(pool, "a", "10%")
    (shown,) = pool.state.quotas()
    assert (shown["held_bytes"], shown["leased_bytes"]) == (5 * PAGE, 2 * PAGE)
    pool.invalidate("a")  # what is held stays, and counts on
    assert held(pool, "a") == 2
    pool.release(mine)
    assert held(pool, "a") == 0


@pytest.mark.parametrize("policy", ["lru", "lfu", "size_aware_lru", "adaptive"])
def test_every_policy_keeps_its_order_when_accounts_are_told_apart(policy):
    orders = []
    for with_quota in (False, True):
        pool = LocalPool(pages=PAGES, policy=policy)
        pool.connect()
        for name in "ab":
            pool.model(name=name, block_bytes=PAGE)
        if with_quota:
            set_quota(pool, "a", 0, "100%")
        for n in range(5):
            pool.now += 1
            put(pool, A, n, 1)
            put(pool, B, 100 + n, 1)
            hit = pool.look_up([n], model=A) if n % 2 else pool.look_up([100 + n], model=B)
            pool.release(hit[1])
        index = pool.state.ledger.index
        orders.append([(index.key_of(row)) for row in index.victims(0)])
        pool.close()
    assert len(orders[0]) == PAGES
    if policy == "adaptive":  # draws samples
        assert sorted(orders[0]) == sorted(orders[1])
    else:
        assert orders[0] == orders[1]


# -- who waits for what -----------------------------------------------------------------------------------------------


def ask(pool, model, pages, *, timeout_s=9.0, priority=0):
    return pool.request(pages * PAGE, model=model, timeout_s=timeout_s, priority=priority)


def test_within_its_guarantee_nobody_stands_behind_others(pool):
    guarantee_both(pool)
    lease(pool, B, 6)
    assert ask(pool, B, 1)[0] == "queued"
    assert ask(pool, A, 1)[0] == "granted"
    assert ask(pool, A, 4)[0] == "queued"  # 3 of it are left
    assert ask(pool, A, 1)[0] == "queued"  # behind the large one


def test_a_raised_guarantee_lets_those_who_wait_have_it(pool):
    guarantee_both(pool)
    lease(pool, B, 6)
    assert ask(pool, B, 1)[0] == "queued"
    set_quota(pool, "a", 0)
    assert [answer[0] for _, answer in pool.grants["c"]] == ["granted"]


def test_nobody_ever_sees_more_than_its_limit_between_decision_and_answer(pool):
    """Both halves of a burst are decided before the device has answered anything."""
    set_quota(pool, "a", 0, 3 * PAGE)
    for _ in range(2):
        pool.handle(CachesRequested(Batch(3), "c", [(n, A, PAGE, PAGE, 9.0, 0, None) for n in range(3)]))
        assert held(pool, "a") == 3
    pool.settle()
    assert held(pool, "a") == 3


def test_by_priority_then_in_order_and_small_ones_do_not_pass_a_large_one(pool):
    mine = lease(pool, A, PAGES)
    tickets = {
        name: ask(pool, B, pages, priority=priority)[1]
        for name, pages, priority in (("large", 4, 0), ("small", 1, 0), ("urgent", 1, 1))
    }
    pool.release(mine[:3])
    assert [ticket for ticket, _ in pool.grants["c"]] == [tickets["urgent"]]  # 2 are free, and kept for the large one
    pool.release(mine[3:5])
    assert [ticket for ticket, _ in pool.grants["c"]] == [tickets["urgent"], tickets["large"]]
    pool.release(mine[5:6])
    assert [ticket for ticket, _ in pool.grants["c"]][-1] == tickets["small"]


def test_a_full_queue_refuses_at_once_and_says_when_to_come_again():
    pool = LocalPool(pages=4, queue_limit=1)
    pool.connect()
    pool.model(name="a", block_bytes=PAGE)
    mine = lease(pool, A, 4)
    assert ask(pool, A, 1, timeout_s=8.0)[0] == "queued"
    pool.now = 3.0
    error = error_of(ask(pool, A, 1, priority=9))
    assert type(error).__name__ == "QueueFullError"
    assert error.details["retry_after_s"] == pytest.approx(5.0)  # nobody has left yet: the next deadline
    pool.release(mine[:1])  # one leaves, at 3.0
    assert ask(pool, A, 1, timeout_s=8.0)[0] == "queued"
    pool.now = 4.0
    assert error_of(ask(pool, A, 1)).details["retry_after_s"] == pytest.approx(1.0)  # as fast as the last one
    pool.close()
