"""Copies of what is worth least, made in the tiers below ahead of need.

Above the threshold, what would go next is copied down in small steps while nobody waits for it; it stays where it is,
and can be hit there, until its room is needed. Its eviction is mere bookkeeping then. (Freeing it early would cost hits
and gain nothing: without the copy, evicting takes no longer than entering it into the books.)
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from functools import partial

from kvpool.cache.index import CacheIndex
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

_ROWS_A_SECOND = 10_000
"""How many of the next to go are looked at where nothing is known to be new among them: a hundredth of a core."""

_NEW_SHARE = 8
"""With an eighth of the next to go being new, they are looked at however lately they were."""


@dataclass(slots=True)
class _Progress:
    """Of one device."""

    copied: set[int] = field(default_factory=set)
    """Ids of what is copied, or could not be."""
    listed: deque[int] = field(default_factory=deque)
    """Ids of what is to be copied, the next to go first."""
    due: float = float("-inf")
    """When it is looked at again; infinity while a step is under way."""
    list_due: float = float("-inf")
    """When the next to go are listed again, unless many of them are new."""
    rows: int = 0
    """How many there were of them when they were listed,"""
    wanted_bytes: float = 0.0
    """how many bytes were to be copied then,"""
    evictions: int = 0
    """and how much had been evicted before."""


class CopiesAhead:
    """Copies down what is next to go, so that room is made without waiting for bytes.

    The policy lists what is next to go from the front, through all that is copied already. So a list goes on until half
    of it is new (or nothing is left), and the next is made when it is used up, and not before an eighth of it can be
    new, or some time has passed: each cache is passed a bounded number of times for each that is new.

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
        self._progress: dict[int, _Progress] = {}

    def follow_up(self, now: float) -> None:
        """Begin a step where one is due. For the end of each event."""
        for device in self._ledger.devices:
            if device.has_lower and device.lost is None:
                progress = self._progress.setdefault(device.number, _Progress())
                if now >= progress.due:
                    self._step(device, progress, now)

    def _step(self, device: Device, progress: _Progress, now: float) -> None:
        ledger = self._ledger
        progress.due = now + _PAUSE_S
        used_bytes = device.capacity_bytes - ledger.free_bytes(device)
        if used_bytes <= self._threshold * device.capacity_bytes:
            return
        wanted_bytes = used_bytes - max(self._threshold - LOW, 0.0) * device.capacity_bytes
        step = self._take(progress, device.number)
        if not step and self._may_list(device, progress, wanted_bytes, now):
            self._list(device, progress, wanted_bytes, now)
            step = self._take(progress, device.number)
        if not step:
            return
        progress.due = float("inf")
        for space, entries in step.items():
            model = ledger.model_in(space)
            operation = ("copy", model.tenant, model.fingerprint, entries)
            ledger.send(device.number, operation, partial(self._done, progress, [i for i, _, _ in entries]))

    def _may_list(self, device: Device, progress: _Progress, wanted_bytes: float, now: float) -> bool:
        if now >= progress.list_due or not progress.rows:
            return True
        # What is evicted makes way for others among the next to go, and so does what is used beyond that.
        grown = (wanted_bytes - progress.wanted_bytes) * progress.rows / progress.wanted_bytes
        return (device.evictions - progress.evictions + grown) * _NEW_SHARE >= progress.rows

    def _list(self, device: Device, progress: _Progress, wanted_bytes: float, now: float) -> None:
        index, copied = self._ledger.index, progress.copied
        progress.wanted_bytes, progress.evictions = wanted_bytes, device.evictions
        seen: set[int] = set()
        progress.rows = 0
        for row in index.victims(device.number):
            progress.rows += 1
            cache_id = index.id_of(row)
            wanted_bytes -= index.size_bytes[row]
            if cache_id in copied:
                seen.add(cache_id)
            elif _can_be_copied(index, row):
                progress.listed.append(cache_id)
            if wanted_bytes <= 0:
                break
            if len(progress.listed) >= max(STEP_CACHES, len(seen)):
                progress.list_due = now  # there may be more
                return
        progress.copied = seen  # what is not among the next to go may change its place again unknown
        progress.list_due = now + progress.rows / _ROWS_A_SECOND

    def _take(self, progress: _Progress, number: int) -> dict[int, list[tuple[int, BlockHash, BlockHash | None]]]:
        """Take one step's caches from what is listed, by space; leaves out what was taken or has gone since."""
        index = self._ledger.index
        step: dict[int, list[tuple[int, BlockHash, BlockHash | None]]] = {}
        step_bytes = count = 0
        while progress.listed and step_bytes < STEP_BYTES and count < STEP_CACHES:
            cache_id = progress.listed.popleft()
            row = index.live_row(cache_id)
            if row < 0 or index.pins[row] or index.device[row] != number or not _can_be_copied(index, row):
                continue
            key = index.key_of(row)
            if key is not None:
                step.setdefault(index.space_of(row), []).append((cache_id, key, index.parent_key_of(row)))
                step_bytes += index.size_bytes[row]
                count += 1
        return step

    def _done(self, progress: _Progress, ids: list[int], answer: Answer, now: float) -> None:
        progress.copied.update(ids)
        progress.due = now


def _can_be_copied(index: CacheIndex, row: int) -> bool:
    return index.key_of(row) is not None and not index.is_void(row)
