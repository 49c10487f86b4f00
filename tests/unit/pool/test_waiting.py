"""Who waits for memory, told to operators and tenants."""

from __future__ import annotations

import pytest
from pool_harness import PAGE, LocalPool

from kvpool.errors import InvalidRequestError
from kvpool.pool.instructions import Batch, ChangesRequested, QuotaSet
from kvpool.pool.waiting import MOST_LISTED, list_waiting


@pytest.fixture
def pool():
    pool = LocalPool(pages=4)
    pool.connect()
    pool.model()
    yield pool
    pool.check()
    pool.close()


def listed(pool, tenant=None, limit=100):
    return list_waiting(pool.state.ledger, pool.state.allocations.queue, tenant, limit, pool.now)


def test_nobody_waits(pool):
    pool.request(PAGE)
    assert listed(pool) == {"requests": [], "total": 0}


def test_who_waits_is_told_in_the_order_of_the_queue_with_what_it_waits_for(pool):
    who = {"pid": 7, "hostname": "h", "job": "j", "node": "n"}
    _, _, instructions = pool.state.connect("x", "elsewhere", "here", "token", who)
    pool.take(instructions)
    pool.settle()
    other = pool.model("x", "other")
    small = pool.model(name="small", limit_bytes=PAGE)
    grows = pool.request(PAGE, max_size=8 * PAGE)[1]
    assert pool.request(PAGE, model=small)[0] == "granted"
    pool.request(2 * PAGE)
    pool.now = 10.0
    pool.request(2 * PAGE, "x", other, timeout_s=30.0)
    pool.ask(ChangesRequested, "c", [(1, grows, "resize", [(0, 3 * PAGE)], 20.0, None)])
    pool.now = 15.0
    pool.request(PAGE, model=small, timeout_s=9.0)
    pool.request(PAGE, timeout_s=5.0, priority=3)
    pool.now = 16.0
    answer = listed(pool)
    figures = ("model", "bytes", "kind", "cache", "device", "priority", "waited_s", "left_s")
    assert [tuple(each[field] for field in figures) for each in answer["requests"]] == [
        ("m", PAGE, "new", None, None, 3, 1.0, 4.0),
        ("other", 2 * PAGE, "new", None, None, 0, 6.0, 24.0),
        ("m", 2 * PAGE, "growth", grows, "host-0", 0, 6.0, 14.0),
        ("small", PAGE, "new", None, None, 0, 1.0, 8.0),
    ]
    assert answer["total"] == 4
    assert [each["limit_of"] for each in answer["requests"]] == [None] * 3 + ["model 'small' of tenant 'default'"]
    assert answer["requests"][1].items() >= (who | {"client": "x", "tenant": "elsewhere", "number": other}).items()
    assert [(each["client"], each["pid"]) for each in listed(pool, "default")["requests"]] == [("c", None)] * 3
    assert listed(pool, "elsewhere")["total"] == 1
    pool.administer(QuotaSet(Batch(1), "default", "small", "none", "none", None))
    assert listed(pool)["requests"][-1]["limit_of"] is None, "what it lacks now"


def test_a_long_queue_is_told_in_part(pool):
    pool.request(4 * PAGE)
    for number in range(9):
        pool.request(PAGE, timeout_s=9.0, priority=number % 3)
    answer = listed(pool, limit=4)
    assert ([each["priority"] for each in answer["requests"]], answer["total"]) == ([2, 2, 2, 1], 9)
    assert listed(pool, limit=0) == {"requests": [], "total": 9}
    for limit in (-1, MOST_LISTED + 1, "5"):
        with pytest.raises(InvalidRequestError, match="0 to 1000 waiting requests"):
            listed(pool, limit=limit)
