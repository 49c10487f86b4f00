"""Removals that the store has refused: they say why, are counted, and go on by themselves when it works again."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from disk_stores import Faults, FaultyFolder, content_of, key_of, read

from kvpool.cache.disk.tier import DiskTier
from kvpool.errors import TierError

DENIED = PermissionError(errno.EACCES, "Permission denied")
URL = "faulty://tier"


async def with_files(tier: DiskTier, count: int = 3) -> DiskTier:
    for number in range(count):
        await tier.write_through(key_of(number), None, content_of(number))
    return tier


async def refused(tier: DiskTier, *numbers: int) -> TierError:
    with pytest.raises(TierError) as caught:
        await tier.remove([key_of(number) for number in numbers])
    return caught.value


def broken(folder: object) -> None:
    raise DENIED


def notes(folder: Path) -> list[Path]:
    return list(folder.glob("*.kvremoved"))


async def test_a_refused_removal_tells_what_the_store_said_and_what_to_do(open_tier, tmp_path):
    tier = await with_files(await open_tier(str(tmp_path / "tier")))
    (tmp_path / "tier").rename(tmp_path / "away")
    error = await refused(tier, 0, 1)
    assert error.details["cause"] == "ESTALE"
    for told in ("2 of 2 caches", str(tmp_path / "tier"), "not the folder that was opened", "mount its disk again"):
        assert told in str(error)
    with pytest.raises(TierError, match="mount its disk again"):
        await tier.space("default", "f")


async def test_it_is_done_by_itself_once_the_folder_is_back(open_tier, tmp_path):
    folder, away = tmp_path / "tier", tmp_path / "away"
    tier = await with_files(await open_tier(str(folder)))
    assert tier.statistics().pending_removals == 0
    folder.rename(away)
    await refused(tier, 0, 1)
    await tier.complete_removals()
    assert (tier.statistics().pending_removals, tier.statistics().lost) == (2, True)
    away.rename(folder)
    await tier.complete_removals()
    assert (tier.statistics().pending_removals, tier.statistics().problem) == (0, None)
    assert len(list(folder.rglob("*.kvcache"))) == 1
    assert notes(folder) == []
    await tier.write_through(key_of(0), None, content_of(0))
    assert await read(tier, key_of(0)) == content_of(0)


@pytest.mark.parametrize("files_can_go", [True, False])
async def test_it_is_noted_at_the_end_if_nobody_has_tried_it_since_the_folder_is_back(
    open_tier, tmp_path, faults, files_can_go
):
    folder, away = tmp_path / "tier", tmp_path / "away"
    tier = await with_files(await open_tier(FaultyFolder(str(folder), faults)))
    folder.rename(away)
    await refused(tier, 0, 1)
    away.rename(folder)
    if not files_can_go:
        faults.errors["remove"] = DENIED
    await tier.close()
    assert len(notes(folder)) == (0 if files_can_go else 1)
    tier = await open_tier(str(folder))
    assert [await read(tier, key_of(number)) for number in range(3)] == [None, None, content_of(2)]


async def test_one_that_cannot_be_completed_does_not_keep_others_from_it(open_tier, tmp_path, faults: Faults):
    tier = await with_files(await open_tier(FaultyFolder(str(tmp_path), faults)))
    faults.errors.update(write=DENIED, remove=DENIED)
    for number in range(3):
        await refused(tier, number)
    faults.errors.clear()
    held = tier._removals._stuck[key_of(0)][0]
    complete, held.complete = held.complete, broken
    for _ in range(2):
        before = sum(tier.statistics().errors.values())
        await tier.complete_removals()
        assert sum(tier.statistics().errors.values()) == before + 1, "not one for each each time"
    assert tier.statistics().pending_removals == 1
    held.complete = complete
    await tier.complete_removals()
    assert tier.statistics().pending_removals == 0
    assert tier.statistics().problem is None, "nothing has been written since, but what failed works"


async def test_what_the_start_could_not_complete_goes_on_too(open_tier, faults):
    tier = await with_files(await open_tier(URL))
    faults.errors["delete"] = DENIED
    await tier.remove([key_of(0), key_of(1)])
    await tier.close()
    tier = await open_tier(URL)
    assert tier.statistics().pending_removals == 2
    faults.errors.clear()
    await tier.complete_removals()
    assert tier.statistics().pending_removals == 0
    await tier.write_through(key_of(0), None, content_of(0))
    await tier.close()
    tier = await open_tier(URL)
    assert [await read(tier, key_of(number)) for number in range(3)] == [content_of(0), None, content_of(2)]


async def test_nothing_is_tried_when_nothing_is_left_or_the_tier_is_closed(open_tier, faults):
    tier = await with_files(await open_tier(URL))
    faults.errors.update(put=DENIED, delete=DENIED)
    await tier.complete_removals()
    assert tier.statistics().errors == {}
    await refused(tier, 0)
    await tier.close()
    errors = tier.statistics().errors
    await tier.complete_removals()
    await tier.close()
    assert tier.statistics().errors == errors
