"""``cluster.yaml`` is what Ray's cluster launcher takes, and what kvpool needs."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from kvpool.config import load_config
from kvpool.memory.limits import DescriptorLimits, MappingLimits, check_descriptors, check_mappings
from kvpool.sizes import GIB

PROJECT = Path(__file__).parents[2]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(PROJECT)
    return yaml.safe_load((PROJECT / "cluster.yaml").read_text(encoding="utf-8"))


def prepared(cluster: dict[str, Any]) -> dict[str, Any]:
    """Do with it what `ray up` does before it calls the cloud."""
    config = prepare_config(copy.deepcopy(cluster))
    validate_config(config)
    return config


def test_ray_takes_it(cluster: dict[str, Any]) -> None:
    config = prepared(cluster)
    assert config["available_node_types"]["head"]["max_workers"] == 0


@pytest.mark.parametrize(
    "path",
    [("no_such_key",), ("docker", "no_such_key"), ("available_node_types", "head", "no_such_key"), ("auth", "token")],
    ids=".".join,
)
def test_ray_refuses_a_wrong_key(cluster: dict[str, Any], path: tuple[str, ...]) -> None:
    place = cluster
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = "x"
    with pytest.raises(jsonschema.ValidationError, match=path[-1]):
        prepared(cluster)


def test_ray_refuses_more_workers_than_are_allowed(cluster: dict[str, Any]) -> None:
    cluster["available_node_types"]["gpu_worker"]["min_workers"] = cluster["max_workers"] + 1
    with pytest.raises(ValueError, match="max_workers"):
        prepared(cluster)


def test_machines_of_ones_own_as_the_comment_says(cluster: dict[str, Any], tmp_path: Path) -> None:
    text = (PROJECT / "cluster.yaml").read_text(encoding="utf-8")
    [line] = re.findall(r"^#\s+(provider: \{type: local.*\})$", text, re.MULTILINE)
    del cluster["available_node_types"], cluster["head_node_type"]
    prepared(cluster | yaml.safe_load(line))


def commands(cluster: dict[str, Any], kind: str) -> str:
    return "\n".join(cluster[f"{kind}_start_ray_commands"])


def test_the_head_does_no_work(cluster: dict[str, Any]) -> None:
    assert cluster["available_node_types"]["head"]["resources"] == {"CPU": 0, "GPU": 0}
    assert "--num-cpus=0 --num-gpus=0" in commands(cluster, "head")
    assert "--head" in commands(cluster, "head")
    assert "--num-cpus" not in commands(cluster, "worker")
    assert "--address=$RAY_HEAD_IP:6379" in commands(cluster, "worker")


def test_one_token_for_all_and_no_secret_in_the_file(cluster: dict[str, Any]) -> None:
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    for kind in ("head", "worker"):
        start = commands(cluster, kind)
        assert start.index("export RAY_AUTH_MODE=token") < start.index("ray start")
    text = (PROJECT / "cluster.yaml").read_text(encoding="utf-8")
    assert not re.search(r"\b[0-9a-f]{32,}\b|AKIA[A-Z0-9]{12,}", text)


def test_kvpool_is_installed_from_here_as_it_is_tested(cluster: dict[str, Any]) -> None:
    assert cluster["file_mounts"]["~/kvpool"] == "."
    [install] = cluster["setup_commands"]
    assert "-c $HOME/kvpool/constraints.txt" in install
    assert '"$HOME/kvpool[torch]"' in install
    pinned = re.search(r"^ray==(.*)$", (PROJECT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert pinned is not None
    for image in ("head_image", "worker_image"):
        assert cluster["docker"][image].startswith(f"rayproject/ray:{pinned[1]}-py311")


def test_the_limits_are_enough_for_the_largest_default_devices(cluster: dict[str, Any]) -> None:
    config = load_config()
    sizes = [size * GIB for size in (1, 16, 17, 24, 80, 141, 192, 1000)]
    pages = max(-(-size // config.page_size_bytes(size, 4096)) for size in sizes)
    for kind in ("head", "worker"):
        start = commands(cluster, kind)
        limit = int(re.search(r"ulimit -n (\d+)", start)[1])
        assert start.index("ulimit -n") < start.index("ray start")
        check_descriptors(pages, DescriptorLimits(500, limit, limit))
    [option] = [option for option in cluster["docker"]["run_options"] if "nofile" in option]
    assert int(re.search(r"nofile=(\d+):(\d+)", option)[2]) >= limit
    [mappings] = [int(found) for line in cluster["initialization_commands"] for found in
                  re.findall(r"sudo sysctl -w vm.max_map_count=(\d+)", line)]  # fmt: skip
    check_mappings(2 * 8 * pages, MappingLimits(5000, mappings))  # eight devices, in two views


def test_workers_have_gpus(cluster: dict[str, Any]) -> None:
    workers = [each for name, each in cluster["available_node_types"].items() if name != cluster["head_node_type"]]
    assert all(re.match(r"(g\d|p\d)", each["node_config"]["InstanceType"]) for each in workers)
    assert cluster["docker"]["worker_image"].endswith("-gpu")
