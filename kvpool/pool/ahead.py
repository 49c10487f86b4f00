"""Copies of what is worth least, made in the tiers below ahead of need.

Above the threshold, what would go next is copied down in small steps while nobody waits for it; it stays where it is,
and can be hit there, until its room is needed. Its eviction is mere bookkeeping then. (Freeing it early would cost hits
and gain nothing: without the copy, evicting takes no longer than entering it into the books.)
"""

from __future__ import annotations

from functools import partial

from kvpool.cache.key import BlockHash
from kvpool.pool.device import Device
from kvpool.pool.instructions import Answer
from kvpool.pool.ledger import Ledger
from kvpool.sizes import MIB

STEP_BYTES = 8 * MIB
"""Bytes of one step, for which a device's operations behind it wait."""

STEP_CACHES = 128

LOW = 0.1
"""How far below the threshold the low watermark lies, as a share of the device."""

_PAUSE_S = 0.25
"""How long a device of which nothing was left to copy is left alone, seconds."""


class CopiesAhead:
    """Copies down what is next to go, so that room is made without waiting for bytes.

    Parameters
    ----------
    ledger
        The pool's books.
    threshold
        Share of a device in use from which on it begins.
    """

    def __init__(self, ledger: Ledger, threshold: float) -> None:
        self._ledger = ledger
        self._threshold = threshold
        self._copied: dict[int, set[int]] = {}
        """By device, ids of what is copied, or could not be."""
        self._due: dict[int, float] = {}
        """By device, when it is looked at again; infinity while a step is under way."""

    def follow_up(self, now: float) -> None:
        """Begin a step where one is due. For the end of each event."""
        for device in self._ledger.devices:
            if device.has_lower and device.lost is None and now >= self._due.get(device.number, now):
                self._step(device, now)

    def _step(self, device: Device, now: float) -> None:
        ledger = self._ledger
        index, number = ledger.index, device.number
        used_bytes = device.capacity_bytes - ledger.free_bytes(device)
        self._due[number] = now + _PAUSE_S
        if used_bytes <= self._threshold * device.capacity_bytes:
            return
        copied = self._copied.setdefault(number, set())
        wanted_bytes = used_bytes - max(self._threshold - LOW, 0.0) * device.capacity_bytes
        seen: set[int] = set()
        step: dict[int, list[tuple[int, BlockHash, BlockHash | None]]] = {}
        step_bytes = count = 0
        for row in ledger.index.victims(number):
            cache_id, key = index.id_of(row), index.key_of(row)
            wanted_bytes -= index.size_bytes[row]
            if cache_id in copied:
                seen.add(cache_id)
            elif key is not None and not index.is_void(row):
                step.setdefault(index.space_of(row), []).append((cache_id, key, index.parent_key_of(row)))
                step_bytes += index.size_bytes[row]
                count += 1
            if wanted_bytes <= 0 or step_bytes >= STEP_BYTES or count >= STEP_CACHES:
                break
        if not step:
            self._copied[number] = seen  # what is not among the next to go may change its place again unknown
            return
        self._due[number] = float("inf")
        for space, entries in step.items():
            model = ledger.model_in(space)
            operation = ("copy", model.tenant, model.fingerprint, entries)
            ledger.send(number, operation, partial(self._done, number, [i for i, _, _ in entries]))

    def _done(self, number: int, ids: list[int], answer: Answer, now: float) -> None:
        self._copied[number].update(ids)
        self._due[number] = now
