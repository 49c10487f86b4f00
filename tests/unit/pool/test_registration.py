"""Models that an earlier life has noted on disk: known by name from the start, and all of a name goes together."""

import pytest
from pool_harness import PAGE, LocalPool, keys_of

from kvpool.cache.key import fingerprint
from kvpool.errors import InvalidRequestError, TierError, from_wire
from kvpool.pool.instructions import Batch, DeviceLost, InvalidateRequested, QuotaSet

BLOCK = 4096
SIZED = fingerprint(model="m")


@pytest.fixture
def pool():
    local = LocalPool(devices=2, lower=True)
    local.connect()
    local.connect("d", "other")
    yield local
    local.settle_all()
    local.check()
    local.close()


def spec(name="m", revision="", block_bytes=BLOCK, limit_bytes=None):
    identity = {"model": name, "revision": revision}
    return {"name": name, "identity": identity, "block_bytes": block_bytes, "limit_bytes": limit_bytes}


def register(pool, client="c", **described):
    model, instructions = pool.state.register_model(client, spec(**described))
    pool.take(instructions)
    return model


def restore(pool, *spaces):
    pool.take(pool.state.restore_models(spaces))


def noted(revision="", name="m", block_bytes=BLOCK, limit_bytes=None):
    return name, revision, block_bytes, limit_bytes


def found(pool, digest, ids, device=0, tenant="default"):
    """Enter content that a device has found again, with its bytes."""
    shelf = pool.shelves[device].content
    for block, key in zip(ids, keys_of(ids), strict=True):
        shelf[tenant, digest, key] = None, bytes([block]) * BLOCK
    pool.state.below.add(device, tenant, digest, [(key, None, BLOCK) for key in keys_of(ids)])


def invalidate(pool, model="m", keys=None, tenant=None):
    event = InvalidateRequested(Batch(1), tenant, model, keys)
    pool.handle(event)
    pool.settle_all()
    (answer,) = pool.done.pop(event.batch)
    return answer


def limit_of(pool, name="m"):
    return next((each["limit"] for each in pool.state.quotas() if each["model"] == name), None)


def told(pool, device=0):
    return [send.operation for send in pool.outboxes[device] if send.operation[0] == "name"]


def test_devices_are_told_each_model_ahead_of_all_that_is_asked_for_it(pool):
    model = register(pool)
    assert told(pool) == told(pool, 1) == [("name", "default", SIZED, [noted()])]
    register(pool)
    assert len(told(pool)) == 1, "it is known"
    pool.settle()
    digest = model.fingerprint
    pool.take(pool.state.restore_models([("default", digest, [noted(name="alias")])]))
    assert told(pool) == [("name", "default", digest, [noted(), noted(name="alias")])]


def test_what_was_restored_is_found_and_read_by_who_registers_nothing(pool):
    restore(pool, ("default", SIZED, [noted()]), ("other", SIZED, [noted()]))
    found(pool, SIZED, [7])
    model = pool.state.find_model("c", spec())
    assert pool.read([7], model=model.number) == [7]
    assert pool.state.find_model("c", spec(block_bytes=None, limit_bytes=PAGE)) is model
    assert pool.state.find_model("d", spec()).tenant == "other"
    assert pool.state.find_model("c", spec("n")) is None


def test_all_revisions_of_a_name_go_though_only_one_was_registered_since(pool):
    old, new = (fingerprint(model="m", revision=revision) for revision in "12")
    restore(pool, ("default", old, [noted("1")]), ("default", new, [noted("2")]))
    found(pool, old, [1, 2])
    found(pool, new, [3], device=1)
    register(pool, revision="2")
    assert [each.revision for each in pool.state.ledger.find_models("m", None)] == ["1", "2"]
    assert invalidate(pool)["lower_keys"] == 3
    assert not any(shelf.content for shelf in pool.shelves)


def test_keys_go_from_revisions_that_nobody_has_registered_since(pool):
    old = fingerprint(model="m", revision="1")
    restore(pool, ("default", old, [noted("1")]))
    found(pool, old, [1, 2])
    assert invalidate(pool, keys=keys_of([1]))["lower_keys"] == 1
    assert [key[2] for key in pool.shelves[0].content] == keys_of([2])


def test_a_registration_wins_over_what_was_noted_and_is_noted_in_its_place(pool):
    restore(pool, ("default", SIZED, [noted(block_bytes=1, limit_bytes=PAGE)]))
    pool.settle()
    assert limit_of(pool) == str(PAGE)
    model = register(pool, limit_bytes=2 * PAGE)
    assert (model.number, model.block_bytes, model.limit_bytes) == (0, BLOCK, 2 * PAGE)
    assert limit_of(pool) == str(2 * PAGE)
    assert told(pool) == told(pool, 1) == [("name", "default", SIZED, [noted(limit_bytes=2 * PAGE)])]
    with pytest.raises(InvalidRequestError, match="registered with block_bytes=4096"):
        register(pool, block_bytes=1)


def test_a_registration_as_it_was_noted_ends_that_another_may_win(pool):
    restore(pool, ("default", SIZED, [noted()]))
    pool.settle()
    register(pool)
    assert told(pool) == []
    with pytest.raises(InvalidRequestError):
        register(pool, limit_bytes=PAGE)


def test_a_limit_that_is_not_asked_for_any_more_ends(pool):
    restore(pool, ("default", SIZED, [noted(limit_bytes=PAGE)]))
    register(pool)
    assert limit_of(pool) is None
    assert pool.request(2 * PAGE)[0] == "granted"


def test_a_limit_that_another_revision_has_stays_and_so_does_one_that_was_set(pool):
    other = fingerprint(model="m", revision="2")
    restore(pool, ("default", SIZED, [noted(limit_bytes=PAGE)]), ("default", other, [noted("2", limit_bytes=PAGE)]))
    register(pool)
    assert limit_of(pool) == str(PAGE)
    pool.administer(QuotaSet(Batch(1), "default", "m", 0, 3 * PAGE, None))
    register(pool, revision="2")
    assert limit_of(pool) == str(3 * PAGE)


def test_a_name_that_is_not_known_is_refused_and_told_that_it_may_be_what_lies_below(pool):
    with pytest.raises(InvalidRequestError) as caught:
        invalidate(pool)
    assert "below" not in caught.value.message
    restore(pool, ("default", SIZED, []))
    for refused in (invalidate, lambda pool: pool.evict(model="m"), lambda pool: invalidate(pool, tenant="default")):
        with pytest.raises(InvalidRequestError, match=r"no model 'm' .*content of 1 model lies below"):
            refused(pool)
    with pytest.raises(InvalidRequestError) as caught:
        invalidate(pool, tenant="other")
    assert "below" not in caught.value.message, "it is another tenant's"


@pytest.mark.parametrize("keys", [None, keys_of([5])])
def test_a_name_is_not_acknowledged_while_content_of_nobody_knows_which_model_lies_below(pool, keys):
    old = fingerprint(model="m", revision="1")
    restore(pool, ("default", old, []))
    found(pool, old, [5])
    model = register(pool, revision="2")
    assert pool.store([5], model=model.number) == 1
    error = from_wire(invalidate(pool, keys=keys)[1:])
    assert isinstance(error, TierError)
    assert error.details["cause"] == "unnamed"
    assert pool.look_up([5], model=model.number)[1] == [], "it is gone all the same"

    assert invalidate(pool, model.number, keys)["caches"] == 0, "a number means that model alone"
    register(pool, "d", name="n")
    assert invalidate(pool, "n", keys, "other")["caches"] == 0, "another tenant's are known"
    assert register(pool, revision="1").fingerprint == old
    assert invalidate(pool, keys=keys)["lower_keys"] == 1
    assert not pool.shelves[0].content


def test_a_lost_disk_is_told_before_content_that_has_no_name(pool):
    restore(pool, ("default", fingerprint(model="m", revision="1"), []))
    register(pool)
    pool.settle()
    pool.handle(DeviceLost(1, "killed"))
    error = from_wire(invalidate(pool)[1:])
    assert isinstance(error, TierError)
    assert (error.details["cause"], error.details["device"]) == ("device_lost", "host-1")
    assert error.message.index("host-1 is lost, and its folder /disk/host-1") < error.message.index("not known")
    assert "everywhere else it is gone" not in error.message


def test_each_lost_disk_is_told_and_what_a_store_refused_beside_it(pool):
    model = register(pool)
    pool.settle()
    pool.handle(DeviceLost(0, "killed"))
    pool.shelves[1].forgotten = lambda *_: ("error", *TierError("it is read-only", cause="EROFS").to_wire())
    error = from_wire(invalidate(pool, model.number)[1:])
    assert (error.details["cause"], error.details["device"]) == ("device_lost", "host-0")
    assert error.message.startswith("host-0 is lost, and its folder /disk/host-0")
    assert error.message.endswith(". Also: it is read-only")
    pool.handle(DeviceLost(1, "killed"))
    error = from_wire(invalidate(pool, model.number)[1:])
    assert "host-0, host-1 are lost, and their folders /disk/host-0, /disk/host-1 may" in error.message
    assert "everywhere else it is gone" in error.message


def test_a_name_is_not_acknowledged_while_a_folder_of_earlier_devices_could_not_be_read(pool):
    with pytest.raises(InvalidRequestError):
        invalidate(pool)
    pool.take(pool.state.restore_models([], ["/disk/host-2"]))
    with pytest.raises(InvalidRequestError, match=r"no model 'm' .*content in /disk/host-2 is not known"):
        invalidate(pool)
    model = register(pool)
    error = from_wire(invalidate(pool, tenant="default")[1:])
    assert error.details["cause"] == "unnamed"
    assert "/disk/host-2" in error.message
    assert invalidate(pool, model.number)["caches"] == 0
