"""Pools of other versions: recognized, and what to do about them.

Ray keeps running the code that an actor was started with, so a pool goes on as it was while newer versions are
installed around it. What must mean the same in every version, because it is used before versions are compared or to
end a pool of another one:

- ``describe()`` answers a dict with ``protocol`` (int), ``config`` (dict) and (the first version did not) ``version``;
- ``leases()`` tells who holds how much, in one of the forms that :func:`leased_bytes` knows;
- ``delete(drain_s)`` refuses new leases, waits for those there are, and ends the pool.
"""

from __future__ import annotations

import json
import shlex
from typing import Any

from kvpool.actors.protocol import PROTOCOL_VERSION
from kvpool.config import PoolConfig
from kvpool.errors import ProtocolError
from kvpool.version import __version__

_DRAIN_S = 60


def check_protocol(name: str, described: dict[str, Any]) -> None:
    """Refuse a pool that speaks another protocol, by the error of :func:`protocol_difference`."""
    difference = protocol_difference(name, described)
    if difference is not None:
        raise difference


def protocol_difference(name: str, described: dict[str, Any]) -> ProtocolError | None:
    """Return None if this process can use the pool that ``describe()`` described.

    Else an error that says which versions meet; ``details["commands"]`` are those by which the pool is drained and
    started again.
    """
    if described.get("protocol") == PROTOCOL_VERSION:
        return None
    stop, start = restart_commands(name, described.get("config", {}))
    running = version_of(described)
    return ProtocolError(
        f"pool {name!r} runs kvpool {running} with protocol {described.get('protocol')}, this process kvpool "
        f"{__version__} with protocol {PROTOCOL_VERSION}: drain the pool and start it again with this version, by "
        f"'{stop}' (any version will do; no new leases are given, those there are have {_DRAIN_S} s to end), then "
        f"'{start}'. What is cached in it is lost. Or install the pool's version here",
        pool=described.get("protocol"),
        client=PROTOCOL_VERSION,
        pool_version=running,
        client_version=__version__,
        commands=[stop, start],
    )


def version_of(described: dict[str, Any]) -> str:
    """Return the version of kvpool that a pool runs."""
    return str(described.get("version", "of a version that does not tell its number"))


def leased_bytes(leases: Any) -> dict[str, int]:
    """Return the bytes that each client holds, from what a pool's ``leases()`` answered.

    Protocol 1 told just these; later ones tell of each client in a dict with ``client`` and ``bytes`` among its fields.
    """
    if isinstance(leases, dict):
        return leases
    return {each["client"]: each["bytes"] for each in leases}


def restart_commands(name: str, config: dict[str, Any]) -> tuple[str, str]:
    """Return the commands that drain a pool, and that start it again with those of its settings that still exist."""
    settings = [
        f"KVPOOL_{key.upper()}={shlex.quote(_as_variable(config[key]))}"
        for key, field in PoolConfig.model_fields.items()
        if key != "name" and config.get(key) is not None and config[key] not in (field.default, [])
    ]
    start = " ".join([*settings, f"kvpool start --name {name}"])
    return f"kvpool stop --name {name} --drain {_DRAIN_S}", start


def _as_variable(value: Any) -> str:
    return json.dumps(value) if isinstance(value, list) else str(value)
