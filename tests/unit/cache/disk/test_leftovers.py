"""Folders of devices that a pool has no longer: told, and reached by what is removed."""

import asyncio

import pytest
from disk_stores import Faults, FaultyFileSystem, content_of, key_of

from kvpool.cache.disk.leftovers import Leftovers
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
    await Leftovers(url, 1).remove_space("default", "f")
    assert await having(open_tier, url, "f") == ["host-0", "host-01", "other"]
    assert await having(open_tier, url, "g") == NAMES
    await Leftovers(url, 1).remove_space("nobody", "f")


async def test_a_removal_waits_for_who_is_at_the_same_folder(open_tier, tmp_path):
    await filled(open_tier, str(tmp_path), ["host-0", "host-1"])
    other = await open_tier(f"{tmp_path}/host-1")
    removing = [asyncio.ensure_future(Leftovers(str(tmp_path), 1).remove_space("default", "f")) for _ in range(2)]
    await asyncio.wait(removing, timeout=0.3)
    assert not any(each.done() for each in removing)
    await other.close()
    await asyncio.gather(*removing)
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


async def test_devices_that_remove_in_one_folder_at_once_do_not_undo_each_others_notes(open_tier, faults):
    await filled(open_tier, "faulty://pool", ["host-1"])
    tiers = [await open_tier("faulty://pool/host-1") for _ in range(2)]  # as such a store has no locks
    faults.errors = {"delete": PermissionError(13, "Permission denied")}
    for tier, fingerprint in zip(tiers, "fg", strict=True):
        assert await tier.remove([key_of(1, fingerprint=fingerprint)]) == 1
        await tier.close()
    faults.errors.clear()
    assert (await open_tier("faulty://pool/host-1")).entries() == []
