"""Requests for the same that come together are decided at once, with the same outcome as one after the other."""

from __future__ import annotations

import random

import pytest
from pool_harness import PAGE, LocalPool

from kvpool.pool.instructions import Batch, CachesRequested, QuotaSet

PAGES = 24


def prepared(seed: int, devices: int, quotas: bool) -> LocalPool:
    """A pool in some state: cached and leased content of two models, and perhaps somebody who waits."""
    rng = random.Random(seed)
    pool = LocalPool(devices, PAGES // devices)
    pool.connect("c")
    pool.connect("d")
    for name in "ab":
        pool.model(name=name, block_bytes=PAGE)
        if quotas:
            guaranteed, limit = rng.choice(["0%", "20%", "40%"]), rng.choice(["60%", "80%", None])
            pool.administer(QuotaSet(Batch(1), "default", name, guaranteed, limit, None))
    for first in range(0, rng.randrange(PAGES), 4):
        pool.store(range(first, first + 4), model=rng.randrange(2), block_bytes=PAGE)
    for _ in range(rng.randrange(6)):
        pool.request(rng.choice([PAGE // 4, PAGE, 3 * PAGE]), "d", model=rng.randrange(2))
    for _ in range(rng.randrange(3)):  # they wait, if there is no room for them
        pool.request(rng.choice([4, 12, 20]) * PAGE, "d", rng.randrange(2), timeout_s=9.0, priority=rng.choice([0, 1]))
    return pool


def outcome(pool: LocalPool, answers: list) -> tuple:
    """What became of the requests and of the content; among devices of equal worth each may be the one that gives."""
    index = pool.state.ledger.index
    kinds = [(answer[0], answer[1] if answer[0] == "error" else None) for answer in answers]
    evictable = [sum(index.evictable_bytes)] if len(pool.stores) > 1 else list(index.evictable_bytes)
    return kinds, sum(index.resident_bytes), evictable, pool.state.ledger.counters.evictions


@pytest.mark.parametrize("devices", [1, 3])
@pytest.mark.parametrize("quotas", [False, True])
def test_a_batch_has_the_outcome_of_its_requests_one_after_the_other(quotas: bool, devices: int) -> None:
    seen = set()
    for seed in range(40):
        rng = random.Random(1000 + seed)
        size, count = rng.choice([PAGE // 2, PAGE, 2 * PAGE]), rng.randrange(2, 40)
        item = (1, rng.randrange(2), size, rng.choice([size, 4 * PAGE]), rng.choice([0.0, 5.0]), 0, None)
        together, apart = prepared(seed, devices, quotas), prepared(seed, devices, quotas)
        answers = together.ask(CachesRequested, "c", [item] * count)
        batches = [Batch(1) for _ in range(count)]
        for batch in batches:
            apart.handle(CachesRequested(batch, "c", [item]))
        apart.settle()
        singly = [apart.done.pop(batch)[0] for batch in batches]
        assert outcome(together, answers) == outcome(apart, singly), (seed, item, count)
        seen |= {answer[0] for answer in answers}
        for pool in (together, apart):
            pool.check()
            pool.close()
    assert seen == {"granted", "queued", "error"}
