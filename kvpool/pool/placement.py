"""Which device a new cache goes to, among those that have room."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from kvpool.errors import UnknownPolicyError


class Placement(Protocol):
    """Chooses a device. Pure but for its own memory of earlier choices."""

    def choose(self, free_bytes: Sequence[int], need_bytes: int) -> int:
        """Return the position of the chosen device, or -1 if none has room.

        Parameters
        ----------
        free_bytes
            Free bytes of each device, in the pool's order; negative for one that may not be chosen.
        need_bytes
            What the new cache takes.
        """
        ...


class RoundRobin:
    """One device after another, passing over full ones."""

    def __init__(self) -> None:
        self._next = 0

    def choose(self, free_bytes: Sequence[int], need_bytes: int) -> int:
        """Return the next device in turn that has room."""
        count = len(free_bytes)
        for step in range(count):
            device = (self._next + step) % count
            if free_bytes[device] >= need_bytes:
                self._next = (device + 1) % count
                return device
        return -1


class LeastLoaded:
    """The device with most free bytes; the first of equals."""

    def choose(self, free_bytes: Sequence[int], need_bytes: int) -> int:
        """Return the device with most free bytes, if it has room."""
        best = max(range(len(free_bytes)), key=free_bytes.__getitem__, default=-1)
        return best if best >= 0 and free_bytes[best] >= need_bytes else -1


PLACEMENTS: dict[str, Callable[[], Placement]] = {"round_robin": RoundRobin, "least_loaded": LeastLoaded}


def make_placement(name: str) -> Placement:
    """Return the placement of that name.

    Raises
    ------
    UnknownPolicyError
        If there is none; names those there are.
    """
    if name not in PLACEMENTS:
        raise UnknownPolicyError(f"no placement named {name!r}; possible: {', '.join(sorted(PLACEMENTS))}", asked=name)
    return PLACEMENTS[name]()
