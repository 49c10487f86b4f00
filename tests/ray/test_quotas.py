"""Quotas of a running pool: by config, in a program, from the command line."""

from __future__ import annotations

import asyncio
import json

import numpy as np
import pytest
from command_line import Cli
from pool_actors import until_waiting

from kvpool import ModelSpec, encode_block_id
from kvpool.errors import CapacityError, ConfigError, InvalidRequestError, InvalidSizeError, QueueFullError

PAGE = 64 * 1024
PAGES = 32


async def test_each_model_gets_its_guarantee_while_the_other_borrows(make_pool, cli: Cli) -> None:
    begin = [{"model": "a", "guaranteed": "40%"}, {"model": "b", "guaranteed": "40%"}]
    pool = await make_pool(quotas=begin, queue_limit=1)
    a, b = [await pool.model(ModelSpec(name, block_bytes=PAGE)) for name in "ab"]
    blocks = np.ones((1, PAGE), np.uint8)
    for number in range(PAGES):
        assert await b.put_blocks([encode_block_id(number)], blocks) == 1
    assert {q["model"]: q["held_bytes"] // PAGE for q in await pool.quotas()} == {"a": 0, "b": PAGES}

    share = PAGES * 40 // 100
    mine = await asyncio.gather(*(a.request_cache(PAGE, timeout_s=0) for _ in range(share)))  # without waiting
    held = {q["model"]: q["held_bytes"] // PAGE for q in await pool.quotas()}
    assert (held["a"], held["b"]) == (share, PAGES - share)

    # All that is not guaranteed to the other, and no more; the rest waits, or is told when to come again.
    mine += await asyncio.gather(*(a.request_cache(PAGE) for _ in range(PAGES - 2 * share - 1)))
    with pytest.raises(CapacityError, match="guaranteed"):
        await a.request_cache(2 * PAGE, timeout_s=0)
    waiting = asyncio.create_task(a.request_cache(2 * PAGE, timeout_s=600.0, priority=1))
    await until_waiting(pool, 1)
    with pytest.raises(QueueFullError) as full:
        await a.request_cache(2 * PAGE, timeout_s=600.0)
    assert 0 < full.value.details["retry_after_s"] <= 600.0

    # An operator lends it the other's share, and takes it back.
    on = ("--name", pool.name, "--model", "b", "--json", "-")
    holds = json.loads((await cli("quota", *on, "--guaranteed", "10%", "--limit", "50%", "--revision", 7)).stdout)
    assert (holds["applied"], holds["revision"], holds["guaranteed_bytes"]) == (True, 7, PAGES * PAGE // 10)
    mine.append(await waiting)
    again = json.loads((await cli("quota", *on, "--guaranteed", "90%", "--revision", 7)).stdout)
    assert (again["applied"], again["guaranteed"], again["limit"]) == (False, "10%", "50%")
    for revision in (0, 10**30):
        refused = await cli("quota", *on, "--guaranteed", "90%", "--revision", revision, code=2)
        assert refused.stderr == f"kvpool: a revision is a number from 1 to 2**63 - 1, not {revision}\n"
    shown = (await cli("quota", "--name", pool.name)).stdout
    assert "10%" in shown
    assert "quotas of pool" in (await cli("status", "--name", pool.name)).stdout

    with pytest.raises(InvalidRequestError, match="operator"):
        await pool.set_quota(tenant="another", guaranteed="10%")
    with pytest.raises(InvalidRequestError, match="neither is named: give model=, or tenant='default' for all models"):
        await pool.set_quota(guaranteed="10%")
    with pytest.raises(InvalidRequestError, match="both are named: give model= alone"):
        await pool.set_quota(model=a, tenant="default", guaranteed="10%")
    with pytest.raises(InvalidSizeError):
        await pool.set_quota(model=a, limit="much")
    for model in (a, "b"):
        assert (await pool.set_quota(model=model))["guaranteed_bytes"] == 0
    for cache in mine:
        await cache.release()


async def test_what_is_odd_about_a_quota_is_said_where_it_is_set(make_pool, cli: Cli) -> None:
    pool = await make_pool()
    on = ("quota", "--name", pool.name)
    typed = (await cli(*on, "--model", "nosuch", "--guaranteed", "40%")).stdout
    assert "nosuch (not registered)" in typed
    assert (
        "warning: no model 'nosuch' is registered by tenant 'default' now (there is none): the quota is kept" in typed
    )
    assert (await pool.set_quota(model="nosuch", limit="none"))["registered"] is False
    assert await pool.quotas() == []
    assert "has no quota" in (await cli(*on)).stdout

    async with await pool.request_cache("m", size=4 * PAGE):
        drains = "model 'm' of tenant 'default' holds more than its limit, 256 KiB of at most 128 KiB, and drains"
        assert drains in (await pool.set_quota(model="m", limit=2 * PAGE))["warning"]
        assert f"warning: {drains}" in (await cli(*on, "--model", "m", "--limit", 2 * PAGE)).stdout
        assert (await pool.set_quota(model="m", guaranteed="none", limit="none"))["limit_bytes"] is None


async def test_a_quota_of_the_config_that_only_the_memory_there_is_rules_out_is_named(make_pool) -> None:
    with pytest.raises(ConfigError, match=r"config key 'quotas\.1': guaranteed 50% is more than the limit 64KiB"):
        await make_pool(quotas=[{"model": "a"}, {"model": "b", "guaranteed": "50%", "limit": "64KiB"}])
