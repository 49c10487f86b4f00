"""Packs that are damaged, cut, replaced or unreadable: what can be read is right, and no more is lost than must be."""

import asyncio
import errno
import os

import pytest
import xxhash
from disk_stores import key_of, read
from packed_caches import CONTENTS, FILE, SIZE, TABLE_BYTES, contents, flip, packs, write_together

from kvpool.cache.disk.pack import PLACE_BYTES, parse_table
from kvpool.cache.disk.reading import Read


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
