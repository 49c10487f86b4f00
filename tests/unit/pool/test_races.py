"""What was once decided wrongly: answers came late, clients died on the way, devices had less room than the books."""

from __future__ import annotations

import pytest
from interleaved_pool import InterleavedPool
from pool_harness import PAGE, LocalPool, hashes, keys_of

from kvpool.errors import BackendError, DeviceLostError, InvalidRequestError, ProtocolError, from_wire
from kvpool.memory.host import HostBackend
from kvpool.pool.device import Device
from kvpool.pool.instructions import (
    Batch,
    BlocksRequested,
    CachesRequested,
    DeviceAnswered,
    DeviceLost,
    PinRequested,
    PrefixesLookedUp,
    ReleaseRequested,
)


@pytest.fixture
def pool():
    pool = LocalPool(devices=1, pages=4)
    pool.connect()
    pool.connect("mortal")
    pool.model()
    yield pool
    pool.check()
    known = {row for row in range(len(pool.state.ledger.index.flags)) if pool.state.ledger.index.flags[row]}
    assert {pool.state.ledger.index.live_row(cache_id) for cache_id in pool.stores[0]._caches} == known
    pool.close()


def test_what_was_to_be_evicted_for_a_client_that_died_is_evicted(pool):
    pool.put(range(64))
    batch = Batch(1)
    pool.handle(BlocksRequested(batch, "mortal", [(1, 0, hashes([100]), None, None, None)]))
    pool.kill("mortal")
    assert pool.stores[0].caches == 63  # else the block that the pool forgot would stay for good


def test_a_block_looked_up_by_a_client_that_died_stays_in_the_pool(pool):
    pool.put([1, 2])
    batch = Batch(1)
    pool.handle(PrefixesLookedUp(batch, "mortal", [(1, 0, hashes([1, 2]), None)]))
    pool.kill("mortal")
    assert pool.done[batch] == [("hit", [], [], [], [], 0)]
    hit = pool.look_up([1, 2])[1]
    assert len(hit) == 2
    pool.release(hit)
    pool.put(range(100, 164))
    assert pool.look_up([1, 2])[1] == []  # and nobody holds it


def test_a_request_of_a_dead_client_does_not_stand_in_line(pool):
    """It found no room on the device (free bytes lie in another tenant's pages), after its client had died."""
    pool.connect("other", tenant="other")
    number = pool.model("other")
    pool.request(4096, client="other", model=number)
    held = pool.request(3 * PAGE)
    batch = Batch(1)
    pool.handle(CachesRequested(batch, "mortal", [(1, 0, 4096, 4096, 60.0, 0, None)]))
    sent = list(pool.outboxes[0])
    pool.outboxes[0].clear()
    answers = pool.stores[0].apply([send.operation for send in sent])  # the device has not seen the death yet
    pool.kill("mortal")
    pool.handle(DeviceAnswered(0, sent, answers, (pool.stamp(), 0)))
    pool.settle()
    assert pool.done[batch][0][0] == "error"
    assert isinstance(from_wire(pool.done[batch][0][1:]), ProtocolError)
    assert not pool.state.allocations.queue
    pool.release([held[1]])


@pytest.mark.parametrize("event_type", [CachesRequested, BlocksRequested])
def test_nothing_is_evicted_for_a_request_of_a_dead_client(pool, event_type):
    """It found no room on the device, after its client had died, and others made way for it."""
    pool.connect("other", tenant="other")
    number = pool.model("other")
    pool.request(4096, client="other", model=number)
    held = pool.request(2 * PAGE)
    pool.put(range(16))  # what is left of the pages of this tenant
    batch = Batch(1)
    caches, blocks = (1, 0, 4096, 4096, 60.0, 0, None), (1, 0, hashes([100]), None, None, None)
    pool.handle(event_type(batch, "mortal", [caches if event_type is CachesRequested else blocks]))
    sent = list(pool.outboxes[0])
    pool.outboxes[0].clear()
    answers = pool.stores[0].apply([send.operation for send in sent])  # the device has not seen the death yet
    assert answers[0][-1] is not None
    pool.kill("mortal")
    pool.handle(DeviceAnswered(0, sent, answers, (pool.stamp(), 0)))
    pool.settle()
    ((kind, *rest),) = pool.done[batch]
    assert isinstance(from_wire(rest), ProtocolError) if kind == "error" else rest == [0, [], [], []]
    assert pool.state.ledger.counters.evictions == 0
    pool.release([held[1]])


def test_a_request_for_which_the_system_refuses_memory_is_answered(pool, monkeypatch):
    """The refusal does not tell what would fit, and who asked waited for ever."""

    def refused(*_):
        raise BackendError("the system refused memory", errno=12)

    monkeypatch.setattr(HostBackend, "create", refused)
    kind, name, _, details = pool.request(PAGE)
    assert (kind, name, details["largest_bytes"]) == ("error", "CapacityError", 0)


def test_who_waits_hears_of_blocks_given_up():
    """A chain loses its tail with a device; what lies on another behind the gap goes, and makes room at once."""
    pool = LocalPool(devices=2, pages=2)
    pool.connect()
    pool.model(block_bytes=PAGE)
    batch = Batch(1)
    pool.handle(BlocksRequested(batch, "c", [(1, 0, hashes(range(4)), None, None, None)]))
    waits = Batch(1)
    pool.handle(CachesRequested(waits, "c", [(2, 0, PAGE, PAGE, 60.0, 0, None)]))
    first = pool.state.ledger.index.device[0]
    pool.step(1 - first)
    pool.handle(DeviceLost(first, "killed"))
    sent = list(pool.outboxes[first])
    pool.outboxes[first].clear()
    pool.take(pool.state.fail_operations(sent, ProtocolError("lost"), pool.now))
    pool.settle()
    assert pool.done[batch] == [("error", "ProtocolError", "lost", {})]
    assert [answer[0] for _, answer in pool.grants["c"]] == ["granted"]
    pool.check()
    pool.close()


def test_round_robin_passes_over_a_device_on_which_whole_pages_do_not_fit():
    pool = LocalPool(devices=2, pages=2, placement="round_robin")
    pool.connect()
    pool.model()
    pool.put([1])  # on the first device, which has a page and a rest left
    pool.release([pool.request(PAGE)[1]])
    assert pool.request(PAGE + 1)[0] == "granted"
    assert pool.state.ledger.counters.evictions == 0
    pool.close()


def test_a_pin_that_the_device_refuses_is_not_held_by_the_books(pool):
    """The cache is released by its last holder on the way; sealed without a key, nothing else keeps it."""
    granted = pool.request(4096)
    pool.seal([granted[1]], [None])
    release, pin = Batch(1), Batch(1)
    pool.handle(ReleaseRequested(release, "c", [(1, [granted[1]], None)]))
    pool.handle(PinRequested(pin, "c", [(2, [granted[1]], None)], True))
    pool.settle()
    assert pool.done[pin] == [("pinned", [False])]
    assert pool.live_bytes() == 0


def test_a_lost_device_pins_nothing():
    pool = LocalPool(devices=1)
    pool.connect()
    pool.model()
    pool.put([1])
    ids = pool.look_up([1])[1]
    batch = Batch(1)
    pool.handle(PinRequested(batch, "c", [(1, ids, None)], True))
    pool.handle(DeviceLost(0, "killed"))
    sent = list(pool.outboxes[0])
    pool.outboxes[0].clear()
    pool.take(pool.state.fail_operations(sent, ProtocolError("lost"), pool.now))
    assert pool.done[batch] == [("pinned", [False])]
    pool.close()


def test_a_seal_names_each_cache_once_and_each_key_for_one(pool):
    ids = pool.blocks([1, 2])[2]
    first, second = keys_of([1, 2])
    for wrong_ids, wrong_keys in [([ids[0], ids[0]], [first, second]), (ids, [first]), (ids, [first, b"short"])]:
        answer = pool.seal(wrong_ids, wrong_keys)
        assert isinstance(from_wire(answer[1:]), InvalidRequestError)
    assert pool.look_up([1])[1] == []
    assert pool.seal(ids, [first, second]) == ("sealed", [True, True])


def test_a_small_cache_that_may_grow_takes_its_whole_range():
    device = Device(0, "d", "here", 4 * PAGE, PAGE, 4096, 32 * PAGE)
    assert device.footprint_bytes(5000, 5000) == 8192  # the tail of the block goes back
    assert device.footprint_bytes(5000, PAGE - 1) == PAGE  # addresses in shared pages are memory
    assert device.footprint_bytes(100, 101) == 4096
    assert device.footprint_bytes(5000, PAGE) == PAGE
    assert device.footprint_bytes(5000, 8 * PAGE) == PAGE


def test_a_device_whose_free_bytes_lie_in_anothers_pages_is_passed_over():
    """By the books the first device has most room; the other has a hole that really fits."""
    pool = LocalPool(devices=2, pages=2)
    pool.connect()
    pool.model()
    pool.connect("other", tenant="other")
    number = pool.model("other")
    part = PAGE // 2 + 4096
    placed = [("other", number, part), ("c", 0, PAGE), ("other", number, part), ("c", 0, part)]
    assert [pool.request(size, client=client, model=model)[2] for client, model, size in placed] == [0, 1, 0, 1]
    answer = pool.request(4 * 4096)
    assert (answer[0], answer[2]) == ("granted", 1)
    pool.check()
    pool.close()


@pytest.mark.parametrize("devices", [1, 2])
def test_a_put_whose_device_dies_before_it_has_room_is_no_put_of_nothing(devices):
    """It was answered like one for which there is no room: 0 blocks stored, and no error."""
    answers: list = []
    pool = InterleavedPool(devices, 4, lambda *_: None)
    _, batch, instructions = pool.state.connect("c", "default", "here", "token")
    pool.open[batch] = lambda _: None
    pool.take(instructions)
    while any([pool.step(device) for device in range(devices)]):  # noqa: C419 - all of them
        pass
    pool.model()
    pool.submit(BlocksRequested, "c", [(1, 0, hashes(range(4)), None, None, None)], answers.extend)
    assert answers == []
    for device in range(devices):
        pool.lose(device)
    ((kind, name, *_),) = answers
    assert (kind, name) == ("error", "DeviceLostError")
    with pytest.raises(DeviceLostError, match="all devices of pool 'test' are lost: delete it and start it again"):
        pool.state.connect("d", "default", "here", "token")
    assert not len(pool.state.ledger.index)
    pool.state.check()
    pool.close()
