"""Content that is declared void, so that nobody ever finds it again and nothing of it is left."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from kvpool.cache.chains import deepest_first, with_descendants
from kvpool.cache.key import MOST_HASHES, check_hash
from kvpool.cache.table import KEYED, Rows
from kvpool.errors import DeviceLostError, InvalidRequestError
from kvpool.memory.tickets import TicketQueue
from kvpool.pool import removal
from kvpool.pool.below import Below
from kvpool.pool.doubts import Doubts
from kvpool.pool.fanout import nothing_more
from kvpool.pool.instructions import Answer, Batch, Move
from kvpool.pool.journal import Happened
from kvpool.pool.leases import Leases
from kvpool.pool.ledger import Ledger
from kvpool.pool.model import Model
from kvpool.pool.removal import Gone, send_removals
from kvpool.pool.requests import CacheRequest
from kvpool.sizes import MIB

STEP_BYTES = 64 * MIB
"""Memory that a device zeroes in one step: about 10 ms of its event loop. (A single larger cache is zeroed at once.)"""


@dataclass(slots=True, eq=False)
class _Invalidation:
    batch: Batch
    number: int
    ids: list[int]
    """Those that nobody holds, children before their parents, the first of them at the end."""
    scrubs: dict[int, list[str]]
    """By device, the tenants whose free memory is still to be scrubbed."""
    figures: dict[str, Any]
    doubts: Doubts = field(default_factory=Doubts)
    lower: int = 0
    """Devices that have not removed it from their lower tiers yet."""
    lower_keys: int = 0
    """How many keys of it were known to lie below the devices."""
    held: dict[str, list[int]] = field(default_factory=dict)
    waits: bool = False
    """For those before it to end."""


class Invalidations:
    """Declares content void.

    With 200,000 caches in the pool, the decision on a whole model takes its event loop 30 ms, that on a key 10 and on
    65,536 keys 130; the steps that follow take about 5 ms each.

    Parameters
    ----------
    ledger
        The pool's books.
    leases
        Told of leases that end.
    queue
        Requests that wait: their caches count as asked for when they were.
    below
        What lies there goes, too.
    """

    def __init__(self, ledger: Ledger, leases: Leases, queue: TicketQueue[CacheRequest], below: Below) -> None:
        self._ledger = ledger
        self._below = below
        self._leases = leases
        self._queue = queue
        self._line: deque[_Invalidation] = deque()

    def invalidate(
        self, batch: Batch, tenant: str | None, model: str | int, keys: Sequence[bytes] | None, now: float
    ) -> None:
        """Declare all content of a model void, or that under some keys and all that is chained behind it.

        From this decision on no look-up finds it, and what was asked for before cannot be sealed as such content any
        more (nor, if more than ``MOST_HASHES`` keys of a model are invalidated meanwhile, as any other of it). The
        answer comes when all devices have zeroed what nobody holds, what was free and what is left of earlier caches
        between live ones: ``{"caches", "bytes", "unsealed", "lower_keys", "held"}``: what was published; caches that
        were being written and can no longer be sealed; how many keys lay in lower tiers; and by client the ``(caches,
        bytes)`` that are still leased, to be zeroed when their leases end. A look-up that was decided on before has
        been answered by then, too. What an earlier invalidation declared void is counted by its answer only, also where
        it is still leased.

        Raises
        ------
        InvalidRequestError
            If there is no such model, or a key is none.
        TierError
            As the answer: if a disk may still have some of it, or, where it was named by name, content of models that
            nobody knows. It is void all the same, and gone elsewhere.
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
        chained: dict[int, set[bytes]] = {}
        parts: list[Rows] = []
        for each in {each.space: each for each in models}.values():
            parts.append(self._bury_all(each) if keys is None else self._bury(each, keys))
            known = (index.key_of(row) for row in parts[-1].tolist()) if keys is not None else ()
            chained[each.space] = {key for key in known if key is not None}
            writers = (ledger.writers.get(cache_id) for cache_id in index.ids_of(parts[-1]))
            chained[each.space].update(w.planned for w in writers if w is not None and w.planned is not None)
        ledger.void_marks.forget(self._oldest())
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
        for device in ledger.devices:
            if device.lost is not None:
                work.doubts.note_lost(device)
        if isinstance(model, str) and (unnamed := ledger.unnamed_below(tenant)):
            work.doubts.note_unnamed(model, unnamed)
        self._line.append(work)
        # Those that somebody holds, first and at once: the end of a lease that comes later must find them void.
        leased: list[int] = rows[held].tolist()
        self._evict_void(work, leased, now)
        # After these: what is being made durable is held, so it is refused from now on, or removed with the rest.
        for each in {each.space: each for each in models}.values():
            self._forget_lower(work, each, keys, chained[each.space])

    def _bury_all(self, model: Model) -> Rows:
        ledger = self._ledger
        rows = ledger.index.rows_of(model.space)
        ledger.void_marks.mark_all(model.space, ledger.invalidations)
        if ledger.journal.open:
            cleared = Happened("cleared", model.tenant, model.name, reason="invalidate")
            ledger.journal.add(cleared._replace(number=model.number, revision=model.revision))
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
        # Their parents went with a device or a client, or were duplicates: what they are chained behind is not known
        # any more, and content that is stored anew under these keys and their successors could lead to them.
        first += [row for row in index.orphans if index.space_of(row) == space]
        ledger.void_marks.mark(space, wanted, ledger.invalidations)
        if not first:
            return np.array([], np.int64)
        chained = with_descendants(index, np.array(first, np.int64))
        ledger.note_removed(chained.tolist(), "invalidate")  # says nothing of those that are void already
        return index.bury(space, chained)

    def _forget_lower(
        self, work: _Invalidation, model: Model, keys: Sequence[bytes] | None, chained: set[bytes]
    ) -> None:
        """Let the lower tiers remove what is void: told in order with what goes down, and waited for beside it."""
        ledger = self._ledger
        known = len(self._below)
        if keys is None:
            self._below.forget_all(model)
            names = None
        else:
            names = sorted(self._below.forget(model, chained.union(keys)))
        work.lower_keys += known - len(self._below)
        for device in ledger.devices:
            if device.has_lower and device.lost is None:
                arguments = (work.number, model.tenant, model.fingerprint)
                ledger.send(device.number, ("forget", *arguments, names), nothing_more)
                work.lower += 1
                forgotten = partial(self._forgotten, work, device.number)
                ledger.out.append(Move(device.number, "forgotten", arguments, forgotten))

    def _forgotten(self, work: _Invalidation, device: int, answer: Answer, now: float) -> None:
        work.lower -= 1
        if isinstance(answer, tuple) and answer[0] == "error":
            if answer[1] == DeviceLostError.__name__:
                work.doubts.note_lost(self._ledger.devices[device])
            else:
                work.doubts.note_refused(answer)
        self._end_if_done(work, now)

    def _oldest(self) -> dict[int, int]:
        """Return by space how many invalidations there had been when the first who writes or waits there asked."""
        index = self._ledger.index
        born = [(index.space_of(index.live_row(i)), each.born) for i, each in self._ledger.writers.items()]
        born += [(request.model.space, request.born) for _, request in self._queue.items()]
        oldest: dict[int, int] = {}
        for space, number in born:
            oldest[space] = min(number, oldest.get(space, number))
        return oldest

    def _next_void(self, work: _Invalidation, now: float) -> None:
        if self._line[0] is not work:
            work.waits = True  # what those before it are still removing may be part of what it was asked for
            return
        index = self._ledger.index
        rows: list[int] = []
        size_bytes = 0
        while work.ids and len(rows) < removal.STEP_CACHES and size_bytes < STEP_BYTES:
            row = index.live_row(work.ids.pop())
            if row >= 0:  # else it was evicted meanwhile, and zeroed by that
                rows.append(row)
                size_bytes += index.size_bytes[row]
        if rows:
            self._evict_void(work, rows, now)
        else:
            for device in list(work.scrubs):
                self._scrub(work, device)
            self._end_if_done(work, now)

    def _evict_void(self, work: _Invalidation, rows: list[int], now: float) -> None:
        """Let the devices zero and free these, or mark them where they are held."""
        index = self._ledger.index
        self._ledger.count_evictions([row for row in rows if index.key_of(row) is not None], "invalidate")
        gone = [Gone(index.device[row], index.id_of(row), True) for row in rows]
        send_removals(self._ledger, gone, partial(self._voided, work), now)
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
                work.doubts.note_refused(answer)
            work.scrubs[device].clear()  # nothing is left to scrub where the device is lost
        if work.scrubs[device]:
            self._scrub(work, device)
        else:
            del work.scrubs[device]
            self._end_if_done(work, now)

    def _end_if_done(self, work: _Invalidation, now: float) -> None:
        if not work.scrubs and not work.lower and not work.ids and self._line[0] is work:
            self._line.popleft()
            held = {client: tuple(figures) for client, figures in sorted(work.held.items())}
            figures = work.figures | {"lower_keys": work.lower_keys, "held": held}
            self._ledger.answer(work.batch, 0, work.doubts.error() or figures)
            if self._line and self._line[0].waits:
                self._next_void(self._line[0], now)
