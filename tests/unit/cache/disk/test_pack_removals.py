"""What was removed from a pack never comes back: after faults, crashes and failures of power, one upon the other."""

import asyncio
import errno
import os
import threading
from pathlib import Path

import pytest
from disk_stores import DEADLINE_S, FaultyFolder, key_of, read
from packed_caches import CONTENTS, FILE, packs, write_together

from kvpool.cache.disk import leftovers, local, local_packs
from kvpool.cache.disk.folder import folder_at
from kvpool.cache.disk.pack import PLACE_BYTES
from kvpool.errors import TierError

BROKEN = OSError(errno.EIO, "Input/output error")


async def there(tier, numbers):
    """The numbers of those that can be read; what can be must be right."""
    contents = {number: await read(tier, key_of(number)) for number in numbers}
    assert all(content in (None, CONTENTS[number]) for number, content in contents.items())
    return [number for number, content in contents.items() if content is not None]


class Disk:
    """What is in packs on the disk itself: what was there when a sync of their file last succeeded."""

    def __init__(self, folder, monkeypatch):
        self._folder, self._real, self.broken = folder, os.fsync, False
        self._contents, self.broken_pack = {}, None
        monkeypatch.setattr(os, "fsync", self._fsync)

    def _fsync(self, file):
        path = os.readlink(f"/proc/self/fd/{file}")
        if ".kvpack" not in path:
            self._real(file)
            return
        if self.broken or path == self.broken_pack:
            raise BROKEN
        self._real(file)
        self._contents[path.removesuffix(".kvtmp")] = Path(path).read_bytes()

    def fail_power(self):
        """Undo what has not come to the disk."""
        for pack in packs(self._folder):
            pack.write_bytes(self._contents[str(pack)])


class ForgetfulFolder(FaultyFolder):
    """Takes what is written and fails to say so."""

    forgets = False

    def write(self, path, parts):
        self._folder.write(path, parts)
        if self.forgets and path.endswith(".kvpack"):
            raise BROKEN


@pytest.fixture
def disk(tmp_path, monkeypatch):
    return Disk(tmp_path, monkeypatch)


async def test_a_start_that_completes_a_removal_syncs_what_the_life_before_could_not(open_tier, tmp_path, disk):
    """The next life sees the zeros, which are not on disk: the note that holds the removal must not go before them."""
    tier = await open_tier(str(tmp_path))
    await write_together(tier, range(4), "write_through")
    disk.broken = True
    assert await tier.remove([key_of(0)]) == 1
    await tier.close()
    disk.broken = False
    tier = await open_tier(str(tmp_path))
    assert not list(tmp_path.glob("*.kvremoved"))
    await tier.close()
    disk.fail_power()
    assert await there(await open_tier(str(tmp_path)), range(4)) == [1, 2, 3]


async def test_zeros_that_the_life_before_failed_to_sync_are_written_again(open_tier, tmp_path, disk, monkeypatch):
    """The system takes pages that it could not write for clean, so that a sync alone writes nothing."""
    tier = await open_tier(str(tmp_path))
    await write_together(tier, range(4), "write_through")
    disk.broken = True
    assert await tier.remove([key_of(1)]) == 1
    await tier.close()
    disk.broken = False
    written, real = set(), os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: (written.add(at), real(file, data, at))[1])
    await open_tier(str(tmp_path))
    assert 2 * PLACE_BYTES in written


async def test_packs_are_synced_by_several_threads_and_one_that_fails_is_synced_again_alone(
    open_tier, tmp_path, disk, monkeypatch
):
    tier = await open_tier(str(tmp_path))
    for first in range(0, 18, 3):
        await write_together(tier, range(first, first + 3))
    changed = local_packs.LocalPacks(tmp_path)
    synced, real = [], os.fsync

    def fsync(file):
        synced.append(os.readlink(f"/proc/self/fd/{file}"))
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    paths = [f"{pack.parent.name}/{pack.name}" for pack in packs(tmp_path)]
    for path in paths:
        changed.remove(path, [next(iter(changed.list(*path.split("/"), 0.0))).name.partition(":")[2]])
    bad = str(tmp_path / paths[2])
    monkeypatch.setattr(disk, "broken_pack", bad)
    with pytest.raises(OSError, match="Input/output"):
        changed.sync("f@default.kvspace")
    assert sorted(synced) == [str(tmp_path / path) for path in paths]
    synced.clear()
    disk.broken_pack = None
    for _ in range(2):
        changed.sync("f@default.kvspace")
        assert synced == [bad]


async def test_a_note_holds_for_all_packs_in_which_its_keys_ever_were(open_tier, tmp_path, disk):
    """Evicted, written again to another pack, removed: of all that only the note has come to the disk."""
    tier = await open_tier(str(tmp_path))
    await write_together(tier, range(4), "write_through")
    await tier.close()
    tier = await open_tier(str(tmp_path), 4 * FILE)
    assert await tier.write_back(key_of(8), None, CONTENTS[8])
    assert await there(tier, range(4)) == [1, 2, 3]
    assert await tier.write_back(key_of(0), None, CONTENTS[0])
    disk.broken = True
    await tier.remove([key_of(0), key_of(3)])
    assert list(tmp_path.glob("*.kvremoved"))
    await tier.close()
    disk.broken = False
    disk.fail_power()
    for _ in range(2):
        tier = await open_tier(str(tmp_path))
        assert tier.find(key_of(0)) is None
        assert tier.find(key_of(3)) is None
        assert await there(tier, [1, 2]) == [1, 2]
        await tier.close()


@pytest.mark.parametrize("written_again", [True, False])
async def test_what_failed_writes_may_have_left_goes_with_its_key(open_tier, tmp_path, faults, written_again):
    """Each pack has a name of its own, so that one key may have several places, and the index knows one at most."""
    folder = ForgetfulFolder(str(tmp_path), faults)
    tier = await open_tier(folder)
    faults.errors["remove"] = BROKEN
    folder.forgets = True
    for _ in range(2):
        assert not any(await write_together(tier, range(3)))
    faults.errors.clear()
    folder.forgets = False
    if written_again:
        assert all(await write_together(tier, range(3)))
    assert len(packs(tmp_path)) == 2 + written_again
    assert await tier.remove([key_of(0), key_of(1)]) == 2
    await tier.close()
    assert await there(await open_tier(str(tmp_path)), range(3)) == [2]


async def test_an_older_one_that_the_start_could_not_clear_away_goes_with_its_key(open_tier, tmp_path, faults):
    tier = await open_tier(str(tmp_path))
    await write_together(tier, range(3))
    older = packs(tmp_path)[0].read_bytes()
    await tier.remove([key_of(number) for number in range(3)])
    await write_together(tier, range(3))
    await tier.close()
    (packs(tmp_path)[0].parent / f"{'0' * 32}.kvpack").write_bytes(older)
    faults.errors["remove"] = BROKEN
    tier = await open_tier(FaultyFolder(str(tmp_path), faults))
    faults.errors.clear()
    assert await there(tier, range(3)) == [0, 1, 2]
    assert await tier.remove([key_of(0)]) == 1
    await tier.close()
    assert tier.statistics().bad_files == {"name": 3}
    assert await there(await open_tier(str(tmp_path)), range(3)) == [1, 2]


async def test_zeros_that_cannot_be_taken_back_come_to_the_disk_before_a_removal_is_acknowledged(
    open_tier, tmp_path, disk, monkeypatch
):
    tier = await open_tier(str(tmp_path))
    await write_together(tier, range(4), "write_through")
    await tier.close()
    tier = await open_tier(str(tmp_path), 4 * FILE)
    punch, pwrite = local_packs.punch_hole, os.pwrite

    def refuse(file, start, length):
        monkeypatch.setattr(os, "pwrite", refuse_write)
        raise BROKEN

    def refuse_write(file, data, at):
        raise BROKEN

    monkeypatch.setattr(local_packs, "punch_hole", refuse)
    assert not await tier.write_back(key_of(8), None, CONTENTS[8])
    monkeypatch.setattr(local_packs, "punch_hole", punch)
    monkeypatch.setattr(os, "pwrite", pwrite)
    assert await there(tier, range(4)) == [1, 2, 3]
    await tier.remove([key_of(0)])
    await tier.close()
    disk.fail_power()
    assert await there(await open_tier(str(tmp_path)), range(4)) == [1, 2, 3]


async def test_a_damaged_one_that_is_written_again_does_not_stay_in_its_pack(open_tier, tmp_path):
    tier = await open_tier(str(tmp_path))
    await write_together(tier, range(3))
    (pack,) = packs(tmp_path)
    whole = pack.stat().st_size
    last = pack.read_bytes()[-1:]
    os.truncate(pack, whole - 1)
    await tier.write_through(key_of(2), None, CONTENTS[2])
    await tier.remove([key_of(2)])
    await tier.close()
    with pack.open("r+b") as file:  # a file system that was not well for a while
        file.seek(whole - 1)
        file.write(last)
    assert await there(await open_tier(str(tmp_path)), range(3)) == [0, 1]


async def test_a_note_that_was_not_surely_written_does_not_remove_what_is_written_later(
    open_tier, tmp_path, faults, monkeypatch
):
    tier = await open_tier(FaultyFolder(str(tmp_path), faults))
    await write_together(tier, range(3))
    noted, count_error = asyncio.Event(), tier._counters.count_error
    monkeypatch.setattr(tier._counters, "count_error", lambda *error: (count_error(*error), noted.set())[0])
    gate = faults.gates["read"] = threading.Event()
    reading = asyncio.ensure_future(read(tier, key_of(0)))  # holds the key, so that the removal is noted first
    assert await asyncio.to_thread(faults.arrived.acquire, True, DEADLINE_S)
    synced = faults.gates["sync"] = threading.Event()
    faults.errors["sync"] = BROKEN
    removal = asyncio.ensure_future(tier.remove([key_of(0)]))
    assert await asyncio.to_thread(faults.arrived.acquire, True, DEADLINE_S)
    synced.set()
    async with asyncio.timeout(DEADLINE_S):
        await noted.wait()
    faults.errors.clear()
    gate.set()
    await reading
    assert await removal == 1
    await tier.write_through(key_of(0), None, CONTENTS[0])
    await tier.close()
    assert not list(tmp_path.glob("*.kvremoved"))
    assert await there(await open_tier(str(tmp_path)), range(3)) == [0, 1, 2]


async def test_a_pack_that_cannot_be_read_costs_no_other_and_is_not_forgotten(open_tier, tmp_path, monkeypatch):
    tier = await open_tier(str(tmp_path))
    await write_together(tier, range(3))
    (unread,) = packs(tmp_path)
    await write_together(tier, range(3, 6))
    (other,) = set(packs(tmp_path)) - {unread}
    await write_together(tier, range(6, 9))
    assert other != unread
    await tier.close()
    real = os.open

    def refuse(path, flags, *mode):
        if str(path) == str(unread):
            raise BROKEN
        return real(path, flags, *mode)

    monkeypatch.setattr(os, "open", refuse)
    tier = await open_tier(str(tmp_path))
    assert await there(tier, range(9)) == [3, 4, 5, 6, 7, 8]
    with pytest.raises(TierError, match="may still be on disk"):
        await tier.remove([key_of(0)])
    assert all(await write_together(tier, [1, 2]))
    assert await tier.remove([key_of(1)]) == 1, "it holds by its note"
    assert list(tmp_path.glob("*.kvremoved"))
    await tier.close()
    tier = await open_tier(str(tmp_path))
    assert list(tmp_path.glob("*.kvremoved")), "there may be more of it"
    assert await there(tier, range(3)) == [2]
    monkeypatch.setattr(os, "open", real)
    await tier.close()
    tier = await open_tier(str(tmp_path))
    assert await there(tier, range(9)) == [0, 2, 3, 4, 5, 6, 7, 8]
    assert not list(tmp_path.glob("*.kvremoved"))


async def test_a_file_system_that_takes_holes_and_no_room_back_gets_no_packs(open_tier, tmp_path, monkeypatch):
    monkeypatch.setattr(local_packs, "punch_hole", lambda file, start, length: None)
    tier = await open_tier(str(tmp_path))
    assert all(await write_together(tier, range(3)))
    assert packs(tmp_path) == []
    assert (tmp_path / "kvpool.lock").stat().st_size == 0


async def test_a_leftover_pack_of_which_nothing_can_be_told_is_looked_at_by_who_has_the_folder(open_tier, tmp_path):
    """Another process may be in the middle of a change: what is not a cache now is not taken for nothing."""
    folder = tmp_path / "host-1"
    tier = await open_tier(str(folder))
    await write_together(tier, range(3))
    await tier.close()
    (pack,) = packs(folder)
    content = pack.read_bytes()
    pack.write_bytes(content[:70] + b"?" + content[71:])
    assert leftovers._has(str(folder), pack.parent.name)
    assert pack.read_bytes() != content
    left = leftovers.Leftovers(str(tmp_path), 1)
    await left.remove_space("default", "f")
    assert not pack.exists()


async def test_who_has_not_taken_a_folder_changes_nothing_in_it(open_tier, tmp_path):
    tier = await open_tier(str(tmp_path))
    await write_together(tier, range(3))
    (pack,) = packs(tmp_path)
    await tier.close()
    with pack.open("r+b") as file:
        file.seek(PLACE_BYTES)
        file.write(bytes(PLACE_BYTES))
    before = pack.read_bytes()
    folder = folder_at(str(tmp_path))
    assert isinstance(folder, local.LocalFolder)
    assert len(list(folder.list(pack.parent.name))) == 2
    folder.sync(pack.parent.name)
    assert pack.read_bytes() == before
