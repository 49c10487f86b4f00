"""Packs after a crash or a failure of power."""

import asyncio
import errno
import os

import pytest
from disk_stores import content_of, key_of, read
from packed_caches import CONTENTS, FILE, TABLE_BYTES, contents, packs, write_together

from kvpool.cache.disk import local, local_packs
from kvpool.cache.disk.pack import PLACE_BYTES


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
