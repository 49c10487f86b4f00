"""Folders of devices that a pool has no longer: told, and reached by what is removed."""

import asyncio
import fcntl
import os
import shutil
import time

import pytest
from disk_stores import DEADLINE_S, Faults, FaultyFileSystem, content_of, key_of

from kvpool.cache.disk import leftovers as leftovers_module
from kvpool.cache.disk.file_names import LOCK_NAME
from kvpool.cache.disk.leftovers import Leftovers
from kvpool.cache.disk.local import LocalFolder
from kvpool.errors import TierError

NAMES = ["host-0", "host-1", "host-2", "host-10", "host-01", "other"]


async def filled(open_tier, url, names=NAMES):
    """Folders that each have cache 1 of two models."""
    for name in names:
        tier = await open_tier(f"{url}/{name}")
        for fingerprint in ("f", "g"):
            await tier.write_through(key_of(1, fingerprint=fingerprint), None, content_of(1))
        await tier.close()


async def having(open_tier, url, fingerprint):
    """Which of the folders have cache 1 of a model."""
    found = []
    for name in NAMES:
        tier = await open_tier(f"{url}/{name}")
        if tier.find(key_of(1, fingerprint=fingerprint)) is not None:
            found.append(name)
        await tier.close()
    return found


async def test_folders_of_devices_that_are_no_more_are_told(open_tier, url, caplog):
    leftovers = Leftovers(url, 2)
    await leftovers.look()
    assert leftovers.urls == []
    await filled(open_tier, url)
    await leftovers.look()
    assert leftovers.urls == [f"{url}/host-10", f"{url}/host-2"]
    assert [message.count("is of a device that this pool of 2 devices") for message in caplog.messages] == [1, 1]


async def test_what_is_removed_goes_from_them_and_nothing_else_does(open_tier, url):
    await filled(open_tier, url)
    own = await open_tier(f"{url}/host-0")
    await Leftovers(url, 1).remove_space("default", "f")
    await own.close()
    assert await having(open_tier, url, "f") == ["host-0", "host-01", "other"]
    assert await having(open_tier, url, "g") == NAMES
    await Leftovers(url, 1).remove_space("nobody", "f")


async def test_a_removal_waits_for_who_is_at_the_same_folder(open_tier, tmp_path):
    await filled(open_tier, str(tmp_path), ["host-0", "host-1"])
    own, other = [await open_tier(f"{tmp_path}/host-{number}") for number in range(2)]
    removing = [asyncio.ensure_future(Leftovers(str(tmp_path), 1).remove_space("default", "f")) for _ in range(2)]
    await asyncio.wait(removing, timeout=0.3)
    assert not any(each.done() for each in removing)
    await other.close()
    await asyncio.gather(*removing)
    await own.close()
    assert await having(open_tier, str(tmp_path), "f") == ["host-0"]


@pytest.mark.parametrize("operation", ["list", "delete"])
async def test_a_store_that_does_not_let_it_be_sure_says_so(open_tier, faults, operation):
    url = "faulty://pool"
    await filled(open_tier, url, ["host-1"])
    faults.errors = {operation: PermissionError(13, "Permission denied"), "put": PermissionError(13, "denied")}
    with pytest.raises(TierError, match=r"denied|call again"):
        await Leftovers(url, 1).remove_space("default", "f")
    FaultyFileSystem.faults = Faults()
    await Leftovers(url, 1).remove_space("default", "f")
    assert await having(open_tier, url, "f") == []


@pytest.mark.parametrize("refused", ["list", "put and delete", "delete"])
async def test_what_the_store_has_refused_is_tried_again(open_tier, faults, refused):
    await filled(open_tier, "faulty://pool", ["host-1"])
    leftovers = Leftovers("faulty://pool", 1)
    faults.errors = dict.fromkeys(refused.split(" and "), PermissionError(13, "Permission denied"))
    for fingerprint in "fg":
        if refused == "delete":  # it is noted: the next start removes it
            await leftovers.remove_space("default", fingerprint)
        else:
            with pytest.raises(TierError):
                await leftovers.remove_space("default", fingerprint)
    await leftovers.remove_again()
    assert leftovers.pending == 2
    assert any(name.endswith(".kvcache") for name in FaultyFileSystem.store)
    faults.errors.clear()
    await leftovers.remove_again()
    assert leftovers.pending == 0
    assert not [name for name in FaultyFileSystem.store if name.endswith((".kvcache", ".kvremoved"))]
    await leftovers.remove_again()


async def test_one_that_is_refused_again_keeps_no_other_from_it(open_tier, faults):
    await filled(open_tier, "faulty://pool", ["host-1"])
    leftovers = Leftovers("faulty://pool", 1)
    faults.errors["list"] = PermissionError(13, "Permission denied")
    for fingerprint in "fg":
        with pytest.raises(TierError):
            await leftovers.remove_space("default", fingerprint)
    await leftovers.remove_again()
    assert list(leftovers._going) == [("default", "g"), ("default", "f")]


async def test_who_waits_for_a_folder_waits_no_longer_than_until_the_end(open_tier, tmp_path):
    await filled(open_tier, str(tmp_path), ["host-1"])
    await open_tier(f"{tmp_path}/host-1")  # of another pool, say
    leftovers = Leftovers(str(tmp_path), 1)
    removing = asyncio.ensure_future(leftovers.remove_space("default", "f"))
    await asyncio.wait((removing,), timeout=0.3)
    assert not removing.done()
    await leftovers.remove_again()
    assert leftovers.pending == 1
    leftovers.close()
    with pytest.raises(TierError, match="closed"):
        await asyncio.wait_for(removing, DEADLINE_S)


async def test_a_folder_that_cannot_be_read_is_told_and_hides_no_other(open_tier, tmp_path, monkeypatch, caplog):
    leftovers = Leftovers(str(tmp_path), 1)
    assert leftovers.unread == (str(tmp_path),), "nobody has looked yet"
    await filled(open_tier, str(tmp_path), ["host-1", "host-2"])
    (space,) = (tmp_path / "host-2").glob("f@*")
    (space / "names.kvmodels").symlink_to("/nowhere" * 8)
    with monkeypatch.context() as patch:
        patch.setattr(LocalFolder, "list", of_host_1_refused(LocalFolder.list))
        await leftovers.look()
    assert leftovers.unread == [f"{tmp_path}/host-1"]
    assert leftovers.spaces == [("default", "f", []), ("default", "g", [])]
    for told in ("host-1 is of is not known: [Errno 13]", "names.kvmodels cannot be read: [Errno 40]"):
        assert any(told in message for message in caplog.messages)
    await leftovers.look()
    assert leftovers.unread == []
    assert len(leftovers.spaces) == 4


def of_host_1_refused(listing):
    def listed(folder, path):
        if "host-1" in folder.url:
            raise PermissionError(13, "Permission denied")
        return listing(folder, path)

    return listed


async def test_of_a_tenant_whose_name_is_too_long_for_a_folder_nothing_is_left(open_tier, tmp_path):
    key = key_of(1, "é" * 60)
    tier = await open_tier(f"{tmp_path}/host-0")
    await filled(open_tier, str(tmp_path), ["host-1"])
    with pytest.raises(TierError, match="use a shorter one"):
        await tier.write_through(key, None, content_of(1))
    assert await tier.space(key.tenant, key.fingerprint) == set()
    assert await tier.remove([key]) == 0
    await Leftovers(str(tmp_path), 1).remove_space(key.tenant, key.fingerprint)


async def test_what_lies_in_a_folder_of_a_device_that_is_elsewhere_is_never_passed_over(
    open_tier, tmp_path, monkeypatch
):
    monkeypatch.setattr(leftovers_module, "_PATIENCE_S", 0.0)
    await filled(open_tier, str(tmp_path), ["host-0", "host-1", "host-2"])
    # Of two devices number 0 runs here, and number 1 did when this machine's disk was last used.
    own = await open_tier(f"{tmp_path}/host-0")
    leftovers = Leftovers(str(tmp_path), 2)
    await leftovers.look()
    assert leftovers.urls == [f"{tmp_path}/host-2"]
    assert len(leftovers.spaces) == 4, "also what lies where nobody is"
    with pytest.raises(TierError, match=rf"{tmp_path}/host-1, which no device uses") as caught:
        await leftovers.remove_space("default", "f")
    assert caught.value.details["cause"] == "unused_folder"
    assert not list((tmp_path / "host-2").rglob("f@*/*.kvcache"))
    assert list((tmp_path / "host-1").rglob("f@*/*.kvcache")), "it may be a device's whose lock does not reach here"
    await leftovers.remove_space("default", "h")
    other = await open_tier(f"{tmp_path}/host-1")  # its device is here after all
    await leftovers.remove_space("default", "f")
    await other.close()
    shutil.rmtree(tmp_path / "host-1")
    await leftovers.remove_space("default", "f")
    assert own.find(key_of(1)) is not None, "that is its own to remove"


async def test_a_device_whose_lock_does_not_reach_here_is_waited_for(open_tier, tmp_path, monkeypatch):
    await filled(open_tier, str(tmp_path), ["host-1"])
    device = await open_tier(f"{tmp_path}/host-1")
    looked = asyncio.Event()

    def is_in_use(folder):
        loop.call_soon_threadsafe(looked.set)
        return False

    loop = asyncio.get_running_loop()
    monkeypatch.setattr(leftovers_module, "_PATIENCE_S", DEADLINE_S)
    monkeypatch.setattr(LocalFolder, "is_in_use", is_in_use)
    removing = asyncio.ensure_future(Leftovers(str(tmp_path), 2).remove_space("default", "f"))
    await looked.wait()
    assert await device.remove([key_of(1)]) == 1
    await removing


def test_who_looks_whether_a_folder_is_in_use_keeps_its_device_from_nothing(tmp_path, monkeypatch):
    folder, again = LocalFolder(tmp_path), LocalFolder(tmp_path)
    folder.open()
    folder.close()
    looking = os.open(tmp_path / LOCK_NAME, os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)  # a sibling's is_in_use(), when both devices start at the same time
    monkeypatch.setattr(time, "sleep", lambda _: os.close(looking))
    folder.open()
    assert again.is_in_use()
    with pytest.raises(TierError, match="in use by another process"):
        again.open()
    folder.close()
    assert not again.is_in_use()


async def test_devices_that_remove_in_one_folder_at_once_do_not_undo_each_others_notes(open_tier, faults):
    await filled(open_tier, "faulty://pool", ["host-1"])
    tiers = [await open_tier("faulty://pool/host-1") for _ in range(2)]  # as such a store has no locks
    faults.errors = {"delete": PermissionError(13, "Permission denied")}
    for tier, fingerprint in zip(tiers, "fg", strict=True):
        assert await tier.remove([key_of(1, fingerprint=fingerprint)]) == 1
        await tier.close()
    faults.errors.clear()
    assert (await open_tier("faulty://pool/host-1")).entries() == []
