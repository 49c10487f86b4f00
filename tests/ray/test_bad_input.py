"""Bad input through the public API: a typed error that names what was asked and what is possible; no change."""

import asyncio
import os
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from pool_actors import leased_bytes

from kvpool import Access, CachePool, ModelSpec, encode_block_id
from kvpool.cache.lru import LeafFirstLRU
from kvpool.errors import (
    CacheStateError,
    ConfigError,
    DoubleReleaseError,
    InvalidRequestError,
    InvalidSizeError,
    LimitError,
    ParentNotResidentError,
    PoolExistsError,
    PoolNotFoundError,
    SealedError,
    SystemLimitError,
    TensorMismatchError,
    UnknownPolicyError,
)

MIB = 1 << 20
SPEC = ModelSpec("m", dtype=torch.bfloat16, block_shape=(4, 8), limit="256KiB")


def keys(*ids):
    return [encode_block_id(number) for number in ids]


async def held(pool):
    """What must not change: bytes, keys, leases."""
    stats = await pool.stats()
    return stats.total("live_bytes"), stats.keys, stats.waiting, stats.grants, await leased_bytes(pool)


async def test_sizes(pool):
    model = await pool.model(SPEC)
    before = await held(pool)
    for size, says in (
        (0, "at least 1 byte, asked for 0"),
        (-4096, "asked for -4096"),
        ("-1MiB", "'-1MiB'"),
        ("abc", "'abc'"),
        ("12 parsecs", "KiB, MiB, GiB"),
        (1.5, "1.5"),
        (None, "None"),
    ):
        with pytest.raises(InvalidSizeError, match=says):
            await model.request_cache(size)
    for size_mb in (0, -1, None, float("nan"), float("inf"), "7"):
        with pytest.raises(InvalidSizeError):
            await pool.request_cache("m2", size_mb)
    with pytest.raises(InvalidSizeError, match=r"asked for 2.5 MiB, but the largest device .* has 2 MiB"):
        await pool.request_cache("m2", 2.5)
    with pytest.raises(InvalidSizeError, match="max_size"):
        await model.request_cache("64KiB", max_size="32KiB")
    with pytest.raises(LimitError, match=r"asked for 256 KiB.*|asked for .*at most 256 KiB") as refused:
        await model.request_cache(256 * 1024 + 1)
    assert refused.value.details == {"asked_bytes": 256 * 1024 + 1, "limit_bytes": 256 * 1024}
    assert await held(pool) == before


async def test_timeouts(pool):
    before = await held(pool)
    for timeout_s in (-1, float("nan"), float("inf"), "3", True):
        with pytest.raises(InvalidRequestError, match="timeout_s"):
            await pool.request_cache("m", size=4096, timeout_s=timeout_s)
    assert await held(pool) == before


async def test_double_release(pool):
    async with await pool.request_cache("m", size=4096) as kept:
        cache = await pool.request_cache("m", size=4096)
        await cache.release()
        before = await held(pool)
        with pytest.raises(DoubleReleaseError, match=str(cache.id)):
            await cache.release()
        with pytest.raises(CacheStateError, match="released"):
            cache.tensor("uint8", (10,))
        with pytest.raises(CacheStateError, match="released"):
            await cache.seal("key")
        blocks = await (await pool.model(SPEC)).new_blocks(keys(1, 2))
        await blocks.release()
        with pytest.raises(DoubleReleaseError):
            await blocks.release()
        assert (await held(pool))[0] == before[0]
        assert kept.numpy("uint8", (4,)).sum() == 0


async def test_ids_that_are_not_ours(pool):
    """Through the bare handle, where ids are all there is."""
    actor = pool.actor
    async with await CachePool.connect(pool.name, tenant="other") as other:
        theirs = await other.request_cache("m", size=4096)
        gone = await pool.request_cache("m", size=4096)
        await gone.release()
        before = await held(pool)
        model = (await pool.model("m")).number
        for cache_id, error in (
            (theirs.id, "UnknownCacheError"),
            (gone.id, "StaleCacheError"),
            (12345 << 32, "UnknownCacheError"),
            (-1, "UnknownCacheError"),
        ):
            for answer in (
                *await actor.release.remote(pool.client_id, [(1, [cache_id], None)]),
                *await actor.seal.remote(pool.client_id, [(1, model, [cache_id], keys(1), None)]),
                *await actor.pin.remote(pool.client_id, [(1, [cache_id], None)]),
                *await actor.describe_caches.remote(pool.client_id, [cache_id]),
            ):
                assert answer[:2] == ("error", error)
        (answer,) = await actor.release.remote("nobody", [(1, [theirs.id], None)])
        assert answer[:2] == ("error", "ProtocolError")
        (answer,) = await actor.request_caches.remote(pool.client_id, [(1, 99, 4096, 4096, 0.0, 0, None)])
        assert answer[:2] == ("error", "InvalidRequestError")
        assert await held(pool) == before
        await theirs.release()


async def test_a_malformed_item_refuses_its_whole_batch(pool):
    """Through the bare handle: a decision that broke off in the middle would leave the items before it half done."""
    actor, client = pool.actor, pool.client_id
    model = await pool.model(SPEC)
    number, key = model.number, keys(1)[0]
    async with await model.request_cache(4096) as cache:
        before = await held(pool)
        pinned = (await pool.stats()).total("pinned_bytes")
        for method, good, wrong in (
            ("request_caches", (1, number, 4096, 4096, 0.0, 0, None), (1, number, "x", 4096, 0.0, 0, None)),
            ("request_caches", (1, number, 4096, 4096, 0.0, 0, None), (1, number, 4096.5, 4097, 0.0, 0, None)),
            ("request_caches", (1, number, 4096, 4096, 0.0, 0, None), (1, number, 4096, 4096, float("nan"), 0, None)),
            ("request_caches", (1, number, 4096, 4096, 0.0, 0, None), (1, number)),
            ("request_blocks", (1, number, key, None, None, None), (1, number, "text", None, None, None)),
            ("request_blocks", (1, number, key, None, None, None), (1, number, key, 1.5, None, None)),
            ("look_up", (1, number, key, None), (1, number, None, None)),
            ("seal", (1, number, [cache.id], [key], None), (1, number, ["x"], [key], None)),
            ("seal_and_release", (1, number, [cache.id], [key], None), (1, number, cache.id, key, None)),
            ("release", (1, [cache.id], None), (1, [None], None)),
            ("pin", (1, [cache.id], None), (1, cache.id, None)),
        ):
            answers = await getattr(actor, method).remote(client, [good, wrong])
            assert [answer[:2] for answer in answers] == [("error", "InvalidRequestError")] * 2
            assert "trace context" in answers[0][2]
        assert await held(pool) == before
        assert (await pool.stats()).total("pinned_bytes") == pinned


async def test_sealed_caches(pool):
    async with await pool.request_cache("m", size=4096) as cache:
        await cache.seal("first")
        await cache.seal("first")  # again with the same key changes nothing
        before = await held(pool)
        with pytest.raises(SealedError, match="copy it into a new cache"):
            cache.tensor("uint8", (10,), access=Access.READ_WRITE)
        with pytest.raises(SealedError, match="keeps its key"):
            await cache.seal("second")
        with pytest.raises(SealedError, match="asked to seal it without a key"):
            await cache.seal()
        with pytest.raises(InvalidRequestError, match="not empty"):
            await cache.seal("")
        with pytest.raises(InvalidRequestError):
            await cache.seal(7)
        assert not cache.numpy("uint8", (10,)).flags.writeable
        assert await held(pool) == before
    async with await pool.request_cache("m", size=4096) as cache:
        await cache.seal()
        with pytest.raises(SealedError, match=r"sealed already, without a key; .*Copy it into a new cache"):
            await cache.seal("too late")
        assert await pool.find_cache("m", "too late") is None


async def test_parents_and_hashes(pool):
    model = await pool.model(SPEC)
    block = torch.zeros((1, 4, 8), dtype=torch.bfloat16)
    assert await model.put_blocks(keys(1), block) == 1
    before = await held(pool)
    with pytest.raises(ParentNotResidentError, match=f"{99:032x}.*root"):
        await model.new_blocks(keys(2), parent=keys(99)[0])
    with pytest.raises(ParentNotResidentError):
        await model.put_blocks(keys(2), block, parent=keys(99)[0])
    for hashes in ([], [b"short"], ["text"], [7], [b"x" * 16, b"x" * 15]):
        with pytest.raises(InvalidRequestError, match="16"):
            await model.match_prefix(hashes)
        with pytest.raises(InvalidRequestError, match="16"):
            await model.new_blocks(hashes)
    for parent in ("text", b"short", 7):
        with pytest.raises(InvalidRequestError, match="16"):
            await model.new_blocks(keys(2), parent=parent)
        with pytest.raises(InvalidRequestError, match="16"):
            await model.put_blocks(keys(2), block, parent=parent)
    with pytest.raises(InvalidRequestError, match="block_shape"):
        await (await pool.model("no blocks")).new_blocks(keys(2))
    assert await held(pool) == before
    assert not await model.match_prefix(keys(5))  # a look-up that finds nothing is no error


async def test_tensors_that_do_not_fit(pool):
    model = await pool.model(SPEC)
    async with await model.request_cache(4096) as cache:
        before = await held(pool)
        for dtype, shape, offset, says in (
            ("float32", (1025,), 0, r"float32\[1025\].*4100.*4096"),
            ("uint8", (4096,), 1, "4097"),
            ("uint8", (-1,), 0, "-1"),
            ("uint8", (-1, -1), 0, "negative"),
            ("uint8", (-1, 4), 0, "at least 1.*-1, 4"),
            ("uint8", (0,), 0, "at least 1"),
            ("uint8", (2.5, 4), 0, r"whole numbers.*\(2.5, 4\)"),
            ("uint8", "4", 0, "whole numbers.*'4'"),
            ("uint8", None, 0, "whole numbers.*None"),
            ("uint8", (4,), 0.5, "0.5"),
            ("uint8", (4,), -4, "-4"),
            ("float32", (4,), 2, "2"),
            ("float128", (4,), 0, "unknown dtype 'float128'.*float32"),
        ):
            with pytest.raises(TensorMismatchError, match=says):
                cache.tensor(dtype, shape, offset_bytes=offset)
        assert cache.numpy("uint8", 4).shape == cache.tensor("uint8", np.array([4])).shape == (4,)
        for blocks, says in (
            (torch.zeros((2, 4, 8), dtype=torch.float16), r"bfloat16\[4, 8\], got float16"),
            (torch.zeros((2, 8, 4), dtype=torch.bfloat16), r"got bfloat16\[8, 4\]"),
            (torch.zeros((3, 4, 8), dtype=torch.bfloat16), "each hash needs a block: 2 of them, got 3"),
            ([np.zeros((4, 8), np.float32)] * 2, "got float32"),
            ([[1, 2], [3, 4]], "torch tensors or numpy arrays"),
        ):
            with pytest.raises(TensorMismatchError, match=says):
                await model.put_blocks(keys(1, 2), blocks)
        assert await held(pool) == before


async def test_two_sizes_are_one_too_many(pool):
    before = await pool.ls()
    with pytest.raises(InvalidSizeError, match="size_mb=1 and size='2KiB'"):
        await pool.request_cache("m", 1, size="2KiB")
    assert await pool.ls() == before


async def test_a_look_up_registers_no_model(pool):
    """A name mistyped once must not pass for a model from then on."""
    assert await pool.find_cache("modle", "key") is None
    for wrong in ("", 7):
        with pytest.raises(InvalidRequestError, match="key is text"):
            await pool.find_cache("modle", wrong)
    for ask in (pool.contains("modle", keys(1)), pool.invalidate("modle"), pool.evict("all", model="modle")):
        with pytest.raises(InvalidRequestError, match="no model 'modle' is registered"):
            await ask
    assert (await pool.ls())["models"] == []
    async with await pool.request_cache("model", size=4096) as cache:
        await cache.seal("key")
    async with await CachePool.connect(pool.name) as other, await other.find_cache("model", "key") as found:
        assert found.size_bytes == 4096
        assert await other.find_cache("model", "other key") is None


async def test_models(pool):
    await pool.model(SPEC)
    with pytest.raises(InvalidRequestError, match=r"registered with.*limit"):
        await pool.model(ModelSpec("m", dtype=torch.bfloat16, block_shape=(4, 8), limit="1MiB"))
    for call in (pool.model(3), pool.request_cache(3, 1), pool.find_cache(None, "key")):
        with pytest.raises(InvalidRequestError, match="a model is its name"):
            await call
    for wrong in (
        {"name": ""},
        {"name": 3},
        {"name": "n", "dtype": "uint8"},
        {"name": "n", "block_bytes": 4096, "dtype": "uint8", "block_shape": (4,)},
        {"name": "n", "dtype": "uint8", "block_shape": (0,)},
    ):
        with pytest.raises(InvalidRequestError):
            ModelSpec(**wrong)
    with pytest.raises(InvalidSizeError):
        await pool.model(ModelSpec("n", block_bytes="many"))


async def test_configurations(local_ray):
    for settings, error, says in (
        ({"policy": "newest"}, UnknownPolicyError, "'newest'.*lru"),
        ({"placement": "elsewhere"}, UnknownPolicyError, "'elsewhere'.*least_loaded"),
        ({"polcy": "lru"}, ConfigError, "unknown config key 'polcy'; possible: .*policy"),
        ({"devices": "gpu:all"}, ConfigError, "gpu:all.*host:2"),
        ({"devices": "host:2xbig"}, ConfigError, "big"),
        ({"devices": "host:1x4KiB"}, ConfigError, "smaller than one page"),
        ({"devices": "host:1x1MiB", "page_size": "12KiB"}, ConfigError, "power of two"),
        ({"devices": "host:1x1MiB", "page_size": 2048}, ConfigError, "4096"),
        ({"name": "a/b"}, ConfigError, "name"),
        ({"reserve": 2}, ConfigError, "reserve"),
        ({"devices": "host:1x1000TiB", "page_size": "1TiB"}, SystemLimitError, "1000 pages of 1 TiB"),
    ):
        with pytest.raises(error, match=says):
            await CachePool.create(**{"name": "never", "devices": "host:1x2MiB", **settings})
    with pytest.raises(PoolNotFoundError, match="no pool named 'never'"):
        await CachePool.connect("never")


async def test_names(make_pool):
    first = await make_pool("host:1x2MiB")
    with pytest.raises(PoolNotFoundError, match=f"'nowhere'.*running: .*{first.name}"):
        await CachePool.connect("nowhere")
    with pytest.raises(PoolExistsError, match=r"devices: runs with 'host:1x2MiB', asked for 'host:1x4MiB'") as exists:
        await CachePool.create(name=first.name, devices="host:1x4MiB", page_size="64KiB")
    assert exists.value.details["differing"] == ["devices"]
    async with await CachePool.create(name=first.name, devices="host:1x2MiB", page_size="64KiB") as same:
        assert same.config == first.config
        assert (await same.stats()).clients == 2

    # A caller that gives up joining leaves the pool alone.
    joining = asyncio.create_task(CachePool.create(name=first.name, devices="host:1x2MiB", page_size="64KiB"))
    await asyncio.sleep(0)
    joining.cancel()
    with pytest.raises(asyncio.CancelledError):
        await joining
    assert (await first.stats()).name == first.name


async def test_a_forked_child_is_refused(pool, start_process):
    process = await start_process(pool)
    before = await held(pool)
    raised = await process.use_in_forked_child([1, 2])
    assert raised == dict.fromkeys(raised, "ForkedHandleError")
    assert (await held(pool))[:3] == before[:3]
    await process.request(1, 4096, 1)  # the parent goes on
    await process.release()


async def test_a_policy_that_only_the_caller_can_import_is_refused_in_one_line(local_ray, monkeypatch):
    """The actor's death was told by all of its traceback, and the pool's name was taken."""
    module = ModuleType("policies_of_the_caller")
    module.own = LeafFirstLRU
    monkeypatch.setitem(sys.modules, module.__name__, module)
    name = f"t{os.getpid()}-callers-policy"
    with pytest.raises(UnknownPolicyError, match="it must be installed or on the PYTHONPATH") as caught:
        await CachePool.create(name=name, devices="host:1x2MiB", policy="policies_of_the_caller:own")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    with pytest.raises(PoolNotFoundError):
        await CachePool.connect(name)
