"""What the pool's state takes in and gives out: events in, instructions out. All of it is plain data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Answer = Any
"""What a client gets for one item: a tuple whose first element names it (``"granted"``, ``"queued"``, ``"error"``)."""

Continuation = Callable[[Answer, float], None]
"""Called with a device's answer and the time."""


@dataclass(slots=True, eq=False)
class Batch:
    """The items of one call of a client, and the answers found so far."""

    size: int
    answers: list[Answer] = field(init=False)
    open_items: int = field(init=False)

    def __post_init__(self) -> None:
        self.answers = [None] * self.size
        self.open_items = self.size

    def put(self, item: int, answer: Answer) -> None:
        """Record the answer of one item."""
        self.answers[item] = answer
        self.open_items -= 1


class CachesRequested(NamedTuple):
    """Items: ``(sequence, model, size_bytes, max_size_bytes, timeout_s, priority, trace)``.

    The trace of an item, here and below, is opaque to all decisions: it goes with the operations that the item causes.
    """

    batch: Batch
    client: str
    items: Sequence[tuple[Any, ...]]


class ChangesRequested(NamedTuple):
    """Items: ``(sequence, id, "resize" or "back" or "unback", ranges, timeout_s, trace)``.

    Of a resize, the ranges are all that is to be backed: ``[(0, size)]``, or none.
    """

    batch: Batch
    client: str
    items: Sequence[tuple[Any, ...]]


class BlocksRequested(NamedTuple):
    """Items: ``(sequence, model, hashes, parent, trace)``; hashes are 16 bytes each, joined.

    The parent is a hash, or None for a root.
    """

    batch: Batch
    client: str
    items: Sequence[tuple[Any, ...]]


class PrefixesLookedUp(NamedTuple):
    """Items: ``(sequence, model, hashes, trace)``."""

    batch: Batch
    client: str
    items: Sequence[tuple[Any, ...]]


class PrefixesFetched(NamedTuple):
    """Items: ``(sequence, model, hashes, first, timeout_s, trace)``: lease what comes up behind ``first``."""

    batch: Batch
    client: str
    items: Sequence[tuple[Any, ...]]


class PersistRequested(NamedTuple):
    """Items: ``(sequence, model, hashes, trace)``: these blocks, in the pool now, are to survive everything."""

    batch: Batch
    client: str
    items: Sequence[tuple[Any, ...]]


class SealRequested(NamedTuple):
    """Items: ``(sequence, model, ids, hashes or None for each id, trace)``; ``finish`` releases what was sealed."""

    batch: Batch
    client: str
    items: Sequence[tuple[Any, ...]]
    finish: bool


class ReleaseRequested(NamedTuple):
    """Items: ``(sequence, ids, trace)``."""

    batch: Batch
    client: str
    items: Sequence[tuple[Any, ...]]


class PinRequested(NamedTuple):
    """Items: ``(sequence, ids, trace)``; ``held`` tells whether they are to be pinned or unpinned."""

    batch: Batch
    client: str
    items: Sequence[tuple[Any, ...]]
    held: bool


class EvictRequested(NamedTuple):
    """An administrator's word: see :meth:`kvpool.pool.evictions.Evictions.evict`. The batch has one item."""

    batch: Batch
    tenant: str | None
    model: str | int | None
    device: str | None
    size_bytes: int | None


class FlushRequested(NamedTuple):
    """An administrator's word: see :meth:`kvpool.pool.flush.Flushes.flush`. The batch has one item."""

    batch: Batch
    tenant: str | None


class InvalidateRequested(NamedTuple):
    """An administrator's word: see :class:`kvpool.pool.invalidation.Invalidations`. The batch has one item."""

    batch: Batch
    tenant: str | None
    model: str | int
    keys: Sequence[bytes] | None


class RevokeRequested(NamedTuple):
    """An administrator's word: see :meth:`kvpool.pool.revocation.Revocations.revoke`. The batch has one item."""

    batch: Batch
    client: str
    tenant: str | None


class QuotaSet(NamedTuple):
    """An administrator's word: see :mod:`kvpool.pool.quota`. The batch has one item."""

    batch: Batch
    tenant: str
    model: str | int | None
    guaranteed: int | str
    limit: int | str | None
    revision: int | None


class TicketsCancelled(NamedTuple):
    """A client no longer waits for these tickets."""

    client: str
    tickets: Sequence[int]


class DeviceAnswered(NamedTuple):
    """A device carried a batch of operations out."""

    device: int
    sent: Sequence[Send]
    answers: Sequence[Answer]
    zombies: tuple[int, int]
    """``(stamp, bytes)``: a figure with an older stamp than one seen before is stale."""


class DeviceFreed(NamedTuple):
    """Zombies of a device are gone, or it gave memory back: waiting requests may fit now."""

    device: int
    zombies: tuple[int, int]


class ClientGone(NamedTuple):
    """A device saw a client's process die: the ids whose lease ended there, and those of them it freed."""

    client: str
    device: int
    ended: Sequence[int]
    freed: Sequence[int]


class Moved(NamedTuple):
    """A device moved bytes as told, or could not: its answer, or an error."""

    move: Move
    answer: Answer


class LowerGone(NamedTuple):
    """A device lost content from its lower tiers: ``(tenant, fingerprint, hash)`` of each.

    ``stamp``: the device's at that time, as in :class:`DeviceAnswered`.
    """

    device: int
    keys: Sequence[tuple[str, str, bytes]]
    stamp: int


class DeviceLost(NamedTuple):
    """A device died, and what was only there with it."""

    device: int
    reason: str


class Tick(NamedTuple):
    """Time passed: requests past their deadline are answered."""


Event = (
    CachesRequested
    | ChangesRequested
    | BlocksRequested
    | PrefixesLookedUp
    | PrefixesFetched
    | PersistRequested
    | SealRequested
    | ReleaseRequested
    | PinRequested
    | EvictRequested
    | FlushRequested
    | InvalidateRequested
    | RevokeRequested
    | QuotaSet
    | TicketsCancelled
    | DeviceAnswered
    | DeviceFreed
    | ClientGone
    | Moved
    | LowerGone
    | DeviceLost
    | Tick
)


class Send(NamedTuple):
    """Instruction: give a device this operation (in order), and continue with its answer."""

    device: int
    operation: tuple[Any, ...]
    then: Continuation
    traces: tuple[Any, ...] = ()
    """The different traces of the items that it is for."""


class Move(NamedTuple):
    """Instruction: let a device move bytes between its memory and its lower tiers, and continue with its answer.

    ``method`` of the device actor is called with ``arguments``, beside the operations and in no order with them: what
    it works on must be held by then.
    """

    device: int
    method: str
    arguments: tuple[Any, ...]
    then: Continuation


class BatchDone(NamedTuple):
    """Instruction: every item of the batch has its answer."""

    batch: Batch


class Grant(NamedTuple):
    """Instruction: tell a client what became of a waiting request."""

    client: str
    ticket: int
    answer: Answer


class Waited(NamedTuple):
    """Instruction: note that a request waited for memory, and what became of it.

    ``outcome`` is ``"granted"``, ``"cancelled"`` or the class of its error; ``since`` and ``asked`` are the times at
    which it was queued and came in.
    """

    model: int
    asked: float
    since: float
    outcome: str
    trace: Any


class Failed(NamedTuple):
    """Instruction: report a bug. What should have followed on a device's answer, or on a request, raised an error."""

    operation: tuple[Any, ...]
    error: Exception


class PolicyFailed(NamedTuple):
    """Instruction: report that the eviction policy failed, and that another one decides from now on."""

    error: Exception


Instruction = Send | Move | BatchDone | Grant | Waited | Failed | PolicyFailed


def distinct(traces: Iterable[Any]) -> tuple[Any, ...]:
    """Return each of the traces once, in order, without those that are None."""
    return tuple(trace for trace in dict.fromkeys(traces) if trace is not None)
