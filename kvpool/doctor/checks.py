"""The checks: each judges facts, and says what is wrong and how to mend it.

What the start of a pool refuses is judged here by the same functions (:mod:`kvpool.memory.limits`,
:mod:`kvpool.memory.socket_path`), so that the two agree.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from kvpool.doctor.facts import Facts, Token
from kvpool.doctor.finding import FAILED, OK, WARNING, Finding, command
from kvpool.doctor.plan import Plan
from kvpool.errors import SystemLimitError
from kvpool.memory.limits import check_descriptors, check_mappings, require_memory
from kvpool.sizes import MIB, format_count, format_size

# Of Ray 2.60: the least that its object store takes, and what it takes by default.
_STORE_LEAST_BYTES = 75 * MIB
_STORE_SHARE, _STORE_MOST_BYTES = 0.3, 200 * 10**9
_HUGE = ("always", "within_size", "force")
"""Settings of the system by which shared memory is made of huge pages where it is large enough, unasked."""


def check_nofile(facts: Facts, plan: Plan, where: str) -> Finding:
    """Judge the limit of open files: a device keeps one a page."""
    found = f"{facts.descriptors.opened} open, limit {_limit(facts.descriptors.hard)}"
    try:
        needed = check_descriptors(plan.device_pages, facts.descriptors)
    except SystemLimitError as error:
        needed = error.details["needed"]
        mend = (
            f"`ulimit -n {needed}` before `ray start` (systemd: LimitNOFILE={needed}; Docker: --ulimit "
            f"nofile={needed}), or set a larger page_size"
        )
        return Finding("nofile", where, FAILED, found, f"{needed:,} open files", mend)
    return Finding("nofile", where, OK, found, f"{needed:,} open files")


def check_max_map_count(facts: Facts, plan: Plan, where: str) -> Finding:
    """Judge ``vm.max_map_count``: a client maps each page of its host up to twice."""
    found = f"{facts.mappings.mapped:,} mapped, limit {facts.mappings.limit:,}"
    try:
        needed = check_mappings(max(plan.device_pages, plan.client_pages), facts.mappings)
    except SystemLimitError as error:
        needed = error.details["needed"]
        mend = f"`sysctl -w vm.max_map_count={needed}` (for a container: on its host), or set a larger page_size"
        return Finding("max_map_count", where, FAILED, found, f"{needed:,} mappings", mend)
    return Finding("max_map_count", where, OK, found, f"{needed:,} mappings")


def check_memory(facts: Facts, plan: Plan, where: str) -> Finding:
    """Judge the free memory of the host, or of its control group (``memory.max``): all devices are promised it."""
    found = f"{format_size(facts.memory.free_bytes)} free of {format_size(facts.memory.total_bytes)}"
    if not plan.devices:
        return Finding("memory", where, OK, found, "nothing more: the pool runs")
    pages, page_bytes = sum(device.pages for device in plan.devices), plan.devices[0].page_bytes
    needed = f"{format_size(pages * page_bytes)} for {format_count(len(plan.devices), 'device')}"
    try:
        require_memory(pages, page_bytes, facts.memory)
    except SystemLimitError:
        mend = (
            "raise the container's memory limit (memory.max), stop what uses memory, or give --devices a smaller size"
        )
        return Finding("memory", where, FAILED, found, needed, mend)
    return Finding("memory", where, OK, found, needed)


def check_shm(facts: Facts, where: str) -> Finding:
    """Judge ``/dev/shm``, in which Ray's object store will lie (a pool's pages do not)."""
    return _judge_shm(facts, where, facts.shm.free_bytes if facts.shm else 0, "free")


def check_shm_of_ray(facts: Facts, where: str) -> Finding:
    """Judge ``/dev/shm`` of a node: what its Ray has taken of it is no loss."""
    return _judge_shm(facts, where, facts.shm.total_bytes if facts.shm else 0, "in all")


def _judge_shm(facts: Facts, where: str, bytes_: int, of_what: str) -> Finding:
    mend = (
        "mount a larger /dev/shm (Docker: --shm-size; Kubernetes: an emptyDir of medium Memory), or delete files there"
    )
    if facts.shm is None:
        return Finding("shm", where, FAILED, "no /dev/shm", "room for Ray's object store", mend)
    found = f"{format_size(bytes_)} {of_what}"
    wanted_bytes = int(min(_STORE_SHARE * facts.memory.total_bytes, _STORE_MOST_BYTES))
    needed = f"{format_size(wanted_bytes)} by Ray's default for its object store"
    if bytes_ < _STORE_LEAST_BYTES:
        return Finding("shm", where, FAILED, found, needed, mend)
    if bytes_ < wanted_bytes:
        return Finding(
            "shm", where, WARNING, found, needed, f"`ray start --object-store-memory={bytes_ // 2}`, or {mend}"
        )
    return Finding("shm", where, OK, found, needed)


def check_token(token: Token, where: str) -> Finding:
    """Judge Ray's authentication token."""
    needed = "one token, the same on all nodes"
    generate = "`ray get-auth-token --generate`, and copy ~/.ray/auth_token to every node"
    if token.error is not None:
        return Finding("token", where, FAILED, token.error, needed, f"unset RAY_AUTH_TOKEN_PATH, or {generate}")
    if token.mode == "disabled":
        mend = f"unset RAY_AUTH_MODE, then {generate}"
        return Finding(
            "token", where, WARNING, "RAY_AUTH_MODE=disabled: anyone who reaches a port runs code", needed, mend
        )
    if token.source is None:
        return Finding("token", where, FAILED, "none: 'ray start' would run open to anyone", needed, generate)
    if token.open_to_others:
        return Finding(
            "token", where, WARNING, f"{token.source}, readable by others", needed, command("chmod", 600, token.source)
        )
    if token.address is not None and token.mode is None:
        found = f"{token.source}, but with RAY_ADDRESS Ray shows it only if RAY_AUTH_MODE says so"
        return Finding("token", where, WARNING, found, needed, "`export RAY_AUTH_MODE=token`")
    return Finding("token", where, OK, token.source, needed)


def check_versions(facts: Facts, where: str, others: dict[str, str | None] | None = None) -> Finding:
    """Judge the versions of Python and Ray, against what kvpool supports and (``others``) against another host's."""
    supported = _supported()
    found = _text(facts.versions, "kvpool", "python", "ray")
    needed = _text({name: str(versions) for name, versions in supported.items()}, *supported)
    bad = [name for name, versions in supported.items() if not _within(facts.versions.get(name), versions)]
    if bad:
        install = (
            command("pip", "install", f"ray[default]{supported['ray']}") if "ray" in bad else "install that Python"
        )
        return Finding("versions", where, FAILED, found, needed, install)
    differing = [name for name in ("kvpool", "python", "ray") if others and facts.versions[name] != others[name]]
    if others and differing:
        mend = f"install the same {' and '.join(differing)} on every node and where you call from"
        return Finding("versions", where, FAILED, found, f"the same as here: {_text(others, *differing)}", mend)
    return Finding("versions", where, OK, found, needed)


def check_torch(facts: Facts, where: str) -> Finding:
    """Judge torch: only tensors need it."""
    versions, found = _extra("torch"), facts.versions["torch"]
    mend = command("pip", "install", f"torch{versions}")
    if found is None:
        return Finding(
            "torch", where, WARNING, "not installed: numpy works, tensor() does not", f"torch {versions}", mend
        )
    if not _within(found, versions):
        return Finding("torch", where, WARNING, f"torch {found}", f"torch {versions}", mend)
    return Finding("torch", where, OK, f"torch {found}", f"torch {versions}")


def check_sockets(facts: Facts, plan: Plan, where: str) -> Finding:
    """Judge the folder in which devices listen."""
    folder = str(plan.sockets[0].parent) if plan.sockets else "those of the pool that runs"
    needed = "a folder of mode 0700, ours, with paths of at most 107 bytes"
    if facts.socket_errors and plan.sockets:
        mend = "set KVPOOL_SOCKET_DIR to a short path that this user may write to, such as /run/kvpool"
        return Finding("sockets", where, FAILED, facts.socket_errors[0], needed, mend)
    if facts.left_behind:
        found = f"{len(facts.left_behind)} sockets of devices that were killed: {facts.left_behind[0]}"
        return Finding(
            "sockets",
            where,
            WARNING,
            found,
            needed,
            f"none needed (the next start removes them), or {command('rm', *facts.left_behind)}",
        )
    return Finding("sockets", where, OK, folder, needed)


def check_pages(facts: Facts, where: str) -> Finding:
    """Judge whether a page can be made, sealed, shared and mapped."""
    needed = "memfd_create with seals, mmap, MADV_DONTFORK"
    if facts.page_error is not None:
        mend = "allow these calls in the container's seccomp profile, or run on the kernel itself (not gVisor)"
        return Finding("pages", where, FAILED, facts.page_error, needed, mend)
    return Finding("pages", where, OK, "a page was made, sealed, shared and mapped", needed)


def check_peer(facts: Facts, where: str) -> Finding:
    """Judge whether the process at the other end of a socket can be watched: leases end with it."""
    needed = "SO_PEERCRED and pidfd_open"
    if facts.peer_error is not None:
        mend = "allow pidfd_open in the container's seccomp profile, and run Linux 5.3 or newer"
        return Finding("peer", where, FAILED, facts.peer_error, needed, mend)
    return Finding("peer", where, OK, "the other end of a socket is seen and watched", needed)


def check_driver(facts: Facts, where: str) -> Finding:
    """Judge the CUDA driver."""
    driver = facts.driver
    needed = "GPUs with virtual memory management, shared by descriptors"
    if driver.version is None and not facts.nvidia_present:
        return Finding("driver", where, OK, "no GPU: host memory is used", "nothing")
    if driver.error is not None:
        mend = "install the driver until `nvidia-smi` works (in a container: --gpus all, with the capability 'compute')"
        return Finding("driver", where, FAILED, driver.error, needed, mend)
    if driver.unmappable or driver.unshareable:
        lacking = sorted({*driver.unmappable, *driver.unshareable})
        found = f"CUDA {driver.version}; GPUs {', '.join(map(str, lacking))} lack it"
        return Finding(
            "driver", where, FAILED, found, needed, "update the driver; hide those GPUs by CUDA_VISIBLE_DEVICES"
        )
    if not driver.gpus:
        return Finding("driver", where, OK, f"CUDA {driver.version}, no GPU visible: host memory is used", "nothing")
    return Finding("driver", where, OK, f"CUDA {driver.version}, {driver.gpus} GPUs", needed)


def check_niceness(facts: Facts, where: str) -> Finding:
    """Judge the scheduling priority of the actors: everyone waits for them."""
    found = f"kvpool's actors would run at {facts.niceness}"
    if facts.niceness > 0:
        mend = (
            "`export RAY_worker_niceness=0` before `ray start` (or allow SYS_NICE): where cores are busy, requests wait"
        )
        return Finding("niceness", where, WARNING, found, "0", mend)
    return Finding("niceness", where, OK, found, "0")


def check_huge_pages(facts: Facts, where: str) -> Finding:
    """Tell whether a page of a pool can be one of the system's large ones.

    It need not be, but then it is made, touched for the first time and given back 7 to 30 times as fast
    (``docs/performance.md``).
    """
    if facts.huge_pages in _HUGE:
        return Finding("huge_pages", where, OK, facts.huge_pages, "nothing")
    found = f"{facts.huge_pages or 'none'}: each page is made of 4 KiB ones"
    needed = "nothing; faster as 'within_size': docs/containers.md"
    return Finding("huge_pages", where, OK, found, needed)


def check_host(facts: Facts, plan: Plan, where: str, others: dict[str, str | None] | None = None) -> list[Finding]:
    """Return what is checked on every host, whether or not Ray runs there."""
    of_plan: tuple[Callable[[Facts, Plan, str], Finding], ...] = (
        check_nofile,
        check_max_map_count,
        check_memory,
        check_sockets,
    )
    of_host: tuple[Callable[[Facts, str], Finding], ...] = (
        check_pages,
        check_peer,
        check_niceness,
        check_huge_pages,
        check_driver,
        check_torch,
    )
    return [
        *(check(facts, plan, where) for check in of_plan),
        check_versions(facts, where, others),
        *(check(facts, where) for check in of_host),
    ]


def _supported() -> dict[str, SpecifierSet]:
    """Return the versions of Python and Ray that the installed kvpool asks for."""
    about = metadata.metadata("kvpool")
    requirements = [Requirement(text) for text in about.get_all("Requires-Dist") or ()]
    ray = next(each.specifier for each in requirements if each.name == "ray" and each.marker is None)
    return {"python": SpecifierSet(about["Requires-Python"]), "ray": ray}


def _extra(name: str) -> SpecifierSet:
    requirements = [Requirement(text) for text in metadata.requires("kvpool") or ()]
    return next(each.specifier for each in requirements if each.name == name)


def _within(version: str | None, versions: SpecifierSet) -> bool:
    return version is not None and versions.contains(version, prereleases=True)


def _text(versions: dict[str, str | None], *names: str) -> str:
    return ", ".join(f"{name} {versions.get(name) or 'not installed'}" for name in names)


def _limit(limit: int) -> str:
    return "none" if limit < 0 else f"{limit:,}"
