"""What lies in host memory below a device: in which order it goes, and what of it would be lost by that."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum

from kvpool.cache.key import BlockHash, CacheKey
from kvpool.errors import ensure


class Kind(Enum):
    """What becomes of content when its entry goes."""

    COPY = "copy"
    """The device above has it, too."""
    SAFE = "safe"
    """The disk below has it."""
    SOLE = "sole"
    """It lies nowhere else."""


@dataclass(slots=True)
class HostEntry:
    """A cache in host memory."""

    key: CacheKey
    parent: BlockHash | None
    size_bytes: int
    kind: Kind
    handle: int
    """By which its memory is known."""


class HostIndex:
    """Entries by key, those that came or were used last at the end. Integers only: no bytes, no clock.

    What goes first is what costs least: copies, then what is safe on disk, then the rest; of each the oldest. Caches
    come down in the order of the device's policy, the least worth first and the tail of a chain before its root, so the
    oldest is worth least here, too.

    Parameters
    ----------
    budget_bytes
        Of all entries together.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self._entries: dict[CacheKey, HostEntry] = {}
        self._kinds: dict[Kind, OrderedDict[CacheKey, None]] = {kind: OrderedDict() for kind in Kind}
        self._kind_bytes: Counter[Kind] = Counter()
        self._held: Counter[CacheKey] = Counter()

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[HostEntry]:
        return iter(list(self._entries.values()))

    def get(self, key: CacheKey) -> HostEntry | None:
        """Return the entry of a key, or None."""
        return self._entries.get(key)

    def bytes_of(self, kind: Kind) -> int:
        """Return the bytes of all entries of a kind."""
        return self._kind_bytes[kind]

    def add(self, entry: HostEntry) -> None:
        """Enter a cache, as the newest of its kind. There must be room for it, and none of its key."""
        ensure(entry.key not in self._entries, "a key lies in host memory once", key=str(entry.key))
        ensure(self.used_bytes + entry.size_bytes <= self.budget_bytes, "host memory is kept within its budget")
        self._entries[entry.key] = entry
        self._kinds[entry.kind][entry.key] = None
        self._kind_bytes[entry.kind] += entry.size_bytes
        self.used_bytes += entry.size_bytes

    def turn(self, entry: HostEntry, kind: Kind) -> None:
        """Note what an entry is from now on, as the newest of that kind."""
        del self._kinds[entry.kind][entry.key]
        self._kind_bytes[entry.kind] -= entry.size_bytes
        entry.kind = kind
        self._kinds[kind][entry.key] = None
        self._kind_bytes[kind] += entry.size_bytes

    def saved(self, entry: HostEntry) -> None:
        """Note that a sole entry is on disk now. It keeps its age."""
        ensure(entry.kind is Kind.SOLE, "only what lies nowhere else is saved")
        self.turn(entry, Kind.SAFE)  # sole ones are saved in the order of their age

    def remove(self, entry: HostEntry) -> None:
        """Forget a cache."""
        del self._entries[entry.key], self._kinds[entry.kind][entry.key]
        self._kind_bytes[entry.kind] -= entry.size_bytes
        self.used_bytes -= entry.size_bytes

    def hold(self, keys: Iterable[CacheKey]) -> None:
        """Keep these from going, whether they are here yet or not, as often as :meth:`unhold` is not called."""
        self._held.update(keys)

    def unhold(self, keys: Iterable[CacheKey]) -> None:
        """End what :meth:`hold` began, where it did."""
        for key in keys:
            if self._held[key] > 1:
                self._held[key] -= 1
            else:
                del self._held[key]

    def is_held(self, key: CacheKey) -> bool:
        """Whether a key is kept from going."""
        return key in self._held

    def oldest(self, *kinds: Kind) -> Iterator[HostEntry]:
        """Yield what is not held, kind by kind, the oldest first. Nothing may change while it is consumed."""
        for kind in kinds:
            for key in self._kinds[kind]:
                if key not in self._held:
                    yield self._entries[key]

    def first_to_go(self, *kinds: Kind) -> HostEntry | None:
        """Return what goes first of these kinds, or None."""
        return next(self.oldest(*kinds), None)

    def check(self) -> None:
        """Raise :class:`~kvpool.errors.InvariantError` unless keys, kinds and bytes agree."""
        by_kind = {key: kind for kind, keys in self._kinds.items() for key in keys}
        ensure(by_kind == {key: entry.kind for key, entry in self._entries.items()}, "each entry has its kind")
        for kind in Kind:
            total = sum(entry.size_bytes for entry in self._entries.values() if entry.kind is kind)
            ensure(total == self._kind_bytes[kind], "bytes of a kind", kind=kind.value)
        ensure(self.used_bytes == sum(self._kind_bytes.values()) <= self.budget_bytes, "bytes within the budget")
