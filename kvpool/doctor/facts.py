"""What is so on one host, as one process of it sees it: gathered by looking and by trying, judged elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import socket
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path

from kvpool.actors.priority import niceness
from kvpool.actors.protocol import host_identity
from kvpool.errors import ConfigError, KvpoolError, ProtocolError
from kvpool.memory import channel, limits, socket_path
from kvpool.memory.backend import Access, MemoryInfo
from kvpool.memory.cuda import Driver, probe_driver
from kvpool.memory.host import HostBackend
from kvpool.memory.limits import DescriptorLimits, MappingLimits
from kvpool.memory.page_server import PageServer
from kvpool.memory.pages import PageTable
from kvpool.version import __version__

_GREETING_S = 5.0
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
"""What the system makes shared memory of: ``always within_size advise [never] deny force``, brackets around what holds.
(Linux, Documentation/admin-guide/mm/transhuge.rst.)"""


@dataclass(frozen=True, slots=True)
class Token:
    """Ray's authentication token as a process started here would find it.

    ``source`` names where it is, None when there is none; ``error`` is why the place that was named cannot be used;
    ``open_to_others`` tells that other users may read it.
    """

    mode: str | None = None
    address: str | None = None
    source: str | None = None
    error: str | None = None
    open_to_others: bool = False


@dataclass(frozen=True, slots=True)
class Facts:
    """One host. Bytes; what was tried holds the error's text, None when it worked.

    ``niceness`` is that of an actor started where the facts were gathered; ``huge_pages`` when shared memory is made of
    these, None if the system does not tell; ``ray_logs`` where Ray's processes keep their logs, None outside a cluster.
    """

    host: str
    versions: dict[str, str | None]
    descriptors: DescriptorLimits
    mappings: MappingLimits
    memory: MemoryInfo
    shm: MemoryInfo | None
    driver: Driver
    nvidia_present: bool
    page_error: str | None
    peer_error: str | None
    niceness: int
    huge_pages: str | None
    socket_errors: list[str] = field(default_factory=list)
    left_behind: list[str] = field(default_factory=list)
    ray_logs: str | None = None


def gather(
    sockets: list[Path], *, proc: Path = Path("/proc"), shm: Path = Path("/dev/shm"), huge_pages: Path = _HUGE_PAGES
) -> Facts:
    """Return the facts of this host. Takes well under a second; leaves nothing behind.

    Parameters
    ----------
    sockets
        Where devices on this host would listen.
    proc, shm, huge_pages
        Where the system tells of its memory, where Ray's object store lies, and what shared memory is made of.
    """
    socket_errors = [_error_of(partial(_try_socket, path)) for path in sockets]
    return Facts(
        host=host_identity(),
        versions={"kvpool": __version__, "python": platform.python_version(), **_installed("ray", "torch")},
        descriptors=limits.descriptor_limits(),
        mappings=limits.mapping_limits(),
        memory=limits.memory_info(proc),
        shm=_file_system(shm),
        driver=probe_driver(),
        nvidia_present=Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidiactl").exists(),
        page_error=_error_of(_try_page),
        peer_error=_error_of(_try_peer),
        niceness=niceness(),
        huge_pages=_chosen(huge_pages),
        socket_errors=[error for error in socket_errors if error],
        left_behind=[
            str(path)
            for path, error in zip(sockets, socket_errors, strict=True)
            if error is None and socket_path.is_left_behind(path)
        ],
    )


def find_token(environment: dict[str, str], home: Path) -> Token:
    """Return the token by the rules of Ray 2.60: ``RAY_AUTH_TOKEN``, else ``RAY_AUTH_TOKEN_PATH``, else the home's."""
    mode, value, named, address = (
        environment.get(name) or None
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS")
    )
    if value is not None:
        return Token(mode, address, "RAY_AUTH_TOKEN")
    path = Path(named) if named is not None else home / ".ray" / "auth_token"
    try:
        found = path.stat()
        empty = not path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as failure:
        missing = named is None and isinstance(failure, FileNotFoundError)
        return Token(mode, address, error=None if missing else f"{path}: {failure}")
    if empty:
        return Token(mode, address, error=f"{path} is empty")
    return Token(mode, address, str(path), open_to_others=bool(stat.S_IMODE(found.st_mode) & 0o077))


def greet(path: Path) -> None:
    """Connect to a device's socket as a client does, and go when it has greeted.

    Raises
    ------
    OSError
        If nobody listens there, it cannot be reached, or does not answer within 5 s.
    KvpoolError
        What the device refuses with.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        client.settimeout(_GREETING_S)
        client.connect(str(path))
        message = channel.recv_message(client)
    if message is None:
        raise ProtocolError(f"the device at {path} closed the connection: its log says why")
    refused = channel.error(message)
    if refused is not None:
        raise refused


def _try_page() -> None:
    """Make, seal, share and map a page, not inherited by forks."""
    backend = HostBackend()
    size_bytes = backend.granularity()
    try:
        address = backend.reserve(size_bytes, size_bytes)
        shared = backend.import_(backend.export(backend.create(size_bytes)), size_bytes)
        backend.map(address, shared)
        backend.set_access(address, size_bytes, Access.READ_WRITE)
    finally:
        backend.close()


def _try_peer() -> None:
    """Learn which process is at the other end of a socket, and watch it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        os.close(channel.peer(ours).pidfd)


def _try_socket(path: Path) -> None:
    """Serve beside where a device would, and connect there."""
    socket_path.check_length(path)
    missing = [folder for folder in path.parents if not folder.exists()]
    try:
        socket_path.prepare_folder(path.parent)
        if socket_path.is_served(path):
            raise ConfigError(f"another server listens at {path}: stop it, or name another folder by socket_dir")
        asyncio.run(_serve_and_greet(path.with_suffix(".test")))  # as long as the device's own name
    finally:
        for folder in missing:
            with contextlib.suppress(OSError):  # it could not be made
                folder.rmdir()


async def _serve_and_greet(path: Path) -> None:
    backend = HostBackend()
    page_bytes = backend.granularity()
    pages = PageTable(backend, 1, page_bytes, 1)
    server = PageServer(path, pages, lambda client, _token: client, lambda _client: None)
    try:
        await server.start()
        await asyncio.to_thread(greet, path)
    finally:
        await server.close()
        pages.close()


def _chosen(setting: Path) -> str | None:
    """Return which word of a setting stands in brackets."""
    try:
        words = setting.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return None
    return next((word[1:-1] for word in words if word.startswith("[")), None)


def _error_of(attempt: Callable[[], None]) -> str | None:
    try:
        attempt()
    except (KvpoolError, OSError) as failure:
        return str(failure)
    return None


def _file_system(folder: Path) -> MemoryInfo | None:
    try:
        found = os.statvfs(folder)
    except OSError:
        return None
    return MemoryInfo(found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize)


def _installed(*packages: str) -> dict[str, str | None]:
    versions: dict[str, str | None] = dict.fromkeys(packages)
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions
