"""Real client processes against one owner: kills, stops, forks, limits."""

from __future__ import annotations

import asyncio
import gc
import os
import select
import signal
from pathlib import Path
from typing import Any

import pytest

from kvpool.memory.page_server import PageServer

DEADLINE_S = 60.0


def footprint() -> tuple[int, int]:
    gc.collect()
    return len(os.listdir("/proc/self/fd")), Path("/proc/self/maps").read_text().count("memfd:kvpool-page")


def seen_of(pid: int) -> tuple[list[str], str]:
    """What a process has open, and its memory map."""
    return [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()], Path(f"/proc/{pid}/maps").read_text()


def stop(client: Any) -> None:
    """Stop a client process, and wait until all of its threads stand still."""
    os.kill(client.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, client.pid, os.WSTOPPED)


def pipe_of(client: Any) -> int:
    """The descriptor that a client's answers come from."""
    return client.process._transport.get_pipe_transport(1).get_extra_info("pipe").fileno()


async def test_owner_and_clients_see_the_same_memory(owner, start_client):
    pages = [owner.add(3, b"hello"), owner.add(4)]
    writer, reader = await start_client("writer"), await start_client("reader")
    assert await writer.ask("ensure", pages) == 2
    assert await reader.ask("ensure", pages, "READ") == 2
    assert await reader.ask("read", 3, 5, "READ") == "hello"
    await writer.ask("write", 4, "world")
    assert await reader.ask("read", 4, 5, "READ") == "world"
    assert owner.read(4, 5) == b"world"


async def test_write_through_the_read_only_view_is_a_fault(owner, start_client):
    page = owner.add(0, b"sealed")
    client = await start_client("a")
    await client.ask("ensure", [page], "READ")
    client.tell("poke", 0, "READ")
    assert await client.process.wait() == -signal.SIGSEGV
    await owner.until(lambda: owner.gone == ["a"])
    assert owner.read(0, 6) == b"sealed"


async def test_killed_client_is_gone(owner, start_client):
    client = await start_client("a")
    await client.ask("ensure", [owner.add(i) for i in range(10)])
    assert len(owner.holders["a"]) == 10
    client.process.kill()
    await owner.until(lambda: owner.gone == ["a"])
    assert owner.server.clients() == {}


async def test_killed_client_is_gone_although_its_forked_child_holds_the_socket(owner, start_client):
    client = await start_client("a")
    await client.ask("ensure", [owner.add(0)])
    child = await client.ask("fork_sleeper")
    try:
        client.process.kill()
        await owner.until(lambda: owner.gone == ["a"])
        os.kill(child, 0)  # alive
        links, mappings = seen_of(child)
        assert any(link.startswith("socket:") for link in links)
        assert "kvpool-page" not in mappings
    finally:
        os.kill(child, signal.SIGKILL)


async def test_stopped_client_blocks_nobody_and_drops_when_continued(owner, start_client):
    pages = [owner.add(i, b"tenant one") for i in range(3)]
    stopped, other = await start_client("stopped"), await start_client("other")
    await stopped.ask("ensure", pages)
    await stopped.ask("ensure", pages[:1], "READ")
    stop(stopped)
    try:
        # More than fits into the socket, one after another, so the owner has to wait with most of them.
        owner.server.request_drop("stopped", [serial for _, serial in pages])
        for serial in range(10_000, 60_000):
            owner.server.request_drop("stopped", [serial])
        for i in range(20):
            assert await other.ask("ensure", [owner.add(100 + i)]) == i + 1
        assert owner.holders["stopped"] == {serial for _, serial in pages}
        assert owner.gone == []
    finally:
        os.kill(stopped.pid, signal.SIGCONT)
    await owner.until(lambda: owner.holders["stopped"] == set())
    for access in ("READ", "READ_WRITE"):
        assert await stopped.ask("readable", 0, access) is False
    assert (await stopped.ask("footprint"))[1] == 0


async def test_8000_pages_in_four_clients_leave_nothing(owner, start_client):
    clients = [await start_client(name) for name in "abcd"]
    at_start = footprint()
    before = [await client.ask("footprint") for client in clients]
    owner.backend.probe(pages=8000, mapped_pages=1, page_size_bytes=owner.page_size_bytes)
    pages = [owner.add(index) for index in range(8000)]
    assert await asyncio.gather(*(client.ask("ensure", pages) for client in clients)) == [8000] * 4
    # A page in each client, and no descriptor that stays open for it.
    assert [await client.ask("footprint") for client in clients] == [[count, 8000] for count, _ in before]
    for client in clients:
        owner.server.request_drop(client.id, [serial for _, serial in pages])
    await owner.until(lambda: not any(owner.holders.values()))
    assert [await client.ask("footprint") for client in clients] == before
    for index in range(8000):
        owner.remove(index)
    assert footprint() == at_start
    await asyncio.gather(*(client.ask("close") for client in clients))
    await owner.until(lambda: sorted(owner.gone) == list("abcd"))


async def test_low_limit_of_open_files_is_told_at_the_start(owner, start_client):
    with pytest.raises(RuntimeError, match=r"SystemLimitError.*nofile"):
        await start_client("a", nofile=100)
    assert owner.connected == []


async def test_low_limit_of_mappings_is_told_at_the_start(owner, start_client):
    with pytest.raises(RuntimeError, match=r"SystemLimitError.*max_map_count"):
        await start_client("a", capacity_pages=10_000_000)


async def test_forks_during_mapping_inherit_nothing(owner, start_client):
    rounds = [[owner.add(i * 8 + j) for j in range(8)] for i in range(150)]
    client = await start_client("a")
    seen = await client.ask("fork_while_mapping", rounds)
    assert seen["forks"] > 3
    assert seen["extra"] <= 0
    assert seen["pages"] == 0
    assert seen["errors"] == ["ForkedHandleError"]
    assert await client.ask("ensure", rounds[0]) == 150 * 8 + 8  # and the parent goes on


async def test_lost_connection_is_made_again_at_the_next_use(owner, start_client):
    pages = [owner.add(0, b"kept"), owner.add(1)]
    client = await start_client("a")
    await client.ask("ensure", pages[:1])
    await client.ask("lose_connection")
    owner.server.request_drop("a", [pages[0][1]])  # waits until it comes back
    assert owner.holders["a"] == {pages[0][1]}
    await client.ask("ensure", pages[1:])
    await owner.until(lambda: owner.holders["a"] == {pages[1][1]})
    assert owner.connected == ["a", "a"]
    assert owner.gone == []
    assert (await client.ask("footprint"))[1] == 1


async def test_stopped_owner_is_told_by_the_deadline(owner, start_client):
    client = await start_client("a")
    pages = [owner.add(0), owner.add(1)]
    client.tell("ensure", pages, timeout_s=0.3)
    # The owner is this event loop: it does not run while this waits for the answer.
    assert select.select([pipe_of(client)], [], [], DEADLINE_S)[0]
    with pytest.raises(RuntimeError, match="PoolUnavailableError"):
        await client.answer()
    assert await client.ask("ensure", pages) == 2  # what came late was mapped, and the next request is served


async def test_owner_that_is_gone_is_lost(owner, start_client):
    client = await start_client("a")
    await client.ask("ensure", [owner.add(0)])
    await owner.server.close()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="DeviceLostError"):
            await client.ask("ensure", [owner.add(1)])
    await client.ask("close")


async def test_restarted_owner_is_another_one(owner, start_client):
    client = await start_client("a")
    await client.ask("ensure", [owner.add(0)])
    await owner.server.close()
    restarted = PageServer(owner.path, owner, owner._authorize, owner._on_gone)
    await restarted.start()
    try:
        with pytest.raises(RuntimeError, match=r"DeviceLostError.*restarted"):
            await client.ask("ensure", [owner.add(1)])
        await owner.until(lambda: owner.gone == ["a"])  # it said goodbye to the new one, where it has nothing mapped
    finally:
        await restarted.close()
