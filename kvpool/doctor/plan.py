"""What a pool will ask of each host."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from kvpool.config import DevicePlan, PoolConfig


@dataclass(frozen=True, slots=True)
class Plan:
    """What one host must bear: the devices that are to be started there, and a client that maps all of them."""

    devices: tuple[DevicePlan, ...]
    sockets: tuple[Path, ...]
    client_pages: int
    """Pages that a client maps: those of all devices of its host, in two views."""

    @property
    def device_pages(self) -> int:
        """Pages of the largest device: what one process is to have open and mapped."""
        return max((device.pages for device in self.devices), default=0)

    def for_client(self) -> Plan:
        """Return what is still to come where the pool runs: a client."""
        return replace(self, devices=(), sockets=())


def plan_host(config: PoolConfig, granularity_bytes: int, *, hosts: int = 1) -> Plan:
    """Return what the host that gets most has to bear, of ``hosts`` over which the devices are spread in turn.

    Raises
    ------
    ConfigError
        If a device is smaller than a page.
    """
    devices = config.device_plans(granularity_bytes)
    here = tuple(devices[::hosts])
    # A private folder bears the time of the start: as many digits as any of these years.
    sockets = tuple(config.socket_path(number, 0x19000000000) for number in range(len(devices)))
    return Plan(here, sockets, client_pages=2 * sum(device.pages for device in here))
