"""Caches too large for a pack that wait together: each has a file of its own, and one thread syncs several at once."""

import asyncio
import errno
import os

import pytest
from disk_stores import content_of, key_of, read, refuse_the_first_write

from kvpool.cache.disk.local import LocalFolder
from kvpool.cache.disk.packing import MOST_PACKED_BYTES
from kvpool.errors import TierError

SIZE = MOST_PACKED_BYTES + 1
COUNT = 5
BROKEN = OSError(errno.EIO, "Input/output error")


def large(number):
    return content_of(number, SIZE)


async def store(tier, numbers):
    writes = (tier.write_through(key_of(number), None, large(number)) for number in numbers)
    return await asyncio.gather(*writes, return_exceptions=True)


def files(folder):
    return [path for path in folder.rglob("*") if path.suffix in (".kvcache", ".kvpack", ".kvtmp")]


@pytest.fixture
def steps(monkeypatch):
    """Record what is done to files that hold caches, and to their folder."""
    taken = []

    def record(name):
        real = getattr(os, name)

        def recorded(*args, **kwargs):
            path = os.readlink(f"/proc/self/fd/{args[0]}") if isinstance(args[0], int) else str(args[0])
            if not path.endswith("kvpool.lock") and not path.endswith("tier"):
                taken.append((name, os.path.basename(path)))
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, recorded)

    for name in ("writev", "fsync", "replace"):
        record(name)
    return taken


async def test_those_that_wait_for_a_thread_are_written_then_synced_then_named_then_acknowledged(
    open_tier, tmp_path, steps
):
    tier = await open_tier(str(tmp_path / "tier"), threads=1)
    assert await store(tier, range(COUNT)) == [None] * COUNT
    names = {name for step, name in steps if step == "replace"}
    assert len(names) == COUNT
    assert [step for step, _ in steps] == ["writev"] * COUNT + ["fsync"] * COUNT + ["replace"] * COUNT + ["fsync"]
    for step in range(0, 3 * COUNT, COUNT):
        assert {name for _, name in steps[step : step + COUNT]} == names
    assert {path.suffix for path in files(tmp_path)} == {".kvcache"}
    for _ in range(2):
        assert [await read(tier, key_of(number)) == large(number) for number in range(COUNT)] == [True] * COUNT
        await tier.close()
        tier = await open_tier(str(tmp_path / "tier"))


@pytest.mark.parametrize("operation", ["writev", "fsync", "replace"])
@pytest.mark.parametrize("failing", [0, 2, COUNT - 1])
async def test_where_one_fails_none_of_them_is_there_and_nothing_is_left(
    open_tier, tmp_path, monkeypatch, operation, failing
):
    tier = await open_tier(str(tmp_path / "tier"), threads=1)
    real, calls = getattr(os, operation), []

    def fails(*args, **kwargs):
        calls.append(args)
        if len(calls) == failing + 1:
            raise BROKEN
        return real(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(os, operation, fails)
        outcomes = await store(tier, range(COUNT))
    assert [type(outcome) for outcome in outcomes] == [TierError] * COUNT
    assert files(tmp_path) == []
    figures = tier.statistics()
    assert (figures.files, figures.used_bytes, figures.waiting_writes) == (0, 0, 0)
    assert await store(tier, range(COUNT)) == [None] * COUNT
    assert await read(tier, key_of(0)) == large(0)


async def test_on_a_store_that_is_full_below_the_budget_old_ones_go_for_them(open_tier, tmp_path, monkeypatch):
    gone = []
    tier = await open_tier(str(tmp_path / "tier"), threads=1, on_gone=gone.extend)
    await store(tier, range(4))
    refuse_the_first_write(monkeypatch)
    assert await store(tier, range(10, 12)) == [None] * 2
    assert gone == [key_of(0), key_of(1)]
    assert [tier.find(key_of(number)) is not None for number in (0, 1, 2, 3, 10, 11)] == [False] * 2 + [True] * 4


async def test_threads_that_are_free_share_what_waits(open_tier, tmp_path, monkeypatch):
    shares, real = [], LocalFolder.write_together

    def write_together(folder, new):
        shares.append(len(new))
        real(folder, new)

    monkeypatch.setattr(LocalFolder, "write_together", write_together)
    tier = await open_tier(str(tmp_path / "tier"), threads=2)
    assert await store(tier, range(32)) == [None] * 32
    assert sorted(shares) == [16, 16]
