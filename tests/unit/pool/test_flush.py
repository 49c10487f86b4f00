"""What a flush writes, whatever happens meanwhile."""

import pytest
from pool_harness import LocalPool, keys_of

from kvpool.errors import TierError
from kvpool.pool import flush
from kvpool.pool.instructions import Batch, DeviceLost, FlushRequested, InvalidateRequested

PAGES = 4
BLOCKS = PAGES * 16


@pytest.fixture
def pool(monkeypatch):
    monkeypatch.setattr(flush, "STEP_CACHES", 16)
    local = LocalPool(pages=PAGES, lower=True)
    for client in ("c", "d"):
        local.connect(client)
        local.model(client)
    yield local
    local.settle_all()
    local.check()
    local.close()


def below(pool):
    return {key[2] for key in pool.shelves[0].content}


def test_all_that_is_stored_is_written_and_stays_where_it_is(pool):
    pool.store(range(1, BLOCKS + 1))
    assert below(pool) == set()
    assert pool.flush() == {"caches": BLOCKS, "bytes": BLOCKS * 4096, "displaced": 0}
    assert below(pool) == set(keys_of(range(1, BLOCKS + 1)))
    held = pool.look_up(range(1, BLOCKS + 1))[1]
    assert len(held) == BLOCKS
    assert pool.flush()["caches"] == BLOCKS, "what is leased, too"
    pool.release(held)


def test_a_tenant_flushes_its_own_alone(pool):
    pool.connect("other", tenant="other")
    number = pool.model("other")
    pool.store(range(1, 9), "other", number)
    pool.store(range(101, 105))
    assert pool.flush("default")["caches"] == 4
    assert pool.flush("none at all")["caches"] == 0
    assert below(pool) == set(keys_of(range(101, 105)))


def test_what_goes_down_or_is_invalidated_on_the_way_needs_no_writing(pool):
    pool.store(range(1, BLOCKS + 1))
    batch = Batch(1)
    pool.handle(FlushRequested(batch, None))
    pool.settle()
    pool.move()  # the first save; the first step is on its way
    pool.store(range(201, 217))
    pool.handle(InvalidateRequested(Batch(1), None, "m", keys_of([40])))
    pool.settle_all()
    (answer,) = pool.done.pop(batch)
    assert answer["caches"] == len(below(pool))
    assert set(keys_of(range(1, 40))) <= below(pool)
    assert below(pool).isdisjoint(keys_of(range(40, BLOCKS + 1)))


def test_what_cannot_be_written_is_told(pool):
    pool.store(range(1, 9))
    error = ("error", *TierError("disk full", cause="ENOSPC").to_wire())
    real = pool.shelves[0].persist
    pool.shelves[0].persist = lambda *arguments: [*real(*arguments)[:-2], error, error]
    kind, name, message, details = pool.flush()
    assert (kind, name, details["failed"], details["cause"]) == ("error", "TierError", 2, "ENOSPC")
    assert "not on disk: 2 caches, on disk: " in message


def budget_error():
    return ("error", *TierError("it does not fit into disk_budget", cause="budget").to_wire())


def copies_of(pool, numbers):
    model = pool.state.ledger.models[0]
    return [(model.tenant, model.fingerprint, key) for key in keys_of(numbers)]


def test_what_the_budget_has_no_room_for_is_displaced_and_no_error(pool):
    """The tail of a chain, from the device and from host memory: each is told once, as what made way is."""
    pool.store(range(1, 9))
    shelf = pool.shelves[0]
    persist, save = shelf.persist, shelf.save
    shelf.persist = lambda *arguments: [*persist(*arguments)[:-3], *[budget_error()] * 3]
    saves = []

    def refuse(store, tenant, *rest):
        saves.append(rest)
        figures = {"mark": 7, "refused": copies_of(pool, [5, 8, 20]), "failed": copies_of(pool, [30])}
        if len(saves) == 1:
            return save(store, tenant) | figures | {"evicted_before": 10, "error": budget_error()}
        return save(store, tenant) | {"evicted": 14, "refused": copies_of(pool, [21])}

    shelf.save = refuse
    # 4 made way; of 6 to 8 none was taken, nor of 20 and 21; 5 was, once what it is chained behind was there.
    assert pool.flush() == {"caches": 8, "bytes": 8 * 4096, "displaced": 9}
    assert saves == [(), (7, copies_of(pool, [30]))], "what is not new below is not written again"


def test_what_fails_beside_what_has_no_room_is_an_error_of_its_own(pool):
    pool.store(range(1, 9))
    error = ("error", *TierError("disk full", cause="ENOSPC").to_wire())
    persist = pool.shelves[0].persist
    pool.shelves[0].persist = lambda *arguments: [*persist(*arguments)[:-3], budget_error(), error, budget_error()]
    kind, _, message, details = pool.flush()
    assert (kind, details["failed"], details["displaced"], details["cause"]) == ("error", 1, 2, "ENOSPC")
    assert "not on disk: 1 cache, " in message


def test_what_fails_on_the_device_and_as_a_copy_in_host_memory_is_one_cache(pool):
    """It was counted by the write of what is on the device, and again by that of what lies below."""
    pool.store(range(1, 9))
    error = ("error", *TierError("disk full", cause="ENOSPC").to_wire())
    copies = copies_of(pool, range(6, 10))
    shelf, failing = pool.shelves[0], keys_of(range(6, 9))
    persist, save = shelf.persist, shelf.save

    def persist_some(store, tenant, fingerprint, entries):
        outcomes = persist(store, tenant, fingerprint, entries)
        return [error if entry[1] in failing else each for entry, each in zip(entries, outcomes, strict=True)]

    shelf.persist = persist_some
    shelf.save = lambda *arguments: save(*arguments) | {"failed": copies, "error": error}
    _, _, _, details = pool.flush()
    assert details["failed"] == 4


def test_without_tiers_there_is_nothing_to_write_to():
    pool = LocalPool(pages=PAGES)
    with pytest.raises(TierError, match="disk_url"):
        pool.flush()


def test_with_host_memory_alone_there_is_nothing_to_write_to(pool):
    pool.state.ledger.devices[0].disk_url = None
    with pytest.raises(TierError, match="disk_url"):
        pool.flush()


def test_where_all_devices_are_lost_it_says_so():
    pool = LocalPool(pages=PAGES, lower=True)
    pool.handle(DeviceLost(0, "killed"))
    with pytest.raises(TierError, match="are lost") as raised:
        pool.flush()
    assert raised.value.details["cause"] == "device_lost"
    pool.close()
