"""What lies in the tiers below the devices, and what goes there.

A device's lower tiers are its own: host memory, then disk. Only the device knows which of them holds what; the pool
knows that it can be brought up there. Its word is a hint in one way only: what it names may have gone (a look-up then
finds less), but what was invalidated is never named.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

from kvpool.cache.chains import with_successors
from kvpool.cache.key import BlockHash
from kvpool.cache.table import KEYED
from kvpool.pool.instructions import Answer
from kvpool.pool.ledger import Ledger
from kvpool.pool.model import Model


class LowerEntry(NamedTuple):
    """Content that its device can bring up."""

    device: int
    size_bytes: int
    parent: BlockHash | None
    stamp: int | None = 0
    """The device's when it answered that this is there; None while it has not."""


class Below:
    """Directory of the content below the devices, by namespace and hash.

    Parameters
    ----------
    ledger
        The pool's books.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._entries: dict[int, dict[BlockHash, LowerEntry]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._entries.values()))

    def find(self, space: int, block_hash: BlockHash) -> LowerEntry | None:
        """Return what is known of content below, or None."""
        entries = self._entries.get(space)
        return entries.get(block_hash) if entries else None

    def add(self, device: int, tenant: str, fingerprint: str, found: Iterable[tuple[BlockHash, Any, int]]) -> None:
        """Enter what a device found again when it started: ``(hash, parent's hash or None, bytes)``."""
        entries = self._entries.setdefault(self._ledger.index.space(tenant, fingerprint), {})
        for block_hash, parent, size_bytes in found:
            entries[block_hash] = LowerEntry(device, size_bytes, parent)

    def lower(self, rows: Sequence[int]) -> None:
        """Let what these rows hold go down, ahead of the operation that frees them. Their keys must still be known."""
        ledger = self._ledger
        index, devices = ledger.index, ledger.devices
        if not any(device.has_lower for device in devices):
            return
        going: dict[tuple[int, int], list[tuple[int, BlockHash, BlockHash | None]]] = {}
        for row in rows:
            device = index.device[row]
            if not devices[device].has_lower or not index.flags[row] & KEYED or index.is_void(row):
                continue
            key, parent = index.key_of(row), index.parent_key_of(row)
            if key is None:
                continue
            space = index.space_of(row)
            going.setdefault((device, space), []).append((index.id_of(row), key, parent))
            self._entries.setdefault(space, {})[key] = LowerEntry(device, index.asked_bytes[row], parent, None)
        for (device, space), entries in going.items():
            model = ledger.model_in(space)
            operation = ("lower", model.tenant, model.fingerprint, entries)
            ledger.counters.blocks_lowered += len(entries)
            entered = [(key, self._entries[space][key]) for _, key, _ in entries]
            ledger.send(device, operation, partial(self._lowered, device, space, entered))

    def _lowered(
        self, device: int, space: int, entered: list[tuple[BlockHash, LowerEntry]], answer: Answer, now: float
    ) -> None:
        lost = isinstance(answer, tuple)
        entries, stamp = self._entries.get(space, {}), self._ledger.devices[device].stamp
        for position, (key, entry) in enumerate(entered):
            if entries.get(key) is not entry:  # forgotten, or it came up meanwhile and went down again
                continue
            if lost or not answer[position]:
                del entries[key]
            else:
                entries[key] = LowerEntry(device, entry.size_bytes, entry.parent, stamp)

    def discard(self, device: int, space: int, block_hash: BlockHash) -> None:
        """Forget content that is not below that device (any more)."""
        entries = self._entries.get(space, {})
        known = entries.get(block_hash)
        if known is not None and known.device == device:
            del entries[block_hash]

    def gone(self, device: int, keys: Iterable[tuple[str, str, BlockHash]], stamp: int) -> None:
        """Enter that a device lost these keys, ``(tenant, fingerprint, hash)``, when its stamp was that.

        Answers overtake this. What was sent down since the key went is there, or is not known to be there yet: it
        stays, as nothing else would ever tell of it. (If it went after it was answered for, a look-up finds less.)
        """
        for tenant, fingerprint, block_hash in keys:
            entries = self._entries.get(self._ledger.index.space(tenant, fingerprint), {})
            known = entries.get(block_hash)
            if known is not None and known.device == device and known.stamp is not None and known.stamp < stamp:
                del entries[block_hash]

    def device_lost(self, number: int) -> None:
        """Forget all that was below a device."""
        for space, entries in self._entries.items():
            self._entries[space] = {key: entry for key, entry in entries.items() if entry.device != number}

    def forget_all(self, model: Model) -> None:
        """Forget all content of a model."""
        self._entries.pop(model.space, None)

    def forget(self, model: Model, keys: Iterable[BlockHash]) -> set[BlockHash]:
        """Forget content under some keys and all that is chained behind it; returns their keys.

        Looks through all that the model has below.
        """
        entries = self._entries.get(model.space, {})
        children: dict[BlockHash, list[BlockHash]] = {}
        for block_hash, entry in entries.items():
            if entry.parent is not None:
                children.setdefault(entry.parent, []).append(block_hash)
        index = self._ledger.index
        found = set(keys)
        # And all that no chain leads to: what is void may have been what it hung on, before that went.
        found.update(
            child
            for parent, behind in children.items()
            if parent not in entries and index.find(model.space, parent) < 0
            for child in behind
        )
        found = with_successors(found, children)
        for block_hash in found:
            entries.pop(block_hash, None)
        return found
