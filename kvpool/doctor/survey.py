"""What the cluster says: its nodes' facts and its pools. Asked in a process of its own, which may be given up.

Ray ends the whole process for some faults (an unreadable token file), and waits for minutes on others.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kvpool.actors.protocol import PROTOCOL_VERSION, host_identity
from kvpool.doctor.facts import Facts, gather, greet
from kvpool.errors import KvpoolError, PoolNotFoundError

_SURVEY_S = 90.0
_NODE_S = 40.0
_POOL_S = 15.0


@dataclass(frozen=True, slots=True)
class Pool:
    """A pool that runs: what it says of itself, or why it says nothing, and its sockets that are out of reach.

    ``statistics``: see :meth:`kvpool.PoolStatistics.to_dict`; empty where it speaks another protocol, or does not tell.
    """

    name: str
    described: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    unreachable: list[str] = field(default_factory=list)
    statistics: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Survey:
    """A cluster. ``nodes`` holds each node's facts by its name, or the text of what went wrong there; ``hosts`` names
    those that get devices.

    ``absent``: there is none. ``error``: there is one, or is said to be, and it cannot be asked.
    """

    absent: bool = False
    error: str | None = None
    nodes: dict[str, Facts | str] = field(default_factory=dict)
    hosts: frozenset[str] = frozenset()
    pools: list[Pool] = field(default_factory=list)


def survey(sockets: list[Path]) -> Survey:
    """Ask the cluster that ``ray.init`` finds; never raises for what is wrong with it. Takes 90 s at most.

    Parameters
    ----------
    sockets
        Where devices would listen on each node.
    """
    with tempfile.TemporaryDirectory(prefix="kvpool-doctor-") as folder:
        answer = Path(folder) / "survey"
        # In another process group: an interrupt from the terminal ends it through us, and not in the middle of Ray.
        child = subprocess.Popen(
            [sys.executable, "-m", "kvpool.doctor.survey", str(answer), *map(str, sockets)],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace",
        )  # fmt: skip
        try:
            _, printed = child.communicate(timeout=_SURVEY_S)
        except subprocess.TimeoutExpired:
            return Survey(error=f"the cluster did not answer within {_SURVEY_S:g} s")
        finally:
            child.kill()
            child.communicate()
        if not answer.exists():
            last = next((line for line in reversed(printed.splitlines()) if line.strip()), "it printed nothing")
            return Survey(error=f"Ray ended the process that asked: {last.strip()}")
        found: Survey = pickle.loads(answer.read_bytes())
        if found.error is not None and "InvalidAuthToken" in printed:  # which Ray tells its log alone
            return replace(found, error=f"{found.error}: the authentication token is missing or not the cluster's")
        return found


async def _survey(sockets: list[Path]) -> Survey:
    from kvpool.actors.cluster import ensure_ray, knock, node_addresses, node_ids, pool_names

    named = os.environ.get("RAY_ADDRESS", "auto")
    try:
        knock(named)
        ensure_ray()
    except PoolNotFoundError as error:
        absent = "Could not find any running Ray instance" in str(error.__cause__)
        return Survey(absent=True) if absent else Survey(error=str(error.__cause__))
    except OSError as error:
        return Survey(error=f"nobody answers at RAY_ADDRESS={named}: {error}")
    except Exception as error:  # noqa: BLE001 - whatever Ray refuses a client with is the finding
        return Survey(error=" ".join(f"{type(error).__name__}: {error}".split()))
    addresses = node_addresses()
    facts = await asyncio.gather(*(_ask_node(node, sockets) for node in addresses))
    names = {node: f"node {address} ({node[:8]})" for node, address in addresses.items()}
    hosts = frozenset(names[node] for node in node_ids() if node in names)
    pools = await asyncio.gather(*(_ask_pool(name) for name in pool_names()))
    return Survey(nodes=dict(zip(names.values(), facts, strict=True)), hosts=hosts, pools=list(pools))


def _gather_in_cluster(sockets: list[Path]) -> Facts:
    from kvpool.actors.cluster import log_folder

    return replace(gather(sockets), ray_logs=log_folder())


async def _ask_node(node: str, sockets: list[Path]) -> Facts | str:
    from kvpool.actors.cluster import run_on

    try:
        facts: Facts = await run_on(node, _gather_in_cluster, sockets, timeout_s=_NODE_S)
    except TimeoutError:
        return f"no answer within {_NODE_S:g} s"
    except Exception as error:  # noqa: BLE001 - whatever fails there is the finding
        cause = getattr(error, "cause", None) or error
        lines = str(cause).strip().splitlines()
        return lines[-1].strip() if lines else type(cause).__name__
    return facts


async def _ask_pool(name: str) -> Pool:
    from kvpool.actors.cluster import call, find_actor

    statistics: dict[str, Any] = {}
    try:
        described = await call(find_actor(name).describe, timeout_s=_POOL_S)
        if described.get("protocol") == PROTOCOL_VERSION:
            statistics = await call(find_actor(name).statistics, timeout_s=_POOL_S)
    except KvpoolError as error:
        return Pool(name, error=str(error))
    unreachable = []
    for device in described.get("devices", ()):
        if device.get("host") == host_identity():
            try:
                await asyncio.to_thread(greet, Path(device["socket_path"]))
            except (KvpoolError, OSError) as error:
                unreachable.append(f"{device['name']} at {device['socket_path']}: {error}")
    return Pool(name, described, unreachable=unreachable, statistics=statistics)


def main(answer: str, *sockets: str) -> None:
    """Ask, and write the pickled :class:`Survey` to the file ``answer``."""
    from kvpool.doctor import survey as module  # by its name, which the reader knows, and not as __main__

    found = asyncio.run(module._survey([Path(each) for each in sockets]))
    Path(answer).write_bytes(pickle.dumps(found))
    # Ray's own end may wait for a cluster that is gone.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
