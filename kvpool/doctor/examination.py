"""All checks together: of this process, of each node of the cluster, and of the pools that run."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvpool.actors.compatibility import protocol_difference, version_of
from kvpool.cache.disk.advice import PENDING_REMOVALS, advice_on
from kvpool.config import PoolConfig
from kvpool.doctor.checks import (
    check_host,
    check_max_map_count,
    check_pages,
    check_shm,
    check_shm_of_ray,
    check_token,
    check_torch,
    check_versions,
)
from kvpool.doctor.facts import Facts, find_token, gather
from kvpool.doctor.finding import FAILED, OK, WARNING, Finding, command
from kvpool.doctor.plan import plan_host
from kvpool.doctor.survey import Pool, Survey, survey
from kvpool.memory.host import HostBackend
from kvpool.sizes import format_count
from kvpool.version import __version__

HERE = "here"


def examine(config: PoolConfig, ask: Callable[[list[Path]], Survey] = survey) -> list[Finding]:
    """Check all that the pool of ``config`` would need, and how the pools that run are.

    Works without a cluster: then this host is checked as the one that all devices run on. In a cluster the limits that
    count are those of its nodes' processes, so they are asked there.

    Parameters
    ----------
    config
        What is to run.
    ask
        Asks the cluster; :func:`no_survey` leaves it alone.

    Raises
    ------
    ConfigError
        If the configuration cannot be used.
    """
    granularity_bytes = HostBackend().granularity()
    sockets = list(plan_host(config, granularity_bytes).sockets)
    token = check_token(find_token(dict(os.environ), Path.home()), HERE)
    facts, found = gather(sockets), ask(sockets)
    plan = plan_host(config, granularity_bytes, hosts=max(len(found.hosts), 1))
    if any(pool.name == config.name and not pool.error for pool in found.pools):
        plan = plan.for_client()
    findings = [token, check_cluster(found)]
    if found.nodes:
        # A client runs here; the devices do not, so their limits are not this process's.
        findings += [check_versions(facts, HERE), check_torch(facts, HERE), check_pages(facts, HERE)]
        findings += [check_max_map_count(facts, plan, HERE)]
    else:
        findings += [*check_host(facts, plan, HERE), check_shm(facts, HERE)]
    for name, there in found.nodes.items():
        if isinstance(there, Facts) and name not in found.hosts:  # a head without work: it may hold the pool actor
            findings.append(check_versions(there, name, facts.versions))
        elif isinstance(there, Facts):
            findings += [*check_host(there, plan, name, facts.versions), check_shm_of_ray(there, name)]
        else:
            mend = f"install kvpool {__version__} on every node, for the Python that runs Ray there"
            findings.append(Finding("node", name, FAILED, there, "a node that runs kvpool", mend))
    logs = sorted({there.ray_logs for there in found.nodes.values() if isinstance(there, Facts) and there.ray_logs})
    return [*findings, *(each for pool in found.pools for each in (check_pool(pool), *check_working(pool, logs)))]


def no_survey(_sockets: list[Path]) -> Survey:
    """Ask no cluster: only this host is examined."""
    return Survey(absent=True)


def check_cluster(found: Survey) -> Finding:
    """Judge whether the cluster can be asked."""
    if found.absent:
        return Finding(
            "cluster", HERE, OK, "none asked: this host is checked alone", "`ray start --head` before `kvpool start`"
        )
    if found.error is None:
        return Finding(
            "cluster", HERE, OK, f"{format_count(len(found.nodes), 'node')}, {format_count(len(found.pools), 'pool')}"
        )
    mend = "check RAY_ADDRESS, and that this network reaches the head; `ray status` must work"
    if "Version mismatch" in found.error:
        mend = "use the Python and Ray that the cluster runs, or install these there"
    elif "uthentication" in found.error or "oken" in found.error:
        mend = "`export RAY_AUTH_MODE=token`, with the cluster's token in ~/.ray/auth_token"
    return Finding("cluster", HERE, FAILED, found.error, "a cluster that answers", mend)


def check_pool(pool: Pool) -> Finding:
    """Judge a pool that runs: its version, whether it answers, and whether its devices live and can be reached here."""
    where = f"pool {pool.name}"
    needed = f"kvpool {__version__}, answering, its sockets within reach"
    if pool.error is not None:
        return Finding(
            "pool",
            where,
            FAILED,
            pool.error,
            needed,
            f"{command('kvpool', 'stop', '--name', pool.name)}, else see Ray's logs",
        )
    other = protocol_difference(pool.name, pool.described)
    found = f"kvpool {version_of(pool.described)}, protocol {pool.described.get('protocol')}"
    if other is not None:
        mend = ", then ".join(f"`{each}`" for each in other.details["commands"])
        return Finding("pool", where, FAILED, found, needed, mend)
    lost = [device["name"] for device in pool.statistics.get("devices", ()) if device["lost"]]
    if lost:
        mend = (
            f"{command('kvpool', 'stop', '--name', pool.name)} and start it again (what is on disk is found again); "
            "Ray's logs say why"
        )
        return Finding("pool", where, FAILED, f"lost: {', '.join(lost)}", needed, mend)
    if pool.unreachable:
        mend = (
            "let this process share the socket folder, the user and (before Linux 6.5) the PID namespace with the "
            "devices: docs/containers.md"
        )
        return Finding("pool", where, FAILED, pool.unreachable[0], needed, mend)
    if pool.described.get("version") != __version__:
        mend = f"{command('kvpool', 'stop', '--name', pool.name, '--drain', 60)} and start it again, when that suits"
        return Finding("pool", where, WARNING, found, needed, mend)
    return Finding("pool", where, OK, found, needed)


def check_working(pool: Pool, logs: Sequence[str] = ()) -> list[Finding]:
    """Judge what a pool that answers does without: a disk tier that cannot be used, a policy that failed, memory.

    ``logs``: the folders in which the nodes keep Ray's logs.
    """
    findings = []
    for device in pool.statistics.get("devices", ()):
        where = f"pool {pool.name}, {device['name']}"
        lower = device["lower"]
        if lower is None or device["lost"]:
            continue
        if lower["disk"] is not None:
            findings.append(_check_disk(where, lower["disk"], logs))
            pending = lower["disk"].get("pending_removals", 0)
            if pending:
                found = f"{format_count(pending, 'removed cache')} hidden, and still on disk"
                findings.append(Finding("disk tier", where, WARNING, found, "removals that are done", PENDING_REMOVALS))
        elif lower["disk_problem"]:
            mend = _mend_disk(pool.name, lower["disk_problem"])
            findings.append(Finding("disk tier", where, FAILED, lower["disk_problem"], "a folder of its own", mend))
        if going := lower.get("leftover_removals", 0):
            found = f"removed content of {format_count(going, 'model')} may still be in folders that are not used"
            findings.append(Finding("disk tier", where, WARNING, found, "removals that are done", PENDING_REMOVALS))
    left = {
        url
        for device in pool.statistics.get("devices", ())
        for url in (device["lower"] or {}).get("leftover_folders", ())
    }
    if left:
        found = f"of devices that it no longer has, outside disk_budget: {', '.join(sorted(left))}"
        mend = "delete them, or start the pool with as many devices as before"
        findings.append(Finding("disk tier", f"pool {pool.name}", WARNING, found, "no such folders", mend))
    failure = pool.statistics.get("policy_failure")
    if failure is not None:
        mend = f"mend it, and {command('kvpool', 'set-policy', '--name', pool.name, 'NAME')}"
        found = f"{pool.statistics['policy']} decides: {failure}"
        findings.append(Finding("policy", f"pool {pool.name}", WARNING, found, "the policy that was asked for", mend))
    warnings = [line for each in pool.statistics.get("quotas", ()) for line in (each.get("warning") or "").splitlines()]
    if warnings:
        shown = command("kvpool", "quota", "--name", pool.name)
        mend = f"guarantee less, or add devices; raise a limit, or end leases ({shown} shows what there is)"
        found = "; ".join(dict.fromkeys(warnings))
        findings.append(Finding("quotas", f"pool {pool.name}", WARNING, found, "quotas that can be met", mend))
    return findings


def _check_disk(where: str, disk: dict[str, Any], logs: Sequence[str]) -> Finding:
    """Judge a disk tier that was started: what failed, now or before, in which folder, and what each cause means."""
    # A pool of an earlier version does not tell where, nor whether it is there.
    url, lost, errors = disk.get("url", ""), disk.get("lost", False), disk["errors"]
    if not errors:
        return Finding("disk tier", where, OK, f"in use: {url}" if url else "in use")
    counts = ", ".join(f"{cause} {format_count(count, 'time')}" for cause, count in sorted(errors.items()))
    found = f"{url or 'its folder'}, since its start: {counts}"
    if lost:
        found += "; the folder is not there now"
    advice = ". ".join(f"{cause}: {advice_on(cause)}" for cause in sorted(errors))
    # Logged by the device's process, the first of each cause.
    tier = f"disk tier {url}".strip()
    log = f"in Ray's logs, which could not be located: lines with {tier!r} in the session's worker-*.err"
    if logs:
        log = command("grep", "-rhs", "--include=worker-*.err", tier, *logs)
    mend = f"{advice}. The first error of each cause, with its file, on the device's node: {log}"
    return Finding("disk tier", where, FAILED if lost else WARNING, found, "no errors", mend)


def _mend_disk(name: str, problem: str) -> str:
    if "in use by another process" in problem:
        return (
            f"its folder is DISK_URL/{name}/DEVICE, so a pool of the same name in another cluster has the same: give "
            "one of them another name or another disk_url"
        )
    return "let Ray's processes read and write there, or name another folder by disk_url, and start the pool again"
