"""A pool with each of the policies: it hits what the simulation says; its books stay sound when chains are spread."""

from random import Random

import pytest
from pool_harness import LocalPool, keys_of

from kvpool.cache import eviction
from kvpool.cache.eviction import policy_names, register_policy
from kvpool.cache.leaf_first import LeafFirst
from kvpool.pool.instructions import PolicyFailed
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
    assert stats.policy_failure == "policy 'brittle' failed in evictable(): ZeroDivisionError: float division by zero"
    assert stats.errors == {"PolicyError": 1}
    assert len(reports) == 1, "it is told once"
    for _ in range(3):
        assert pool.evict(size_bytes=4096)["caches"] == 1
    pool.state.set_policy("lfu", pool.now)
    assert collect(pool.state, {}).policy_failure is None
    pool.close()
