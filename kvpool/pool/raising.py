"""Content that is brought up from the tiers below: begun by a look-up, waited for by whoever wants it.

A look-up tells how many blocks behind the resident run lie below, and begins to bring them up; it does not wait.
Whoever asks for the same meanwhile joins. The new caches belong to a client of the pool's own until their bytes are
there, then they are published, and those who wait are given leases by the same rules as in a look-up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

from kvpool.cache.key import BlockHash, split_hashes
from kvpool.cache.store import FREED, RELEASED
from kvpool.errors import InvalidRequestError, KvpoolError
from kvpool.pool.below import Below, LowerEntry
from kvpool.pool.client import Client
from kvpool.pool.directory import Directory
from kvpool.pool.fanout import Fanout, nothing_more
from kvpool.pool.instructions import Answer, Batch, Failed, Grant, Move
from kvpool.pool.leases import RAISER, Leases
from kvpool.pool.ledger import Ledger
from kvpool.pool.model import Model
from kvpool.pool.room import Room
from kvpool.pool.stepwise import send_stepwise


@dataclass(slots=True, eq=False)
class _Waiter:
    """Somebody who wants a chain's blocks behind the first ones, which it has."""

    client: Client
    sequence: int
    model: Model
    hashes: list[BlockHash]
    first: int
    coming: int
    deadline: float
    trace: Any
    ticket: int
    open_raises: int = 0


@dataclass(slots=True, eq=False)
class _Raise:
    """Neighbours in a chain that come up together."""

    model: Model
    device: int
    size_bytes: int
    """Of each."""
    ids: list[int]
    hashes: list[BlockHash]
    root: bool
    """Whether the first of them begins its chain."""
    waiters: list[_Waiter] = field(default_factory=list)


class Raising:
    """Brings content up.

    Parameters
    ----------
    ledger
        The pool's books.
    room
        Makes it.
    below
        Tells what lies there.
    directory, fanout, leases
        Give leases on what has come up.
    """

    def __init__(
        self, ledger: Ledger, room: Room, below: Below, directory: Directory, fanout: Fanout, leases: Leases
    ) -> None:
        self._ledger = ledger
        self._room = room
        self._below = below
        self._directory = directory
        self._fanout = fanout
        self._leases = leases
        self._under_way: dict[tuple[int, BlockHash], _Raise] = {}
        self._waiters: dict[int, _Waiter] = {}
        self._tickets = count(-1, -1)  # below zero, so that they are never those of requests that wait for memory
        self._connected: set[tuple[str, int]] = set()

    def __contains__(self, ticket: int) -> bool:
        return ticket in self._waiters

    # -- to begin -------------------------------------------------------------------------------------------------

    def begin(
        self, client: Client, model: Model, hashes: Sequence[BlockHash], rows: Sequence[int], now: float
    ) -> tuple[int, list[_Raise]]:
        """Begin to bring up what lies below behind a chain's leading run ``rows``, which somebody holds.

        Returns how many blocks are on their way by now, and what they come with.
        """
        if not len(self._below) and not self._under_way:
            return 0, []
        index = self._ledger.index
        parent = rows[-1] if rows else -1
        place, raises = len(rows), dict[_Raise, None]()
        while place < len(hashes):
            joined = self._under_way.get((model.space, hashes[place]))
            if joined is None:
                started = self._start(client, model, hashes, place, parent, now)
                if started is None:
                    break
                raises[started] = None
                place += len(started.ids)
                parent = index.live_row(started.ids[-1])
                continue
            parent = index.live_row(joined.ids[joined.hashes.index(hashes[place])])
            if parent < 0 or index.is_void(parent) or joined.device not in client.devices:
                break
            raises[joined] = None
            place += 1
        return place - len(rows), list(raises)

    def _start(
        self, client: Client, model: Model, hashes: Sequence[BlockHash], first: int, parent: int, now: float
    ) -> _Raise | None:
        """Begin on the run of blocks from ``first`` on that lies below one device; None if nothing can come."""
        ledger = self._ledger
        entry = self._below.find(model.space, hashes[first])
        if entry is None or entry.device not in client.devices or ledger.devices[entry.device].lost is not None:
            return None
        run, device = self._run(model.space, hashes, first, entry), entry.device
        # Held before anything goes down to make room for them: it could push out the very content that is wanted.
        ledger.send(device, ("hold", model.tenant, model.fingerprint, run), nothing_more)
        rows, evicted = self._find_room(model, entry, run, parent, hashes, now)
        if len(rows) < len(run):
            ledger.send(device, ("unhold", model.tenant, model.fingerprint, run[len(rows) :]), nothing_more)
        if not rows:
            return None
        ids = list(map(ledger.index.id_of, rows))
        work = _Raise(model, device, entry.size_bytes, ids, run[: len(ids)], parent < 0)
        for block_hash in work.hashes:
            self._under_way[model.space, block_hash] = work
        self._allocate(work, 0, evicted, 0)
        return work

    def _run(self, space: int, hashes: Sequence[BlockHash], first: int, entry: LowerEntry) -> list[BlockHash]:
        """Return the blocks from ``first`` on that lie below one device, in one size, and are not under way."""
        end = first + 1
        while (
            end < len(hashes)
            and (space, hashes[end]) not in self._under_way
            and (other := self._below.find(space, hashes[end])) is not None
            and other[:2] == entry[:2]
        ):
            end += 1
        return list(hashes[first:end])

    def _find_room(
        self,
        model: Model,
        entry: LowerEntry,
        run: Sequence[BlockHash],
        parent: int,
        chain: Sequence[BlockHash],
        now: float,
    ) -> tuple[list[int], list[int]]:
        """Enter as much of a run as there is room for; returns the rows, and the ids of what goes for them.

        All of it is one operation then, in which that has gone before the first is placed.
        """
        ledger, size_bytes = self._ledger, entry.size_bytes
        device, raiser = ledger.devices[entry.device], self._raiser(model.tenant, entry.device)
        rows: list[int] = []
        evicted: list[int] = []
        while len(rows) < len(run):
            try:
                found = self._room.find_on(device, model, size_bytes, size_bytes, len(run) - len(rows))
            except Exception as error:  # a bug: what is in the books by now must reach the device all the same
                if not rows:
                    raise
                ledger.out.append(Failed(("find room",), error))
                break
            if found is None:
                break
            part = run[len(rows) : len(rows) + found[0]]
            above = rows[-1] if rows else parent
            rows += ledger.add_chain(raiser, model.space, device, size_bytes, part, above, chain, now)
            evicted += found[1]
        return rows, evicted

    def _raiser(self, tenant: str, device: int) -> Client:
        raiser = Client(RAISER + tenant, tenant, self._ledger.devices[device].host, [])
        if (raiser.id, device) not in self._connected:
            self._connected.add((raiser.id, device))
            self._ledger.send(device, ("connect", raiser.id, tenant, ""), nothing_more)
        return raiser

    def _allocate(self, work: _Raise, first: int, evict: list[int], attempts: int) -> None:
        """Place what comes up from the ``first`` on."""
        raiser = self._raiser(work.model.tenant, work.device)
        ids, size_bytes = work.ids[first:], work.size_bytes
        operation = ("allocate", raiser.id, 0, work.model.tenant, ids, size_bytes, size_bytes, evict)
        send_stepwise(self._ledger, work.device, operation, partial(self._placed, work, first, attempts))

    def _placed(self, work: _Raise, first: int, attempts: int, answer: Answer, now: float) -> None:
        placed, shortage = (first, None) if answer[0] == "error" else (first + len(answer[0]), answer[2])
        if placed < len(work.ids):
            device, missing = self._ledger.devices[work.device], len(work.ids) - placed
            evict = self._room.make_up_for(shortage, work.model, device, work.size_bytes, missing, attempts)
            if evict:
                self._allocate(work, placed, evict, attempts + 1)
                return
            # What lies below stays there.
            for cache_id, block_hash in zip(work.ids[placed:][::-1], work.hashes[placed:][::-1], strict=True):
                del self._under_way[work.model.space, block_hash]
                self._ledger.forget(cache_id)
            unheld = ("unhold", work.model.tenant, work.model.fingerprint, work.hashes[placed:])
            self._ledger.send(work.device, unheld, nothing_more)
            work.ids, work.hashes = work.ids[:placed], work.hashes[:placed]
            self._room.clearance.changed = True
        if not placed:
            self._end(work, now)
            return
        entries = list(zip(work.ids, work.hashes, strict=True))
        arguments = (work.model.tenant, work.model.fingerprint, entries)
        self._ledger.out.append(
            Move(work.device, "fill", arguments, lambda answer, now: self._filled(work, answer, now))
        )

    def _filled(self, work: _Raise, answer: Answer, now: float) -> None:
        ledger = self._ledger
        index, space = ledger.index, work.model.space
        filled: list[bool | None] = [None] * len(work.ids) if isinstance(answer, tuple) else answer
        by_id: dict[int, BlockHash | None] = dict.fromkeys(work.ids)
        chained = True  # what lies behind a block that is missing could never be hit, and stays below
        for cache_id, block_hash, is_there in zip(work.ids, work.hashes, filled, strict=True):
            del self._under_way[space, block_hash]
            row, writer = index.live_row(cache_id), ledger.writers.get(cache_id)
            if row < 0 or writer is None or index.is_void(row):
                chained = False
                continue
            if is_there is False:  # None: it may be had another time
                self._below.discard(work.device, space, block_hash)
            void = ledger.void_marks.last(space, block_hash) > writer.born
            cut = index.parent[row] < 0 and not (work.root and cache_id == work.ids[0])
            # What somebody stored meanwhile stays. Behind that, and behind what is gone, nothing is published: it would
            # hang on a cache that is about to go, where no invalidation of the chain would find it.
            chained &= not (void or cut) and is_there is True and index.find(space, block_hash) < 0
            if chained:
                index.publish(row, block_hash)
                del ledger.writers[cache_id]
                ledger.note_stored((row,))
                ledger.counters.blocks_raised += 1
                by_id[cache_id] = block_hash
        live = [cache_id for cache_id in work.ids if index.live_row(cache_id) >= 0]

        def finished(codes: list[Any], now: float) -> None:
            # Lost with its device, if it is neither: it is off the books then. And what is not published nobody can
            # find, also where the device must keep its memory because a store that hangs still writes to it.
            known = [
                (i, FREED if by_id[i] is None else code)
                for i, code in zip(live, codes, strict=True)
                if code in (FREED, RELEASED)
            ]
            self._leases.settle([i for i, _ in known], [code for _, code in known], now)
            self._leases.memory_freed(now)

        self._fanout.ask(
            live,
            [index.live_row(cache_id) for cache_id in live],
            lambda part, _positions: ("finish", RAISER + work.model.tenant, 0, part, [by_id[i] for i in part]),
            finished,
            now,
        )
        self._end(work, now)

    def _end(self, work: _Raise, now: float) -> None:
        for waiter in work.waiters:
            waiter.open_raises -= 1
            if not waiter.open_raises and waiter.ticket in self._waiters:
                self._deliver(waiter, now)

    # -- to wait --------------------------------------------------------------------------------------------------

    def fetch(self, batch: Batch, client_id: str, items: Sequence[tuple[Any, ...]], now: float) -> None:
        """Lease each item's blocks from its ``first`` on, once those that lie below have come up."""

        def decide(batch: Batch, item: int, client: Client, content: tuple[Any, ...]) -> None:
            sequence, model_number, joined, first, timeout_s, trace = content
            model = self._ledger.model(client, model_number)
            hashes = split_hashes(joined)
            if not 0 <= first <= len(hashes):
                raise InvalidRequestError(f"fetch begins within the {len(hashes)} hashes, not at {first}")
            waiter = _Waiter(client, sequence, model, hashes, first, 0, now + timeout_s, trace, 0)

            def answer(hit: Answer) -> None:
                self._ledger.answer(batch, item, hit)

            index = self._ledger.index
            rows = self._directory.reachable(client, index.match(model.space, hashes))
            with index.shielded(rows, now=now):  # nobody may have leased those behind ``first``
                waiter.coming, raises = self.begin(client, model, hashes, rows, now)
            if not raises or timeout_s <= 0:
                self._lease(waiter, answer, now)
                return
            waiter.ticket = next(self._tickets)
            waiter.open_raises = len(raises)
            self._waiters[waiter.ticket] = waiter
            for each in raises:
                each.waiters.append(waiter)
            answer(("queued", waiter.ticket))

        self._fanout.each(batch, client_id, items, decide)

    def _deliver(self, waiter: _Waiter, now: float) -> None:
        del self._waiters[waiter.ticket]
        if self._ledger.clients.get(waiter.client.id) is not waiter.client:
            return  # it left

        def answer(hit: Answer) -> None:
            self._ledger.out.append(Grant(waiter.client.id, waiter.ticket, hit))

        self._lease(waiter, answer, now)

    def _lease(self, waiter: _Waiter, answer: Callable[[Answer], None], now: float) -> None:
        rows = self._directory.reachable(waiter.client, self._ledger.index.match(waiter.model.space, waiter.hashes))[
            waiter.first :
        ]
        asked = max(waiter.coming, len(rows))
        self._directory.lease_run(
            waiter.client, waiter.sequence, waiter.model, rows, asked, 0, waiter.trace, answer, now
        )

    def next_deadline(self) -> float | None:
        """Return when the first of those who wait must be answered, or None."""
        return min((waiter.deadline for waiter in self._waiters.values()), default=None)

    def expire(self, now: float) -> None:
        """Give those whose deadline has come what is there by now."""
        for waiter in [each for each in self._waiters.values() if each.deadline <= now]:
            self._deliver(waiter, now)

    def cancel(self, client: str, tickets: Sequence[int]) -> None:
        """Forget somebody who waits. What is on its way comes all the same."""
        for ticket in tickets:
            waiter = self._waiters.get(ticket)
            if waiter is not None and waiter.client.id == client:
                del self._waiters[ticket]

    def refuse_client(self, client: str, error: KvpoolError) -> None:
        """Answer all that a client waits for with an error."""
        for waiter in [each for each in self._waiters.values() if each.client.id == client]:
            del self._waiters[waiter.ticket]
            self._ledger.out.append(Grant(client, waiter.ticket, ("error", *error.to_wire())))

    def cancel_client(self, client: str) -> None:
        """Forget all that a client waits for."""
        self.cancel(client, [ticket for ticket, waiter in self._waiters.items() if waiter.client.id == client])
