"""Administration of a pool that others use: content is invalidated under load, leases are revoked, events come."""

import asyncio
import ctypes

import numpy as np
import pytest
import ray
from footprint import mapped_inodes
from pool_actors import DEADLINE_S, device_actors, leased_bytes, pid_of, until, until_no_zombies, until_waiting

from kvpool import CachePool, ModelSpec, encode_block_id, sync
from kvpool.actors.cluster import call
from kvpool.actors.protocol import PROTOCOL_VERSION, host_identity
from kvpool.errors import (
    InvalidatedError,
    InvalidRequestError,
    LeaseRevokedError,
    PoolUnavailableError,
    ProtocolError,
    UnknownPolicyError,
)

PAGE = 64 * 1024
BLOCK_BYTES = 16 * 1024
BLOCKS = ModelSpec("model", block_bytes=BLOCK_BYTES)
OLD, NEW = 0xAA, 0x55


def keys(ids):
    return [encode_block_id(block_id) for block_id in ids]


def filled(count, value):
    return np.full((count, BLOCK_BYTES), value, np.uint8)


async def bytes_left(pool, value):
    """How many bytes of a value are in the memory of all devices, whatever it is used for."""

    def count(actor, value=value):
        table = actor._allocator._table
        pages = (table.address + index * table.page_size_bytes for index in table._mapped)
        return sum(ctypes.string_at(page, table.page_size_bytes).count(value) for page in pages)

    return sum([await device.__ray_call__.remote(count) for device in device_actors(pool)])


# -- invalidate -------------------------------------------------------------------------------------------------------


async def test_no_look_up_after_an_invalidation_sees_what_was_there_before(make_pool, start_process):
    """Three processes store and read without pause, while the weights change again and again."""
    pool = await make_pool("host:2x4MiB")
    workers = await asyncio.gather(*(start_process(pool) for _ in range(3)))
    running = [asyncio.ensure_future(each.store_and_verify(3, 8, seed)) for seed, each in enumerate(workers)]
    gone = []

    async def hits():
        return sum(counts["hits"] for counts in await asyncio.gather(*(each.progress() for each in workers)))

    async def busy(before):
        return await hits() >= before + 20

    try:
        await asyncio.gather(*(each.valid_from(1) for each in workers))
        for version in range(2, 14):
            before = await hits()
            await until(lambda before=before: busy(before), "they store and read")
            # New weights first, then the old content goes. What was asked for before and is still being computed with
            # the old ones cannot be sealed any more; from the return on nobody may see an old version.
            await asyncio.gather(*(each.use_version(version) for each in workers))
            answer = await pool.invalidate("model")
            gone.append(answer["caches"])
            await asyncio.gather(*(each.valid_from(version) for each in workers))
    finally:
        await asyncio.gather(*(each.stop_storing() for each in workers))
        counts = await asyncio.gather(*running)
    totals = {name: sum(count[name] for count in counts) for name in counts[0]}
    print(f"\n{totals}, invalidated {gone}")
    assert (totals["stale"], totals["mixed"]) == (0, 0)
    assert totals["refused"] > 0
    assert min(gone) > 0
    stats = await pool.stats()
    assert stats.evictions_by_reason["invalidate"] == sum(gone)


async def test_a_put_on_its_way_with_old_weights_is_refused(pool):
    model = await pool.model(BLOCKS)
    new = await model.new_blocks(keys([1, 2]))
    for block in new.numpy():
        block[:] = OLD
    del block
    answer = await pool.invalidate(model)
    assert (answer["caches"], answer["unsealed"]) == (0, 2)
    with pytest.raises(InvalidatedError, match="compute and store it anew"):
        await new.seal()
    with pytest.raises(InvalidatedError):
        await new.finish()
    await until(lambda: not pool.leases(), "the refused blocks are given back")
    assert await model.put_blocks(keys([1, 2]), filled(2, NEW)) == 2


async def test_no_byte_of_invalidated_content_is_left_on_any_device(make_pool, start_process):
    pool = await make_pool("host:2x2MiB", reserve=1.0)
    reader = await start_process(pool)
    model, other = await pool.model(BLOCKS), await pool.model(ModelSpec("other", block_bytes=BLOCK_BYTES))
    assert await model.put_blocks(keys(range(40)), filled(40, OLD)) == 40
    assert await other.put_blocks(keys(range(20)), filled(20, NEW)) == 20
    await pool.evict("256KiB", model=model)  # its bytes stay in warm pages and in holes
    assert await bytes_left(pool, OLD) >= 40 * BLOCK_BYTES
    assert len(await reader.match(list(range(3)))) == 3

    answer = await pool.invalidate("model")

    assert answer["caches"] == 40 - 16
    assert answer["held"] == {reader.client_id: (3, 3 * BLOCK_BYTES)}
    assert await reader.digest() == [[OLD]] * 3
    assert await bytes_left(pool, OLD) == 3 * BLOCK_BYTES
    await reader.release()
    await until(lambda: _none_left(pool, OLD), "the last lease ended")
    assert await bytes_left(pool, NEW) >= 20 * BLOCK_BYTES  # more if compaction moved some: it leaves a copy behind
    assert (await other.contains(keys(range(20))))["blocks"] == 20
    assert (await pool.stats()).total("reserve_bytes") > 0


async def _none_left(pool, value):
    return await bytes_left(pool, value) == 0


async def test_one_keys_content_goes_and_its_neighbours_stay(pool):
    async with await pool.request_cache("documents", size=5000) as cache:
        cache.numpy("uint8", (5000,))[:] = OLD
        await cache.seal(key="page 1 of letter.pdf")
        await cache.pin()
    async with await pool.request_cache("documents", size=5000) as cache:
        await cache.seal(key="page 2 of letter.pdf")
    answer = await pool.invalidate("documents", ["page 1 of letter.pdf", "page 9"])
    assert (answer["caches"], answer["held"]) == (1, {})
    assert await bytes_left(pool, OLD) == 0
    listed = await pool.ls("documents")
    assert [each["pinned"] for each in listed["caches"]] == [False]
    assert (await pool.invalidate("documents", "page 2 of letter.pdf"))["caches"] == 1, "text alone is one key"
    with pytest.raises(InvalidRequestError, match="no model 'document'"):
        await pool.invalidate("document")


# -- revoke -----------------------------------------------------------------------------------------------------------


async def test_a_revoked_process_is_told_keeps_its_tensors_and_can_connect_again(pool, start_process):
    process, other = await start_process(pool), await start_process(pool)
    await other.put([1, 2], 9)
    assert len(await process.match([1, 2])) == 2
    await process.release()
    await process.request(1, 4096, OLD)
    await process.keep_view(4096)
    await process.match([1, 2])
    await process.request(1, 3 * PAGE, OLD)
    await process.keep_view(4096)
    (before,) = [each for each in await pool.holders() if each["client"] == process.client_id]
    assert (before["pid"], before["bytes"]) == (process.pid, 4096 + 3 * PAGE + 2 * BLOCK_BYTES)
    assert 0 <= before["age_s"] <= before["connected_s"] < 600
    assert before["job"] == ray.get_runtime_context().get_job_id()

    answer = await pool.revoke(process.client_id)

    assert (answer["caches"], answer["bytes"]) == (4, before["bytes"])
    assert answer["mapped_bytes"] > 0
    assert await leased_bytes(pool) == {}
    raised = await process.error_of_use()
    assert raised == dict.fromkeys(raised, "LeaseRevokedError")
    assert await process.digest() == [[OLD]]
    # Nothing is put where it may still write, though there is much less in the pool than there is room for.
    lost_bytes = len(mapped_inodes(process.pid)) * PAGE
    filler = await other.take_all(4096, NEW, lost_bytes)
    assert filler["caches"] > 300
    await process.fill(0xEE)
    assert await process.digest() == [[0xEE]]
    assert (await other.take_all(4096, NEW, lost_bytes))["foreign"] == 0
    assert await bytes_left(pool, NEW) == 4096 * filler["caches"]
    await process.drop_tensors()
    await until(lambda: not mapped_inodes(process.pid), "it unmaps all when nothing is in use any more")
    await until_no_zombies(pool)
    assert (await other.take_all(4096, NEW))["caches"] > 0, "what it had is given out now"
    await other.release()
    assert await process.connect_again() != process.client_id
    assert await process.put([5], 1) == 1
    assert (await pool.stats()).clients_died == 0


async def test_revoking_a_stopped_process_does_not_wait_for_it(pool, start_process):
    process, other = await start_process(pool), await start_process(pool)
    await process.request(30, PAGE, OLD)
    await process.keep_view(PAGE)
    kept = mapped_inodes(process.pid)
    process.stop()
    waiting = asyncio.ensure_future(other.take_all(PAGE, NEW, lost_bytes=30 * PAGE))
    async with asyncio.timeout(DEADLINE_S):
        answer = await pool.revoke(process.client_id)
        assert answer["mapped_bytes"] == answer["bytes"] == 30 * PAGE
        first = await waiting
    assert first == {"caches": 2, "foreign": 0}, "what it maps is given to nobody"
    assert (await pool.stats()).total("zombie_bytes") == 30 * PAGE
    assert not mapped_inodes(other.pid) & kept
    process.resume()
    assert await process.digest() == [[OLD]]  # no fault, and nobody wrote there
    await process.fill(0xEE)
    await process.drop_tensors()
    await until_no_zombies(pool)
    assert await other.take_all(PAGE, NEW) == {"caches": 30, "foreign": 0}
    await other.release()


async def test_a_revoked_process_that_is_killed_leaves_nothing(pool, start_process):
    process = await start_process(pool)
    await process.request(5, PAGE, OLD)
    await process.keep_view(PAGE)
    await pool.revoke(process.client_id)
    assert (await pool.stats()).total("zombie_bytes") > 0
    process.kill()
    await until_no_zombies(pool)


async def test_a_revoked_process_that_waits_for_memory_is_told(pool):
    async with await CachePool.connect(pool.name) as held:
        cache = await held.request_cache("m", size="2MiB")
        async with await CachePool.connect(pool.name) as other:
            waiting = asyncio.ensure_future(other.request_cache("m", size="1MiB"))
            await until_waiting(pool, 1)
            await pool.revoke(other.client_id)
            async with asyncio.timeout(DEADLINE_S):
                with pytest.raises(LeaseRevokedError):
                    await waiting
        await cache.release()


async def test_a_revoked_client_is_not_kept_waiting_for_grants(pool):
    asks = {"protocol": PROTOCOL_VERSION, "id": "bare", "tenant": "default", "host": host_identity(), "token": "secret"}
    await call(pool.actor.connect, asks)
    with pytest.raises(ProtocolError, match="'nobody' is not connected"):
        await call(pool.actor.grants, "nobody", 0, 600.0)
    assert await call(pool.actor.grants, "bare", 0, 0.0) == (0, [])
    await pool.revoke("bare")
    with pytest.raises(LeaseRevokedError):
        await call(pool.actor.grants, "bare", 0, 600.0, timeout_s=DEADLINE_S)
    await call(pool.actor.disconnect, "bare")
    with pytest.raises(ProtocolError):
        await call(pool.actor.grants, "bare", 0, 600.0)


async def test_only_clients_of_the_own_tenant_can_be_revoked_or_seen(pool, start_process):
    process = await start_process(pool, "elsewhere")
    await process.request(1, 4096, 1)
    assert await pool.holders() == []
    with pytest.raises(InvalidRequestError, match=r"no client .* in tenant 'default'"):
        await pool.revoke(process.client_id)
    assert (await pool.evict("all"))["leased_caches"] == 0
    assert (await pool.ls())["total"] == 0
    (seen,) = await pool.actor.leases.remote()
    assert (seen["client"], seen["tenant"]) == (process.client_id, "elsewhere")
    await pool.actor.revoke.remote(process.client_id)
    assert await leased_bytes(pool) == {}


# -- events, and the rest ---------------------------------------------------------------------------------------------


async def test_events_come_as_they_happen(pool):
    model = await pool.model(BLOCKS)
    stream = await pool.events().start()
    came = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    await model.put_blocks(keys([1, 2]), filled(2, OLD))
    async with asyncio.timeout(DEADLINE_S):
        first = await came
    assert (first.kind, first.tenant, first.model, first.key, first.parent) == (
        "stored", "default", "model", *keys([1]), None,
    )  # fmt: skip
    await pool.evict(1)
    await pool.invalidate(model)
    seen = []
    async for event in stream:
        seen.append((event.kind, event.key, event.reason))
        if event.kind == "cleared":
            break
    assert seen == [
        ("stored", keys([2])[0], None),
        ("removed", keys([2])[0], "request"),
        ("cleared", None, "invalidate"),
    ]
    assert await stream.next(0.0) is None
    with sync.CachePool.connect(pool.name, tenant="elsewhere") as blocking:
        theirs = blocking.events().start()
        await model.put_blocks(keys([7]), filled(1, OLD))
        blocking.model(BLOCKS).put_blocks(keys([8]), filled(1, OLD))
        for event in theirs:
            assert (event.key, event.tenant) == (*keys([8]), "elsewhere")
            break


async def test_the_stream_of_a_pool_that_is_gone_ends_with_an_error(make_pool):
    pool = await make_pool()
    stream = await pool.events().start()
    came = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0.05)
    await pool.actor.delete.remote(None, pool.client_id)
    async with asyncio.timeout(DEADLINE_S):
        with pytest.raises(PoolUnavailableError):
            await came


async def test_questions_of_many_are_merged_and_take_no_lease(pool):
    model = await pool.model(BLOCKS)
    await model.put_blocks(keys(range(5)), filled(5, OLD))
    before = await pool.stats()
    found = await asyncio.gather(*(pool.contains("model", keys(range(n, n + 3))) for n in range(6)))
    assert [each["blocks"] for each in found] == [3, 3, 3, 2, 1, 0]
    assert found[0]["devices"] == {"host-0": 3}
    with pytest.raises(InvalidRequestError):
        await pool.contains("absent", keys([1]))
    async with await pool.request_cache("documents", size=4096) as cache:
        await cache.seal(key="page 1")
    for asked, blocks in (("page 1", 1), (["page 1", "page 2"], 1), (cache.key, 1), ("page 2", 0)):
        assert (await pool.contains("documents", asked))["blocks"] == blocks, (
            "keys as seal and the command line have them"
        )
    for wrong in ([], "", 7, [7], [""]):
        with pytest.raises(InvalidRequestError, match=r"encode_block_id"):
            await pool.contains("documents", wrong)
    after = await pool.stats()
    assert (after.lookups, after.blocks_hit) == (before.lookups, before.blocks_hit)
    assert await leased_bytes(pool) == {}


async def test_the_blocking_client_has_the_same_verbs(pool):
    def administer():
        with sync.CachePool.connect(pool.name) as blocking:
            model = blocking.model(BLOCKS)
            model.put_blocks(keys([1, 2]), filled(2, OLD))
            assert blocking.contains(model, keys([1, 2, 3]))["blocks"] == model.contains(keys([1, 2]))["blocks"] == 2
            assert blocking.ls(model, limit=1)["total"] == 2
            assert blocking.holders() == []
            assert blocking.evict("16KiB")["caches"] == 1
            assert blocking.invalidate(model)["caches"] == 1
            assert blocking.set_policy("lru") == "lru"
            assert blocking.stats().total("reserve_bytes") == PAGE
            assert blocking.trim() == PAGE, "also what this client still maps, and lets go of when it is asked"
            assert blocking.stats().total("reserve_bytes") == 0
            assert (blocking.actor, blocking.client_id) == (blocking._pool.actor, blocking._pool.client_id)
            assert model.name == "model"
            with pytest.raises(UnknownPolicyError, match="lru"):
                blocking.set_policy("none")
            with pytest.raises(InvalidRequestError):
                blocking.revoke("nobody")

    await asyncio.to_thread(administer)


async def test_a_device_of_a_pool_is_named_in_evictions(make_pool):
    pool = await make_pool("host:2x1MiB")
    model = await pool.model(BLOCKS)
    await model.put_blocks(keys([1]), filled(1, OLD))
    where = (await model.contains(keys([1])))["devices"]
    (device,) = where
    with pytest.raises(InvalidRequestError, match="host-0, host-1"):
        await pool.evict("all", device="host-7")
    assert (await pool.evict("all", device=device))["caches"] == 1
    assert await pid_of(pool.actor) > 0


@pytest.mark.parametrize("when", ["by word", "in the background"])
async def test_compaction_moves_what_nobody_has_and_every_byte_stays_right(make_pool, when):
    pool = await make_pool("host:1x2MiB", compaction_threshold=1.0 if when == "by word" else 0.0)
    spec = ModelSpec("small", block_bytes=4096)
    model = await pool.model(spec)
    hashes = [encode_block_id(number) for number in range(512)]
    for place in range(0, 512, 64):  # chains of their own, one a page of 64 KiB and some
        content = np.stack([np.full(4096, number % 251, np.uint8) for number in range(place, place + 64)])
        assert await model.put_blocks(hashes[place : place + 64], content) == 64
    kept = await model.match_prefix(hashes[:4])  # leased: stays where it is
    before = kept.addresses()
    await pool.evict("1MiB")

    if when == "by word":
        done = await pool.defragment()
        assert done.keys() == {"moved_bytes", "freed_pages"}
    async with asyncio.timeout(DEADLINE_S):
        while not (await pool.stats()).total("compacted_pages"):  # noqa: ASYNC110 - the actor has no event for it
            await asyncio.sleep(0.05)
    assert kept.addresses() == before
    await kept.release()
    for place in range(0, 512, 64):
        async with await model.match_prefix(hashes[place : place + 64]) as hit:
            for number, block in zip(range(place, place + 64), hit.numpy(), strict=False):
                assert (block == number % 251).all()
