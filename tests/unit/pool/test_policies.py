"""A pool with each of the policies: it hits what the simulation says; its books stay sound when chains are spread."""

from random import Random

import pytest
from pool_harness import PAGE, LocalPool, keys_of

from kvpool.cache import eviction
from kvpool.cache.eviction import policy_names, register_policy
from kvpool.cache.leaf_first import LeafFirst
from kvpool.cache.lru import LeafFirstLRU
from kvpool.pool.instructions import Batch, BlocksRequested, CachesRequested, Failed, PolicyFailed, QuotaSet
from kvpool.pool.statistics import collect
from kvpool.simulate import simulate
from kvpool.workload import TraceRequest, generate

CAPACITY_BLOCKS = 64  # four pages of 64 KiB, in blocks of 4 KiB


def serve(pool: LocalPool, request: TraceRequest) -> int:
    """Look up, store what is missing, give everything back; returns the hits."""
    pool.now = request.timestamp_ms / 1000
    ids = list(request.hash_ids)
    _, found, *_ = pool.look_up(ids)
    _, resident, new, _, _ = pool.blocks(ids, output_tokens=request.output_length)
    assert resident == len(found)
    if new:
        pool.seal(new, keys_of(ids)[resident : resident + len(new)], finish=True)
    if found:
        pool.release(found)
    return len(found)


@pytest.mark.parametrize("policy", policy_names())
def test_a_pool_hits_what_the_simulation_says(policy: str) -> None:
    requests = generate(6, sessions=60, system_prompts=3, system_blocks=3, turn_blocks=3)
    pool = LocalPool(policy=policy)
    pool.connect()
    pool.model()
    hits = sum(serve(pool, request) for request in requests)
    row = simulate(requests, policy, CAPACITY_BLOCKS)
    assert hits == round(row["prefix_hit_ratio"] * row["blocks"])
    assert pool.state.ledger.counters.evictions == row["evictions"]
    pool.check()
    pool.close()


@pytest.mark.parametrize("policy", policy_names())
def test_chains_over_several_devices_beside_whole_caches(policy: str) -> None:
    chance = Random(3)
    pool = LocalPool(devices=3, pages=2, policy=policy)
    pool.connect()
    pool.model()
    pool.model(name="whole", block_bytes=None)
    granted = 0
    for number, request in enumerate(generate(7, sessions=40, system_blocks=2, turn_blocks=2)):
        serve(pool, request)
        if number % 7 == 0:
            answer = pool.request(4096 * chance.randint(1, 5), model=1)
            if answer[0] == "granted":  # else each device is full of parents whose children lie on others
                granted += 1
                pool.seal([answer[1]], keys_of([10**6 + number]), model=1, finish=True)
        pool.check()
    assert granted > 5
    assert pool.state.ledger.counters.evictions > 0
    pool.close()


def test_a_pool_goes_on_by_lru_when_a_policy_of_ones_own_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    policy_names()
    monkeypatch.setattr(eviction, "_POLICIES", dict(eviction._POLICIES))
    register_policy("brittle")(lambda index: LeafFirst(index, lambda row, now: now / (3 - now)))
    pool = LocalPool(policy="Brittle")
    reports: list[PolicyFailed] = []
    take = pool.take
    monkeypatch.setattr(
        pool, "take", lambda out: (reports.extend(i for i in out if isinstance(i, PolicyFailed)), take(out))
    )
    pool.connect()
    pool.model()
    for number in range(8):
        pool.now = float(number)
        answer = pool.put(range(100 * number, 100 * number + 20))
        assert (answer[0], len(answer[2])) == ("blocks", 20), "whoever asks is served"
        pool.check()
    stats = collect(pool.state, {}, policy_requested="brittle")
    assert (stats.policy, stats.policy_requested) == ("lru", "brittle")
    failed = "policy 'brittle' failed in evictable(): ZeroDivisionError: float division by zero"
    assert stats.policy_failure is not None
    assert stats.policy_failure.startswith(f"{failed} ({__file__}:")
    assert stats.errors == {"PolicyError": 1}
    assert len(reports) == 1, "it is told once"
    for _ in range(3):
        assert pool.evict(size_bytes=4096)["caches"] == 1
    pool.state.set_policy("lfu", pool.now)
    assert collect(pool.state, {}).policy_failure is None
    pool.close()


def two_partitions(policy: str) -> LocalPool:
    """A full pool in which two models' caches are ranked apart, because one has a quota."""
    pool = LocalPool(pages=10, policy=policy)
    pool.connect()
    for model, name in enumerate("ab"):
        assert pool.model(name=name, block_bytes=PAGE) == model
    pool.administer(QuotaSet(Batch(1), "default", "a", 0, "100%", None))
    for number in range(5):
        for model in range(2):
            pool.store([100 * model + number], model=model, block_bytes=PAGE)
    return pool


class FailsBehindTheFirst(LeafFirstLRU):
    def victims(self, partition):
        for number, row in enumerate(super().victims(partition)):
            if number == 1:
                raise KeyError("one")
            yield row


class WorthNothing(LeafFirstLRU):
    def worth(self, row):
        return None


class WorthThisOrThat(LeafFirstLRU):
    def worth(self, row):
        return 1.0 if row % 2 else (1.0, 2)


@pytest.mark.parametrize("policy", [FailsBehindTheFirst, WorthNothing, WorthThisOrThat])
def test_a_policy_that_fails_for_several_partitions_fails_once(monkeypatch: pytest.MonkeyPatch, policy: type) -> None:
    policy_names()
    monkeypatch.setattr(eviction, "_POLICIES", dict(eviction._POLICIES))
    register_policy("own")(policy)
    pool = two_partitions("own")
    assert pool.request(4 * PAGE)[0] == "granted"
    fails = policy is not WorthThisOrThat
    assert pool.state.policy_name == ("lru" if fails else "own"), "a number is compared as a tuple of one"
    assert pool.state.ledger.counters.errors == ({"PolicyError": 1} if fails else {})
    pool.check()
    pool.close()


def test_what_is_decided_is_carried_out_though_a_bug_keeps_others_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = two_partitions("lru")
    room = pool.state.allocations._room
    find, find_on = room.find, room.find_on

    def broken(client, model, size_bytes, *arguments):
        if size_bytes == 2 * PAGE:
            raise TypeError("not this one")
        return find(client, model, size_bytes, *arguments)

    monkeypatch.setattr(room, "find", broken)
    batch = Batch(3)
    items = [(1, 0, pages * PAGE, pages * PAGE, 0.0, 0, None) for pages in (3, 2, 1)]
    out = pool.state.handle(CachesRequested(batch, "c", items), pool.now)
    assert [type(each.error) for each in out if isinstance(each, Failed)] == [TypeError]
    pool.take([each for each in out if not isinstance(each, Failed)])
    pool.settle()
    answers = pool.done.pop(batch)
    assert [answer[0] for answer in answers] == ["granted", "error", "granted"]
    pool.check()
    monkeypatch.setattr(room, "find_on", lambda *arguments: (1 / 0, find_on(*arguments)))
    batch = Batch(1)
    item = (1, 0, b"".join(keys_of([1000])), None, None, None)
    out = pool.state.handle(BlocksRequested(batch, "c", [item]), pool.now)
    assert [type(each.error) for each in out if isinstance(each, Failed)] == [ZeroDivisionError]
    pool.take([each for each in out if not isinstance(each, Failed)])
    assert pool.done.pop(batch)[0][:2] == ("error", "InvariantError")
    pool.check()
    pool.close()
