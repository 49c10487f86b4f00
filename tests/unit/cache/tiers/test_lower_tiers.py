"""How caches move between a device's memory, the host tier and the disk, when the store does what it should."""

import asyncio

import pytest
from disk_stores import content_of, key_of

from kvpool.cache.host_index import Kind
from kvpool.errors import InvalidRequestError, InvalidSizeError, TierError

PAGE = 64 << 10


@pytest.fixture(params=["file", "memory"])
def url(request, tmp_path):
    return f"{request.param}://{tmp_path}/tier"


def kinds(device, *numbers):
    entries = [device.host.index.get(key_of(number)) for number in numbers]
    return [None if entry is None else entry.kind for entry in entries]


async def settled(device):
    """Writes are done, and all that is gone has been told."""
    await device.saved()
    await asyncio.sleep(0)
    device.check()


async def test_what_leaves_the_device_is_found_in_the_host_and_comes_back_right(open_device):
    device = await open_device(8)
    assert await device.demote(1, 2, 3) == [True] * 3
    assert device.found(1, 2, 3, 4) == ["host", "host", "host", None]
    assert device.tiers.locate(key_of(2)) == ("host", None, PAGE)
    assert await device.fill(3, 1, 4, 2) == [True, True, False, True]
    assert device.gone == []


async def test_many_sizes_and_tenants_in_one_batch_come_back_right(open_device):
    device = await open_device(40)
    sizes = [1, 4095, 4097, PAGE - 1, PAGE, 100, 100, PAGE, PAGE, 5]
    sources = [
        device.written(number, size, place=place, tenant="ab"[number % 2])
        for number, (size, place) in enumerate(zip(sizes, [9, 8, 0, 1, 2, 3, 4, 5, 6, 7], strict=True))
    ]
    assert all(await device.tiers.demote(sources))
    device.overwrite(sources)
    targets = [source._replace(address=device.source(30 + n).address) for n, source in enumerate(sources)]
    assert all(await device.tiers.fill(targets[::-1]))
    assert [bytes(target.view()) for target in targets] == [content_of(n, size) for n, size in enumerate(sizes)]


async def test_equal_hashes_of_other_tenants_and_models_are_other_caches(open_device, url):
    device = await open_device(0, url)
    device2 = await open_device(8)
    for tiers in (device.tiers, device2.tiers):
        sources = []
        for number, (tenant, fingerprint) in enumerate([("a", "f"), ("b", "f"), ("a", "g")]):
            source = device.written(number)
            sources.append(source._replace(key=key_of(7, tenant, fingerprint)))
        assert await tiers.demote(sources) == [True] * 3
        device.overwrite(sources)
        assert await tiers.fill(sources) == [True] * 3
        assert [bytes(source.view()) for source in sources] == [content_of(number, PAGE) for number in range(3)]


async def test_without_a_disk_the_oldest_are_dropped_and_told(open_device):
    device = await open_device(4)
    assert await device.demote(0, 1, 2, 3) == [True] * 4
    assert await device.demote(4, 5) == [True] * 2
    await settled(device)
    assert device.gone == [key_of(0), key_of(1)]
    assert device.found(0, 1, 2, 3, 4, 5) == [None, None, "host", "host", "host", "host"]
    figures = device.tiers.statistics()
    assert (figures["demoted"], figures["not_kept"], figures["host"]["dropped"]) == (6, 0, 2)
    assert (figures["host"]["entries"], figures["host"]["sole_bytes"], figures["disk"]) == (4, 4 * PAGE, None)


async def test_of_one_batch_the_first_given_up_is_the_first_dropped_wherever_it_lies(open_device):
    device = await open_device(4)
    await device.demote(3, 0, 2, 1)
    await device.demote(4, 5)
    assert device.found(3, 0, 2, 1) == [None, None, "host", "host"]


async def test_a_batch_larger_than_the_host_keeps_what_fits(open_device):
    device = await open_device(4)
    kept = await device.demote(*range(6))
    assert sum(kept) == 4
    assert [tier is not None for tier in device.found(*range(6))] == kept
    assert device.tiers.statistics()["not_kept"] == 2


async def test_a_cache_too_large_for_the_host_drops_nothing(open_device):
    device = await open_device(2)
    await device.demote(1)
    assert await device.tiers.demote([device.source(9, 3 * PAGE)]) == [False]
    await settled(device)
    assert device.found(1) == ["host"]
    assert device.gone == []


async def test_filling_leaves_a_copy_that_goes_first_and_costs_nothing_to_demote_again(open_device):
    device = await open_device(3)
    await device.demote(0, 1, 2)
    assert await device.fill(1) == [True]
    assert kinds(device, 0, 1, 2) == [Kind.SOLE, Kind.COPY, Kind.SOLE]
    # Its memory is not read: the copy counts.
    assert await device.tiers.demote([device.source(1)]) == [True]
    assert kinds(device, 1) == [Kind.SOLE]
    assert await device.fill(1, 2) == [True, True]
    await device.demote(3)
    await settled(device)
    assert device.found(0, 1, 2, 3) == ["host", None, "host", "host"]
    assert device.gone == [key_of(1)], "it could be found below, and no longer can"
    assert device.tiers.statistics()["host"]["dropped"] == 0


async def test_copies_ahead_displace_copies_never_sole_ones(open_device):
    device = await open_device(3)
    await device.demote(0)
    assert await device.copy_ahead(1, 2) == [True, True]
    assert await device.copy_ahead(3) == [True]
    assert device.found(0, 1, 2, 3) == ["host", None, "host", "host"]
    await device.demote(2, 3)
    assert await device.copy_ahead(4) == [False]
    assert device.found(0, 2, 3, 4) == ["host", "host", "host", None]
    assert kinds(device, 0, 2, 3) == [Kind.SOLE] * 3
    assert [await device.fill(number) for number in (0, 2, 3)] == [[True]] * 3
    assert device.tiers.statistics()["copied_ahead"] == 3


async def test_copying_ahead_what_is_below_makes_it_a_copy(open_device):
    device = await open_device(3)
    await device.demote(0)
    assert await device.copy_ahead(0, 0) == [True, True]
    assert kinds(device, 0) == [Kind.COPY]


async def test_beyond_the_watermark_the_oldest_go_to_the_disk_in_the_background(open_device, url):
    device = await open_device(10, url, watermark=0.5)
    for number in range(10):
        assert await device.demote(number) == [True]
    await settled(device)
    assert kinds(device, *range(10)) == [Kind.SAVED] * 5 + [Kind.SOLE] * 5
    assert device.disk.statistics().files == 5
    assert await device.demote(10, 11, 12) == [True] * 3
    await settled(device)
    assert device.gone == []
    found = device.found(*range(13))
    assert (found[:5].count("disk"), found[5:]) == (3, ["host"] * 8)  # threads finish in any order
    for number in range(13):
        assert await device.fill(number) == [True]
    assert device.tiers.statistics()["host"]["dropped"] == 0


async def test_more_than_the_host_has_spills_to_the_disk_without_loss(open_device, url):
    device = await open_device(4, url, patience_s=20.0)
    for start in range(0, 40, 4):
        assert await device.demote(*range(start, start + 4)) == [True] * 4
    await settled(device)
    assert device.gone == []
    assert None not in device.found(*range(40))
    for start in range(0, 40, 10):
        assert await device.fill(*range(start, start + 10)) == [True] * 10
    figures = device.tiers.statistics()
    assert (figures["host"]["dropped"], figures["not_kept"], figures["fills"], figures["misses"]) == (0, 0, 40, 0)
    assert figures["disk"]["bad_files"] == {}


async def test_what_the_disk_evicts_is_sole_again_in_the_host_and_gone_elsewhere(open_device, url):
    file_bytes = PAGE + 200
    device = await open_device(4, url, 2 * file_bytes, watermark=0.5)
    await device.demote(0, 1, 2, 3)
    await settled(device)
    assert kinds(device, 0, 1, 2, 3) == [Kind.SAVED] * 2 + [Kind.SOLE] * 2
    await device.tiers.write_through([device.written(9)])
    await settled(device)
    assert sorted(kinds(device, 0, 1)) == [Kind.SAVED, Kind.SOLE]
    assert device.gone == []
    await device.tiers.write_through([device.written(10), device.written(11)])
    await settled(device)
    assert device.gone == [key_of(9)]
    assert kinds(device, 0, 1) == [Kind.SOLE, Kind.SOLE]


async def test_a_disk_too_small_for_the_watermark_is_not_written_for_ever(open_device, url):
    file_bytes = PAGE + 200
    device = await open_device(10, url, 2 * file_bytes, watermark=0.1)
    for number in range(30):
        await device.demote(number)
    await settled(device)
    written = device.disk.statistics().written_files
    await settled(device)
    assert device.disk.statistics().written_files == written <= 2 * 30
    found = device.found(*range(30))
    assert [await device.fill(number) for number in range(30)] == [[tier is not None] for tier in found]
    assert set(device.gone) == {key_of(number) for number in range(30) if found[number] is None}


async def test_without_a_host_tier_the_disk_keeps_what_leaves(open_device, url):
    device = await open_device(0, url, patience_s=20.0)
    assert await device.demote(*range(20)) == [True] * 20
    assert device.found(0, 19, 20) == ["disk", "disk", None]
    assert await device.fill(*range(20)) == [True] * 20
    assert await device.demote(*range(20)) == [True] * 20
    assert device.disk.statistics().written_files == 20
    assert await device.copy_ahead(30, 31) == [True, True]
    assert device.found(30, 31) == ["disk", "disk"]
    assert device.gone == []


async def test_without_any_tier_nothing_is_kept(open_device):
    device = await open_device(0)
    assert await device.demote(1) == [False]
    assert await device.copy_ahead(1) == [False]
    assert await device.fill(1) == [False]
    assert await device.tiers.remove([key_of(1)]) == 0
    assert await device.tiers.remove_space("default", "f") == 0
    assert device.tiers.scrub("default", 1, PAGE)
    (error,) = await device.tiers.write_through([device.written(1)])
    assert isinstance(error, TierError)
    assert "set disk_url" in str(error)
    assert device.tiers.statistics()["not_kept"] == 1


async def test_what_was_written_through_is_safe_wherever_else_it_lies(open_device, url):
    device = await open_device(4, url)
    await device.demote(1)
    assert await device.tiers.write_through([device.written(1), device.written(2)]) == [None, None]
    assert kinds(device, 1) == [Kind.SAVED]
    assert await device.fill(1, 2) == [True, True]
    await device.demote(1, 2)
    assert device.disk.statistics().written_files == 2


async def test_a_restart_finds_what_the_disk_has(open_device, url):
    device = await open_device(4, url)
    assert await device.tiers.write_through([device.written(number) for number in range(3)]) == [None] * 3
    await device.tiers.close()
    again = await open_device(4, url)
    assert sorted(again.restored) == [key_of(0), key_of(1), key_of(2)]
    assert again.tiers.locate(key_of(1)) == ("disk", None, PAGE)
    assert await again.fill(2, 0, 1) == [True] * 3


async def test_another_size_under_a_key_replaces_what_was_there(open_device, url):
    device = await open_device(8, url)
    await device.demote(1)
    assert await device.fill(1, size=PAGE // 2) == [False]
    source = device.written(1, PAGE // 2)
    assert await device.tiers.demote([source]) == [True]
    assert device.tiers.locate(key_of(1)) == ("host", None, PAGE // 2)
    assert await device.fill(1, size=PAGE // 2) == [True]
    assert await device.fill(1) == [False]
    await device.tiers.write_through([device.written(2)])
    assert await device.fill(2, size=PAGE // 2) == [False]
    assert await device.fill(2) == [True]


async def test_what_is_wanted_above_does_not_leave_the_disk_for_what_goes_down(open_device, url):
    device = await open_device(0, url, 3 * (PAGE + 200), patience_s=20.0)
    assert await device.demote(0, 1, 2) == [True] * 3
    device.tiers.hold([key_of(0), key_of(1)])
    for number in (3, 4):
        assert await device.demote(number) == [True]
    assert device.found(0, 1, 2) == ["disk", "disk", None]
    assert await device.fill(0, 1) == [True] * 2
    device.tiers.unhold([key_of(0), key_of(1)])
    device.tiers.unhold([key_of(0)])
    for number in (5, 6, 7):
        assert await device.demote(number) == [True]
    assert device.found(0, 1) == [None, None]


async def test_a_chain_that_was_wanted_in_vain_goes_from_its_tail(open_device):
    device = await open_device(4)
    await device.demote(2, 1, 0)
    device.tiers.hold([key_of(number) for number in range(3)])
    device.tiers.unhold([key_of(number) for number in range(3)])
    await device.demote(10, 11)
    assert device.found(0, 1, 2) == ["host", "host", None]


async def test_the_same_key_twice_in_a_batch_and_in_two_batches_at_once(open_device):
    device = await open_device(4)
    first, second = device.written(1, place=1), device.written(1, place=2)
    outcomes = await asyncio.gather(
        device.tiers.demote([first, second]), device.tiers.copy_ahead([first]), device.tiers.demote([second])
    )
    assert outcomes == [[True, True], [True], [True]]
    assert device.tiers.statistics()["host"]["entries"] == 1
    assert await device.fill(1, 1) == [True, True]


async def test_bad_requests_change_nothing(open_device, url):
    device = await open_device(4, url)
    good = device.written(1)
    bad = [
        (good._replace(size_bytes=0), InvalidSizeError),
        (good._replace(address=0), InvalidRequestError),
        (good._replace(parent=b"short"), InvalidRequestError),
        (good._replace(key=good.key._replace(block_hash=b"short")), InvalidRequestError),
    ]
    calls = [device.tiers.demote, device.tiers.copy_ahead, device.tiers.fill, device.tiers.write_through]
    for source, error in bad:
        for call in calls:
            with pytest.raises(error):
                await call([good, source])
    assert device.found(1) == [None]


async def test_after_close_everything_is_a_miss_and_closing_again_is_no_error(open_device, url):
    device = await open_device(4, url)
    await device.demote(1)
    await device.tiers.close()
    await device.tiers.close()
    source = device.written(2)
    assert device.found(1) == [None]
    assert await device.tiers.demote([source]) == [False]
    assert await device.tiers.copy_ahead([source]) == [False]
    assert await device.fill(1) == [False]
    (error,) = await device.tiers.write_through([source])
    assert isinstance(error, TierError)
    with pytest.raises(TierError, match="closed"):
        await device.tiers.remove([key_of(1)])
