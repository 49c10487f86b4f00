"""Who is refused for want of room is told who holds it."""

from __future__ import annotations

import pytest
from pool_harness import PAGE, LocalPool

from kvpool.errors import CapacityError, from_wire
from kvpool.pool.instructions import Batch, CachesRequested, DeviceLost


@pytest.fixture
def pool():
    pool = LocalPool(devices=2, pages=8)
    for client, tenant in (("a", "default"), ("b", "default"), ("c", "default"), ("d", "default"), ("other", "z")):
        pool.connect(client, tenant)
        pool.model(client)
    yield pool
    pool.check()
    pool.close()


def refused(answer) -> CapacityError:
    error = from_wire(answer[1:])
    assert isinstance(error, CapacityError)
    return error


def test_an_error_names_the_largest_holders_and_no_client_of_another_tenant(pool: LocalPool) -> None:
    pool.store([1], "a")
    (kept,) = pool.look_up([1], "a")[1]
    pool.pin([kept], True, "a")
    pool.release([kept], "a")
    for client, pages in (("a", 7), ("a", 2), ("b", 1)):
        assert pool.request(pages * PAGE, client)[0] == "granted"
    assert pool.request(4 * PAGE, "other", model=1)[0] == "granted"
    error = refused(pool.request(8 * PAGE, "b"))
    assert error.details["held_by"] == {"client a": 9 * PAGE, "other tenants": 4 * PAGE, "client b": PAGE}
    for part in ("client a (576 KiB)", "other tenants (256 KiB)", "and 1 more", "kvpool leases"):
        assert part in str(error)
    seen = refused(pool.request(8 * PAGE, "other", model=1)).details["held_by"]
    assert seen == {"other tenants": 10 * PAGE + 4096, "client other": 4 * PAGE}


def test_an_error_names_the_models_that_hold_most_and_none_of_another_tenant(pool: LocalPool) -> None:
    small, large = (pool.model("a", name=name) for name in ("small", "large"))
    assert pool.request(2 * PAGE, "a", model=small)[0] == "granted"
    assert pool.request(7 * PAGE, "b", model=large)[0] == "granted"
    assert pool.request(PAGE, "b", model=small)[0] == "granted"
    assert pool.request(4 * PAGE, "other", model=1)[0] == "granted"
    error = refused(pool.request(8 * PAGE, "b"))
    assert error.details["pinned_by"] == {"model large": 7 * PAGE, "other tenants": 4 * PAGE, "model small": 3 * PAGE}
    assert error.details["held_by"] == {"client b": 8 * PAGE, "other tenants": 4 * PAGE, "client a": 2 * PAGE}
    assert "(pinned are model large (448 KiB), other tenants (256 KiB), model small (192 KiB), by client b" in str(
        error
    )
    seen = refused(pool.request(8 * PAGE, "other", model=1)).details["pinned_by"]
    assert seen == {"other tenants": 10 * PAGE, "model m": 4 * PAGE}
    pool.invalidate(large)
    pool.now += 1.0
    assert refused(pool.request(8 * PAGE, "b")).details["pinned_by"]["what was invalidated"] == 7 * PAGE


def test_the_models_are_named_also_where_a_device_does_not_tell(pool: LocalPool) -> None:
    pool.request(8 * PAGE, "a"), pool.request(8 * PAGE, "a")
    pool.request(PAGE, "b", timeout_s=5.0)
    pool.now = 5.0
    pool.tick()
    pool.now = 5.25
    pool.tick()
    ((_, answer),) = pool.grants.pop("b")
    error = refused(answer)
    assert (error.details["pinned_by"], error.details["held_by"]) == ({"model m": 16 * PAGE}, {})
    assert "(pinned are model m (1 MiB), 0.2 s ago: 'kvpool leases'" in str(error)
    pool.settle()


def test_devices_are_asked_once_for_all_that_are_refused_at_once_and_not_again_soon(pool: LocalPool) -> None:
    pool.request(8 * PAGE, "a"), pool.request(8 * PAGE, "a")
    tickets = [pool.request(PAGE, "b", timeout_s=5.0)[1] for _ in range(3)]
    pool.now = 5.0
    pool.tick()
    assert pool.grants == {}, "the devices are asked first"
    asked = [send.operation for outbox in pool.outboxes for send in outbox]
    assert asked == [("holders",)] * 2
    pool.settle()
    assert [ticket for ticket, _ in pool.grants["b"]] == tickets
    assert all(refused(answer).details["held_by"] == {"client a": 16 * PAGE} for _, answer in pool.grants["b"])
    pool.now = 5.5
    error = refused(pool.request(PAGE, "c"))
    assert error.details["held_by"] == {"client a": 16 * PAGE}
    assert "client a (1 MiB), 0.5 s ago: " in str(error), "its figures are older than the others"
    assert not any(pool.outboxes)


def test_an_error_does_not_wait_for_a_device_that_hangs(pool: LocalPool) -> None:
    pool.request(8 * PAGE, "a"), pool.request(8 * PAGE, "a")
    ticket = pool.request(PAGE, "b", timeout_s=5.0)[1]
    pool.now = 5.0
    pool.tick()
    pool.step(1)
    assert pool.grants == {}
    assert pool.state.next_deadline() == pytest.approx(5.25)
    pool.now = 5.25
    pool.tick()
    ((told, answer),) = pool.grants.pop("b")
    assert (told, refused(answer).details["held_by"]) == (ticket, {"client a": 8 * PAGE})
    assert pool.state.next_deadline() is None
    batch = Batch(1)
    pool.handle(CachesRequested(batch, "b", [(1, 0, PAGE, PAGE, 0.0, 0, None)]))
    assert len(pool.outboxes[0]) == 1, "it is not asked again before it has answered"
    pool.settle()
    assert refused(pool.done.pop(batch)[0]).details["held_by"] == {"client a": 16 * PAGE}


def test_an_error_comes_also_if_a_device_is_lost_meanwhile(pool: LocalPool) -> None:
    pool.request(8 * PAGE, "a"), pool.request(8 * PAGE, "a")
    ticket = pool.request(PAGE, "b", timeout_s=5.0)[1]
    pool.now = 5.0
    pool.tick()
    (lost,) = pool.outboxes[0]
    pool.outboxes[0].clear()
    pool.handle(DeviceLost(0, "gone"))
    pool.take(pool.state.fail_operations([lost], CapacityError("the device is lost"), pool.now))
    pool.settle()
    ((told, answer),) = pool.grants["b"]
    assert (told, refused(answer).details["held_by"]) == (ticket, {"client a": 8 * PAGE})
