"""``deploy/raycluster.yaml`` and ``docs/containers.md`` keep what the page promises."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvpool.config import load_config
from kvpool.memory.limits import MappingLimits, check_mappings
from kvpool.sizes import GIB
from kvpool.version import __version__

PROJECT = Path(__file__).parents[2]
PAGE = (PROJECT / "docs" / "containers.md").read_text(encoding="utf-8")
PINNED = re.search(r"^ray==(.*)$", (PROJECT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.fixture(scope="module")
def spec() -> dict[str, Any]:
    [manifest] = yaml.safe_load_all((PROJECT / "deploy" / "raycluster.yaml").read_text(encoding="utf-8"))
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayCluster")
    return manifest["spec"]


@pytest.fixture(scope="module")
def head(spec: dict[str, Any]) -> dict[str, Any]:
    return spec["headGroupSpec"]["template"]["spec"]


@pytest.fixture(scope="module")
def worker(spec: dict[str, Any]) -> dict[str, Any]:
    [group] = spec["workerGroupSpecs"]
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    return group["template"]["spec"]


def mounted(pod: dict[str, Any], container: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the volumes of a container by where they are mounted."""
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    return {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}


def test_the_head_does_no_work_and_one_token_is_for_all(spec: dict[str, Any], head: dict[str, Any]) -> None:
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0", "num-gpus": "0"}  # KubeRay takes text only
    assert PINNED is not None
    assert spec["rayVersion"] == PINNED[1]
    assert "nvidia.com/gpu" not in head["containers"][0]["resources"]["requests"]


def test_worker_pods_of_one_machine_share_what_they_must(worker: dict[str, Any]) -> None:
    [container], [prepare] = worker["containers"], worker["initContainers"]
    assert worker["hostPID"] is True
    environment = {item["name"]: item["value"] for item in container["env"]}
    folder = Path(environment["KVPOOL_SOCKET_DIR"])
    assert load_config(socket_dir=folder).socket_path(1023, 0) == folder / "1023.sock"
    [shared] = [where for where in mounted(worker, container) if Path(where) in folder.parents]
    for each in (container, prepare):
        assert mounted(worker, each)[shared]["hostPath"]["path"] == shared
    user = container["securityContext"]
    command = prepare["args"][0]
    assert f"chown {user['runAsUser']}:{user['runAsGroup']} {shared}" in command
    assert f"chmod 0700 {shared}" in command


def test_a_pool_can_be_started_from_the_head_for_the_workers(head: dict[str, Any], worker: dict[str, Any]) -> None:
    there, here = ({item["name"]: item for item in pod["containers"][0]["env"]} for pod in (head, worker))
    assert there["KVPOOL_SOCKET_DIR"] == here["KVPOOL_SOCKET_DIR"]
    assert there["KVPOOL_HOST"]["valueFrom"] == {"fieldRef": {"fieldPath": "metadata.name"}}


def test_limits(head: dict[str, Any], worker: dict[str, Any]) -> None:
    config = load_config()
    pages = max(-(-size // config.page_size_bytes(size, 4096)) for size in (1 * GIB, 17 * GIB, 141 * GIB, 192 * GIB))
    limit = re.search(r"sysctl -w vm.max_map_count=(\d+)", worker["initContainers"][0]["args"][0])
    assert limit is not None
    check_mappings(2 * 8 * pages, MappingLimits(5000, int(limit[1])))
    assert worker["initContainers"][0]["securityContext"]["privileged"] is True
    for pod in (head, worker):
        [container] = pod["containers"]
        resources = container["resources"]
        assert resources["requests"]["memory"] == resources["limits"]["memory"]
        shm = mounted(pod, container)["/dev/shm"]["emptyDir"]
        assert shm["medium"] == "Memory"
        share = int(shm["sizeLimit"].removesuffix("Gi")) / int(resources["limits"]["memory"].removesuffix("Gi"))
        assert 0.3 <= share < 0.4  # what Ray's object store takes by default


def test_the_page_and_the_manifest_say_what_was_not_run() -> None:
    assert "Docker and Kubernetes themselves have not been run" in " ".join(PAGE.split())
    assert "It has not been run." in " ".join(PAGE.split())
    assert "has not been run" in (PROJECT / "deploy" / "raycluster.yaml").read_text(encoding="utf-8")


def test_versions_on_the_page(worker: dict[str, Any]) -> None:
    [dockerfile] = re.findall(r"^```dockerfile\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert PINNED is not None
    assert f"FROM rayproject/ray:{PINNED[1]}-py311-gpu" in dockerfile
    assert "-c /home/ray/kvpool/constraints.txt" in dockerfile
    assert worker["containers"][0]["image"].endswith(f"/kvpool:{__version__}")


def test_commands_on_the_pages_exist() -> None:
    from kvpool.cli import main

    for page in ("containers.md", "upgrade.md"):
        text = (PROJECT / "docs" / page).read_text(encoding="utf-8")
        for command in re.findall(r"\bkvpool (doctor|start|stop|status|[a-z]+ --[a-z])", text):
            assert command.split()[0] in main.list_commands(None)
