"""The client's arena, in one process with its owner (which is the event loop, so the arena works in a thread)."""

from __future__ import annotations

import asyncio
import ctypes
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from kvpool.errors import BackendError, InvalidRequestError, LeaseRevokedError, StaleCacheError
from kvpool.memory.backend import Access
from kvpool.memory.client_arena import ClientArena
from kvpool.memory.host import HostBackend
from kvpool.memory.page_client import PageRequest

TOKEN = "the right token"
PAGE = 65536
READ, WRITE = Access.READ, Access.READ_WRITE


@pytest.fixture
def backend() -> Iterator[HostBackend]:
    backend = HostBackend()
    yield backend
    backend.close()


@pytest.fixture
async def arena(owner, backend):
    arena = await asyncio.to_thread(ClientArena, backend, owner.path, "a", TOKEN, 1000 * PAGE, PAGE, 500)
    yield arena
    await asyncio.to_thread(arena.close)


def read(arena: ClientArena, index: int, access: Access = READ, size: int = 5) -> bytes:
    return ctypes.string_at(arena.address(index * PAGE, access), size)


async def until(true: Any) -> None:
    """For what the server does without telling its owner."""
    async with asyncio.timeout(60):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0)


async def ensure(arena: ClientArena, pages: Any, access: Access = READ) -> None:
    await asyncio.to_thread(arena.ensure, pages, access)


async def test_two_views_of_one_page(owner, arena) -> None:
    page = owner.add(7, b"hello")
    assert not arena.is_mapped([page], READ)
    await ensure(arena, [page], READ)
    assert arena.is_mapped([page], READ)
    assert not arena.is_mapped([page], WRITE)
    await ensure(arena, [page], WRITE)
    ctypes.memmove(arena.address(7 * PAGE, WRITE), b"world", 5)
    assert read(arena, 7) == owner.read(7, 5) == b"world"
    assert arena.mapped_pages == 2
    assert arena.address(7 * PAGE, READ) - arena.address(0, READ) == 7 * PAGE


async def test_no_descriptor_stays_open_for_a_mapped_page(owner, arena, open_page_count) -> None:
    pages = [owner.add(index) for index in range(300)]  # three messages
    before = open_page_count()
    await ensure(arena, pages)
    assert arena.mapped_pages == 300
    assert open_page_count() == before


async def test_mapped_pages_are_not_asked_for_again(owner, arena) -> None:
    pages = [owner.add(index) for index in range(3)]
    await ensure(arena, pages[:2])
    asked = []
    export = owner.export
    owner.export = lambda *args: (asked.append(args[3]), export(*args))[1]
    arena.ensure(pages[:2], READ)  # in the owner's own thread: it would wait for itself
    await ensure(arena, pages)
    assert asked == [pages[2][1]]


async def test_index_with_a_new_page_is_mapped_anew_and_the_owner_told(owner, arena) -> None:
    old = owner.add(0, b"older")
    await ensure(arena, [old])
    await ensure(arena, [old], WRITE)
    owner.remove(0)
    new = owner.add(0, b"newer")
    await ensure(arena, [new])
    assert read(arena, 0) == b"newer"
    # The writable view still has the old page, so it is not reported as dropped yet.
    assert owner.holders["a"] == {old[1], new[1]}
    await ensure(arena, [new], WRITE)
    await owner.until(lambda: owner.holders["a"] == {new[1]})
    assert read(arena, 0, WRITE) == b"newer"
    assert arena.mapped_pages == 2


async def test_page_that_moved_leaves_its_old_place_in_both_views(owner, arena) -> None:
    _, serial = owner.add(3, b"moves")
    await ensure(arena, [(3, serial)])
    await ensure(arena, [(3, serial)], WRITE)
    owner.pages[8] = owner.pages.pop(3)
    await ensure(arena, [(8, serial)])
    assert read(arena, 8) == b"moves"
    assert arena.mapped_pages == 1
    assert not arena.is_mapped([(3, serial)], WRITE)
    assert owner.holders["a"] == {serial}  # it still maps that page


async def test_drop_unmaps_both_views(owner, arena, mapped_page_count) -> None:
    before = mapped_page_count()
    pages = [owner.add(index) for index in range(2)]
    for access in (READ, WRITE):
        await ensure(arena, pages, access)
    owner.server.request_drop("a", [pages[0][1], 999])  # one it never had, too
    await owner.until(lambda: owner.holders["a"] == {pages[1][1]})
    assert not arena.is_mapped(pages[:1], READ)
    assert not arena.is_mapped(pages[:1], WRITE)
    assert arena.is_mapped(pages[1:], READ)
    assert mapped_page_count() == before + 2


@pytest.mark.parametrize("reconnected", [False, True])
async def test_a_revoked_client_keeps_what_it_has_until_it_closes_and_gets_no_more(
    owner, backend, reconnected: bool
) -> None:
    told = threading.Event()
    arena = await asyncio.to_thread(
        ClientArena, backend, owner.path, "a", TOKEN, 1000 * PAGE, PAGE, 500, on_revoked=told.set
    )
    held, other = owner.add(0, b"still"), owner.add(1)
    await ensure(arena, [held], WRITE)
    if reconnected:  # it is told when it comes back
        arena._connection._socket.shutdown(2)
        await asyncio.to_thread(arena._connection._thread.join)
        await until(lambda: owner.server._clients["a"].connection is None)
    owner.server.revoke("a")
    owner.server.revoke("a")
    if reconnected:
        with pytest.raises(LeaseRevokedError):
            await ensure(arena, [other])
    assert await asyncio.to_thread(told.wait, 10)
    owner.server.request_drop("a", [held[1]])
    with pytest.raises(LeaseRevokedError):  # answered after the drop was taken
        await ensure(arena, [other])
    assert read(arena, 0, WRITE) == b"still"
    assert owner.holders["a"] == {held[1]}
    await asyncio.to_thread(arena.close)
    await owner.until(lambda: owner.gone == ["a"])


async def test_drop_overtaken_by_nothing(owner, arena) -> None:
    """Pages on their way when they are asked back are mapped first and dropped then, never the other way round."""
    for round_ in range(50):
        page = owner.add(round_)
        waiting = asyncio.create_task(ensure(arena, [page]))
        await owner.until_exported("a", page[1])
        owner.server.request_drop("a", [page[1]])
        await waiting
        await owner.until(lambda page=page: page[1] not in owner.holders["a"])
        assert not arena.is_mapped([page], READ)
    assert arena.mapped_pages == 0


async def test_page_that_comes_twice_stays_where_it_is(owner, arena, backend, monkeypatch) -> None:
    """A request that timed out is answered after all; by then another thread may use what the next one mapped."""
    page = owner.add(0)
    await ensure(arena, [page])
    monkeypatch.setattr(backend, "unmap", lambda *_: pytest.fail("unmapped while in use"))
    await asyncio.to_thread(arena._connection.request, PageRequest([page], READ), 10.0)
    monkeypatch.undo()
    assert arena.mapped_pages == 1


async def test_error_of_the_owner_reaches_the_caller_and_the_rest_goes_on(owner, arena) -> None:
    page = owner.add(0)
    with pytest.raises(StaleCacheError, match="no page 5 at 1"):
        await ensure(arena, [page, (1, 5)])
    assert arena.is_mapped([page], READ)
    await ensure(arena, [owner.add(2)])


async def test_bad_input_changes_nothing(owner, arena) -> None:
    page = owner.add(0)
    for pages in ([(1000, 5)], [(-1, 5)], [page, (0, 5)], [page, (1, page[1])]):
        with pytest.raises(InvalidRequestError):
            arena.ensure(pages, READ)
    for offset in (-1, 1000 * PAGE):
        with pytest.raises(InvalidRequestError):
            arena.address(offset, READ)
    with pytest.raises(InvalidRequestError):
        arena.ensure([page], Access.NONE)
    assert arena.mapped_pages == 0


async def test_many_threads(owner, arena) -> None:
    pages = [owner.add(index, b"%05d" % index) for index in range(400)]

    def run(number: int) -> None:
        for start in range(0, 400, 20):
            first = (start + number * 60) % 400
            arena.ensure(pages[first : first + 20], READ)
            for index in range(first, first + 20):
                assert read(arena, index) == b"%05d" % index

    async with asyncio.TaskGroup() as group:
        for number in range(6):
            group.create_task(asyncio.to_thread(run, number))
    assert arena.mapped_pages == 400


async def test_failed_mapping_is_undone_and_told(owner, arena, backend, monkeypatch, mapped_page_count) -> None:
    before = mapped_page_count()
    pages = [owner.add(index) for index in range(4)]
    map_page, calls = backend.map, []

    def fails_at_the_third(address: int, handle: int) -> None:
        calls.append(address)
        if len(calls) == 3:
            raise BackendError("refused", errno=12)
        map_page(address, handle)

    monkeypatch.setattr(backend, "map", fails_at_the_third)
    with pytest.raises(BackendError):
        await ensure(arena, pages)
    assert arena.mapped_pages == 0
    assert mapped_page_count() == before
    await ensure(arena, pages)
    assert arena.mapped_pages == 4


async def test_failed_move_is_undone_and_told(owner, arena, backend, monkeypatch, mapped_page_count) -> None:
    before = mapped_page_count()
    serials = [owner.add(index, b"moves")[1] for index in range(2)]
    await ensure(arena, list(enumerate(serials)))
    for index in range(2):
        owner.pages[8 + index] = owner.pages.pop(index)
    moved = [(8 + index, serial) for index, serial in enumerate(serials)]
    remap_page, calls = backend.remap, []

    def fails_at_the_second(address: int, handle: int, source: int) -> None:
        calls.append(address)
        if len(calls) == 2:
            raise BackendError("refused", errno=12)
        remap_page(address, handle, source)

    monkeypatch.setattr(backend, "remap", fails_at_the_second)
    with pytest.raises(BackendError):
        await ensure(arena, moved)
    assert mapped_page_count() == before + 1  # the second, where it was
    await ensure(arena, moved)
    assert [read(arena, 8), read(arena, 9)] == [b"moves"] * 2
    assert mapped_page_count() == before + 2


@pytest.mark.parametrize("access", [READ, WRITE])
async def test_pages_that_changed_places_come_in_one_request(owner, arena, mapped_page_count, access: Access) -> None:
    before = mapped_page_count()
    serials = [owner.add(index, b"%05d" % index)[1] for index in range(4)]
    await ensure(arena, list(enumerate(serials)), READ)
    await ensure(arena, list(enumerate(serials)), WRITE)
    first, second, third, fourth = (owner.pages.pop(index) for index in range(4))
    # Two that changed places, and one that came where another was before it, which moved on.
    owner.pages.update({0: second, 1: first, 3: third, 4: fourth})
    places = {0: 1, 1: 0, 3: 2, 4: 3}
    await ensure(arena, [(index, serials[page]) for index, page in places.items()], access)
    assert [read(arena, index, access) for index in places] == [b"%05d" % page for page in places.values()]
    assert arena.mapped_pages == 4  # nothing of their old places, in the other view neither
    assert mapped_page_count() == before + 4
    assert owner.holders["a"] == set(serials)


async def test_close_gives_everything_back_and_tells_the_owner(owner, backend, mapped_page_count) -> None:
    def threads() -> list[str]:
        return [thread.name for thread in threading.enumerate() if "kvpool-pages" in thread.name]

    before = len(os.listdir("/proc/self/fd")), mapped_page_count()
    arena = await asyncio.to_thread(ClientArena, backend, owner.path, "b", TOKEN, 1000 * PAGE, PAGE, 500)
    assert threads() == ["kvpool-pages-b"]
    page = owner.add(0)
    before = before[0] + 1, before[1]  # the owner's page itself
    await ensure(arena, [page])
    await asyncio.to_thread(arena.close)
    assert owner.gone == ["b"]  # known when close returns
    await asyncio.to_thread(arena.close)
    assert (len(os.listdir("/proc/self/fd")), mapped_page_count()) == before
    assert threads() == []
    with pytest.raises(InvalidRequestError, match="closed"):
        arena.ensure([page], READ)


async def test_refused_client_leaves_nothing(owner, backend) -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(InvalidRequestError, match="token"):
        await asyncio.to_thread(ClientArena, backend, owner.path, "b", "wrong", 1000 * PAGE, PAGE, 500)
    assert len(os.listdir("/proc/self/fd")) == len(before)
    assert "kvpool-pages-b" not in [thread.name for thread in threading.enumerate()]
