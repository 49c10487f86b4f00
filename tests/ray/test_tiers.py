"""Pools with host memory and disk below their devices."""

import asyncio
import os
import signal
from pathlib import Path
from random import Random

import numpy as np
import pytest
from pool_actors import device_actors, kill_device, make_patient, pid_of

from kvpool import ModelSpec, encode_block_id
from kvpool.errors import DeviceLostError, InvalidRequestError, StaleCacheError, TierError

BLOCK_BYTES = 32 * 1024
SPEC = ModelSpec("m", block_bytes=BLOCK_BYTES)
CHAIN = 8


def chain(number):
    return [encode_block_id(1000 * number + place + 1) for place in range(CHAIN)]


def content(number, block_bytes=BLOCK_BYTES):
    return np.stack([np.full(block_bytes, (number * CHAIN + place) % 251, np.uint8) for place in range(CHAIN)])


async def read(model, number):
    """Look a chain up, wait for what comes up, and verify all of it; returns how many blocks there were."""
    async with await model.match_prefix(chain(number)) as hit:
        await hit.fetch()
        for block, expected in zip(hit.numpy(), content(number, model.spec.block_bytes), strict=False):
            assert (block == expected).all()
        return hit.num_blocks


async def put(model, number, **how):
    return await model.put_blocks(chain(number), content(number, model.spec.block_bytes), **how)


async def tiers(pool):
    return (await pool.stats()).devices[0].lower


@pytest.mark.parametrize("block_bytes", [BLOCK_BYTES, 36_000])  # the last leaves holes in pages
async def test_three_times_the_devices_memory_runs_through_device_host_and_disk(make_pool, tmp_path, block_bytes):
    pool = await make_pool("host:1x2MiB", host_memory="2MiB", disk_url=str(tmp_path / "disk"))
    await make_patient(pool)
    model = await pool.model(ModelSpec("m", block_bytes=block_bytes))
    chains = 3 * (2 << 20) // (CHAIN * block_bytes)
    for number in range(chains):
        assert await put(model, number) == CHAIN

    for _ in range(3):
        for number in range(chains):
            assert await read(model, number) == CHAIN

    figures = await tiers(pool)
    assert (figures["not_kept"], figures["host"]["dropped"], figures["misses"]) == (0, 0, 0)
    assert figures["disk"]["hits"] > 0
    assert figures["host"]["hits"] > 0


async def test_several_who_ask_for_the_same_share_what_comes_up(make_pool, tmp_path):
    pool = await make_pool("host:1x1MiB", host_memory="2MiB")
    model = await pool.model(SPEC)
    for number in range(5):
        await put(model, number)

    assert await asyncio.gather(*(read(model, 0) for _ in range(6))) == [CHAIN] * 6

    assert (await tiers(pool))["fills"] <= CHAIN


async def test_a_look_up_tells_what_is_coming_and_does_not_wait_for_it(make_pool):
    pool = await make_pool("host:1x1MiB", host_memory="2MiB")
    model = await pool.model(SPEC)
    for number in range(5):
        await put(model, number)

    async with await model.match_prefix(chain(0)) as hit:
        assert hit.num_blocks + hit.coming == CHAIN
        assert hit.coming > 0
        assert await hit.fetch() == CHAIN
        assert hit.coming == 0
        assert len(hit.tensors()) == CHAIN


async def test_a_fetch_that_is_cancelled_loses_nothing(make_pool):
    pool = await make_pool("host:1x1MiB", host_memory="2MiB")
    model = await pool.model(SPEC)
    for number in range(5):
        await put(model, number)

    async with await model.match_prefix(chain(0)) as hit:
        waiting = asyncio.create_task(hit.fetch())
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert hit.num_blocks + hit.coming == CHAIN
        assert await hit.fetch() == CHAIN
        assert (hit.numpy()[-1] == content(0)[-1]).all()


async def test_durable_blocks_are_found_again_after_a_kill_and_a_new_start(make_pool, tmp_path):
    url = str(tmp_path / "disk")
    pool = await make_pool("host:1x2MiB", disk_url=url, name=f"t{os.getpid()}-durable")
    model = await pool.model(SPEC)
    assert await put(model, 1, durable=True) == CHAIN
    await put(model, 2)
    await kill_device(pool, 0)
    await pool.delete()

    again = await make_pool("host:1x2MiB", disk_url=url, name=pool.name)
    model = await again.model(SPEC)
    assert await read(model, 1) == CHAIN
    assert await read(model, 2) in range(CHAIN + 1)  # never wrong


KILLS = 3
"""Rounds of the next test; 50 of them were run once."""


async def test_kills_at_random_moments_lose_nothing_that_is_durable_and_bring_nothing_wrong(make_pool, tmp_path):
    random, name, kept = Random(5), f"t{os.getpid()}-killed", []
    settings = {"host_memory": "512KiB", "disk_url": str(tmp_path / "disk"), "name": name}
    for life in range(KILLS):
        pool = await make_pool("host:1x1MiB", **settings)
        model = await pool.model(SPEC)
        killed_after, pid = random.randrange(1, 12), await pid_of(device_actors(pool)[0])
        acknowledged = asyncio.Event()

        async def write(numbers, model=model, killed_after=killed_after, acknowledged=acknowledged):
            for done, number in enumerate(numbers):
                stored = await put(model, number, durable=bool(number % 2))
                if number % 2 and stored == CHAIN:  # a dying device may take fewer, and says so
                    kept.append(number)
                if done == killed_after:
                    acknowledged.set()

        writer = asyncio.create_task(write(range(100 * life, 100 * life + 40)))
        reached = asyncio.create_task(acknowledged.wait())
        await asyncio.wait((writer, reached), return_when=asyncio.FIRST_COMPLETED)
        assert reached.done(), writer.exception()
        os.kill(pid, signal.SIGKILL)
        with pytest.raises((DeviceLostError, StaleCacheError, TierError)):
            await writer
        await pool.delete()

        pool = await make_pool("host:1x1MiB", **settings)
        model = await pool.model(SPEC)
        for number in range(100 * life + 40):
            found = await read(model, number)  # never wrong, whatever is there
            assert found == CHAIN or number not in kept
        await pool.delete()


async def test_what_is_not_surely_on_disk_is_not_acknowledged_as_durable(make_pool, tmp_path):
    pool = await make_pool()
    model = await pool.model(SPEC)
    with pytest.raises(TierError, match=r"in the pool, but not durable: .*set disk_url"):
        await put(model, 1, durable=True)
    assert await read(model, 1) == CHAIN  # it is stored all the same


async def test_a_pool_that_is_to_write_nothing_says_so(make_pool, tmp_path):
    pool = await make_pool(disk_url=str(tmp_path / "disk"), write_policy="none", host_memory="64KiB")
    model = await pool.model(SPEC)
    with pytest.raises(TierError, match="set write_policy to something else than 'none'"):
        await put(model, 1, durable=True)


async def test_what_is_there_already_is_made_durable_by_word(make_pool, tmp_path):
    pool = await make_pool(disk_url=str(tmp_path / "disk"))
    model = await pool.model(SPEC)
    assert await put(model, 1) == CHAIN
    assert (await tiers(pool))["disk"]["files"] == 0
    assert await put(model, 1, durable=True) == CHAIN
    assert (await tiers(pool))["disk"]["files"] == CHAIN

    async with await pool.request_cache("whole", size="64KiB") as cache:
        await cache.seal(key="page")
        await cache.seal(key="page", durable=True)
        assert (await tiers(pool))["disk"]["files"] == CHAIN + 1


async def test_every_put_is_durable_where_the_write_policy_says_so(make_pool, tmp_path):
    pool = await make_pool(disk_url=str(tmp_path / "disk"), write_policy="write_through")
    model = await pool.model(SPEC)
    await put(model, 1)
    assert (await tiers(pool))["disk"]["files"] == CHAIN


def files(folder):
    return [*folder.rglob("*.kvcache"), *folder.rglob("*.kvpack")]


async def test_invalidated_content_is_gone_from_every_tier(make_pool, tmp_path):
    folder = tmp_path / "disk"
    pool = await make_pool("host:1x1MiB", host_memory="1MiB", disk_url=str(folder))
    await make_patient(pool)
    model = await pool.model(SPEC)
    for number in range(12):
        await put(model, number)
    await put(model, 13, durable=True)
    assert files(folder)

    await pool.invalidate("m", [chain(0)[0]])
    assert await read(model, 0) == 0
    assert await read(model, 1) == CHAIN

    await pool.invalidate("m")
    assert [await read(model, number) for number in range(14)] == [0] * 14
    assert not files(folder)
    figures = await tiers(pool)
    assert (figures["host"]["entries"], figures["disk"]["files"]) == (0, 0)


async def test_after_a_new_start_names_mean_what_they_meant_before_anybody_registers_a_model(make_pool, cli, tmp_path):
    folder = tmp_path / "disk"
    settings = {"disk_url": str(folder), "name": f"t{os.getpid()}-names"}
    pool = await make_pool("host:2x1MiB", **settings)
    for number in range(4):
        async with await pool.request_cache("doc", size="64KiB") as cache:
            cache.numpy("uint8", (65536,))[:] = number + 1
            await cache.seal(key=f"doc {number}", durable=True)
    for revision in "12":
        await put(await pool.model(ModelSpec("llm", revision=revision, block_bytes=BLOCK_BYTES)), 1, durable=True)
    await pool.delete()

    # By the disk alone; and with one device fewer, so that some of it lies where nobody looks it up.
    pool = await make_pool("host:1x1MiB", **settings)
    listed = {(each["name"], each["revision"]) for each in (await pool.ls())["models"]}
    assert listed == {("doc", ""), ("llm", "1"), ("llm", "2")}
    there = 0
    for number in range(4):
        found = await pool.find_cache("doc", f"doc {number}")
        if found is not None:
            there += 1
            async with found:
                assert (found.numpy("uint8", (65536,)) == number + 1).all()
    assert there > 0
    assert (await pool.contains("doc", ["doc 9"]))["blocks"] == 0

    new = await pool.model(ModelSpec("llm", revision="2", block_bytes=BLOCK_BYTES, limit="512KiB"))
    await put(new, 2)
    await cli("invalidate", "--name", pool.name, "--model", "llm", "--all")
    await cli("invalidate", "--name", pool.name, "--model", "doc", "--all")
    assert not files(folder)
    await pool.delete()

    pool = await make_pool("host:2x1MiB", **settings)
    assert (await pool.ls())["models"] == []
    gone = await cli("invalidate", "--name", pool.name, "--model", "doc", "--all", code=2)
    assert "below" not in gone.stderr


async def test_content_without_a_name_is_not_passed_over_by_what_is_asked_by_name(make_pool, tmp_path):
    folder = tmp_path / "disk"
    settings = {"disk_url": str(folder), "name": f"t{os.getpid()}-nameless"}
    pool = await make_pool("host:1x1MiB", **settings)
    old = ModelSpec("m", revision="1", block_bytes=BLOCK_BYTES)
    await put(await pool.model(old), 1, durable=True)
    await pool.delete()
    for names in folder.rglob("*.kvmodels"):  # as a version that noted none has left it
        names.unlink()

    pool = await make_pool("host:1x1MiB", **settings)
    with pytest.raises(InvalidRequestError, match=r"no model 'm' .*content of 1 model lies below"):
        await pool.invalidate("m")
    new = await pool.model(SPEC)
    await put(new, 2)
    with pytest.raises(TierError, match="content of 1 model lies below"):
        await pool.invalidate("m")
    assert await read(new, 2) == 0
    await pool.model(old)
    assert (await pool.invalidate("m"))["lower_keys"] == CHAIN
    assert not files(folder)


async def test_a_pool_goes_on_when_its_disk_vanishes(make_pool, tmp_path):
    folder = tmp_path / "disk"
    pool = await make_pool("host:1x1MiB", host_memory="512KiB", disk_url=str(folder))
    model = await pool.model(SPEC)
    for number in range(10):
        await put(model, number)
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()

    for number in range(10, 20):
        assert await put(model, number) == CHAIN
    assert await read(model, 19) == CHAIN
    assert all([await read(model, number) <= CHAIN for number in range(20)])
    figures = await tiers(pool)
    assert set(figures["disk"]["errors"]) == {"ESTALE"}
    assert figures["disk"]["lost"]
    assert f"{folder}/" in figures["disk_problem"]
    with pytest.raises(TierError, match="mount its disk again") as caught:
        await pool.flush()
    assert (caught.value.details["caches"], caught.value.details["cause"]) == (0, "ESTALE")


async def test_a_folder_that_cannot_be_used_leaves_a_pool_without_disk(make_pool, tmp_path):
    file = tmp_path / "file"
    file.write_text("not a folder")
    pool = await make_pool(disk_url=str(file))
    model = await pool.model(SPEC)
    assert await put(model, 1) == CHAIN
    assert str(Path(file)) in (await tiers(pool))["disk_problem"]


async def test_what_was_flushed_is_hit_after_the_pool_was_deleted_and_made_anew(make_pool, tmp_path):
    """It lies on the device, in host memory, and on disk by then."""
    settings = {"host_memory": "1MiB", "disk_url": str(tmp_path / "disk"), "name": f"t{os.getpid()}-flushed"}
    pool = await make_pool("host:1x1MiB", **settings)
    await make_patient(pool)
    model = await pool.model(SPEC)
    chains = 12
    for number in range(chains):
        assert await put(model, number) == CHAIN
    done = await pool.flush()
    assert done == {"caches": chains * CHAIN, "bytes": chains * CHAIN * BLOCK_BYTES, "displaced": 0}
    await pool.delete()

    again = await make_pool("host:1x1MiB", **settings)
    await make_patient(again)
    model = await again.model(SPEC)
    for number in range(chains):
        assert await read(model, number) == CHAIN


async def test_a_removal_that_a_lost_folder_refused_goes_on_when_it_is_back(make_pool, tmp_path):
    settings = {"disk_url": str(tmp_path / "disk"), "name": f"t{os.getpid()}-pending"}
    pool = await make_pool("host:1x1MiB", **settings)
    model = await pool.model(SPEC)
    await put(model, 0, durable=True)
    folder, away = tmp_path / "disk" / settings["name"] / "host-0", tmp_path / "away"
    folder.rename(away)
    with pytest.raises(TierError, match="mount its disk again"):
        await pool.invalidate("m")
    assert (await tiers(pool))["disk"]["pending_removals"] == CHAIN
    away.rename(folder)
    await pool.delete()  # before or after it has been tried again

    assert files(folder) == []
    again = await make_pool("host:1x1MiB", **settings)
    assert await read(await again.model(SPEC), 0) == 0


@pytest.mark.parametrize("below", [False, True])
async def test_of_chains_longer_than_the_budget_a_flush_writes_the_fronts_and_tells_the_rest(
    make_pool, tmp_path, below
):
    """With host memory the tail of one lies there, from where it must not go before the front."""
    settings = {"disk_url": str(tmp_path / "disk"), "disk_budget": "1MiB", "name": f"t{os.getpid()}-long"}
    if below:
        settings["host_memory"] = "4MiB"
    pool = await make_pool("host:1x2MiB", **settings)
    await make_patient(pool)
    model = await pool.model(SPEC)
    chains = [[encode_block_id(1000 * chain + place) for place in range(1, 49)] for chain in range(1 + below)]
    for keys in chains:
        assert await model.put_blocks(keys, np.zeros((len(keys), BLOCK_BYTES), np.uint8)) == 48
    if below:
        assert (await tiers(pool))["demoted"] > 0
    done = await pool.flush()
    fit = (1 << 20) // (BLOCK_BYTES + 200)
    assert (done["caches"], done["displaced"]) == (fit, 48 * len(chains) - fit)
    await pool.delete()

    again = await (await make_pool("host:1x2MiB", **settings)).model(SPEC)
    hit = 0
    for keys in chains:
        async with await again.match_prefix(keys) as found:
            await found.fetch()
            hit += found.num_blocks
    assert hit == fit, "none lies behind a gap"
