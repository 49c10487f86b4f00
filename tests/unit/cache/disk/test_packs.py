"""Small caches in one file: each found, read, evicted and removed by itself."""

import asyncio

import pytest
from disk_stores import content_of, key_of, read
from packed_caches import CONTENTS, FILE, SIZE, contents, packs, write_together

from kvpool.cache.disk import local
from kvpool.cache.disk.packing import MOST_PACKED_BYTES, Write
from kvpool.cache.disk.reading import Read


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
