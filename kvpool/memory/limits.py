"""Limits that this system sets a process: open descriptors, mappings, memory (also that of its control group)."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from kvpool.errors import SystemLimitError
from kvpool.memory.backend import MemoryInfo
from kvpool.sizes import format_size

# Beside the pages: descriptors in flight (128 a message) and what the rest of the process opens.
_SPARE_DESCRIPTORS = 256
# Beside the arena: shared libraries, thread stacks and heaps that the rest of the process maps.
_SPARE_MAPPINGS = 2048


class DescriptorLimits(NamedTuple):
    """Files that a process has open and may have open: ``soft`` may be raised up to ``hard``; -1 is no limit."""

    opened: int
    soft: int
    hard: int


class MappingLimits(NamedTuple):
    """Mappings that a process has, and ``vm.max_map_count``."""

    mapped: int
    limit: int


def descriptor_limits() -> DescriptorLimits:
    """Return those of this process."""
    return DescriptorLimits(len(os.listdir("/proc/self/fd")), *resource.getrlimit(resource.RLIMIT_NOFILE))


def mapping_limits() -> MappingLimits:
    """Return those of this process."""
    return MappingLimits(count_mappings(), int(Path("/proc/sys/vm/max_map_count").read_text()))


def require_descriptors(pages: int) -> None:
    """Make sure that this process can keep ``pages`` more descriptors open, raising its soft limit when needed.

    Raises
    ------
    SystemLimitError
        If the hard limit of open files is too low.
    """
    limits = descriptor_limits()
    needed = check_descriptors(pages, limits)
    if limits.soft != resource.RLIM_INFINITY and needed > limits.soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, limits.hard))


def check_descriptors(pages: int, limits: DescriptorLimits) -> int:
    """Return how many files must be open at once for ``pages`` more; raises as :func:`require_descriptors` does."""
    needed = limits.opened + pages + _SPARE_DESCRIPTORS
    hard = limits.hard
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise SystemLimitError(
            f"{pages} pages need {needed} open files (one a page), but this process may open at most {hard}: raise "
            f"nofile (ulimit -n {needed}, LimitNOFILE=, or --ulimit nofile={needed}), or configure larger pages",
            limit="nofile",
            needed=needed,
            soft=limits.soft,
            hard=limits.hard,
        )
    return needed


def require_mappings(mapped_pages: int) -> None:
    """Make sure that this process can keep ``mapped_pages`` more pages mapped.

    A page takes up to two mappings: itself and the gap behind it.

    Raises
    ------
    SystemLimitError
        If ``vm.max_map_count`` is too low.
    """
    check_mappings(mapped_pages, mapping_limits())


def check_mappings(mapped_pages: int, limits: MappingLimits) -> int:
    """Return how many mappings ``mapped_pages`` more may need; raises as :func:`require_mappings` does."""
    mapped, limit = limits
    needed = mapped + 2 * mapped_pages + _SPARE_MAPPINGS
    if needed > limit:
        raise SystemLimitError(
            f"{mapped_pages} mapped pages need up to {needed} mappings, but vm.max_map_count is {limit}: raise it "
            f"(sysctl -w vm.max_map_count={needed}), or configure larger pages",
            limit="max_map_count",
            needed=needed,
            max_map_count=limit,
        )
    return needed


def require_memory(pages: int, page_size_bytes: int, available: MemoryInfo) -> None:
    """Make sure that ``pages`` fit into the memory that is ``available`` now.

    Raises
    ------
    SystemLimitError
        If they do not.
    """
    needed_bytes = pages * page_size_bytes
    if needed_bytes > available.free_bytes:
        raise SystemLimitError(
            f"{pages} pages of {format_size(page_size_bytes)} need {format_size(needed_bytes)}, but "
            f"{format_size(available.free_bytes)} of {format_size(available.total_bytes)} are free (system, control "
            "group and budget counted): configure less memory, or raise the limit of the container",
            limit="memory",
            needed_bytes=needed_bytes,
            free_bytes=available.free_bytes,
            total_bytes=available.total_bytes,
        )


def count_mappings() -> int:
    """Return how many mappings this process has now."""
    with open("/proc/self/maps", "rb") as maps:
        return sum(1 for _ in maps)


def memory_info(proc: Path = Path("/proc")) -> MemoryInfo:
    """Return the memory this process may use: the system's, or its control group's where that is less."""
    fields = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines())
    total, free = (int(fields[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    for limit_bytes, used_bytes in _control_group_limits(proc / "self"):
        total = min(total, limit_bytes)
        free = min(free, limit_bytes - used_bytes)
    return MemoryInfo(max(free, 0), total)


def _control_group_limits(process: Path) -> Iterator[tuple[int, int]]:
    """Yield ``(limit, used)`` bytes of each control group that holds this process and has a limit."""
    for mount, group, files in _memory_controllers(process):
        # A group is bound by its ancestors too. In a container only a part of the tree may be visible.
        for folder in [group, *group.parents]:
            if folder != mount and mount not in folder.parents:
                break
            limit, used = (_read_bytes(folder / name) for name in files[:2])
            if limit is None or used is None:
                continue
            yield limit, max(0, used - _reclaimable_bytes(folder / "memory.stat", files[2]))


def _memory_controllers(process: Path) -> Iterator[tuple[Path, Path, tuple[str, str, str]]]:
    """Yield mount point, own group and names of (limit, usage, reclaimable) of the memory controllers, v1 and v2."""
    groups = {}
    for line in (process / "cgroup").read_text().splitlines():
        number, controllers, group = line.split(":", 2)
        if number == "0" or "memory" in controllers.split(","):
            groups["cgroup2" if number == "0" else "cgroup"] = group
    for line in (process / "mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        root, mount = left.split()[3:5]
        kind, _, options = right.split(" ", 2)
        if kind == "cgroup2":
            files = ("memory.max", "memory.current", "inactive_file")
        elif kind == "cgroup" and "memory" in options.split(","):
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = groups.get(kind, "/")
        inside = os.path.relpath(group, root)
        yield Path(mount), Path(mount) if inside.startswith("..") else Path(mount, inside), files


def _read_bytes(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:  # the root group has no limit files, and a container may hide a group
        return None
    return None if text == "max" else int(text)


def _reclaimable_bytes(path: Path, field: str) -> int:
    """Return the file cache that the kernel gives up before it refuses memory."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(value) for name, _, value in (line.partition(" ") for line in lines) if name == field), 0)
