"""Which traces an operation belongs to, how long requests waited, and what is counted for the metrics."""

from __future__ import annotations

import pytest
from pool_harness import PAGE, LocalPool, hashes

from kvpool.pool.instructions import (
    Batch,
    CachesRequested,
    PrefixesLookedUp,
    ReleaseRequested,
    SealRequested,
    Send,
    Tick,
    TicketsCancelled,
    Waited,
)


class Recorded(LocalPool):
    """A pool that keeps its instructions."""

    def __init__(self, **layout):
        self.sent: list[Send] = []
        self.waits: list[Waited] = []
        super().__init__(**layout)

    def take(self, instructions):
        instructions = list(instructions)
        self.sent += [each for each in instructions if isinstance(each, Send)]
        self.waits += [each for each in instructions if isinstance(each, Waited)]
        super().take(instructions)

    def traces(self):
        """Operation, device and traces of what was sent since the last call."""
        sent, self.sent = self.sent, []
        return [(each.operation[0], each.device, each.traces) for each in sent]


@pytest.fixture
def pool():
    pool = Recorded(devices=2, pages=4, placement="round_robin")
    pool.connect()
    pool.model()
    pool.traces()
    yield pool
    pool.check()
    pool.close()


def caches(pool, *requests, timeout_s=0.0):
    return pool.ask(CachesRequested, "c", [(1, 0, size, size, timeout_s, 0, trace) for size, trace in requests])


def test_an_operation_for_several_items_has_each_of_their_traces_once(pool):
    answers = caches(pool, (4096, "a"), (4096, "b"), (4096, "a"), (4096, "a"), (4096, None), (8192, "c"))
    assert pool.traces() == [
        ("allocate", 0, ("a",)),
        ("allocate", 1, ("b", "a")),
        ("allocate", 1, ("c",)),
    ]
    ids = [answer[1] for answer in answers]
    # A release of ids on both devices goes to each with the traces of what lies there.
    pool.ask(ReleaseRequested, "c", [(1, ids[:2], "d"), (2, [ids[2]], "e"), (3, ids[3:], None)])
    assert pool.traces() == [("release", 0, ("d", "e")), ("release", 1, ("d",))]


def test_blocks_and_look_ups_pass_their_trace_on(pool):
    _, _, ids, _, _ = pool.blocks([1, 2])
    keys = [hashes([number]) for number in (1, 2)]
    pool.traces()
    pool.ask(SealRequested, "c", [(1, 0, ids, keys, "s")], True)
    assert pool.traces() == [("finish", 0, ("s",)), ("finish", 1, ("s",))]
    ((_, found, *_),) = pool.ask(PrefixesLookedUp, "c", [(1, 0, hashes([1, 2, 3]), "l")])
    assert pool.traces() == [("lease", 0, ("l",)), ("lease", 1, ("l",))]
    pool.release(found)
    model = pool.state.ledger.models[0]
    assert (model.blocks_looked_up, model.blocks_hit) == (3, 2)


def test_a_wait_is_told_with_its_times_and_its_outcome(pool):
    whole = 4 * PAGE
    held = [answer[1] for answer in caches(pool, (whole, None), (whole, None))]
    pool.now = 10.0
    granted, expiring, cancelled = caches(pool, (whole, "g"), (whole, "x"), (whole, "c"), timeout_s=5.0)
    assert {answer[0] for answer in (granted, expiring, cancelled)} == {"queued"}
    assert pool.waits == []
    pool.now = 12.0
    pool.handle(TicketsCancelled("c", [cancelled[1]]))
    pool.traces()
    pool.release([held[0]])
    assert ("allocate", 0, ("g",)) in pool.traces()
    pool.now = 16.0
    pool.handle(Tick())
    pool.settle()
    assert pool.waits == [
        Waited(0, 10.0, 10.0, "cancelled", "c"),
        Waited(0, 10.0, 10.0, "granted", "g"),
        Waited(0, 10.0, 10.0, "CapacityError", "x"),
    ]


def test_the_waits_of_a_client_that_dies_end(pool):
    caches(pool, (4 * PAGE, None), (4 * PAGE, None))
    pool.connect("d")
    pool.ask(CachesRequested, "d", [(1, 0, 4096, 4096, 5.0, 0, "t")])
    pool.kill("d")
    assert [wait.outcome for wait in pool.waits] == ["cancelled"]


def test_evictions_are_counted_by_reason(pool):
    pool.put(range(8))
    caches(pool, (4 * PAGE, None))
    counters = pool.state.ledger.counters
    assert counters.evictions > 0
    assert counters.evictions_by_reason == {"capacity": counters.evictions, "request": 0, "invalidate": 0}


def test_a_batch_without_traces_sends_none(pool):
    batch = Batch(1)
    pool.handle(CachesRequested(batch, "c", [(1, 0, 4096, 4096, 0.0, 0, None)]))
    assert pool.traces() == [("allocate", 0, ())]
    pool.settle()
