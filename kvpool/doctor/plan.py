"""What a pool will ask of each host."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kvpool.config import DevicePlan, PoolConfig


@dataclass(frozen=True, slots=True)
class Plan:
    """What one host must bear: the devices that may be started there, and a client that maps all of them.

    ``running`` tells that they run already: then only the client is to come.
    """

    devices: tuple[DevicePlan, ...]
    sockets: tuple[Path, ...]
    running: bool = False

    @property
    def device_pages(self) -> int:
        """Pages of the largest device: what one process is to have open and mapped."""
        return 0 if self.running else max((device.pages for device in self.devices), default=0)

    @property
    def client_pages(self) -> int:
        """Pages that a client maps: those of all devices, in two views."""
        return 2 * sum(device.pages for device in self.devices)


def plan_host(config: PoolConfig, granularity_bytes: int, *, hosts: int = 1, running: bool = False) -> Plan:
    """Return what the host that gets most has to bear, of ``hosts`` over which the devices are spread in turn.

    Raises
    ------
    ConfigError
        If a device is smaller than a page.
    """
    devices = config.device_plans(granularity_bytes)
    here = tuple(devices[::hosts])
    # A private folder bears the time of the start: as many digits as any of these years.
    return Plan(here, tuple(config.socket_path(number, 0x19000000000) for number in range(len(devices))), running)
