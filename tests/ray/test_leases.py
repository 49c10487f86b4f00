"""When a lease ends: by word, with the last tensor, with the handle, with the connection."""

import asyncio
import gc
import warnings

import numpy as np
import pytest
from pool_actors import leased_bytes, until_leased

import kvpool.client.connection
from kvpool import Access, CachePool, ModelSpec, encode_block_id
from kvpool.config import load_config
from kvpool.errors import CacheStateError, ConfigError, DoubleReleaseError, SealedError, SystemLimitError


async def own_bytes(pool):
    return (await leased_bytes(pool)).get(pool.client_id, 0)


async def test_a_release_takes_effect_when_the_last_tensor_dies(pool):
    cache = await pool.request_cache("m", size="64KiB")
    tensor = cache.tensor("float32", (4, 4))
    part = tensor.reshape(16)[3:5]
    await cache.release()
    assert cache.released
    assert pool.leases() == [{"ids": [cache.id], "size_bytes": 65536, "views": 1, "released": True}]
    tensor.fill_(7)  # the memory is still ours
    del tensor
    assert part.tolist() == [7, 7]  # views outlive the tensor that they were taken of
    assert await own_bytes(pool) == 65536
    with pytest.raises(DoubleReleaseError):
        await cache.release()

    del part
    await until_leased(pool, 0)
    assert pool.leases() == []


async def test_a_dropped_handle_is_released_with_a_warning(pool):
    cache = await pool.request_cache("m", size="64KiB")
    view = cache.numpy("uint8", (10,))
    del cache
    gc.collect()
    assert await own_bytes(pool) == 65536  # the view holds it
    views = [view]
    del view
    with pytest.warns(ResourceWarning, match="without release"):
        views.clear()
    await until_leased(pool, 0)


async def test_close_refuses_while_tensors_are_alive(pool):
    async with await CachePool.connect(pool.name) as another:
        cache = await another.request_cache("m", size="64KiB")
        view = cache.numpy("uint8", (10,))
        with pytest.raises(CacheStateError, match="1 tensor over"):
            await another.close()
        view[:] = 1
        assert await own_bytes(another) == 65536  # nothing was closed
        del view
    assert await leased_bytes(pool) == {}  # a lease that was not released ends with the connection
    with pytest.raises(CacheStateError, match="closed"):
        await another.stats()
    with pytest.raises(CacheStateError, match="closed"):
        cache.numpy("uint8", (10,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del cache  # its lease ended with the connection: nothing to warn of
        gc.collect()


async def test_leaving_the_context_releases_also_after_an_error(pool):
    async def fail():
        async with await pool.request_cache("m", size="64KiB"):
            assert await own_bytes(pool) == 65536
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    assert await own_bytes(pool) == 0


async def test_an_error_is_not_hidden_by_the_tensors_that_its_traceback_keeps(pool, caplog):
    opened = []

    async def fail():
        async with await CachePool.connect(pool.name) as another:
            opened.append(another)
            cache = await another.request_cache("m", size="64KiB")
            view = cache.numpy("uint8", (10,))
            await cache.release()
            raise ZeroDivisionError(view.shape)

    with pytest.raises(ZeroDivisionError):
        await fail()
    assert "stays connected: still in use in this process: 1 tensor" in caplog.text
    await until_leased(pool, 0)  # it did, so that the end of the tensor could be told
    await opened.pop().close()


async def test_a_pinned_cache_survives_its_leases_but_not_the_pool(make_pool):
    pool = await make_pool()
    async with await pool.request_cache("m", size="1MiB") as cache:
        await cache.seal("system prompt")
        await cache.pin()
    async with await pool.request_cache("m", size="1MiB", timeout_s=60):
        with pytest.raises(MemoryError):
            await pool.request_cache("m", size="1MiB", timeout_s=0)
    assert (await pool.stats()).evictions == 0
    await pool.delete()  # nobody is left who could unpin it


async def test_who_seals_second_gets_what_the_first_one_sealed(pool):
    async with await pool.request_cache("m", size=4096) as first, await pool.request_cache("m", size=4096) as second:
        first.numpy("uint8", (4096,))[:] = 1
        second.numpy("uint8", (4096,))[:] = 2
        await first.seal("key")
        await second.seal("key")
        assert second.id == first.id
        assert np.unique(second.numpy("uint8", (4096,))).tolist() == [1]
        assert (await second.info())["leases"] == 2
    assert await own_bytes(pool) == 0


async def test_blocks_that_do_not_all_fit_are_stored_as_far_as_they_fit(pool):
    block_bytes = 256 * 1024
    model = await pool.model(ModelSpec("m", block_bytes=block_bytes))
    async with await pool.request_cache("m", size="1MiB"):
        hashes = [encode_block_id(number) for number in range(10)]
        assert await model.put_blocks(hashes, np.ones((10, block_bytes), np.uint8)) == 4
        async with await model.match_prefix(hashes) as hit:
            assert hit.num_blocks == 4
            assert [np.unique(block).tolist() for block in hit.numpy()] == [[1]] * 4


async def test_a_cancelled_put_leaves_no_lease(pool):
    model = await pool.model(ModelSpec("m", block_bytes=4096))
    for turns in range(12):
        hashes = [encode_block_id(100 * turns + number) for number in range(20)]
        put = asyncio.create_task(model.put_blocks(hashes, np.ones((20, 4096), np.uint8)))
        for _ in range(turns):
            await asyncio.sleep(0.0003)
        put.cancel()
        await asyncio.gather(put, return_exceptions=True)
    await until_leased(pool, 0)


async def test_new_blocks_are_read_only_once_they_are_sealed(pool):
    model = await pool.model(ModelSpec("m", block_bytes=4096))
    async with await model.new_blocks([encode_block_id(number) for number in range(3)]) as new:
        for number, block in enumerate(new.numpy()):
            assert block.flags.writeable
            block[:] = number
        del block
        written_at = new.addresses()
        await new.seal()
        sealed = new.numpy()
        assert [block.flags.writeable for block in sealed] == [False] * 3
        assert [np.unique(block).tolist() for block in sealed] == [[0], [1], [2]]
        assert not set(written_at) & set(new.addresses())  # the other view of the same memory
        del sealed


@pytest.mark.parametrize("turns", range(4))
async def test_a_cache_whose_sealing_was_cancelled_is_read_only_and_can_be_sealed_again(pool, turns):
    async with await pool.request_cache("m", size=4096) as cache:
        sealing = asyncio.create_task(cache.seal("key"))
        for _ in range(1 + turns):
            await asyncio.sleep(0)
        sealing.cancel()
        await asyncio.gather(sealing, return_exceptions=True)
        with pytest.raises(SealedError):
            cache.numpy("uint8", (1,), access=Access.READ_WRITE)
        await cache.seal("key")
        assert (await cache.info())["sealed"]


async def test_a_cache_whose_sealing_was_refused_stays_writable(pool):
    async with await pool.request_cache("m", size=4096) as first, await pool.request_cache("m", size=8192) as second:
        await first.seal("key")
        with pytest.raises(SealedError):  # the same key means the same bytes
            await second.seal("key")
        second.numpy("uint8", (8192,))[:] = 1
        await second.seal("another key")


async def test_a_key_whose_cache_is_never_found_is_given_up(pool, monkeypatch):
    async with await pool.request_cache("m", size=4096) as first, await pool.request_cache("m", size=4096) as second:
        await first.seal("key")

        async def nothing(_item, _trace):
            return "hit", [], [], [], [], 0

        monkeypatch.setattr(pool._connection.prefixes, "ask", nothing)
        with pytest.raises(CacheStateError, match="keeps vanishing"):
            async with asyncio.timeout(60):
                await second.seal("key")
        assert not second.sealed


async def test_a_connection_is_used_on_its_own_event_loop(pool):
    cache = await pool.request_cache("m", size=4096)

    async def elsewhere():
        cache.numpy("uint8", (1,))[:] = 1  # memory is the process's
        for use in (cache.release, cache.seal, cache.info, pool.stats, pool.close):
            with pytest.raises(CacheStateError, match="another event loop"):
                await use()

    await asyncio.to_thread(asyncio.run, elsewhere())
    await cache.release()
    assert await own_bytes(pool) == 0


async def test_closing_looks_for_tensors_again_when_the_last_calls_are_answered(pool):
    async with await CachePool.connect(pool.name) as another:
        views = []

        async def ask():
            cache = await another.request_cache("m", size=4096)
            views.append((cache, cache.numpy("uint8", (1,))))

        await another.model("m")
        asking = asyncio.create_task(ask())
        await asyncio.sleep(0)
        drained = another._connection.releases.drain

        async def drain():
            await asking
            await drained()

        another._connection.releases.drain = drain
        with pytest.raises(CacheStateError, match="1 tensor over"):
            await another.close()
        cache, _ = views.pop()
        del _
        await cache.release()
        assert await own_bytes(another) == 0


async def test_limits_are_checked_for_all_devices_together(make_pool, monkeypatch):
    pool = await make_pool(devices="host:2x2MiB")  # 32 pages each, in two views
    asked = []

    class Backend(kvpool.client.connection.HostBackend):
        def probe(self, *, pages, mapped_pages, page_size_bytes):
            asked.append(mapped_pages)
            if mapped_pages > 100:
                raise SystemLimitError("max_map_count")

    monkeypatch.setattr(kvpool.client.connection, "HostBackend", Backend)
    with pytest.raises(SystemLimitError):
        await CachePool.connect(pool.name)
    assert asked == [128]
    assert (await pool.stats()).clients == 1


async def test_a_config_and_fields_beside_it_are_refused(pool):
    with pytest.raises(ConfigError, match="devices, page_size"):
        await CachePool.create(load_config(name=pool.name), page_size="64KiB", devices="host:1x2MiB")
