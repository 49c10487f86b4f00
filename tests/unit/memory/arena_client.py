"""A client process for tests: opens an arena, then carries out commands from standard input, one JSON line each."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import select
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from kvpool.errors import ForkedHandleError, KvpoolError
from kvpool.memory.backend import Access
from kvpool.memory.client_arena import ClientArena
from kvpool.memory.host import HostBackend


class Client:
    def __init__(self, settings: dict[str, Any]) -> None:
        settings["socket_path"] = Path(settings["socket_path"])
        self.settings = settings
        self.page_size_bytes = settings["page_size_bytes"]
        self.backend = HostBackend()
        self.arena = ClientArena(self.backend, **settings)
        self.child = 0

    def ensure(self, pages: list[list[int]], access: str = "READ_WRITE", timeout_s: float = 20.0) -> int:
        self.arena.ensure([(index, serial) for index, serial in pages], Access[access], timeout_s)
        return self.arena.mapped_pages

    def write(self, index: int, text: str) -> None:
        data = text.encode()
        ctypes.memmove(self.arena.address(index * self.page_size_bytes, Access.READ_WRITE), data, len(data))

    def read(self, index: int, size_bytes: int, access: str = "READ_WRITE") -> str:
        return ctypes.string_at(self.arena.address(index * self.page_size_bytes, Access[access]), size_bytes).decode()

    def readable(self, index: int, access: str = "READ_WRITE") -> bool:
        """Whether the page can be read; the kernel tells by EFAULT, where a load would end this process."""
        address = self.arena.address(index * self.page_size_bytes, Access[access])
        reader, writer = os.pipe()
        try:
            return ctypes.CDLL(None).write(writer, ctypes.c_void_p(address), 1) == 1
        finally:
            os.close(reader)
            os.close(writer)

    def poke(self, index: int, access: str) -> None:
        ctypes.memset(self.arena.address(index * self.page_size_bytes, Access[access]), 1, 1)

    def footprint(self) -> list[int]:
        """Open descriptors, and lines of the memory map that are of pages."""
        return [len(os.listdir("/proc/self/fd")), Path("/proc/self/maps").read_text().count("memfd:kvpool-page")]

    def fork_sleeper(self) -> int:
        """Fork a child by ``fork`` of the C library, which runs none of Python's hooks: it keeps the socket open."""
        self.child = ctypes.PyDLL(None).fork()
        if not self.child:
            signal.pause()
        return self.child

    def fork_while_mapping(self, rounds: list[list[list[int]]]) -> dict[str, Any]:
        """Fork again and again while another thread maps page after page; return what the children saw."""
        before = len(os.listdir("/proc/self/fd"))
        mapping = threading.Thread(target=lambda: [self.ensure(pages, "READ") for pages in rounds])
        mapping.start()
        forks, extra, errors, pages = 0, 0, set(), 0
        while mapping.is_alive() or forks == 0:
            forks += 1
            reader, writer = os.pipe()
            child = os.fork()
            if not child:
                os.write(writer, json.dumps(self.seen_by_child(before + 2)).encode())
                os._exit(0)
            os.close(writer)
            seen = json.loads(os.read(reader, 4096))
            os.close(reader)
            os.waitpid(child, 0)
            extra = max(extra, seen["extra"])
            pages += seen["pages"]
            errors.update(seen["errors"])
        mapping.join()
        return {"forks": forks, "extra": extra, "pages": pages, "errors": sorted(errors)}

    def seen_by_child(self, allowed: int) -> dict[str, Any]:
        errors = []
        calls = (
            lambda: self.arena.ensure([(0, 1)], Access.READ),
            lambda: self.arena.is_mapped([(0, 1)], Access.READ),
            lambda: self.arena.address(0, Access.READ),
            lambda: self.backend.create(self.page_size_bytes),
        )
        for call in calls:
            try:
                call()
                errors.append("none")
            except ForkedHandleError as error:
                errors.append(type(error).__name__)
        self.arena.close()
        self.backend.close()
        links = []
        for name in os.listdir("/proc/self/fd"):
            try:
                links.append(os.readlink(f"/proc/self/fd/{name}"))
            except FileNotFoundError:
                continue
        pages = sum("kvpool-page" in link for link in links) + self.footprint()[1]
        return {"extra": len(links) + 1 - allowed, "pages": pages, "errors": errors}

    def lose_connection(self) -> None:
        """End the connection from outside of the arena, and wait until its reader has seen that."""
        connection = self.arena._connection
        poller = select.poll()
        connection._socket.shutdown(2)
        poller.register(connection._socket.fileno(), select.POLLHUP)
        poller.poll(10_000)
        connection._thread.join(10)

    def close(self) -> None:
        self.arena.close()
        self.backend.close()


def main() -> None:
    nofile = int(sys.argv[2])
    if nofile:
        resource.setrlimit(resource.RLIMIT_NOFILE, (nofile, nofile))
    try:
        client = Client(json.loads(sys.argv[1]))
    except KvpoolError as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
        return
    print(json.dumps({"result": "ready"}), flush=True)
    for line in sys.stdin:
        command, args, kwargs = json.loads(line)
        try:
            answer = {"result": getattr(client, command)(*args, **kwargs)}
        except KvpoolError as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
