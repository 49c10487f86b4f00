"""Operations that take memory of a device, in as many steps as its compaction takes.

Where there is room only once caches were moved together, a device moves them for a few milliseconds, answers how far it
came, and is asked for the rest: so whoever needs something else of it meanwhile is served in between.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from kvpool.errors import BackendError, CapacityError, DeviceLostError
from kvpool.pool.fanout import nothing_more
from kvpool.pool.instructions import Answer, Continuation
from kvpool.pool.leases import PINNER
from kvpool.pool.ledger import Ledger


@dataclass(slots=True, eq=False)
class _Work:
    """An operation, and what came of it so far."""

    ledger: Ledger
    device: int
    then: Continuation
    traces: tuple[Any, ...]
    steps_left: int
    stepped: bool = False
    places: list[Any] = field(default_factory=list)
    refused: list[int] = field(default_factory=list)


def send_stepwise(
    ledger: Ledger, device: int, operation: tuple[Any, ...], then: Continuation, traces: tuple[Any, ...] = ()
) -> None:
    """Give a device an ``allocate``, ``resize`` or ``back``; ``then`` gets one answer, as of one step."""
    there = ledger.devices[device]
    # Nearly each step frees a page. It has to end, too, where others take more meanwhile than comes free.
    work = _Work(ledger, device, then, traces, 2 * there.capacity_bytes // there.page_bytes)
    ledger.send(device, operation, partial(_answered, work, operation), traces)


def wants_memory(shortage: Mapping[str, Any]) -> bool:
    """Whether more memory would mend a shortage: not one of addresses, nor that the client has gone meanwhile."""
    return shortage["class"] in (CapacityError.__name__, BackendError.__name__)


def _answered(work: _Work, operation: tuple[Any, ...], answer: Answer, now: float) -> None:
    if answer[0] == "error":
        _, name, message, details = answer
        if not work.places or name == DeviceLostError.__name__:
            work.then(answer, now)
            return
        # What was placed before is there, whatever is refused now: mostly because its client has gone.
        answer = [], [], {"class": name, "message": message, "details": details}
    shortage = answer[-1]
    rest = operation
    if operation[0] == "allocate":
        places, refused, _ = answer
        ids = operation[4]
        rest = (*operation[:4], ids[len(places) :], *operation[5:])
        if work.stepped:
            _declare_void(work, ids[: len(places)])
        work.places += places
        work.refused += refused
        answer = work.places, work.refused, shortage
    if shortage is None or not shortage["details"].pop("compaction_left", False) or not work.steps_left:
        work.then(answer, now)
        return
    work.steps_left -= 1
    work.stepped = True
    rest = (*rest[:-1], [])  # what was to be evicted has gone
    work.ledger.send(work.device, rest, partial(_answered, work, rest), work.traces)


def _declare_void(work: _Work, ids: Sequence[int]) -> None:
    """Tell the device again what was declared void before it knew these caches."""
    index = work.ledger.index
    rows = map(index.live_row, ids)
    void = [cache_id for cache_id, row in zip(ids, rows, strict=True) if row >= 0 and index.is_void(row)]
    if void:
        work.ledger.send(work.device, ("void", void, PINNER), nothing_more)
