"""Each check on facts in which its fault is made, and on facts without it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from kvpool.actors.protocol import PROTOCOL_VERSION
from kvpool.cli import main
from kvpool.config import load_config
from kvpool.doctor import checks
from kvpool.doctor.examination import check_cluster, check_pool, check_working, examine
from kvpool.doctor.facts import Facts, Token
from kvpool.doctor.finding import FAILED, OK, WARNING, Finding
from kvpool.doctor.plan import Plan, plan_host
from kvpool.doctor.survey import Pool, Survey
from kvpool.memory.backend import MemoryInfo
from kvpool.memory.cuda import Driver
from kvpool.memory.limits import DescriptorLimits, MappingLimits
from kvpool.sizes import GIB, MIB
from kvpool.version import __version__

HEALTHY = Facts(
    host="h",
    versions={"kvpool": __version__, "python": "3.11.7", "ray": "2.60.0", "torch": "2.13.0"},
    descriptors=DescriptorLimits(20, 1024, 65536),
    mappings=MappingLimits(300, 65530),
    memory=MemoryInfo(20 * GIB, 24 * GIB),
    shm=MemoryInfo(12 * GIB, 12 * GIB),
    driver=Driver(error="libcuda.so.1: cannot open shared object file"),
    nvidia_present=False,
    page_error=None,
    peer_error=None,
    niceness=0,
    huge_pages="within_size",
)
LOGS = {"a": "/t/s/logs", "b": "/r/s/logs", "d": "/t/s/logs"}
TWO_OF_A_GIB = plan_host(load_config(devices="host:2x1GiB"), 4096)


def host(facts: Facts, plan: Plan = TWO_OF_A_GIB) -> dict[str, Finding]:
    findings = [*checks.check_host(facts, plan, "here"), checks.check_shm(facts, "here")]
    return {finding.check: finding for finding in findings}


def test_nothing_is_wrong_with_a_healthy_host() -> None:
    assert {finding.result for finding in host(HEALTHY).values()} == {OK}
    assert not any(finding.mend for finding in host(HEALTHY).values())


@pytest.mark.parametrize(
    ("check", "fault", "result", "found", "mend"),
    [
        ("nofile", {"descriptors": DescriptorLimits(20, 500, 700)}, FAILED, "limit 700", "ulimit -n 788"),
        ("nofile", {"descriptors": DescriptorLimits(20, 500, 788)}, OK, "limit 788", ""),
        ("nofile", {"descriptors": DescriptorLimits(20, -1, -1)}, OK, "limit none", ""),
        # Two devices of 512 pages in two views, with the gap behind each.
        ("max_map_count", {"mappings": MappingLimits(300, 6443)}, FAILED, "6,443", "vm.max_map_count=6444"),
        ("max_map_count", {"mappings": MappingLimits(300, 6444)}, OK, "6,444", ""),
        ("memory", {"memory": MemoryInfo(2 * GIB - 1, 24 * GIB)}, FAILED, "of 24 GiB", "memory.max"),
        ("memory", {"memory": MemoryInfo(2 * GIB, 24 * GIB)}, OK, "2 GiB free", ""),
        ("niceness", {"niceness": 15}, WARNING, "run at 15", "RAY_worker_niceness=0"),
        ("niceness", {"niceness": -5}, OK, "run at -5", ""),
        ("huge_pages", {"huge_pages": "never"}, OK, "never: each page is made of 4 KiB", ""),
        ("huge_pages", {"huge_pages": None}, OK, "none: each page is made of 4 KiB", ""),
        ("shm", {"shm": MemoryInfo(64 * MIB, 64 * MIB)}, FAILED, "64 MiB free", "--shm-size"),
        ("shm", {"shm": MemoryInfo(1 * GIB, 64 * GIB)}, WARNING, "1 GiB free", "--object-store-memory"),
        ("shm", {"shm": None}, FAILED, "no /dev/shm", "emptyDir"),
        ("versions", {"versions": HEALTHY.versions | {"ray": "2.61.0"}}, FAILED, "ray 2.61.0", "pip install"),
        ("versions", {"versions": HEALTHY.versions | {"ray": "2.9.3"}}, FAILED, "ray 2.9.3", "pip install"),
        ("versions", {"versions": HEALTHY.versions | {"ray": None}}, FAILED, "ray not installed", "pip install"),
        ("versions", {"versions": HEALTHY.versions | {"python": "3.10.14"}}, FAILED, "python 3.10.14", "Python"),
        ("torch", {"versions": HEALTHY.versions | {"torch": None}}, WARNING, "not installed", "pip install"),
        ("torch", {"versions": HEALTHY.versions | {"torch": "2.3.1"}}, WARNING, "torch 2.3.1", "`pip install 'torch"),
        ("torch", {"versions": HEALTHY.versions | {"torch": "2.13.0+cu128"}}, OK, "2.13.0+cu128", ""),
        ("sockets", {"socket_errors": ["cannot listen there"]}, FAILED, "cannot listen", "KVPOOL_SOCKET_DIR"),
        ("sockets", {"left_behind": ["/run/kvpool/0.sock"]}, WARNING, "1 sockets", "`rm /run/kvpool/0.sock`"),
        ("sockets", {"left_behind": ["/run/a b/0.sock"]}, WARNING, "1 sockets", "`rm '/run/a b/0.sock'`"),
        ("pages", {"page_error": "refused memfd_create"}, FAILED, "memfd_create", "seccomp"),
        ("peer", {"peer_error": "cannot watch process 0"}, FAILED, "process 0", "pidfd_open"),
        ("driver", {"nvidia_present": True}, FAILED, "cannot open shared object", "--gpus all"),
        ("driver", {"driver": Driver("12.4", error="cuInit: (error 803)")}, FAILED, "error 803", "nvidia-smi"),
        ("driver", {"driver": Driver("12.4", 2, unmappable=(1,))}, FAILED, "GPUs 1 lack", "CUDA_VISIBLE_DEVICES"),
        ("driver", {"driver": Driver("12.4", 2, unshareable=(0, 1))}, FAILED, "GPUs 0, 1 lack", "update the driver"),
        ("driver", {"driver": Driver("12.4", 2)}, OK, "CUDA 12.4, 2 GPUs", ""),
        ("driver", {"driver": Driver("12.4", 0)}, OK, "no GPU visible: host memory is used", ""),
        ("driver", {}, OK, "no GPU: host memory is used", ""),
    ],
)
def test_a_fault_fails_its_check_and_no_other(
    check: str, fault: dict[str, Any], result: str, found: str, mend: str
) -> None:
    findings = host(replace(HEALTHY, **fault))
    finding = findings.pop(check)
    assert finding.result == result
    assert found in finding.found
    assert mend in finding.mend
    assert bool(finding.mend) == (result != OK)
    assert {other.result for other in findings.values()} == {OK}


def test_what_ray_has_taken_of_shm_is_no_loss() -> None:
    used = replace(HEALTHY, shm=MemoryInfo(1 * MIB, 12 * GIB))
    assert (checks.check_shm(used, "here").result, checks.check_shm_of_ray(used, "node").result) == (FAILED, OK)


def test_a_pool_that_runs_needs_nothing_more_but_room_for_a_client() -> None:
    running = TWO_OF_A_GIB.for_client()
    full = replace(
        HEALTHY,
        memory=MemoryInfo(0, 24 * GIB),
        descriptors=DescriptorLimits(20, 300, 300),
        socket_errors=["another server listens"],
    )
    assert {finding.result for finding in host(full, running).values()} == {OK}
    assert host(replace(full, mappings=MappingLimits(300, 4000)), running)["max_map_count"].result == FAILED


def test_the_host_that_gets_most_of_the_devices_is_what_counts() -> None:
    config = load_config(devices="host:5x64MiB")
    assert [len(plan_host(config, 4096, hosts=hosts).devices) for hosts in (1, 2, 3, 5, 9)] == [5, 3, 2, 1, 1]


@pytest.mark.parametrize(
    ("token", "result", "found", "mend"),
    [
        (Token(source="/h/.ray/auth_token"), OK, "/h/.ray/auth_token", ""),
        (Token("token", "head:6379", "RAY_AUTH_TOKEN"), OK, "RAY_AUTH_TOKEN", ""),
        (Token(), FAILED, "none", "ray get-auth-token --generate"),
        (Token("token"), FAILED, "none", "ray get-auth-token --generate"),
        (Token(error="/etc/token: no such file"), FAILED, "/etc/token", "unset RAY_AUTH_TOKEN_PATH"),
        (Token("disabled", source="/h/.ray/auth_token"), WARNING, "disabled", "unset RAY_AUTH_MODE"),
        (Token(source="/h/t", open_to_others=True), WARNING, "readable by others", "`chmod 600 /h/t`"),
        (Token(source="/h/a b", open_to_others=True), WARNING, "readable by others", "`chmod 600 '/h/a b'`"),
        (Token(None, "head:6379", "/h/t"), WARNING, "RAY_ADDRESS", "export RAY_AUTH_MODE=token"),
    ],
)
def test_tokens(token: Token, result: str, found: str, mend: str) -> None:
    finding = checks.check_token(token, "here")
    assert finding.result == result
    assert found in finding.found
    assert mend in finding.mend


@pytest.mark.parametrize(("name", "version"), [("kvpool", "0.0.9"), ("python", "3.11.8"), ("ray", "2.60.1")])
def test_a_node_must_have_the_versions_that_are_here(name: str, version: str) -> None:
    there = replace(HEALTHY, versions=HEALTHY.versions | {name: version})
    finding = checks.check_versions(there, "node", HEALTHY.versions)
    assert (finding.result, finding.needed) == (FAILED, f"the same as here: {name} {HEALTHY.versions[name]}")
    assert f"install the same {name}" in finding.mend
    assert checks.check_versions(HEALTHY, "node", HEALTHY.versions).result == OK


@pytest.mark.parametrize(
    ("survey", "result", "mend"),
    [
        (Survey(absent=True), OK, ""),
        (Survey(nodes={"n": HEALTHY}, hosts=frozenset("n")), OK, ""),
        (Survey(error="the cluster did not answer within 90 s"), FAILED, "RAY_ADDRESS"),
        (Survey(error="RuntimeError: Version mismatch: the cluster runs 3.10"), FAILED, "Python and Ray"),
        (Survey(error="AuthenticationError: no token was found"), FAILED, "RAY_AUTH_MODE=token"),
    ],
)
def test_clusters(survey: Survey, result: str, mend: str) -> None:
    finding = check_cluster(survey)
    assert finding.result == result
    assert mend in finding.mend


DESCRIBED = {"protocol": PROTOCOL_VERSION, "version": __version__, "config": {}, "devices": []}
LOST = {"name": "host-0", "lost": "killed", "lower": None}


@pytest.mark.parametrize(
    ("pool", "result", "mend"),
    [
        (Pool("p", DESCRIBED), OK, ""),
        (Pool("p", error="the pool did not answer"), FAILED, "kvpool stop --name p"),
        (Pool("p", DESCRIBED | {"protocol": 0}), FAILED, "`kvpool stop --name p --drain 60`, then `kvpool start"),
        (Pool("p", DESCRIBED | {"version": "0.0.1"}), WARNING, "kvpool stop --name p --drain 60"),
        (Pool("p", DESCRIBED, unreachable=["host-0: no such file"]), FAILED, "share the socket folder"),
        (
            Pool("p", DESCRIBED, unreachable=["host-0: refused"], statistics={"devices": [LOST]}),
            FAILED,
            "`kvpool stop --name p` and start it again",
        ),
    ],
)
def test_pools(pool: Pool, result: str, mend: str) -> None:
    finding = check_pool(pool)
    assert finding.result == result
    assert mend in finding.mend


def working(policy_failure: str | None = None, quotas: tuple[dict[str, Any], ...] = (), **lower: Any) -> Pool:
    device = {"name": "host-0", "lost": None, "lower": {"disk": None, "disk_problem": None, "host": None} | lower}
    statistics = {"policy": "lru", "policy_failure": policy_failure, "devices": [device], "quotas": quotas}
    return Pool("p", DESCRIBED, statistics=statistics)


@pytest.mark.parametrize(
    ("pool", "findings"),
    [
        (Pool("p", error="the pool did not answer"), []),
        (working(), []),
        (working(disk={"errors": {}}), [("disk tier", OK, "")]),
        (working(disk={"errors": {"ENOSPC": 2}}), [("disk tier", WARNING, "ENOSPC: its file system is full")]),
        (
            working(disk={"errors": {"EACCES": 1, "ENOSPC": 2}, "url": "file:///d/p/host-0", "lost": False}),
            [("disk tier", WARNING, "`grep -rhs '--include=worker-*.err' 'disk tier file:///d/p/host-0' /r/s/logs`")],
        ),
        (
            working(disk={"errors": {"ESTALE": 196}, "url": "file:///d/p/host-0", "lost": True}, disk_problem="…"),
            [("disk tier", FAILED, "mount its disk again, or put the folder back")],
        ),
        (
            working(disk={"errors": {"ESTALE": 3}, "pending_removals": 80}),
            [("disk tier", WARNING, "mount its disk again"), ("disk tier", WARNING, "invalidate again until")],
        ),
        (working(disk_problem="file:///x: Permission denied"), [("disk tier", FAILED, "name another folder")]),
        (
            working(disk_problem="file:///d/p/host-0 is in use by another process: give …"),
            [("disk tier", FAILED, "DISK_URL/p/DEVICE, so a pool of the same name in another cluster")],
        ),
        (
            working(disk={"errors": {}}, leftover_folders=["/d/p/host-1"]),
            [("disk tier", OK, ""), ("disk tier", WARNING, "delete them, or start the pool with as many devices")],
        ),
        (
            working(disk={"errors": {}}, leftover_removals=2),
            [("disk tier", OK, ""), ("disk tier", WARNING, "invalidate again until")],
        ),
        (working(policy_failure="policy 'own' failed"), [("policy", WARNING, "kvpool set-policy --name p NAME")]),
        (working(quotas=({"warning": None},)), []),
        (
            working(quotas=({"warning": "too much"},)),
            [("quotas", WARNING, "`kvpool quota --name p` shows what there is")],
        ),
    ],
)
def test_what_a_running_pool_does_without(pool: Pool, findings: list[tuple[str, str, str]]) -> None:
    found = check_working(pool, ["/r/s/logs"])
    assert [(finding.check, finding.result) for finding in found] == [each[:2] for each in findings]
    assert all(mend in finding.mend for finding, (_, _, mend) in zip(found, findings, strict=True))


def test_what_quotas_cannot_do_is_found_once() -> None:
    (finding,) = check_working(working(quotas=tuple({"warning": each} for each in ("much", None, "much\nm drains"))))
    assert finding.found == "much; m drains"


def test_of_a_disk_that_failed_the_folder_is_named() -> None:
    disk = {"errors": {"ESTALE": 196, "ENOSPC": 1}, "url": "file:///d/p/host-0", "lost": True}
    (finding,) = check_working(working(disk=disk))
    assert finding.found == (
        "file:///d/p/host-0, since its start: ENOSPC 1 time, ESTALE 196 times; the folder is not there now"
    )


def test_where_the_logs_are_not_known_no_command_is_told_that_finds_nothing() -> None:
    (finding,) = check_working(working(disk={"errors": {"EACCES": 1}, "url": "file:///d/p/host-0", "lost": False}))
    assert "could not be located: lines with 'disk tier file:///d/p/host-0'" in finding.mend
    assert "grep" not in finding.mend


def test_of_nodes_with_other_folders_of_logs_all_are_searched() -> None:
    disk = {"errors": {"EACCES": 1}, "url": "file:///d/p/host-0", "lost": False}
    nodes: dict[str, Facts | str] = {name: replace(HEALTHY, ray_logs=logs) for name, logs in LOGS.items()}
    found = Survey(nodes=nodes | {"c": "no answer"}, pools=[working(disk=disk)])
    (finding,) = (each for each in examine(load_config(), lambda _: found) if each.check == "disk tier")
    assert finding.mend.endswith("'disk tier file:///d/p/host-0' /r/s/logs /t/s/logs`")


def test_sockets_are_planned_where_devices_will_listen() -> None:
    given = plan_host(load_config(devices="host:2x64MiB", socket_dir="/run/kvpool"), 4096)
    assert given.sockets == (Path("/run/kvpool/0.sock"), Path("/run/kvpool/1.sock"))


def test_with_a_file_the_command_prints_no_table(tmp_path: Path) -> None:
    written = tmp_path / "rows.json"
    result = CliRunner().invoke(main, ["doctor", "--here", "--json", str(written)])
    assert (result.exit_code in (0, 1), result.stdout) == (True, "")
    assert "versions" in {row["check"] for row in json.loads(written.read_text())["rows"]}


def test_the_last_line_counts_warnings_too(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Finding("a", "here", OK, "x"), *[Finding("b", "here", WARNING, "x", mend="y")] * 2]
    monkeypatch.setattr("kvpool.doctor.examination.examine", lambda *_: found)
    done = CliRunner().invoke(main, ["doctor", "--here"])
    assert done.stdout.splitlines()[-1] == "3 checks, 0 failed, 2 with a warning"
    assert done.exit_code == 0
