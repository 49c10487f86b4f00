"""The handle of a cache that grows: threads that open tensors, callers that are cancelled."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from lease_connection import LeaseConnection

from kvpool.client.cache import VirtualKVCache
from kvpool.errors import CacheStateError, LeaseRevokedError, SealedError
from kvpool.memory.backend import Access

PAGE = 4096
WRITE = Access.READ_WRITE


class Arena:
    """Notes what is covered and mapped."""

    def __init__(self) -> None:
        self.covered: set[tuple[int, int]] = set()
        self.withdrawn: list[Any] = []
        self.withdrawing = threading.Event()
        self.may_withdraw = threading.Event()

    def cover(self, first: int, count: int, access: Access) -> None:
        self.covered.add((first, count))

    def uncover(self, first: int, count: int) -> None:
        self.covered.discard((first, count))

    def ensure(self, pages: Any, access: Access) -> None:
        """All is mapped."""

    def address(self, offset: int, access: Access) -> int:
        return 0x10000 + offset

    def withdraw(self, pages: list[Any]) -> None:
        self.withdrawing.set()
        assert self.may_withdraw.wait(60)
        self.withdrawn += pages


class Connection(LeaseConnection):
    """As much of a connection as a cache sees."""

    def __init__(self) -> None:
        super().__init__()
        self.arenas = {0: Arena()}
        self.devices = {0: {"page_bytes": PAGE, "name": "host:0", "epoch": 1, "min_block_bytes": PAGE}}
        self.mapped: list[Any] = []
        self.config = {"timeout_s": 30.0}
        self.followers: dict[int, Any] = {}
        self.changes: list[str] = []
        self.revoked = False

    def check_not_revoked(self) -> None:
        if self.revoked:
            raise LeaseRevokedError("revoked")

    def run_soon(self, make: Any, what: str, after_s: float) -> None:
        """Nothing is backed ahead."""

    async def change(self, cache: Any, kind: str, ranges: Any, timeout_s: float) -> None:
        self.changes.append(kind)
        if kind != "unback":
            await asyncio.Event().wait()  # for memory that nobody gives back

    async def in_thread(self, function: Any, *arguments: Any) -> None:
        await asyncio.to_thread(function, *arguments)

    async def map_pages(self, device: int, pages: Any, access: Access) -> None:
        self.mapped.append((tuple(pages), access))


def cache_of(connection: Any, pages: int = 2, most: int = 8) -> VirtualKVCache:
    place = (0, tuple((n, n + 1) for n in range(pages)), 1)
    return VirtualKVCache(connection, 0, "m", (None, 7, 0, pages * PAGE, most * PAGE, place))


def test_a_release_while_a_thread_opens_a_tensor_leaves_no_cover() -> None:
    connection = Connection()
    cache, arena = cache_of(connection), connection.arenas[0]
    ends_at_once = []
    covered = arena.cover

    def release_first(*arguments: Any) -> None:  # the event loop is faster than this thread
        ends_at_once.append(cache._lease.release_by_word())
        covered(*arguments)

    arena.cover = release_first  # type: ignore[method-assign]
    with pytest.raises(CacheStateError, match="was released"):
        cache.numpy("uint8", (8 * PAGE,))
    assert ends_at_once == [False], "it is being used"
    assert arena.covered == set()
    assert connection.released == [7], "and ends when that is over"


async def test_a_resize_that_is_cancelled_after_its_answer_came_is_shown_whole() -> None:
    connection = Connection()
    cache, arena = cache_of(connection, pages=4), connection.arenas[0]
    await cache.map()
    connection.mapped.clear()
    left = ((0, 1), (1, 2))
    resizing = asyncio.create_task(cache.follow(("changed", 7, 2 * PAGE, ((0, 2 * PAGE),), (0, left, 2))))
    assert await asyncio.to_thread(arena.withdrawing.wait, 10)
    resizing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await resizing
    arena.may_withdraw.set()
    async with asyncio.timeout(60):
        while not connection.mapped:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    assert arena.withdrawn == [(2, 3), (3, 4)]
    assert connection.mapped == [(left, WRITE)]
    assert (cache.size_bytes, cache.generation) == (2 * PAGE, 2)
    assert cache._lease.release_by_word(), "nothing of it hangs on"
    assert arena.covered == set()


async def waiting_growth(cache: VirtualKVCache, connection: Connection) -> asyncio.Task[None]:
    growing = asyncio.create_task(cache.resize(8 * PAGE))
    async with asyncio.timeout(60):
        while not connection.changes:  # noqa: ASYNC110
            await asyncio.sleep(0)
    return growing


async def test_a_release_ends_growth_that_waits_though_a_tensor_is_alive() -> None:
    connection = Connection()
    cache = cache_of(connection)
    view = cache.numpy("uint8", (PAGE,))
    growing = await waiting_growth(cache, connection)
    await cache.release()
    with pytest.raises(CacheStateError, match="was released"):
        await asyncio.wait_for(growing, 60)
    assert connection.released == [], "the tensor keeps it"
    del view
    assert connection.released == [7]


async def test_growth_whose_caller_is_cancelled_says_so() -> None:
    connection = Connection()
    cache = cache_of(connection)
    growing = await waiting_growth(cache, connection)
    growing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await growing
    growing = await waiting_growth(cache, connection)
    growing.cancel()
    await cache.release()
    with pytest.raises(asyncio.CancelledError):
        await growing


async def test_what_is_sealed_or_revoked_says_that_before_all_else() -> None:
    connection = Connection()
    cache = cache_of(connection)
    blocks = cache.block_allocator(PAGE)
    connection.revoked = True
    for refused in (cache.resize(PAGE), cache.back([(0, 1)]), cache.unback([(0, 1)]), cache.resize("nothing")):
        with pytest.raises(LeaseRevokedError):
            await refused
    connection.revoked = False
    blocks.close()
    cache.sealed = True
    for refused in (cache.resize(100 * PAGE), cache.back([(0, 100 * PAGE)]), cache.unback([(0, 1)])):
        with pytest.raises(SealedError):
            await refused
    assert connection.changes == []
    await cache.release()
