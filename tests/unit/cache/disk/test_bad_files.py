"""Files that are torn, corrupt, cut, foreign or under another's name: a counted miss, and removed."""

import os

import pytest
from disk_stores import FaultyFolder, content_of, key_of, read

SIZE = 5000


def cut(path):
    os.truncate(path, path.stat().st_size - 1)


def grow(path):
    path.write_bytes(path.read_bytes() + b"x")


def empty(path):
    os.truncate(path, 0)


def flip_payload(path):
    flip(path, -1)


def flip_header(path):
    flip(path, 20)


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def overwrite(path):
    path.write_bytes(os.urandom(path.stat().st_size))


def delete(path):
    path.unlink()


DAMAGE = [(cut, "size"), (grow, "size"), (empty, "size"), (flip_payload, "checksum"), (flip_header, "header"),
          (overwrite, "foreign"), (delete, "missing")]  # fmt: skip


def file_of(tmp_path, tier, number):
    return tmp_path / tier.find(key_of(number)).path


@pytest.mark.parametrize(("damage", "cause"), DAMAGE)
async def test_damage_is_a_counted_miss_the_file_goes_and_the_key_can_be_stored_again(
    open_tier, tmp_path, damage, cause, caplog
):
    gone = []
    tier = await open_tier(str(tmp_path), on_gone=gone.extend)
    for number in range(3):
        await tier.write_through(key_of(number), None, content_of(number))
    paths = [file_of(tmp_path, tier, number) for number in range(3)]
    for path in paths[:2]:
        damage(path)
    assert [await read(tier, key_of(number)) for number in range(3)] == [None, None, content_of(2)]
    assert gone == [key_of(0), key_of(1)]
    assert [path.exists() for path in paths] == [False, False, True]
    figures = tier.statistics()
    assert (figures.bad_files, figures.misses, figures.files) == ({cause: 2}, 2, 1)
    assert sum(f"bad {cause}" in message for message in caplog.messages) == 1, "logged once for the cause"
    await tier.write_through(key_of(0), None, content_of(0))
    assert await read(tier, key_of(0)) == content_of(0)


@pytest.mark.parametrize(("damage", "cause"), DAMAGE)
async def test_damage_while_the_tier_was_closed_is_never_data(open_tier, tmp_path, damage, cause):
    tier = await open_tier(str(tmp_path))
    await tier.write_through(key_of(0), None, content_of(0))
    path = file_of(tmp_path, tier, 0)
    await tier.close()
    damage(path)
    tier = await open_tier(str(tmp_path))
    assert await read(tier, key_of(0)) is None
    assert not path.exists()
    assert tier.statistics().bad_files == ({} if cause == "missing" else {cause: 1})


async def test_a_file_renamed_to_another_key_is_not_that_keys_data(open_tier, tmp_path):
    tier = await open_tier(str(tmp_path))
    for number in range(2):
        await tier.write_through(key_of(number), None, content_of(number))
    os.replace(file_of(tmp_path, tier, 0), file_of(tmp_path, tier, 1))
    assert await read(tier, key_of(1)) is None
    assert tier.statistics().bad_files == {"key": 1}


async def test_a_second_name_of_a_key_made_by_hand_is_removed(open_tier, tmp_path):
    tier = await open_tier(str(tmp_path))
    await tier.write_through(key_of(0), None, content_of(0))
    path = file_of(tmp_path, tier, 0)
    await tier.close()
    other = path.with_name(path.name.replace("root", "0" * 32))
    os.link(path, other)
    tier = await open_tier(str(tmp_path))
    assert path.exists() + other.exists() == 1
    assert tier.statistics().bad_files == {"name": 1}


async def test_what_others_keep_in_the_folder_stays_and_leftovers_of_ours_go(open_tier, tmp_path):
    tier = await open_tier(str(tmp_path))
    await tier.write_through(key_of(0), None, content_of(0))
    space = file_of(tmp_path, tier, 0).parent
    await tier.close()
    theirs = [tmp_path / "notes.txt", tmp_path / "sub" / "x.kvcache", space / "readme", tmp_path / "kvcache"]
    ours = [tmp_path / "x.kvcache", space / "y.kvcache", space / "z.kvcache.kvtmp", tmp_path / "0.kvremoved.kvtmp"]
    (tmp_path / "sub").mkdir()
    for path in theirs + ours:
        path.write_bytes(b"something")
    outside = tmp_path / "outside"
    outside.write_bytes(b"precious")
    (space / "link.kvcache").symlink_to(outside)
    tier = await open_tier(str(tmp_path))
    assert all(path.exists() for path in [*theirs, outside])
    assert not any(path.exists() for path in [*ours, space / "link.kvcache"])
    assert (tier.statistics().leftover_files, tier.statistics().bad_files) == (2, {"name": 3})
    assert await read(tier, key_of(0)) == content_of(0)


async def test_a_link_in_place_of_a_file_is_not_followed(open_tier, tmp_path):
    tier = await open_tier(str(tmp_path))
    await tier.write_through(key_of(0), None, content_of(0))
    path = file_of(tmp_path, tier, 0)
    os.replace(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert await read(tier, key_of(0)) is None
    assert tier.statistics().errors == {"ELOOP": 1}


async def test_memory_that_is_written_to_while_it_is_stored_is_found_out(open_tier, faults, tmp_path):
    # A writer that keeps its view after sealing is a breach that only the checksum sees.
    content = bytearray(content_of(0))
    folder = FaultyFolder(str(tmp_path), faults)
    tier = await open_tier(folder)
    real_check = faults.check

    def write_to_it(operation):
        if operation == "write":  # the header has been made
            content[100] ^= 1
        real_check(operation)

    faults.check = write_to_it
    await tier.write_through(key_of(0), None, memoryview(content))
    assert await read(tier, key_of(0)) is None
    assert tier.statistics().bad_files == {"checksum": 1}
