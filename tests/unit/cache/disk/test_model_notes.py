"""Which models content is of: noted before the first of it, found again with it, and never a reason to lose it."""

import asyncio
import errno
import threading

import pytest
from disk_stores import DEADLINE_S, Faults, FaultyFolder, MovingFileSystem, arrived, content_of, key_of, read

from kvpool.cache.disk.file_names import MODELS_NAME, models_path, space_name
from kvpool.cache.disk.folder import folder_at
from kvpool.cache.disk.leftovers import Leftovers
from kvpool.cache.disk.models_file import NotedModel, decode_models, encode_models
from kvpool.errors import TierError

FIRST = NotedModel("llm", "1", 65536, None)
SECOND = NotedModel("llm", "2", None, 1 << 30)
ALIAS = NotedModel("größer/llm", "", 65536, None)
SPACE = space_name("default", "f")
NAMES = models_path(SPACE)


class Recorder(FaultyFolder):
    """Any folder, that remembers what was written and synced, in order; and refuses names, or content, on demand."""

    def __init__(self, url):
        super().__init__(url, Faults())
        self.done = []
        self.refused = None
        self.hanging = None
        self.noted = threading.Event()

    def write(self, path, parts):
        if self.refused is not None and path.endswith(self.refused):
            raise OSError(errno.EIO, "Input/output error")
        if self.hanging is not None and path.endswith(MODELS_NAME):
            assert self.hanging.wait(DEADLINE_S)
        self._folder.write(path, parts)
        if path.endswith(".kvremoved"):
            self.noted.set()
        self.done.append(("write", path))

    def write_together(self, files):
        for path, parts in files:
            self.write(path, parts)

    def sync(self, path):
        self._folder.sync(path)
        self.done.append(("sync", path))


async def written(open_tier, where, *models, numbers=(1,), fingerprint="f"):
    """Content of a model on disk, by a tier that is closed again."""
    tier = await open_tier(where)
    if models:
        tier.name("default", fingerprint, models)
    for number in numbers:
        await tier.write_through(key_of(number, fingerprint=fingerprint), None, content_of(number))
    await tier.close()


async def test_content_is_found_again_with_the_models_that_it_is_of(open_tier, url):
    await written(open_tier, url, FIRST, ALIAS)
    await written(open_tier, url, SECOND, fingerprint="g")
    tier = await open_tier(url)
    assert tier.spaces() == [("default", "f", [FIRST, ALIAS]), ("default", "g", [SECOND])]
    assert await read(tier, key_of(1)) == content_of(1)
    assert tier.statistics().bad_files == {}


async def test_names_are_there_for_good_before_any_content_is(open_tier, tmp_path):
    folder = Recorder(str(tmp_path))
    tier = await open_tier(folder)
    tier.name("default", "f", [FIRST])
    assert folder.done == [], "nothing to name yet"
    await asyncio.gather(*(tier.write_back(key_of(number), None, content_of(number, 1 << 20)) for number in range(8)))
    assert folder.done[:2] == [("write", NAMES), ("sync", SPACE)]
    assert folder.done.count(("write", NAMES)) == 1, "once, though several threads begin with it"
    tier.name("default", "f", [FIRST, ALIAS])
    await tier.write_back(key_of(8), None, content_of(8))
    assert folder.done.count(("write", NAMES)) == 2
    await tier.close()
    assert (await open_tier(str(tmp_path))).spaces() == [("default", "f", [FIRST, ALIAS])]


async def test_a_write_whose_names_the_store_refuses_fails_as_any_other(open_tier, tmp_path):
    folder = Recorder(str(tmp_path))
    tier = await open_tier(folder)
    tier.name("default", "f", [FIRST])
    folder.refused = MODELS_NAME
    with pytest.raises(TierError) as caught:
        await tier.write_through(key_of(1), None, content_of(1))
    assert caught.value.details["cause"] == "EIO"
    assert not await tier.write_back(key_of(2), None, content_of(2))
    assert tier.find(key_of(1)) is None
    assert (tier.statistics().files, tier.statistics().used_bytes) == (0, 0)
    assert not list(tmp_path.glob("*/*"))

    folder.refused = None
    await tier.write_through(key_of(1), None, content_of(1))
    await tier.close()
    assert (await open_tier(str(tmp_path))).spaces() == [("default", "f", [FIRST])]


def torn(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def foreign(path):
    path.write_bytes(encode_models("default", "g", [FIRST]))


def nameless(path):
    path.write_bytes(encode_models("default", "f", []))


@pytest.mark.parametrize("damage", [torn, empty, flipped, foreign, nameless])
async def test_a_file_of_names_that_is_no_good_is_counted_and_goes_and_its_content_is_found(
    open_tier, tmp_path, damage
):
    await written(open_tier, str(tmp_path), FIRST)
    damage(tmp_path / NAMES)
    tier = await open_tier(str(tmp_path))
    assert tier.spaces() == [("default", "f", [])]
    assert tier.statistics().bad_files == {"names": 1}
    assert not (tmp_path / NAMES).exists()
    assert await read(tier, key_of(1)) == content_of(1)


async def test_a_store_that_does_not_give_the_names_costs_no_content(open_tier, tmp_path):
    await written(open_tier, str(tmp_path), FIRST)
    folder = Recorder(str(tmp_path))
    folder._faults.errors["read"] = OSError(errno.EIO, "Input/output error")
    tier = await open_tier(folder)
    assert tier.spaces() == [("default", "f", [])]
    assert tier.find(key_of(1)) is not None
    assert (tmp_path / NAMES).exists()


async def test_content_without_names_is_named_as_soon_as_these_are_known(open_tier, tmp_path):
    await written(open_tier, str(tmp_path))
    tier = await open_tier(str(tmp_path))
    assert tier.spaces() == [("default", "f", [])]
    assert not (tmp_path / NAMES).exists()
    tier.name("default", "f", [FIRST])
    await asyncio.gather(*tier._noting)
    await tier.close()
    again = await open_tier(str(tmp_path))
    assert again.spaces() == [("default", "f", [FIRST])]
    again.name("default", "f", [FIRST])
    assert not again._noting, "they are there"


async def test_a_name_that_comes_later_is_noted_though_nothing_is_written_any_more(open_tier, tmp_path):
    tier = await open_tier(str(tmp_path))
    tier.name("default", "f", [FIRST])
    await tier.write_through(key_of(1), None, content_of(1))
    tier.name("default", "f", [FIRST, ALIAS])
    await tier.close()
    assert (await open_tier(str(tmp_path))).spaces() == [("default", "f", [FIRST, ALIAS])]


async def test_names_that_come_while_the_first_are_being_written_are_noted_though_nothing_follows(open_tier, faults):
    tier = await open_tier("faulty://tier")
    tier.name("default", "f", [FIRST])
    gate = faults.gates["put"] = threading.Event()
    writing = asyncio.ensure_future(tier.write_back(key_of(1), None, content_of(1)))
    await arrived(faults)  # at the file of names
    tier.name("default", "f", [FIRST, ALIAS])
    gate.set()
    assert await writing
    await tier.close()
    assert (await open_tier("faulty://tier")).spaces() == [("default", "f", [FIRST, ALIAS])]


async def test_a_store_that_renames_to_no_name_that_is_taken_takes_other_names_too(open_tier, monkeypatch):
    def mv(filesystem, source, target, **_):
        if filesystem.exists(target):
            raise FileExistsError(errno.EEXIST, "File exists", target)
        filesystem.cp_file(source, target)
        filesystem.rm_file(source)

    monkeypatch.setattr(MovingFileSystem, "mv", mv)
    url = "moving://tier"
    try:
        await written(open_tier, url, FIRST)
        await written(open_tier, url, SECOND, numbers=(2,))  # with another limit, say
        tier = await open_tier(url)
        assert tier.spaces() == [("default", "f", [SECOND])]
        assert tier.statistics().leftover_files == 0
    finally:
        MovingFileSystem.store.clear()
        MovingFileSystem.pseudo_dirs[:] = [""]


async def test_a_removal_is_noted_at_the_end_though_a_note_of_names_hangs(open_tier, tmp_path):
    folder = Recorder(str(tmp_path))
    tier = await open_tier(folder)
    tier.name("default", "f", [FIRST])
    await tier.write_through(key_of(1), None, content_of(1))
    folder.refused = ".kvremoved"
    folder._faults.errors["remove"] = OSError(errno.EIO, "Input/output error")
    with pytest.raises(TierError):
        await tier.remove([key_of(1)])
    folder.refused = None
    folder.hanging = threading.Event()
    tier.name("default", "f", [FIRST, ALIAS])
    closing = asyncio.ensure_future(tier.close())
    try:
        assert await asyncio.to_thread(folder.noted.wait, DEADLINE_S)
        assert not closing.done()
    finally:
        folder.hanging.set()
    await closing
    assert (await open_tier(str(tmp_path))).find(key_of(1)) is None


async def test_names_that_the_store_refuses_are_not_told_as_a_removal_that_failed(open_tier, tmp_path):
    await written(open_tier, str(tmp_path))
    folder = Recorder(str(tmp_path))
    tier = await open_tier(folder)
    folder.refused = MODELS_NAME
    tier.name("default", "f", [FIRST])
    await asyncio.gather(*tier._noting)
    assert NAMES in str(tier.statistics().problem)
    assert await tier.remove([key_of(1)]) == 1
    await tier.complete_removals()
    assert NAMES in str(tier.statistics().problem), "that something can be removed does not say that it can be written"
    await tier.close()
    before = tier.statistics().errors
    tier.name("default", "f", [ALIAS])
    assert not tier._noting
    assert tier.statistics().errors == before


async def test_names_of_what_is_not_there_any_more_do_no_harm_and_go(open_tier, url):
    await written(open_tier, url, FIRST)
    tier = await open_tier(url)
    assert await tier.remove([key_of(1)]) == 1
    await tier.close()
    tier = await open_tier(url)
    assert (tier.spaces(), tier.statistics().files, tier.statistics().bad_files) == ([], 0, {})
    assert [found.name for found in folder_at(url).list(SPACE)] == []
    tier.name("default", "f", [FIRST])  # they are noted again when something comes
    await tier.write_through(key_of(2), None, content_of(2))
    await tier.close()
    assert (await open_tier(url)).spaces() == [("default", "f", [FIRST])]


async def test_folders_of_devices_that_are_no_more_tell_their_models_too(open_tier, url):
    for name, models in (("host-0", [FIRST]), ("host-1", [ALIAS]), ("host-2", [])):
        await written(open_tier, f"{url}/{name}", *models)
    await open_tier(f"{url}/host-0")
    leftovers = Leftovers(url, 1)
    await leftovers.look()
    assert leftovers.spaces == [("default", "f", [ALIAS]), ("default", "f", [])]
    await leftovers.remove_space("default", "f")
    await leftovers.look()
    assert leftovers.spaces == []


@pytest.mark.parametrize(
    "model",
    [
        {"name": "", "revision": "", "block_bytes": None, "limit_bytes": None},
        {"name": "m", "revision": "", "block_bytes": 0, "limit_bytes": None},
        {"name": "m", "revision": 1, "block_bytes": None, "limit_bytes": None},
        {"name": "m", "revision": "", "block_bytes": None, "limit_bytes": "1GiB"},
    ],
)
def test_names_that_nobody_can_have_registered_are_none(model):
    assert decode_models(encode_models("t", "f", [NotedModel(**model)]), "t", "f") is None


def test_names_of_any_text_come_back():
    models = [NotedModel("a\n\udcff", "\0", 1, 2)]
    assert decode_models(encode_models("t\udcff", "f", models), "t\udcff", "f") == models
