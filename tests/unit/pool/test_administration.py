"""Who holds what and what is there: told, revoked, listed, listened to; and a policy that is changed at run time."""

from __future__ import annotations

import os

import pytest
from pool_harness import PAGE, LocalPool, hashes, keys_of

from kvpool.cache import eviction
from kvpool.cache.eviction import register_policy
from kvpool.cache.lru import LeafFirstLRU
from kvpool.errors import InvalidRequestError, LeaseRevokedError, ProtocolError, UnknownPolicyError, from_wire
from kvpool.pool.instructions import Batch, CachesRequested, DeviceLost, SealRequested, Tick
from kvpool.pool.journal import LISTENING_S, MOST_EVENTS, Happened, Journal
from kvpool.pool.listing import list_caches, list_models
from kvpool.pool.statistics import collect

BLOCK = 4096


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


def listed(pool, **options):
    wanted = {"tenant": None, "model": None, "limit": 100, "sort": None, "after": None} | options
    return list_caches(pool.state.ledger, pool.state.leases, now=pool.now, **wanted)


# -- revoke -----------------------------------------------------------------------------------------------------------


def test_a_revoked_client_holds_nothing_and_can_do_nothing(pool):
    pool.put([1, 2])
    pool.connect("other")
    pool.look_up([1], "other")
    _, leased, *_ = pool.look_up([1, 2])
    _, cache_id, *_ = pool.request(PAGE)
    answer = pool.revoke("c")
    assert answer == {"client": "c", "caches": 3, "bytes": 2 * BLOCK + PAGE, "mapped_bytes": 0}
    assert [store.leases() for store in pool.stores if store.leases()] == [{"other": BLOCK}]
    assert pool.live_bytes() == 2 * BLOCK, "what was not sealed went with its lease"
    for refused in (
        lambda: pool.request(PAGE),
        lambda: pool.look_up([1]),
        lambda: pool.release(leased),
        lambda: pool.seal([cache_id], [None]),
        lambda: pool.model(name="new"),
    ):
        with pytest.raises(LeaseRevokedError, match="connect again"):
            refused()
    with pytest.raises(InvalidRequestError, match="no client 'c' is connected"):
        pool.revoke("c")
    with pytest.raises(ProtocolError, match="connected already"):
        pool.connect("c")
    assert pool.look_up([1, 2], "other")[1] == leased


def test_who_is_revoked_while_it_waits_is_told_and_the_next_is_served(pool):
    held = [pool.request(4 * PAGE), pool.request(4 * PAGE)]
    pool.connect("greedy")
    waiting = pool.request(4 * PAGE, "greedy", timeout_s=9)
    behind = pool.request(PAGE, timeout_s=9)
    pool.revoke("greedy")
    ((ticket, answer),) = pool.grants["greedy"]
    assert ticket == waiting[1]
    assert isinstance(error_of(answer), LeaseRevokedError)
    pool.release([held[0][1]])
    assert pool.grants["c"][0][0] == behind[1]


def test_a_revoked_client_is_told_so_after_its_connection_to_the_device_has_ended(pool):
    """The device ends that before the client calls again: it must not be told that it was never connected."""
    pool.put([1])
    pool.look_up([1])
    pool.revoke("c")
    pool.kill("c")  # of which the devices tell the same
    with pytest.raises(LeaseRevokedError, match="connect again"):
        pool.look_up([1])


def test_what_is_on_its_way_to_a_revoked_client_is_not_leaked(pool):
    asked, revoked = Batch(2), Batch(1)
    pool.handle(CachesRequested(asked, "c", [(1, 0, 4 * PAGE, 4 * PAGE, 9.0, 0, None)] * 2))
    from kvpool.pool.instructions import RevokeRequested

    pool.handle(RevokeRequested(revoked, "c", None))
    pool.settle()
    assert pool.done.pop(revoked)[0]["caches"] == 2
    assert [answer[0] for answer in pool.done.pop(asked)] == ["granted", "granted"]
    assert pool.live_bytes() == 0
    pool.take(pool.state.disconnect("c")[1])
    pool.settle()
    pool.connect("c")


def test_what_is_kept_from_everybody_after_a_revocation_is_not_free_in_the_books():
    pool = LocalPool(devices=1, pages=2)
    for client in ("c", "other"):
        pool.connect(client)
        pool.model(client)
    kept, held = pool.request(BLOCK, "other"), pool.request(PAGE // 2)
    assert kept[5][1] == held[5][1], "they share a page"
    ((index, serial),) = held[5][1]
    store = pool.stores[0]
    os.close(store.allocator.export("c", "default", index, serial))
    pool.revoke("c")
    given = 0
    while (answer := pool.request(BLOCK, "other"))[0] == "granted":
        given += BLOCK
    assert given == PAGE
    details = error_of(answer).details
    assert (details["free_bytes"], details["zombie_bytes"], details["largest_bytes"]) == (0, PAGE - BLOCK, 0)
    pool.kill("c")
    assert pool.request(PAGE // 2, "other")[0] == "granted"
    pool.check()
    pool.close()


def test_a_tenants_clients_are_its_own_and_its_pins_can_be_ended(pool):
    pool.put([1])
    pool.connect("stranger", "elsewhere")
    with pytest.raises(InvalidRequestError, match="in tenant 'elsewhere'"):
        pool.revoke("c", "elsewhere")
    with pytest.raises(InvalidRequestError, match="in tenant 'elsewhere'"):
        pool.revoke("pin:default", "elsewhere")
    _, leased, *_ = pool.look_up([1])
    pool.pin(leased, True)
    assert pool.revoke("pin:default", "default")["caches"] == 1
    assert pool.state.leases.pinned == {}
    pool.release(leased)
    assert pool.evict()["caches"] == 1
    pool.put([1])
    _, leased, *_ = pool.look_up([1])
    assert pool.pin(leased, True) == ("pinned", [True])
    assert pool.pin(leased, False) == ("released", [True])


def test_ages_count_from_the_oldest_lease_that_is_still_held(pool):
    (store, _) = pool.stores
    store.apply([("allocate", "c", 1, "default", [10**6], PAGE, PAGE, [])], 5.0)
    store.apply([("allocate", "c", 1, "default", [10**6 + 1], BLOCK, BLOCK, [])], 7.0)
    assert store.holders(10.0) == {"c": (2, PAGE + BLOCK, 5.0)}
    store.apply([("release", "c", 1, [10**6])], 8.0)
    assert store.holders(10.0) == {"c": (1, BLOCK, 3.0)}
    store.apply([("release", "c", 1, [10**6 + 1])], 8.0)
    assert store.holders(10.0) == {}


# -- contains and listings --------------------------------------------------------------------------------------------


def test_contains_tells_where_and_counts_as_no_use(pool):
    pool.put([1, 2, 3])
    pool.now = 9.0
    index = pool.state.ledger.index
    before = list(index.last_accessed), list(index.access_count), pool.state.ledger.counters.lookups
    found = pool.state.directory.contains("default", "m", hashes([1, 2, 3, 4]))
    assert (found["model"], found["blocks"], found["hosts"]) == (0, 3, {"here": 3})
    assert sum(found["devices"].values()) == 3
    assert pool.state.directory.contains("default", 0, hashes([2]))["blocks"] == 1
    assert pool.state.directory.contains("default", 0, hashes([7, 1]))["blocks"] == 0
    assert before == (list(index.last_accessed), list(index.access_count), pool.state.ledger.counters.lookups)


def test_a_name_that_several_models_have_is_no_name_for_contains(pool):
    spec = {"name": "m", "identity": {"model": "m", "revision": "2"}, "block_bytes": BLOCK, "limit_bytes": None}
    pool.state.register_model("c", spec)
    with pytest.raises(InvalidRequestError, match=r"2 models .* named 'm'.*--model=#0 .*1 \(revision '2'"):
        pool.state.directory.contains("default", "m", hashes([1]))
    with pytest.raises(InvalidRequestError, match=r"no model 'n'.*: there is m"):
        pool.state.directory.contains("default", "n", hashes([1]))
    with pytest.raises(InvalidRequestError):
        pool.state.directory.contains("elsewhere", 0, hashes([1]))
    with pytest.raises(InvalidRequestError, match="16 bytes"):
        pool.state.directory.contains("default", 0, b"short")


def test_caches_are_listed_in_parts_or_the_most_first(pool):
    for number in range(5):
        pool.now = float(number)
        pool.put([number])
    pool.request(PAGE)
    _, (cache_id,), *_ = pool.look_up([3])
    pool.pin([cache_id], True)
    seen = []
    after = None
    while True:
        part = listed(pool, limit=2, after=after)
        assert part["total"] == 6
        seen += part["caches"]
        after = part["next"]
        if after is None:
            break
    assert len({each["id"] for each in seen}) == 6
    (pinned,) = [each for each in seen if each["pinned"]]
    assert (pinned["id"], pinned["key"], pinned["leases"], pinned["accesses"]) == (cache_id, keys_of([3])[0], 1, 2)
    assert [each["bytes"] for each in listed(pool, sort="bytes", limit=2)["caches"]] == [PAGE, BLOCK]
    assert listed(pool, sort="recent", limit=10)["caches"][-1]["key"] == keys_of([0])[0]
    assert listed(pool, sort="uses", limit=1)["caches"][0]["id"] == cache_id
    assert listed(pool, tenant="elsewhere")["total"] == 0
    assert listed(pool, limit=0) == {"caches": [], "total": 6, "next": None}
    for wrong in ({"limit": 1001}, {"limit": -1}, {"sort": "age"}, {"sort": "uses", "after": 3}, {"model": "none"}):
        with pytest.raises(InvalidRequestError):
            listed(pool, **wrong)


def test_models_are_listed_with_what_they_have(pool):
    pool.put([1, 2])
    pool.request(PAGE)
    pool.connect("x", "elsewhere")
    pool.model("x", "other", None, 10 * PAGE)
    first, second = list_models(pool.state.ledger, None, None)
    assert (first["name"], first["caches"], first["keys"], first["bytes"]) == ("m", 3, 2, 2 * BLOCK + PAGE)
    assert (second["tenant"], second["limit_bytes"], second["caches"]) == ("elsewhere", 10 * PAGE, 0)
    assert list_models(pool.state.ledger, "elsewhere", None) == [second]
    pool.invalidate()
    assert [each["keys"] for each in list_models(pool.state.ledger, "default", "m")] == [0]


# -- the policy -------------------------------------------------------------------------------------------------------


class MostRecentFirst(LeafFirstLRU):
    """Gives up what was used last."""

    def victim(self) -> int:
        return max(self.victims(0), key=lambda row: self._stamp[row], default=-1)

    def victims(self, device: int):
        return iter(sorted(super().victims(device), key=lambda row: -self._stamp[row]))


def test_another_policy_takes_over_what_is_resident(pool, monkeypatch):
    monkeypatch.setattr(eviction, "_POLICIES", dict(eviction._POLICIES))
    register_policy("most-recent")(MostRecentFirst)
    pool.handle(DeviceLost(1, "killed"))
    for number in range(3):
        pool.now = float(number)
        pool.put([number])
    with pytest.raises(UnknownPolicyError, match=r"'fifo'.*lru"):
        pool.state.set_policy("fifo", pool.now)
    assert collect(pool.state, {}).policy == "lru"
    pool.state.set_policy("Most-Recent", pool.now)
    assert collect(pool.state, {}).policy == "most-recent"
    pool.check()
    assert pool.evict(size_bytes=1)["caches"] == 1
    assert [pool.state.directory.contains("default", 0, hashes([n]))["blocks"] for n in range(3)] == [1, 1, 0]
    pool.state.set_policy("lru", pool.now)
    pool.evict(size_bytes=1)
    assert [pool.state.directory.contains("default", 0, hashes([n]))["blocks"] for n in range(3)] == [0, 1, 0]
    assert pool.request(4 * PAGE)[0] == "granted", "the rooms of both are known to the new one"


def test_a_policy_that_takes_over_respects_chains_and_leases(pool):
    pool.put(range(6))
    pool.put([0, 1, 20, 21])
    _, leased, *_ = pool.look_up(range(3))
    pool.state.set_policy("lru", pool.now)
    pool.state.ledger.policy.check()
    assert pool.evict()["caches"] == 3 + 2
    pool.release(leased)
    pool.state.ledger.policy.check()
    assert pool.evict()["caches"] == 3


# -- events -----------------------------------------------------------------------------------------------------------


def read(pool, seen, tenant=None, most=100):
    seen, events = pool.state.ledger.journal.read(seen, tenant, most, pool.now)
    return seen, [Happened(*event) for event in events]


def test_nothing_is_recorded_while_nobody_listens(pool):
    pool.put([1])
    assert pool.state.ledger.journal.last == 0
    assert read(pool, None) == (0, [])


def test_events_tell_what_comes_and_goes_and_why(pool):
    other = pool.model(name="other")
    pool.connect("x", "elsewhere")
    theirs = pool.model("x")
    seen, _ = read(pool, None)
    pool.put([1, 2])
    seen, events = read(pool, seen)
    (one, two) = keys_of([1, 2])
    assert [(e.kind, e.tenant, e.model, e.key, e.parent, e.size_bytes) for e in events] == [
        ("stored", "default", "m", one, None, BLOCK),
        ("stored", "default", "m", two, one, BLOCK),
    ]
    assert {e.device for e in events} == {"host-0", "host-1"}
    pool.evict(size_bytes=1)
    pool.invalidate(keys=[one])
    pool.put([5], model=other)
    pool.put([6], client="x", model=theirs)
    pool.invalidate("other")
    held = [pool.request(4 * PAGE, timeout_s=0) for _ in range(2)]
    assert [answer[0] for answer in held] == ["granted", "granted"]
    seen, events = read(pool, seen)
    assert [(e.kind, e.model, e.key, e.reason) for e in events] == [
        ("removed", "m", two, "request"),
        ("removed", "m", one, "invalidate"),
        ("stored", "other", keys_of([5])[0], None),
        ("stored", "m", keys_of([6])[0], None),
        ("cleared", "other", None, "invalidate"),
        ("removed", "m", keys_of([6])[0], "capacity"),
    ]
    pool.handle(DeviceLost(1, "killed"))
    _, events = read(pool, seen)
    assert [(e.kind, e.device) for e in events] == [("device_lost", "host-1")]
    _, events = read(pool, 0, tenant="elsewhere")
    assert [e.kind for e in events] == ["stored", "removed", "device_lost"]


def test_revisions_of_one_model_are_told_apart_in_events_and_listings(pool):
    spec = {"name": "m", "identity": {"model": "m", "revision": "2"}, "block_bytes": BLOCK, "limit_bytes": None}
    new = pool.state.register_model("c", spec)[0].number
    seen, _ = read(pool, None)
    pool.put([1])
    pool.put([1], model=new)
    (key,) = keys_of([1])
    assert [(each["model"], each["number"], each["revision"], each["key"]) for each in listed(pool)["caches"]] == [
        ("m", 0, "", key),
        ("m", new, "2", key),
    ]
    pool.evict(model=new)
    pool.invalidate(0)
    _, events = read(pool, seen)
    assert [(e.kind, e.model, e.number, e.revision, e.key) for e in events] == [
        ("stored", "m", 0, "", key),
        ("stored", "m", new, "2", key),
        ("removed", "m", new, "2", key),
        ("cleared", "m", 0, "", None),
    ]


def test_a_key_whose_writer_died_before_the_device_had_it_is_told_to_be_gone(pool):
    _, _, (cache_id,), _, _ = pool.blocks([1])
    seen, _ = read(pool, None)
    batch = Batch(1)
    for store in pool.stores:
        store.disconnect("c")
    pool.handle(SealRequested(batch, "c", [(1, 0, [cache_id], keys_of([1]), None)], False))
    pool.settle()
    _, events = read(pool, seen)
    assert [(e.kind, e.reason) for e in events] == [("stored", None), ("removed", "gone")]


def test_who_lags_or_comes_back_late_is_told_that_it_missed_something(pool):
    seen, _ = read(pool, None)
    pool.now += LISTENING_S + 1
    pool.handle(Tick())
    assert not pool.state.ledger.journal.open
    pool.put([1])
    seen, events = read(pool, seen)
    assert [e.kind for e in events] == ["missed"]
    pool.put([2])
    seen, events = read(pool, seen)
    assert [e.kind for e in events] == ["stored"]
    assert [e.kind for e in read(pool, seen + 5)[1]] == ["missed"]


def test_the_record_is_bounded_and_read_in_parts():
    journal = Journal()
    seen, _ = journal.read(None, None, 10, 0.0)
    for number in range(MOST_EVENTS):
        journal.add(Happened("stored", "red" if number % 2 else "blue"))
    seen, events = journal.read(seen, "red", 10, 0.0)
    assert (seen, len(events)) == (20, 10)
    journal.add(Happened("stored"))
    assert [event[0] for event in journal.read(0, None, 10, 0.0)[1]] == ["missed"]
    assert journal.read(journal.last, None, 10, 0.0) == (journal.last, [])
    seen, events = journal.read(1, "nobody", 10, 0.0)
    assert (seen, events) == (10_001, []), "one poll looks at a bounded number of them"
