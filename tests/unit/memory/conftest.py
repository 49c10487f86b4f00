"""A small owner of real pages, client processes that do as they are told, and the check that nothing is left over."""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import kvpool
from kvpool.errors import InvalidRequestError, StaleCacheError
from kvpool.memory.backend import Access
from kvpool.memory.host import HostBackend
from kvpool.memory.page_server import PageServer

TOKEN = "the right token"
DEADLINE_S = 60.0


def open_pages() -> int:
    """Descriptors of pages that this process has open."""
    count = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            count += "memfd:kvpool-page" in os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the descriptor of the listing itself
            continue
    return count


def mapped_pages() -> int:
    """Pages that this process has mapped."""
    return Path("/proc/self/maps").read_text().count("memfd:kvpool-page")


@pytest.fixture
def open_page_count() -> Callable[[], int]:
    return open_pages


@pytest.fixture
def mapped_page_count() -> Callable[[], int]:
    return mapped_pages


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    """No page stays open or mapped in this process after a test."""
    before = open_pages(), mapped_pages()
    yield
    assert (open_pages(), mapped_pages()) == before


class Owner:
    """Owns pages, one at each index, and serves them."""

    def __init__(self, folder: Path, page_size_bytes: int) -> None:
        self.backend = HostBackend()
        self.page_size_bytes = page_size_bytes
        self.path = folder / "private" / "pages.sock"
        self.server = PageServer(self.path, self, self._authorize, self._on_gone, self._on_connected)
        self.pages: dict[int, tuple[int, int]] = {}  # index → (serial, handle)
        self.holders: dict[str, set[int]] = {}  # client → serials that it may map
        self.gone: list[str] = []
        self.connected: list[str] = []
        self._next_serial = 100
        self._changed = asyncio.Condition()
        self._window = self.backend.reserve(page_size_bytes, page_size_bytes)

    def add(self, index: int, content: bytes = b"") -> tuple[int, int]:
        """Put a new page at an index; returns (index, serial)."""
        handle = self.backend.create(self.page_size_bytes)
        if content:
            self._through_window(handle, content)
        serial, self._next_serial = self._next_serial, self._next_serial + 1
        self.pages[index] = (serial, handle)
        return index, serial

    def remove(self, index: int) -> None:
        self.backend.release(self.pages.pop(index)[1])

    def read(self, index: int, size_bytes: int) -> bytes:
        return self._through_window(self.pages[index][1], b"", size_bytes)

    async def until(self, true: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S), self._changed:
            await self._changed.wait_for(true)

    async def until_exported(self, client_id: str, serial: int) -> None:
        await self.until(lambda: serial in self.holders.get(client_id, ()))

    # What PageServer calls

    def export(self, client_id: str, tenant: str, index: int, serial: int) -> int:
        if self.pages.get(index, (None,))[0] != serial:
            raise StaleCacheError(f"no page {serial} at {index}", index=index, serial=serial)
        self.holders.setdefault(client_id, set()).add(serial)
        self._notify()
        return self.backend.export(self.pages[index][1])

    def dropped(self, client_id: str, serials: list[int]) -> None:
        self.holders.setdefault(client_id, set()).difference_update(serials)
        self._notify()

    def _authorize(self, client_id: str, token: str) -> str:
        if not hmac.compare_digest(token, TOKEN):
            raise InvalidRequestError(f"client {client_id!r} has another token")
        return "default"

    def _on_gone(self, client_id: str) -> None:
        self.gone.append(client_id)
        self.holders.pop(client_id, None)
        self._notify()

    def _on_connected(self, client_id: str) -> None:
        self.connected.append(client_id)
        self._notify()

    def _notify(self) -> None:
        async def notify() -> None:
            async with self._changed:
                self._changed.notify_all()

        self._task = asyncio.ensure_future(notify())

    def _through_window(self, handle: int, content: bytes, size_bytes: int = 0) -> bytes:
        import ctypes

        self.backend.map(self._window, handle)
        try:
            self.backend.set_access(self._window, self.page_size_bytes, Access.READ_WRITE)
            ctypes.memmove(self._window, content, len(content))
            return ctypes.string_at(self._window, size_bytes)
        finally:
            self.backend.unmap(self._window, self.page_size_bytes)


class ClientProcess:
    """A real process with an arena, run by ``arena_client.py``: one JSON command a line, one JSON answer."""

    def __init__(self, process: asyncio.subprocess.Process, client_id: str) -> None:
        self.process = process
        self.id = client_id
        self.pid = process.pid

    async def ask(self, command: str, *args: Any, **kwargs: Any) -> Any:
        self.tell(command, *args, **kwargs)
        return await self.answer()

    def tell(self, command: str, *args: Any, **kwargs: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([command, args, kwargs]).encode() + b"\n")

    async def answer(self) -> Any:
        assert self.process.stdout is not None
        async with asyncio.timeout(DEADLINE_S):
            line = await self.process.stdout.readline()
        assert line, f"client {self.id} died: exit status {await self.process.wait()}"
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["result"]


@pytest.fixture
async def owner(tmp_path: Path) -> AsyncIterator[Owner]:
    """Owner of pages of 64 KiB, serving."""
    owner = Owner(tmp_path, 65536)
    await owner.server.start()
    yield owner
    await owner.server.close()
    owner.backend.close()


@pytest.fixture
async def start_client(owner: Owner) -> AsyncIterator[Callable[..., Any]]:
    """Start a client process: ``await start_client("a")``; its arena has 10,000 pages."""
    started: list[ClientProcess] = []

    async def start(
        client_id: str, capacity_pages: int = 10_000, nofile: int = 0, wrapper: Sequence[str] = ()
    ) -> ClientProcess:
        settings = {
            "socket_path": str(owner.path),
            "client_id": client_id,
            "token": TOKEN,
            "arena_bytes": 10_000 * owner.page_size_bytes,
            "page_size_bytes": owner.page_size_bytes,
            "capacity_pages": capacity_pages,
        }
        process = await asyncio.create_subprocess_exec(
            *wrapper,
            sys.executable,
            str(Path(__file__).with_name("arena_client.py")),
            json.dumps(settings),
            str(nofile),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(Path(kvpool.__file__).parent.parent)},
        )
        client = ClientProcess(process, client_id)
        started.append(client)
        await client.answer()
        return client

    yield start
    for client in started:
        if client.process.returncode is None:
            client.process.kill()
        await client.process.wait()
        client.process._transport.close()  # type: ignore[attr-defined]  # or its pipes stay for the collector
