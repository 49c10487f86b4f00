"""What a process holds that kvpool made, read from /proc: page descriptors and mappings, arenas, sockets, pidfds."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_PAGE = "memfd:kvpool-page"
_ARENA_BYTES = 96 << 20
"""Inaccessible ranges from this size on are arenas: the allocator of the C library reserves 64 MiB at a time."""


class PhysicalPage(NamedTuple):
    """A page of memory, by what the kernel knows it as: equal in all processes that map it."""

    device: str
    inode: int
    offset: int


@dataclass(frozen=True)
class Footprint:
    page_descriptors: int = 0
    page_mappings: int = 0
    arena_bytes: int = 0
    """Reserved addresses in which nothing is mapped."""
    sockets: int = 0
    """Of the kind of the page channel (SOCK_SEQPACKET, which Ray does not use)."""
    pidfds: int = 0


def footprint(pid: int) -> Footprint:
    """Return what a process holds; nothing when it is gone."""
    try:
        links = _links(pid)
        maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
        unix = Path(f"/proc/{pid}/net/unix").read_text().splitlines()[1:]
    except (FileNotFoundError, ProcessLookupError):
        return Footprint()
    seqpackets = {f"socket:[{fields[6]}]" for fields in map(str.split, unix) if fields[4] == "0005"}
    reserved = 0
    for line in maps:
        fields = line.split(None, 5)
        first, end = (int(part, 16) for part in fields[0].split("-"))
        if fields[1].startswith("---") and fields[4] == "0" and end - first >= _ARENA_BYTES:
            reserved += end - first
    return Footprint(
        page_descriptors=sum(_PAGE in link for link in links),
        page_mappings=sum(_PAGE in line for line in maps),
        arena_bytes=reserved,
        sockets=sum(link in seqpackets for link in links),
        pidfds=sum("pidfd" in link for link in links),
    )


def physical_page(pid: int, address: int) -> PhysicalPage:
    """Return the page that a process has mapped at an address, and the offset within."""
    for first, end, device, inode, offset in _page_lines(pid):
        if first <= address < end:
            return PhysicalPage(device, inode, offset + address - first)
    raise AssertionError(f"process {pid} has no page mapped at {address:#x}")


def mapped_inodes(pid: int) -> set[int]:
    """Return the pages that a process has mapped, by inode (each page is a file of its own)."""
    return {inode for _, _, _, inode, _ in _page_lines(pid)}


def descendants(pid: int) -> list[int]:
    """Return the processes that a process started, and those that they started."""
    parents: dict[int, int] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            stat = Path(f"/proc/{name}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        parents[int(name)] = int(stat.rpartition(")")[2].split()[1])
    found: list[int] = []
    level = [pid]
    while level:
        level = [child for child, parent in parents.items() if parent in level]
        found += level
    return found


def state(pid: int) -> str:
    """Return the state of a process as the kernel names it ("S", "T", "Z", …), or "gone"."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "gone"


def birth(pid: int) -> str | None:
    """Return when a process began, None if it is dead: by that it differs from a later one with the same number."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else fields[19]


def _links(pid: int) -> list[str]:
    links = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            links.append(os.readlink(f"/proc/{pid}/fd/{name}"))
        except FileNotFoundError:  # closed meanwhile
            continue
    return links


def _page_lines(pid: int) -> list[tuple[int, int, str, int, int]]:
    pages = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if _PAGE in line:
            span, _, offset, device, inode = line.split(None, 5)[:5]
            first, end = (int(part, 16) for part in span.split("-"))
            pages.append((first, end, device, int(inode), int(offset, 16)))
    return pages
