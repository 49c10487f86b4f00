"""Why it is not sure that an invalidation has reached all that it was asked for."""

from __future__ import annotations

from typing import Any

from kvpool.errors import KvpoolError, TierError, from_wire
from kvpool.pool.device import Device
from kvpool.pool.instructions import Answer


class Doubts:
    """What is told instead of figures: all of it, and first what can least be mended while the pool lives."""

    def __init__(self) -> None:
        self._lost: dict[int, Device] = {}
        self._refused: KvpoolError | None = None
        self._unnamed: KvpoolError | None = None

    def note_lost(self, device: Device) -> None:
        """Note that nobody can remove the files of a device that is lost, if it has any: the next start finds them."""
        if device.disk_url is not None:
            self._lost[device.number] = device

    def note_refused(self, answer: Answer) -> None:
        """Note a device's error; the first is told."""
        if self._refused is None:
            self._refused = from_wire(answer[1:])

    def note_unnamed(self, name: str, unnamed: str) -> None:
        """Note that not all that a name may mean is known: other revisions of the model, perhaps."""
        self._unnamed = TierError(
            f"what is known as model {name!r} was invalidated, but {unnamed}. (Named by its number, a model is "
            "invalidated alone, without this error.)",
            cause="unnamed",
        )

    def error(self) -> tuple[Any, ...] | None:
        """Return the error that tells all this, as an answer; None if there is no doubt."""
        found = [each for each in (self._of_lost(), self._refused, self._unnamed) if each is not None]
        if not found:
            return None
        first, *others = found
        messages = [each.message.rstrip(".") for each in found]
        told = type(first)(". Also: ".join(messages), **first.details) if others else first
        return "error", *told.to_wire()

    def _of_lost(self) -> TierError | None:
        if not self._lost:
            return None
        lost = [self._lost[number] for number in sorted(self._lost)]
        names = ", ".join(device.name for device in lost)
        urls = ", ".join(str(device.disk_url) for device in lost)
        are, folders, them = (
            ("is", "its folder", "that folder") if len(lost) == 1 else ("are", "their folders", "those")
        )
        elsewhere = "" if self._refused or self._unnamed else "; everywhere else it is gone"
        return TierError(
            f"{names} {are} lost, and {folders} {urls} may still have what was invalidated{elsewhere}. Delete the pool "
            "and start it again, then invalidate again before anything is looked up; or delete "
            f"{them} before the start",
            cause="device_lost",
            device=names,
        )
