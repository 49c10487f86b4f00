"""Content that goes by somebody's word: evicted to make room, or invalidated so that nobody ever finds it again.

Both work on many caches at once, so they go step by step: the next step begins when the devices concerned have answered
the one before, and whoever asks for memory meanwhile is served in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from heapq import merge
from typing import Any

import numpy as np

from kvpool.cache.chains import Rows, deepest_first, with_descendants
from kvpool.cache.key import MOST_HASHES, check_hash
from kvpool.cache.table import KEYED
from kvpool.errors import DeviceLostError, InvalidRequestError, InvalidSizeError
from kvpool.memory.tickets import TicketQueue
from kvpool.pool.instructions import Answer, Batch
from kvpool.pool.journal import Happened
from kvpool.pool.leases import PINNER, Leases
from kvpool.pool.ledger import Ledger, Model
from kvpool.pool.requests import CacheRequest
from kvpool.sizes import MIB

STEP_CACHES = 1000
"""Caches that leave the books in one step: about a millisecond of the pool's event loop."""

STEP_BYTES = 64 * MIB
"""Memory that a device zeroes in one step: about 10 ms of its event loop. (A single larger cache is zeroed at once.)"""


@dataclass(slots=True, eq=False)
class _Eviction:
    batch: Batch
    scope: frozenset[int] | None
    """Spaces; None: all."""
    devices: list[int]
    left_bytes: float
    ids: list[int] = field(default_factory=list)
    """Those that may go, the first of them at the end."""
    caches: int = 0
    size_bytes: int = 0


@dataclass(slots=True, eq=False)
class _Invalidation:
    batch: Batch
    number: int
    ids: list[int]
    """Those that nobody holds, children before their parents, the first of them at the end."""
    scrubs: dict[int, list[str]]
    """By device, the tenants whose free memory is still to be scrubbed."""
    answer: dict[str, Any]
    held: dict[str, list[int]] = field(default_factory=dict)


class Removals:
    """Removes content by word.

    Parameters
    ----------
    ledger
        The pool's books.
    leases
        Told of leases that end.
    queue
        Requests that wait: their caches count as asked for when they were.
    """

    def __init__(self, ledger: Ledger, leases: Leases, queue: TicketQueue[CacheRequest]) -> None:
        self._ledger = ledger
        self._leases = leases
        self._queue = queue

    # -- evict ----------------------------------------------------------------------------------------------------

    def evict(
        self,
        batch: Batch,
        tenant: str | None,
        model: str | int | None,
        device: str | None,
        size_bytes: int | None,
        now: float,
    ) -> None:
        """Evict what nobody holds, in the order of the policy, until ``size_bytes`` are found or all of it is gone.

        The answer is ``{"caches", "bytes", "leased_caches", "leased_bytes"}``: what went, and what of the same scope is
        held by leases or pins and stays. Bytes are those that the caches took of their devices.

        Raises
        ------
        InvalidRequestError
            If there is no such model or device, or the size is not positive.
        """
        if size_bytes is not None and (not isinstance(size_bytes, int) or size_bytes <= 0):
            raise InvalidSizeError(f"evict a positive number of bytes, or all; asked for {size_bytes!r}")
        work = _Eviction(
            batch, self._spaces(tenant, model), self._devices(device), np.inf if size_bytes is None else size_bytes
        )
        self._next_evictions(work, now)

    def _next_evictions(self, work: _Eviction, now: float) -> None:
        index = self._ledger.index
        if not work.ids and work.left_bytes > 0:
            work.ids = self._evictable(work)
        rows: list[int] = []
        children_gone: dict[int, int] = {}
        while work.ids and len(rows) < STEP_CACHES and work.left_bytes > 0:
            row = index.live_row(work.ids.pop())
            # Others went on since these were chosen: one may be gone or held, or have a child that stays.
            if row < 0 or index.pins[row] or index.children[row] != children_gone.get(row, 0):
                continue
            rows.append(row)
            work.left_bytes -= index.size_bytes[row]
            above = index.parent[row]
            if above >= 0:
                children_gone[above] = children_gone.get(above, 0) + 1
        if rows:
            work.caches += len(rows)
            work.size_bytes += self._ledger.count_evictions(rows, "request")
            self._send(rows, "evict", partial(self._evictions_done, work), now)
            index.remove_all(rows)
        else:
            self._ledger.answer(work.batch, 0, self._evicted(work))

    def _evictions_done(self, work: _Eviction, _answers: list[Answer], now: float) -> None:
        self._leases.memory_freed(now)
        self._next_evictions(work, now)

    def _evictable(self, work: _Eviction) -> list[int]:
        """Return the ids of what may go, the first of them last. One pass in the order of the policy."""
        index = self._ledger.index
        accessed, sizes = index.last_accessed, index.size_bytes
        ranked: list[Iterator[int]] = [index.policy.victims(device) for device in work.devices]
        rows: list[int] = []
        found_bytes = 0
        for row in ranked[0] if len(ranked) == 1 else merge(*ranked, key=accessed.__getitem__):
            if found_bytes >= work.left_bytes:
                break
            if work.scope is None or index.space_of(row) in work.scope:
                rows.append(row)
                found_bytes += sizes[row]
        return index.ids_of(np.array(rows[::-1], np.int64))

    def _evicted(self, work: _Eviction) -> dict[str, int]:
        index = self._ledger.index
        spaces = index.spaces_of(None) if work.scope is None else sorted(work.scope)
        rows = index.rows_of(*spaces) if spaces else np.array([], np.int64)
        there = np.isin(np.frombuffer(index.device, np.int32)[rows], work.devices)
        held = rows[there & (np.frombuffer(index.pins, np.uint32)[rows] > 0)]
        return {
            "caches": work.caches,
            "bytes": work.size_bytes,
            "leased_caches": len(held),
            "leased_bytes": int(np.frombuffer(index.size_bytes, np.int64)[held].sum()),
        }

    # -- invalidate -----------------------------------------------------------------------------------------------

    def invalidate(
        self, batch: Batch, tenant: str | None, model: str | int, keys: Sequence[bytes] | None, now: float
    ) -> None:
        """Declare all content of a model void, or that under some keys and all that is chained behind it.

        From this decision on no look-up finds it, and what was asked for before cannot be sealed as such content any
        more. The answer comes when all devices have zeroed what nobody holds, what was free and what is left of
        earlier caches between live ones: ``{"caches", "bytes", "unsealed", "held"}``: what was published; caches that
        were being written and can no longer be sealed; and by client the ``(caches, bytes)`` that are still leased, to
        be zeroed when their leases end. A look-up that was decided on before has been answered by then, too.

        Raises
        ------
        InvalidRequestError
            If there is no such model, or a key is none.
        """
        ledger = self._ledger
        index = ledger.index
        models = ledger.find_models(model, tenant)
        if keys is not None:
            if not isinstance(keys, (list, tuple)) or not 0 < len(keys) <= MOST_HASHES:
                raise InvalidRequestError(f"keys to invalidate come as a list of 1 to {MOST_HASHES}, or None for all")
            for key in keys:
                check_hash(key)
        ledger.invalidations += 1
        parts = [
            self._bury_all(each) if keys is None else self._bury(each, keys)
            for each in {each.space: each for each in models}.values()
        ]
        self._forget_voided()
        rows: Rows = deepest_first(index, np.concatenate(parts))
        published = rows[np.frombuffer(index.flags, np.uint8)[rows] & KEYED != 0]
        held = np.frombuffer(index.pins, np.uint32)[rows] > 0
        answer = {
            "caches": len(published),
            "bytes": int(np.frombuffer(index.size_bytes, np.int64)[published].sum()),
            "unsealed": sum(cache_id in ledger.writers for cache_id in index.ids_of(rows[held])),
        }
        alive = [device.number for device in ledger.devices if device.lost is None]
        tenants = sorted({each.tenant for each in models})
        work = _Invalidation(
            batch, ledger.invalidations, index.ids_of(rows[~held][::-1]), {n: list(tenants) for n in alive}, answer
        )
        # Those that somebody holds, first and at once: the end of a lease that comes later must find them void.
        leased: list[int] = rows[held].tolist()
        self._evict_void(work, leased, now)

    def _bury_all(self, model: Model) -> Rows:
        ledger = self._ledger
        rows = ledger.index.rows_of(model.space)
        ledger.voided[model.space, None] = ledger.invalidations
        if ledger.journal.open:
            ledger.journal.add(Happened("cleared", model.tenant, model.name, reason="invalidate"))
        ledger.index.bury_all(model.space)
        return rows

    def _bury(self, model: Model, keys: Sequence[bytes]) -> Rows:
        ledger = self._ledger
        index, space = ledger.index, model.space
        wanted = set(keys)
        first = [row for row in index.find_all(space, wanted) if row >= 0]
        for cache_id, writer in ledger.writers.items():
            row = index.live_row(cache_id)
            if writer.planned in wanted and index.space_of(row) == space:
                first.append(row)
        ledger.voided.update(dict.fromkeys(((space, key) for key in wanted), ledger.invalidations))
        if not first:
            return np.array([], np.int64)
        rows = with_descendants(index, np.array(first, np.int64))
        ledger.note_removed(rows.tolist(), "invalidate")
        index.bury(rows)
        return rows

    def _forget_voided(self) -> None:
        """Drop the marks of invalidations that no cache is old enough to have to heed."""
        ledger = self._ledger
        born = [writer.born for writer in ledger.writers.values()]
        born += [request.born for _, request in self._queue.items()]
        oldest = min(born, default=ledger.invalidations)
        if len(ledger.voided) and oldest == ledger.invalidations:
            ledger.voided.clear()
        else:
            ledger.voided = {mark: number for mark, number in ledger.voided.items() if number > oldest}

    def _next_void(self, work: _Invalidation, now: float) -> None:
        index = self._ledger.index
        rows: list[int] = []
        size_bytes = 0
        while work.ids and len(rows) < STEP_CACHES and size_bytes < STEP_BYTES:
            row = index.live_row(work.ids.pop())
            if row >= 0:  # else it was evicted meanwhile, and zeroed by that
                rows.append(row)
                size_bytes += index.size_bytes[row]
        if rows:
            self._evict_void(work, rows, now)
        else:
            for device in list(work.scrubs):
                self._scrub(work, device)
            self._end_if_done(work)

    def _evict_void(self, work: _Invalidation, rows: list[int], now: float) -> None:
        """Let the devices zero and free these, or mark them where they are held."""
        index = self._ledger.index
        self._ledger.count_evictions([row for row in rows if index.key_of(row) is not None], "invalidate")
        self._send(rows, "void", partial(self._voided, work), now)
        for row in rows:
            if index.pins[row] and index.key_of(row) is not None:
                index.withdraw(row)
        index.remove_all([row for row in rows if not index.pins[row]])

    def _voided(self, work: _Invalidation, answers: list[Answer], now: float) -> None:
        for answer in answers:
            if answer[0] == "error":
                continue  # the device is lost, and what was there with it
            ended, freed, held = answer
            self._leases.pins_ended(ended, freed, now)
            for cache_id in freed:
                self._ledger.forget(cache_id)
            for client, (caches, size_bytes) in held.items():
                known = work.held.setdefault(client, [0, 0])
                known[0] += caches
                known[1] += size_bytes
        self._leases.memory_freed(now)
        self._next_void(work, now)

    def _scrub(self, work: _Invalidation, device: int) -> None:
        operation = ("scrub", work.scrubs[device][-1], work.number, STEP_BYTES)
        self._ledger.send(device, operation, partial(self._scrubbed, work, device))

    def _scrubbed(self, work: _Invalidation, device: int, answer: Answer, now: float) -> None:
        if answer is True:
            work.scrubs[device].pop()
        elif answer is not False:
            if answer[1] != DeviceLostError.__name__:
                work.answer = {"error": answer}
            work.scrubs[device].clear()  # nothing is left to scrub where the device is lost
        if work.scrubs[device]:
            self._scrub(work, device)
        else:
            del work.scrubs[device]
            self._end_if_done(work)

    def _end_if_done(self, work: _Invalidation) -> None:
        if not work.scrubs:
            held = {client: tuple(figures) for client, figures in sorted(work.held.items())}
            self._ledger.answer(work.batch, 0, work.answer.get("error", work.answer | {"held": held}))

    # -- both -----------------------------------------------------------------------------------------------------

    def _send(
        self, rows: Sequence[int], operation: str, then: Callable[[list[Answer], float], None], now: float
    ) -> None:
        """Give an operation on these caches to the devices concerned, and go on when all have answered."""
        index = self._ledger.index
        by_device: dict[int, list[int]] = {}
        void: dict[int, list[int]] = {}
        for row in rows:
            part = void if operation == "void" or index.is_void(row) else by_device
            part.setdefault(index.device[row], []).append(index.id_of(row))
        answers: list[Answer] = []
        expected = len(by_device) + len(void)

        def answered(answer: Answer, now: float) -> None:
            answers.append(answer)
            if len(answers) == expected:
                then(answers, now)

        for device, ids in by_device.items():
            self._ledger.send(device, ("evict", ids), answered)
        for device, ids in void.items():
            self._ledger.send(device, ("void", ids, PINNER), answered)
        if not expected:
            then([], now)

    def _spaces(self, tenant: str | None, model: str | int | None) -> frozenset[int] | None:
        if model is not None:
            return frozenset(each.space for each in self._ledger.find_models(model, tenant))
        return None if tenant is None else frozenset(self._ledger.index.spaces_of(tenant))

    def _devices(self, name: str | None) -> list[int]:
        alive = {device.name: device.number for device in self._ledger.devices if device.lost is None}
        if name is None:
            return list(alive.values())
        if name not in alive:
            raise InvalidRequestError(
                f"this pool has no device {name!r} that is alive: there is {', '.join(alive) or 'none'}", asked=name
            )
        return [alive[name]]
