"""Small caches in one file: each found, read, evicted, removed and lost by itself."""

import asyncio
import errno
import os
import threading

import pytest
import xxhash
from disk_stores import DEADLINE_S, FaultyFolder, content_of, key_of, read

from kvpool.cache.disk import local, local_packs
from kvpool.cache.disk.file_names import CacheName
from kvpool.cache.disk.index import DiskEntry
from kvpool.cache.disk.pack import MOST_CACHES, PLACE_BYTES, find_packed, has_others, make_table, parse_table
from kvpool.cache.disk.packing import MOST_PACKED_BYTES, Write
from kvpool.cache.disk.reading import Read
from kvpool.cache.key import encode_block_id
from kvpool.errors import TierError

SIZE = 9000  # three units of a file system, with what stands before it
FILE = DiskEntry(key_of(0), None, SIZE).file_bytes
TABLE_BYTES = 4096  # of a pack of few
CONTENTS = [content_of(number, SIZE) for number in range(40)]


async def write_together(tier, numbers, write="write_back"):
    return await asyncio.gather(*(getattr(tier, write)(key_of(n), None, CONTENTS[n]) for n in numbers))


async def contents(tier, numbers):
    """For each whether it can be read; what can be must be right."""
    there = [await read(tier, key_of(number)) for number in numbers]
    assert all(content in (None, CONTENTS[number]) for number, content in zip(numbers, there, strict=True))
    return [content is not None for content in there]


def packs(tmp_path):
    return sorted(tmp_path.rglob("*.kvpack"))


def flip(path, at):
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("write", ["write_back", "write_through"])
async def test_what_waits_together_is_one_file_and_found_again_in_its_order(open_tier, tmp_path, write):
    tier = await open_tier(str(tmp_path))
    await write_together(tier, range(10), write)
    assert len(packs(tmp_path)) == 1
    assert not list(tmp_path.rglob("*.kvcache"))
    for _ in range(2):
        assert all(await contents(tier, range(10)))
        figures = tier.statistics()
        assert (figures.files, figures.used_bytes, figures.bad_files) == (10, 10 * FILE, {})
        await tier.close()
        tier = await open_tier(str(tmp_path))
        assert [entry.key for entry in tier.entries()] == [key_of(number) for number in range(10)]
    assert {path.stat().st_mode & 0o777 for path in packs(tmp_path)} == {0o600}


async def test_what_is_alone_or_large_or_anothers_is_not_packed_with_it(open_tier, tmp_path):
    tier = await open_tier(str(tmp_path))
    await tier.write_back(key_of(0), None, CONTENTS[0])
    large = content_of(1, MOST_PACKED_BYTES + 1)
    writes = [tier.write_back(key_of(n, tenant), None, CONTENTS[n]) for tenant in "ab" for n in range(2, 5)]
    assert all(await asyncio.gather(*writes, tier.write_back(key_of(1), None, large)))
    assert sorted(path.parent.name for path in packs(tmp_path)) == ["f@a.kvspace", "f@b.kvspace"]
    assert len(list(tmp_path.rglob("*.kvcache"))) == 2
    assert await read(tier, key_of(1)) == large
    for tenant in "ab":
        assert await read(tier, key_of(3, tenant)) == CONTENTS[3]


async def test_more_than_a_pack_takes_are_several(open_tier, tmp_path, monkeypatch):
    monkeypatch.setattr("kvpool.cache.disk.packing.MOST_CACHES", 8)
    tier = await open_tier(str(tmp_path))
    assert all(await write_together(tier, range(40)))
    assert len(packs(tmp_path)) == 5
    assert all(await contents(tier, range(40)))


async def test_where_a_file_system_takes_no_room_back_each_has_a_file(open_tier, tmp_path, monkeypatch):
    monkeypatch.setattr(local, "gives_room_back", lambda file: False)
    tier = await open_tier(str(tmp_path))
    assert all(await write_together(tier, range(10)))
    assert packs(tmp_path) == []
    assert all(await contents(tier, range(10)))


async def test_one_that_is_removed_gives_its_room_back_and_the_last_takes_the_file_with_it(open_tier, tmp_path):
    tier = await open_tier(str(tmp_path))
    await write_together(tier, range(10), "write_through")
    (pack,) = packs(tmp_path)
    before = pack.stat().st_blocks
    assert await tier.remove([key_of(number) for number in (0, 3, 4, 9)]) == 4
    assert (before - pack.stat().st_blocks) * 512 == 4 * 3 * 4096
    for _ in range(2):
        assert await contents(tier, range(10)) == [n not in (0, 3, 4, 9) for n in range(10)]
        assert tier.statistics().used_bytes == 6 * FILE
        await tier.close()
        tier = await open_tier(str(tmp_path))
    await tier.write_through(key_of(3), None, CONTENTS[3])
    assert await tier.remove([key_of(number) for number in range(10)]) == 7
    assert not pack.exists()


async def test_the_least_recently_used_go_from_their_packs_for_others(open_tier, tmp_path):
    gone = []
    tier = await open_tier(str(tmp_path))
    await write_together(tier, range(10))
    await tier.close()
    tier = await open_tier(str(tmp_path), 12 * FILE, on_gone=gone.extend)
    assert await read(tier, key_of(0)) == CONTENTS[0]
    assert all(await write_together(tier, range(10, 16)))
    assert sorted(gone) == [key_of(number) for number in range(1, 5)]  # by several threads
    assert await contents(tier, range(16)) == [number not in range(1, 5) for number in range(16)]
    assert tier.statistics().used_bytes == 12 * FILE
    await tier.close()
    tier = await open_tier(str(tmp_path), 12 * FILE)
    assert len(tier.entries()) == 12


async def test_more_than_the_budget_at_once_is_refused_to_none(open_tier, tmp_path):
    """So packs are small where the budget is: what is being written cannot go for the next."""
    tier = await open_tier(str(tmp_path), 36 * FILE)
    for numbers in (range(20), range(20, 40), range(20), range(20, 40)):
        assert all(await write_together(tier, numbers))
    assert sum(await contents(tier, range(40))) == 36
    assert tier.statistics().given_up == {}


@pytest.mark.parametrize("count", [2, 63, 64, MOST_CACHES])
def test_a_table_says_what_it_was_made_of(count):
    names = [
        CacheName(encode_block_id(n), None if n % 3 else encode_block_id(n + 1), 1 + 977 * n) for n in range(count)
    ]
    block = make_table([(name, 100 + n) for n, name in enumerate(names)], 17)
    table = parse_table(block + b"the first cache")
    assert (table.written_ns, table.end, table.removed_places) == (17, len(block), [])
    assert [packed.name for packed in table.caches] == names
    assert [packed.header_bytes for packed in table.caches] == [100 + n for n in range(count)]
    assert [packed.start for packed in table.caches] == [len(block), *(packed.end for packed in table.caches[:-1])]
    assert all(find_packed(block, packed.name) == packed for packed in table.caches)
    assert find_packed(block, names[0]._replace(payload_bytes=2)) is None
    assert find_packed(block, CacheName(encode_block_id(9999), None, 1)) is None
    last = [packed.place for packed in table.caches[1:]]
    assert has_others(block + b"x" * 99, last)
    assert not has_others(block + b"x" * 99, [*last, table.caches[0].place])


def test_a_change_of_any_byte_of_a_table_is_found():
    names = [CacheName(encode_block_id(number), None, 5) for number in range(3)]
    block = make_table([(name, 100) for name in names], 17)
    for at in range(4 * PLACE_BYTES):
        changed = bytearray(block)
        changed[at] ^= 1
        assert parse_table(bytes(changed)) is None, at
    assert parse_table(block[: 4 * PLACE_BYTES - 1]) is None
    assert parse_table(b"") is None


async def test_a_pack_of_another_version_is_removed_and_counted(open_tier, tmp_path):
    tier = await open_tier(str(tmp_path))
    await write_together(tier, range(3))
    (pack,) = packs(tmp_path)
    await tier.close()
    content = bytearray(pack.read_bytes())
    content[8] += 1
    content[48:64] = xxhash.xxh3_128_digest(content[:48])
    pack.write_bytes(content)
    tier = await open_tier(str(tmp_path))
    assert (tier.statistics().files, tier.statistics().bad_files) == (0, {"pack": 1})
    assert not pack.exists()


# -- damage -----------------------------------------------------------------------------------------------------------


def damage_table(pack):
    flip(pack, 3 * PLACE_BYTES)


def damage_head(pack):
    flip(pack, 9)


def cut_all(pack):
    os.truncate(pack, 0)


@pytest.mark.parametrize("damage", [damage_table, damage_head, cut_all])
async def test_a_pack_of_which_nothing_can_be_told_is_removed_and_all_in_it_are_misses(open_tier, tmp_path, damage):
    tier = await open_tier(str(tmp_path))
    await write_together(tier, range(5))
    (pack,) = packs(tmp_path)
    await tier.close()
    damage(pack)
    tier = await open_tier(str(tmp_path))
    assert tier.statistics().bad_files == {"pack": 1}
    assert not pack.exists()
    assert not any(await contents(tier, range(5)))


@pytest.mark.parametrize("damage", [damage_head, cut_all])
async def test_a_pack_that_is_damaged_while_it_is_in_use_is_so_many_misses_and_removed(open_tier, tmp_path, damage):
    gone = []
    tier = await open_tier(str(tmp_path), on_gone=gone.extend)
    await write_together(tier, range(5))
    damage(packs(tmp_path)[0])
    assert not any(await contents(tier, range(5)))
    assert tier.statistics().bad_files == {"size": 1, "missing": 4}
    assert (tier.statistics().files, gone, packs(tmp_path)) == (0, [key_of(number) for number in range(5)], [])


async def test_damage_in_the_place_of_one_in_the_table_costs_that_one_while_it_is_in_use(open_tier, tmp_path):
    tier = await open_tier(str(tmp_path))
    await write_together(tier, range(5))
    damage_table(packs(tmp_path)[0])
    assert await contents(tier, range(5)) == [True, True, False, True, True]


async def test_damage_within_a_pack_costs_that_cache_alone(open_tier, tmp_path):
    gone = []
    tier = await open_tier(str(tmp_path), on_gone=gone.extend)
    await write_together(tier, range(6))
    (pack,) = packs(tmp_path)
    room = -(-FILE // 4096) * 4096
    flip(pack, TABLE_BYTES + 1 * room + 20)
    flip(pack, TABLE_BYTES + 3 * room + FILE - 1)
    os.truncate(pack, pack.stat().st_size - 1)
    together = await asyncio.gather(*(read(tier, key_of(number)) for number in range(6)))
    assert together == [CONTENTS[0], None, CONTENTS[2], None, CONTENTS[4], None]
    assert tier.statistics().bad_files == {"header": 1, "checksum": 1, "size": 1}
    assert sorted(gone) == sorted(key_of(number) for number in (1, 3, 5))
    await tier.close()
    tier = await open_tier(str(tmp_path))
    assert (tier.statistics().files, tier.statistics().bad_files) == (3, {})


async def test_what_was_cut_off_a_pack_while_the_tier_was_closed_is_removed_at_the_start(open_tier, tmp_path):
    tier = await open_tier(str(tmp_path))
    await write_together(tier, range(6))
    (pack,) = packs(tmp_path)
    await tier.close()
    os.truncate(pack, TABLE_BYTES + 4 * (-(-FILE // 4096) * 4096) + 100)
    tier = await open_tier(str(tmp_path))
    assert tier.statistics().bad_files == {"size": 2}
    assert await contents(tier, range(6)) == [True] * 4 + [False] * 2
    await tier.remove([key_of(number) for number in range(4)])
    assert not pack.exists()


async def test_a_pack_that_somebody_deleted_is_so_many_misses_and_a_durable_write_writes_again(open_tier, tmp_path):
    tier = await open_tier(str(tmp_path))
    await write_together(tier, range(4))
    packs(tmp_path)[0].unlink()
    await tier.write_through(key_of(0), None, CONTENTS[0])
    assert await contents(tier, range(4)) == [True, False, False, False]
    assert tier.statistics().bad_files == {"missing": 3}


async def test_a_link_or_a_name_in_place_of_a_pack_is_not_followed(open_tier, tmp_path):
    tier = await open_tier(str(tmp_path / "tier"))
    await write_together(tier, range(4))
    (pack,) = packs(tmp_path)
    await tier.close()
    outside = tmp_path / "outside"
    pack.rename(outside)
    pack.symlink_to(outside)
    (pack.parent / "x.kvpack").write_bytes(outside.read_bytes())
    tier = await open_tier(str(tmp_path / "tier"))
    assert (tier.statistics().files, tier.statistics().bad_files) == (0, {"pack": 2})
    assert outside.exists()
    assert packs(tmp_path) == []


# -- crashes and failures of power ------------------------------------------------------------------------------------


async def test_the_room_of_one_whose_removal_was_killed_half_way_is_given_back_by_the_next_start(open_tier, tmp_path):
    tier = await open_tier(str(tmp_path))
    big = [content_of(number, 200_000) for number in range(4)]
    await asyncio.gather(*(tier.write_through(key_of(n), None, content) for n, content in enumerate(big)))
    (pack,) = packs(tmp_path)
    await tier.close()
    before = pack.stat().st_blocks
    with pack.open("r+b") as file:  # killed between the zeros and the hole
        file.seek(2 * PLACE_BYTES)
        file.write(bytes(PLACE_BYTES))
    tier = await open_tier(str(tmp_path))
    assert [await read(tier, key_of(number)) for number in range(4)] == [big[0], None, big[2], big[3]]
    assert tier.statistics().bad_files == {}
    assert (before - pack.stat().st_blocks) * 512 >= 200_000


async def test_an_eviction_that_a_failure_of_power_undoes_does_not_hide_what_was_written_since(open_tier, tmp_path):
    tier = await open_tier(str(tmp_path))
    await write_together(tier, range(4))
    (pack,) = packs(tmp_path)
    await tier.close()
    tier = await open_tier(str(tmp_path), 4 * FILE)
    table = pack.read_bytes()[:TABLE_BYTES]
    await tier.write_through(key_of(8), None, CONTENTS[8])
    await tier.write_through(key_of(0), None, CONTENTS[0])
    assert await contents(tier, [0, 1, 2, 3, 8]) == [True, False, True, True, True]
    await tier.close()
    with pack.open("r+b") as file:  # the zeros have not come to the disk, the holes have
        file.write(table)
    tier = await open_tier(str(tmp_path), 6 * FILE)
    assert await contents(tier, [0, 2, 3, 8]) == [True] * 4
    assert await contents(tier, [1]) == [False]


async def test_a_pack_that_was_not_complete_is_cleared_away(open_tier, tmp_path, monkeypatch):
    tier = await open_tier(str(tmp_path))
    written, real = [], os.replace

    def replace(source, target):
        if str(target).endswith(".kvpack"):
            os.link(source, tmp_path / "kept")
            written.append(source)
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    await write_together(tier, range(3))
    await tier.close()
    (pack,) = packs(tmp_path)
    pack.rename(written[0])
    tier = await open_tier(str(tmp_path))
    assert (tier.statistics().leftover_files, tier.statistics().files) == (1, 0)
    assert not written[0].exists()


async def test_content_is_on_disk_before_the_name_and_the_name_before_the_acknowledgement(
    open_tier, tmp_path, monkeypatch
):
    tier = await open_tier(str(tmp_path))
    await tier.write_through(key_of(20), None, CONTENTS[20])  # makes the folder
    happened = []
    fsync, replace = os.fsync, os.replace

    def note_sync(file):
        fsync(file)
        happened.append(("synced", os.readlink(f"/proc/self/fd/{file}").rpartition("/")[2][-15:]))

    def note_replace(source, target):
        replace(source, target)
        happened.append(("renamed", str(target)[-7:]))

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_replace)
    await write_together(tier, range(5), "write_through")
    (pack,) = packs(tmp_path)
    temporary = (pack.name + ".kvtmp")[-15:]
    assert happened == [("synced", temporary), ("renamed", ".kvpack"), ("synced", pack.parent.name[-15:])]


async def test_a_removal_is_acknowledged_when_its_zeros_are_on_disk_and_else_holds_by_its_note(
    open_tier, tmp_path, monkeypatch
):
    tier = await open_tier(str(tmp_path))
    await write_together(tier, range(5), "write_through")
    (pack,) = packs(tmp_path)
    table = pack.read_bytes()[:TABLE_BYTES]
    real = os.fsync

    def fsync(file):
        if os.readlink(f"/proc/self/fd/{file}") == str(pack):
            raise OSError(errno.EIO, "Input/output error")
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    assert await tier.remove([key_of(0)]) == 1
    assert tier.statistics().errors == {"EIO": 1}
    assert list(tmp_path.glob("*.kvremoved")), "the next start must see to it"
    assert not await tier.write_back(key_of(0), None, CONTENTS[0])
    monkeypatch.setattr(os, "fsync", real)
    await tier.close()
    with pack.open("r+b") as file:  # a failure of power
        file.write(table)
    tier = await open_tier(str(tmp_path))
    assert await contents(tier, range(5)) == [False, True, True, True, True]
    assert not list(tmp_path.glob("*.kvremoved"))


async def test_zeros_that_a_failed_sync_has_lost_are_written_again_by_the_next(tmp_path, monkeypatch):
    """The system takes pages that it could not write for clean: a second sync alone would say that all is well."""
    folder = local.LocalFolder(tmp_path / "tier")
    folder.open()
    tier_folder = tmp_path / "tier" / "f@default.kvspace"
    tier_folder.mkdir()
    source = local_packs.LocalPacks(tmp_path / "tier")
    source._note_change("f@default.kvspace/x.kvpack", [2 * PLACE_BYTES])
    pack = tier_folder / "x.kvpack"
    pack.write_bytes(b"x" * TABLE_BYTES)
    real, fail = os.fsync, [True]

    def fsync(file):
        if fail:
            fail.clear()
            raise OSError(errno.EIO, "Input/output error")
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output"):
        source.sync("f@default.kvspace")
    pack.write_bytes(b"x" * TABLE_BYTES)
    source.sync("f@default.kvspace")
    assert pack.read_bytes()[2 * PLACE_BYTES : 3 * PLACE_BYTES] == bytes(PLACE_BYTES)
    folder.close()


# -- faults and interruptions -----------------------------------------------------------------------------------------


async def test_a_pack_that_cannot_be_written_leaves_nothing_and_costs_one_error(open_tier, tmp_path, faults):
    tier = await open_tier(FaultyFolder(str(tmp_path), faults))
    faults.errors["write"] = OSError(errno.EIO, "Input/output error")
    assert await write_together(tier, range(6)) == [False] * 6
    with pytest.raises(TierError, match="5 more"):
        await write_together(tier, range(6), "write_through")
    faults.errors.clear()
    assert not any(await contents(tier, range(6)))
    assert (tier.statistics().errors, tier.statistics().used_bytes) == ({"EIO": 2}, 0)
    assert all(await write_together(tier, range(6)))
    assert all(await contents(tier, range(6)))


async def test_on_a_store_that_is_full_below_the_budget_old_ones_go_for_a_pack(open_tier, tmp_path, monkeypatch):
    gone = []
    tier = await open_tier(str(tmp_path), on_gone=gone.extend)
    await write_together(tier, range(8))
    real, fails = os.writev, [True]

    def writev(file, parts):
        if fails:
            fails.clear()
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, parts)

    monkeypatch.setattr(os, "writev", writev)
    assert all(await write_together(tier, range(10, 14)))
    assert gone == [key_of(number) for number in range(4)]
    assert await contents(tier, range(14)) == [False] * 4 + [True] * 4 + [False] * 2 + [True] * 4


async def test_a_sync_that_fails_acknowledges_none_of_a_pack(open_tier, tmp_path, faults):
    tier = await open_tier(FaultyFolder(str(tmp_path), faults))
    faults.errors["sync"] = OSError(errno.EIO, "Input/output error")
    writes = (tier.write_through(key_of(number), None, CONTENTS[number]) for number in range(5))
    outcomes = await asyncio.gather(*writes, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [TierError] * 5
    faults.errors.clear()
    await write_together(tier, range(5), "write_through")
    assert all(await contents(tier, range(5)))


async def test_one_that_cannot_get_its_hole_stays_and_goes_first_later(open_tier, tmp_path, monkeypatch):
    gone = []
    tier = await open_tier(str(tmp_path))
    await write_together(tier, range(4))
    await tier.close()
    tier = await open_tier(str(tmp_path), 4 * FILE, on_gone=gone.extend)
    real = local_packs.punch_hole

    def punch_hole(file, start, length):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(local_packs, "punch_hole", punch_hole)
    assert not await tier.write_back(key_of(9), None, CONTENTS[9])
    assert (gone, tier.statistics().used_bytes) == ([], 4 * FILE)
    assert all(await contents(tier, range(1, 4)))
    monkeypatch.setattr(local_packs, "punch_hole", real)
    assert await tier.write_back(key_of(9), None, CONTENTS[9])
    assert gone == [key_of(0)]


async def arrival(faults):
    assert await asyncio.to_thread(faults.arrived.acquire, True, DEADLINE_S)


async def test_one_of_a_pack_that_is_being_written_can_be_removed_and_one_that_waits_ends_at_once(
    open_tier, tmp_path, faults
):
    tier = await open_tier(FaultyFolder(str(tmp_path), faults), threads=1)
    gate = faults.gates["write"] = threading.Event()
    under_way = [asyncio.ensure_future(tier.write_through(key_of(n), None, CONTENTS[n])) for n in range(4)]
    await arrival(faults)
    waiting = [asyncio.ensure_future(tier.write_back(key_of(n), None, CONTENTS[n])) for n in range(4, 8)]
    await asyncio.sleep(0)
    del faults.gates["write"]
    removal = asyncio.ensure_future(tier.remove([key_of(1), key_of(5)]))
    waiting[3].cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting[3]
    under_way[2].cancel()
    await asyncio.sleep(0)
    assert not under_way[2].done(), "the thread reads its memory"
    assert tier.find(key_of(1)) is None
    gate.set()
    assert await removal == 1
    with pytest.raises(asyncio.CancelledError):
        await under_way[2]
    assert await asyncio.gather(*waiting[:3]) == [True, False, True]
    for _ in range(2):
        assert await contents(tier, range(8)) == [True, False, True, True, True, False, True, False]
        await tier.close()
        tier = await open_tier(str(tmp_path))


async def test_closing_gives_up_what_waits_to_be_packed(open_tier, tmp_path, faults):
    tier = await open_tier(FaultyFolder(str(tmp_path), faults), threads=1)
    gate = faults.gates["write"] = threading.Event()
    under_way = [asyncio.ensure_future(tier.write_back(key_of(n), None, CONTENTS[n])) for n in range(3)]
    await arrival(faults)
    waiting = [asyncio.ensure_future(tier.write_back(key_of(n), None, CONTENTS[n])) for n in range(3, 6)]
    await asyncio.sleep(0)
    closing = asyncio.ensure_future(tier.close())
    await asyncio.sleep(0)
    gate.set()
    await closing
    assert await asyncio.gather(*under_way, *waiting) == [True] * 3 + [False] * 3


async def test_reads_of_a_pack_go_together_and_one_that_is_removed_meanwhile_is_a_miss(open_tier, tmp_path, faults):
    tier = await open_tier(FaultyFolder(str(tmp_path), faults), threads=1)
    await write_together(tier, range(6))
    gate = faults.gates["read"] = threading.Event()
    first = asyncio.ensure_future(read(tier, key_of(0)))
    await arrival(faults)
    del faults.gates["read"]
    waiting = [asyncio.ensure_future(read(tier, key_of(number))) for number in range(1, 6)]
    await asyncio.sleep(0)
    removal = asyncio.ensure_future(tier.remove([key_of(2)]))
    waiting[2].cancel()
    await asyncio.sleep(0)
    gate.set()
    assert await first == CONTENTS[0]
    assert await removal == 1
    left = await asyncio.gather(*waiting, return_exceptions=True)
    assert left[:2] == [CONTENTS[1], None]
    assert isinstance(left[2], asyncio.CancelledError)
    assert left[3:] == [CONTENTS[4], CONTENTS[5]]


async def test_reads_of_several_packs_and_files_that_come_together_are_all_answered(open_tier, tmp_path):
    """What waits of one pack goes together, however it is mixed with others."""
    tier = await open_tier(str(tmp_path), threads=1)
    for start in (0, 5, 10):
        await write_together(tier, range(start, start + 5))
    await tier.write_back(key_of(15), None, CONTENTS[15])
    into = {number: bytearray(SIZE) for number in (15, *range(0, 15, 5), 20, *range(1, 15, 4), 15)}
    reads = [Read(key_of(number), memoryview(view)) for number, view in into.items()]
    await tier.read(reads)
    assert [read.done.result() for read in reads] == [number != 20 for number in into]
    assert all(bytes(view) == CONTENTS[number] for number, view in into.items() if number != 20)
    figures = tier.statistics()
    assert (figures.hits, figures.misses) == (len(into) - 1, 1)


async def test_caches_written_in_one_call_are_answered_each_by_itself(open_tier, tmp_path):
    tier = await open_tier(str(tmp_path), queue_limit=6)
    await tier.write_back(key_of(0), None, CONTENTS[0])
    large = bytes(MOST_PACKED_BYTES + 1)
    numbers = [0, 1, 1, 2, 3]
    writes = [Write(key_of(number), None, memoryview(CONTENTS[number]), durable=False) for number in numbers]
    writes += [Write(key_of(number), None, memoryview(large), durable=False) for number in (30, 31)]
    writes += [Write(key_of(32), None, memoryview(CONTENTS[32]), durable=True)]
    await tier.write(writes)
    assert [write.done.exception() is None for write in writes] == [True] * 6 + [False, True]
    assert tier.statistics().given_up == {"queue_full": 1}
    assert await contents(tier, [0, 1, 2, 3, 32]) == [True] * 5
    assert tier.find(key_of(30)) is not None
    assert tier.statistics().waiting_writes == 0


async def test_given_up_together_what_waits_ends_at_once_and_what_a_thread_has_when_it_is_done(
    open_tier, tmp_path, faults
):
    tier = await open_tier(FaultyFolder(str(tmp_path), faults), threads=1)
    gate = faults.gates["write"] = threading.Event()

    def made(numbers):
        return [Write(key_of(number), None, memoryview(CONTENTS[number]), durable=True) for number in numbers]

    held, waiting = made(range(3)), made([*range(3, 6), 4])
    under_way = asyncio.ensure_future(tier.write(held))
    await arrival(faults)
    del faults.gates["write"]
    behind = asyncio.ensure_future(tier.write(waiting))
    await asyncio.sleep(0)
    waiting[0].cancel()  # one by itself: the others go on
    held[0].cancel()
    assert [each.done.done() for each in (waiting[0], held[0])] == [True, False]
    under_way.cancel()
    behind.cancel()
    with pytest.raises(asyncio.CancelledError):
        await behind
    assert not under_way.done(), "the thread reads their memory"
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await under_way
    assert all(write.done.cancelled() for write in (*held, *waiting))
    assert await contents(tier, range(6)) == [True] * 3 + [False] * 3
    assert tier.statistics().waiting_writes == 0
    await asyncio.gather(*(tier.write_through(key_of(number), None, CONTENTS[number]) for number in range(6)))
    assert await contents(tier, range(6)) == [True] * 6, "no key and no room was kept"


async def test_a_place_that_cannot_be_read_is_a_miss_of_its_own_cache_alone(open_tier, tmp_path, monkeypatch):
    """What was read together was a miss together, each time again: the store may mean something else by its error."""
    tier = await open_tier(str(tmp_path))
    await write_together(tier, range(8))
    (pack,) = packs(tmp_path)
    bad = parse_table(pack.read_bytes()).caches[3]
    real = os.preadv

    def preadv(file, parts, offset):
        if offset <= bad.start < offset + sum(map(len, parts)):
            raise OSError(errno.EIO, "a bad sector")
        return real(file, parts, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    reads = [Read(key_of(number), memoryview(bytearray(SIZE))) for number in range(8)]
    await tier.read(reads)
    there = [each.done.result() for each in reads]
    assert there == [key_of(number) != key_of(3) for number in range(8)]
    assert all(each.payload == CONTENTS[n] for n, each in enumerate(reads) if there[n])
    assert tier.statistics().errors == {"EIO": 1}
