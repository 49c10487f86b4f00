"""What the disk tier does when the store does what it should: on local files and on an object store alike."""

import asyncio
import os
import random
import stat
import threading

import pytest
from disk_stores import content_of, key_of, read

from kvpool.cache.disk.folder import folder_at
from kvpool.cache.disk.index import DiskEntry
from kvpool.cache.disk.local import LocalFolder
from kvpool.cache.disk.tier import DiskTier
from kvpool.errors import ConfigError, InvalidRequestError, InvalidSizeError, TierError

SIZE = 5000
FILE = DiskEntry(key_of(0), None, SIZE).file_bytes


async def test_what_was_written_is_read_and_counted(open_tier, url):
    tier = await open_tier(url)
    assert await tier.write_back(key_of(1), None, content_of(1))
    await tier.write_through(key_of(2), key_of(1).block_hash, content_of(2))
    assert await read(tier, key_of(1)) == content_of(1)
    assert await read(tier, key_of(2)) == content_of(2)
    assert await read(tier, key_of(3)) is None
    assert tier.find(key_of(2)) == DiskEntry(key_of(2), key_of(1).block_hash, SIZE)
    figures = tier.statistics()
    assert (figures.files, figures.used_bytes, figures.waiting_writes) == (2, 2 * FILE, 0)
    assert (figures.hits, figures.misses, figures.read_bytes, figures.written_bytes) == (2, 1, 2 * SIZE, 2 * SIZE)
    assert figures.errors == figures.bad_files == figures.given_up == {}


async def test_a_restart_finds_everything_in_the_order_it_was_written(open_tier, url, tmp_path):
    first = await open_tier(url)
    for written_s, number in enumerate((3, 1, 2)):
        await first.write_through(key_of(number), None, content_of(number, SIZE + number))
        if url.startswith("file:"):  # three files may fall into one tick of the clock
            os.utime(tmp_path / "tier" / first.find(key_of(number)).path, (written_s, written_s))
    await first.close()
    assert first.find(key_of(3)) is None
    second = DiskTier(folder_at(url), 1 << 30)
    found = await second.start()
    assert [entry.size_bytes - SIZE for entry in found] == [3, 1, 2]
    assert await read(second, key_of(2)) == content_of(2, SIZE + 2)
    await second.close()


async def test_equal_hashes_of_other_tenants_and_models_are_other_caches(open_tier, url):
    tier = await open_tier(url)
    keys = [key_of(1, tenant, fingerprint) for tenant in ("a", "a/b", "") for fingerprint in ("f", "g")]
    for number, key in enumerate(keys):
        await tier.write_through(key, None, content_of(number))
    assert [await read(tier, key) for key in keys] == [content_of(number) for number in range(len(keys))]


async def test_a_key_that_is_there_is_not_written_again_and_one_of_another_size_is_replaced(open_tier, url):
    tier = await open_tier(url)
    await tier.write_through(key_of(1), None, content_of(1))
    assert await tier.write_back(key_of(1), None, content_of(1))
    await tier.write_through(key_of(1), None, content_of(1))
    assert tier.statistics().written_files == 1
    await tier.write_through(key_of(1), None, content_of(2, SIZE + 8))
    assert await read(tier, key_of(1)) == content_of(2, SIZE + 8)
    assert tier.statistics().files == 1


async def test_large_caches_and_odd_sizes_come_back_whole(open_tier, url):
    tier = await open_tier(url)
    rng = random.Random(3)
    sizes = [1, 4095, 4097, 3 << 20, (5 << 20) + 7]
    contents = [rng.randbytes(size) for size in sizes]
    for number, content in enumerate(contents):
        await tier.write_through(key_of(number), None, memoryview(content))
    assert [await read(tier, key_of(number)) for number in range(len(sizes))] == contents


async def test_the_budget_holds_and_the_least_recently_used_go(open_tier, url):
    gone = []
    tier = await open_tier(url, 3 * FILE, on_gone=gone.extend)
    for number in range(3):
        await tier.write_back(key_of(number), None, content_of(number))
    await read(tier, key_of(0))
    await tier.write_back(key_of(3), None, content_of(3))
    assert gone == [key_of(1)]
    assert [tier.find(key_of(number)) is not None for number in range(4)] == [True, False, True, True]
    assert not await tier.write_back(key_of(4), None, content_of(4, 3 * FILE))
    with pytest.raises(TierError, match="budget") as caught:
        await tier.write_through(key_of(4), None, content_of(4, 3 * FILE))
    assert caught.value.details["cause"] == "budget"
    figures = tier.statistics()
    assert (figures.files, figures.used_bytes, figures.evicted_files) == (3, 3 * FILE, 1)
    assert figures.given_up == {"budget": 2}


async def test_a_smaller_budget_after_a_restart_evicts_the_oldest(open_tier, url):
    tier = await open_tier(url)
    for number in range(4):
        await tier.write_back(key_of(number), None, content_of(number))
    await tier.close()
    tier = await open_tier(url, 2 * FILE)
    assert [tier.find(key_of(number)) is not None for number in range(4)] == [False, False, True, True]
    assert tier.statistics().evicted_files == 2


async def write_chain(tier, numbers):
    above = None
    for number in numbers:
        await tier.write_through(key_of(number), above, content_of(number))
        above = key_of(number).block_hash


async def test_a_chain_goes_from_its_tail_also_after_a_restart_with_a_smaller_budget(open_tier, url):
    """Behind a block that is missing nothing could be hit."""
    gone = []
    tier = await open_tier(url, 6 * FILE, on_gone=gone.extend)
    await write_chain(tier, range(4))
    await write_chain(tier, range(10, 13))
    assert gone == [key_of(3)]
    await tier.close()
    tier = await open_tier(url, 4 * FILE)
    left = {number for number in range(13) if tier.find(key_of(number)) is not None}
    assert left in ({0, 10, 11, 12}, {0, 1, 2, 10}, {0, 1, 10, 11})  # files written in one tick have no order


async def test_a_chain_as_long_as_the_budget_does_not_lose_its_head_for_its_tail(open_tier, url):
    tier = await open_tier(url, 3 * FILE)
    with pytest.raises(TierError, match="its own chain"):
        await write_chain(tier, range(5))
    assert [tier.find(key_of(number)) is not None for number in range(5)] == [True] * 3 + [False] * 2


async def test_what_is_kept_does_not_go_for_others(open_tier, url):
    tier = await open_tier(url, 2 * FILE)
    for number in range(2):
        await tier.write_back(key_of(number), None, content_of(number))
    for _ in range(2):
        tier.keep([key_of(0), key_of(9)])
    tier.unkeep([key_of(0), key_of(9)])
    assert await tier.write_back(key_of(2), None, content_of(2))
    tier.keep([key_of(2)])
    assert not await tier.write_back(key_of(3), None, content_of(3))
    tier.unkeep([key_of(0), key_of(9)])
    assert await tier.write_back(key_of(3), None, content_of(3))
    assert [tier.find(key_of(number)) is not None for number in range(4)] == [False, False, True, True]


async def test_touching_counts_as_use_and_of_what_is_not_there_does_nothing(open_tier, url):
    gone = []
    tier = await open_tier(url, 2 * FILE, on_gone=gone.extend)
    for number in range(2):
        await tier.write_back(key_of(number), None, content_of(number))
    tier.touch(key_of(0))
    tier.touch(key_of(9))
    await tier.write_back(key_of(2), None, content_of(2))
    assert gone == [key_of(1)]


async def test_the_keys_of_a_space_are_those_of_one_tenant_and_model(open_tier, url):
    tier = await open_tier(url)
    for tenant, fingerprint in (("a", "f"), ("a", "g"), ("b", "f")):
        await tier.write_back(key_of(1, tenant, fingerprint), None, content_of(1))
    assert tier.keys_of("a", "f") == [key_of(1, "a", "f")]
    assert await tier.space("a", "f") == {key_of(1, "a", "f")}
    assert await tier.space("c", "f") == set()
    await tier.close()
    assert tier.keys_of("a", "f") == []
    with pytest.raises(TierError, match="closed"):
        await tier.space("a", "f")


async def test_removed_is_gone_for_good_and_may_be_written_anew(open_tier, url):
    tier = await open_tier(url)
    for number in range(3):
        await tier.write_through(key_of(number), None, content_of(number))
    assert await tier.remove([key_of(0), key_of(1), key_of(9)]) == 2
    assert await tier.remove([]) == 0
    assert await read(tier, key_of(0)) is None
    await tier.write_through(key_of(1), None, content_of(1))
    await tier.close()
    tier = await open_tier(url)
    assert [tier.find(key_of(number)) is not None for number in range(3)] == [False, True, True]
    assert not [found.name for found in folder_at(url).list("") if found.name.endswith(".kvremoved")]


async def test_many_at_once_come_back_right(open_tier, url):
    tier = await open_tier(url, 30 * FILE)
    await asyncio.gather(*(tier.write_back(key_of(n % 40), None, content_of(n % 40)) for n in range(120)))
    found = await asyncio.gather(*(read(tier, key_of(n % 40)) for n in range(120)))
    assert all(content in (None, content_of(n % 40)) for n, content in enumerate(found))
    figures = tier.statistics()
    assert (figures.files, figures.errors, figures.bad_files) == (30, {}, {})
    assert figures.hits == sum(content is not None for content in found) == 90


async def test_bad_requests_change_nothing(open_tier, url):
    tier = await open_tier(url)
    with pytest.raises(InvalidSizeError):
        await tier.write_through(key_of(1), None, memoryview(b""))
    with pytest.raises(InvalidRequestError):
        await tier.write_back(key_of(1)._replace(block_hash=b"short"), None, content_of(1))
    with pytest.raises(InvalidRequestError):
        await tier.write_back(key_of(1), b"short", content_of(1))
    await tier.write_through(key_of(1), None, content_of(1))
    with pytest.raises(InvalidSizeError):
        await tier.read_into(key_of(1), memoryview(bytearray(SIZE - 1)))
    with pytest.raises(InvalidRequestError, match="read-only"):
        await tier.read_into(key_of(1), memoryview(bytes(SIZE)))
    assert (tier.statistics().files, tier.statistics().misses) == (1, 0)
    for budget_bytes in (0, -1):
        with pytest.raises(InvalidSizeError):
            DiskTier(folder_at(url), budget_bytes)


async def test_a_closed_tier_and_one_not_started_refuse_and_find_nothing(open_tier, url):
    closed = await open_tier(url)
    await closed.write_through(key_of(1), None, content_of(1))
    await closed.close()
    for tier in (closed, DiskTier(folder_at(url), 1 << 20)):
        assert not await tier.write_back(key_of(1), None, content_of(1))
        for refused in (tier.write_through(key_of(1), None, content_of(1)), tier.remove([key_of(1)])):
            with pytest.raises(TierError, match="closed"):
                await refused
        assert not await tier.read_into(key_of(1), memoryview(bytearray(SIZE)))


async def test_a_tier_starts_once(open_tier, url):
    tier = await open_tier(url)
    with pytest.raises(TierError, match="before"):
        await tier.start()
    await tier.write_through(key_of(1), None, content_of(1))


@pytest.mark.parametrize("wrong", ["nosuchscheme://x/y", "file:///", "memory://"])
def test_an_url_that_is_no_folder_is_refused(wrong):
    with pytest.raises(ConfigError):
        folder_at(wrong)


# -- local files only -------------------------------------------------------------------------------------------------


async def test_a_second_tier_on_the_same_folder_is_refused_until_the_first_is_closed(open_tier, tmp_path):
    first = await open_tier(str(tmp_path))
    second = DiskTier(folder_at(str(tmp_path)), 1 << 20)
    with pytest.raises(TierError, match="another process"):
        await second.start()
    await first.write_through(key_of(1), None, content_of(1))
    await first.close()
    third = await open_tier(str(tmp_path))
    assert await read(third, key_of(1)) == content_of(1)


async def test_nothing_stays_open_after_closing(open_tier, tmp_path):
    before = os.listdir("/proc/self/fd"), threading.active_count()
    tier = await open_tier(str(tmp_path))
    await asyncio.gather(*(tier.write_through(key_of(n), None, content_of(n)) for n in range(20)))
    await asyncio.gather(*(read(tier, key_of(n)) for n in range(21)))
    with pytest.raises(TierError):
        await DiskTier(folder_at(str(tmp_path)), 1 << 20).start()
    await tier.close()
    assert (os.listdir("/proc/self/fd"), threading.active_count()) == before


async def test_files_are_private_to_the_user(open_tier, tmp_path):
    tier = await open_tier(str(tmp_path / "tier"))
    await tier.write_through(key_of(1), None, content_of(1))
    for path in [tmp_path / "tier", *(tmp_path / "tier").rglob("*")]:
        assert not path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO), path


def test_bytes_are_on_disk_before_the_name_is_there(tmp_path, monkeypatch):
    steps = []

    def record(name):
        real = getattr(os, name)

        def recorded(*args, **kwargs):
            target = os.readlink(f"/proc/self/fd/{args[0]}") if isinstance(args[0], int) else str(args[0])
            steps.append((name, os.path.basename(target)))
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, recorded)

    folder = LocalFolder(tmp_path)
    folder.write("s/first", (b"x",))
    folder.sync("s")
    for name in ("writev", "fsync", "replace"):
        record(name)
    folder.write("s/a", (b"header", memoryview(b"payload")))
    folder.sync("s")
    temporary = "a.kvtmp"
    assert steps == [("writev", temporary), ("fsync", temporary), ("replace", temporary), ("fsync", "s")]


def test_the_first_sync_of_a_folder_puts_its_own_name_on_disk_too(tmp_path, monkeypatch):
    """It may have been made by this life, or by one that was killed before its sync."""
    (tmp_path / "old").mkdir()
    folder, synced, real = LocalFolder(tmp_path), [], os.fsync

    def fsync(file):
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{file}")))
        real(file)

    folder.write("new/a", (b"x",))
    monkeypatch.setattr(os, "fsync", fsync)
    for name in ("new", "old", "new", "old"):
        folder.sync(name)
    assert synced == ["new", tmp_path.name, "old", tmp_path.name, "new", "old"]
    (tmp_path / "old").rmdir()
    folder.write("old/a", (b"x",))
    synced.clear()
    folder.sync("old")
    assert synced == ["old", tmp_path.name]


def test_interrupted_reads_and_writes_go_on(tmp_path, monkeypatch):
    real_write, real_read = os.writev, os.preadv
    monkeypatch.setattr(os, "writev", lambda file, parts: real_write(file, [parts[0][:3]]))
    monkeypatch.setattr(os, "preadv", lambda file, parts, offset: real_read(file, [memoryview(parts[0])[:2]], offset))
    folder = LocalFolder(tmp_path)
    folder.write("s/a", (b"header", memoryview(b"payload")))
    parts = bytearray(6), bytearray(7)
    assert folder.read("s/a", parts) == 13
    assert parts == (b"header", b"payload")


def test_parts_that_cannot_be_made_leave_no_file(tmp_path):
    def parts():
        yield b"header"
        raise InvalidRequestError("no")

    folder = LocalFolder(tmp_path)
    with pytest.raises(InvalidRequestError):
        folder.write("s/a", parts())
    assert list(tmp_path.rglob("a*")) == []


def test_a_folder_that_has_vanished_is_not_made_again(tmp_path):
    folder = LocalFolder(tmp_path / "mount")
    folder.open()
    (tmp_path / "mount" / "kvpool.lock").unlink()
    (tmp_path / "mount").rmdir()
    with pytest.raises(OSError, match="not the folder that was opened"):
        folder.write("s/a", (b"x",))
    folder.close()
