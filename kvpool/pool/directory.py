"""What is in the pool and who holds it: look-ups, sealing, release, pins, and the end of clients and devices.

A key is published at the moment of the decision, before the device has answered. That is safe because operations
reach a device in the order of the decisions: a lease that follows a seal is applied after it, and a device leases
nothing that is not sealed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from kvpool.cache.store import FREED, RELEASED
from kvpool.errors import CacheStateError, KvpoolError, NotSealedError, SealedError
from kvpool.pool.allocation import split_hashes
from kvpool.pool.instructions import Answer, Batch
from kvpool.pool.ledger import Client, Ledger

PINNER = "pin:"
"""Prefix of the pseudo-client that holds what a tenant pinned by word. It has no token, so nobody can connect as it."""


@dataclass(slots=True, eq=False)
class _Gather:
    """Answers of several devices for one item, put together at the end."""

    answers: list[Any]
    done: Callable[[list[Any], float], None]
    open_operations: int = 0


class Directory:
    """Decides on everything that needs no new memory.

    Parameters
    ----------
    ledger
        The pool's books.
    memory_freed
        Called when something became evictable or free, so that waiting requests are tried again.
    """

    def __init__(self, ledger: Ledger, memory_freed: Callable[[float], None]) -> None:
        self._ledger = ledger
        self._memory_freed = memory_freed
        self._pinners: set[tuple[str, int]] = set()

    def _each(
        self,
        batch: Batch,
        client_id: str,
        items: Sequence[tuple[Any, ...]],
        decide: Callable[[Batch, int, Client, tuple[Any, ...]], None],
    ) -> None:
        client = self._ledger.client(client_id)
        for item, content in enumerate(items):
            try:
                decide(batch, item, client, content)
            except KvpoolError as error:
                self._ledger.answer(batch, item, ("error", *error.to_wire()))

    def _ask(
        self,
        ids: Sequence[int],
        rows: Sequence[int],
        operation: Callable[[list[int], list[int]], tuple[Any, ...]],
        done: Callable[[list[Any], float], None],
        now: float,
    ) -> None:
        """Send one operation to each device concerned; ``done`` gets the answers in the order of ``ids``.

        ``operation`` is given the ids of one device and their positions.
        """
        if not ids:
            done([], now)
            return
        index = self._ledger.index
        by_device: dict[int, list[int]] = {}
        for position, row in enumerate(rows):
            by_device.setdefault(index.device[row], []).append(position)
        gather = _Gather([None] * len(ids), done, len(by_device))
        for device, positions in by_device.items():
            self._ledger.send(
                device,
                operation([ids[position] for position in positions], positions),
                partial(self._gathered, gather, positions),
            )

    def _gathered(self, gather: _Gather, positions: list[int], answer: Answer, now: float) -> None:
        gather.open_operations -= 1
        whole = isinstance(answer, tuple) and answer[:1] == ("error",)
        for part, position in enumerate(positions):
            gather.answers[position] = answer if whole else answer[part]
        if not gather.open_operations:
            gather.done(gather.answers, now)

    # -- look-ups -------------------------------------------------------------------------------------------------

    def look_up(self, batch: Batch, client_id: str, items: Sequence[tuple[Any, ...]], now: float) -> None:
        """Find and lease the longest resident run of each item's hashes."""
        self._each(batch, client_id, items, partial(self._look_up, now))

    def _look_up(self, now: float, batch: Batch, item: int, client: Client, content: tuple[Any, ...]) -> None:
        sequence, model_number, joined, _trace = content
        ledger = self._ledger
        index, counters = ledger.index, ledger.counters
        model = ledger.model(client, model_number)
        hashes = split_hashes(joined)
        rows = index.match(model.space, hashes)
        reachable = set(client.devices)
        for position, row in enumerate(rows):
            if index.device[row] not in reachable:  # its bytes lie on another host, where this client cannot map them
                rows = rows[:position]
                break
        counters.lookups += 1
        counters.blocks_looked_up += len(hashes)
        if not rows:
            ledger.answer(batch, item, ("hit", [], [], []))
            return
        index.pin(rows, now=now)
        ids = [index.id_of(row) for row in rows]
        devices = [index.device[row] for row in rows]
        self._ask(
            ids,
            rows,
            lambda part, _positions: ("lease", client.id, sequence, part),
            partial(self._looked_up, batch, item, client, sequence, ids, devices),
            now,
        )

    def _looked_up(
        self,
        batch: Batch,
        item: int,
        client: Client,
        sequence: int,
        ids: list[int],
        devices: list[int],
        places: list[Any],
        now: float,
    ) -> None:
        leased = [place is not None and place[0] != "error" for place in places]
        hits = leased.index(False) if False in leased else len(leased)
        if hits < len(ids):
            # Something in the run is gone (its device, or the client itself). What was leased behind it is no hit.
            self._release(client, sequence, [ids[p] for p in range(hits, len(ids)) if leased[p]], _nothing_more, now)
            for position in range(len(ids) - 1, hits - 1, -1):
                if not leased[position]:
                    self._ledger.forget(ids[position])
        self._ledger.counters.blocks_hit += hits
        self._ledger.answer(batch, item, ("hit", ids[:hits], devices[:hits], places[:hits]))

    # -- seal -----------------------------------------------------------------------------------------------------

    def seal(
        self, batch: Batch, client_id: str, items: Sequence[tuple[Any, ...]], finish: bool, now: float
    ) -> None:
        """Make caches immutable and publish their keys; with ``finish`` also release them."""
        self._each(batch, client_id, items, partial(self._seal, finish, now))

    def _seal(
        self, finish: bool, now: float, batch: Batch, item: int, client: Client, content: tuple[Any, ...]
    ) -> None:
        sequence, model_number, ids, hashes, _trace = content
        ledger = self._ledger
        index = ledger.index
        model = ledger.model(client, model_number)
        rows = [ledger.row(client, cache_id) for cache_id in ids]
        for cache_id, row, key in zip(ids, rows, hashes, strict=True):
            known = index.key_of(row)
            if index.is_sealed(row) and known != key:
                raise SealedError(
                    f"cache {cache_id} is sealed already, with key {known.hex() if known else None}; asked for "
                    f"{key.hex() if key else None}: a sealed cache keeps its key",
                    cache_id=cache_id,
                )
            if key is not None and index.space_of(row) != model.space:
                raise CacheStateError(f"cache {cache_id} was made for another model than {model.name!r}")
        answers: list[Any] = [True] * len(ids)
        own: list[int] = []
        for position, (row, key) in enumerate(zip(rows, hashes, strict=True)):
            elder = index.find(model.space, key) if key is not None else -1
            if elder >= 0 and elder != row:
                # The first sealed cache of a key stays. This one stays unsealed, so it goes with its lease.
                answers[position] = "duplicate"
                ledger.counters.duplicates += 1
                continue
            if key is None:
                index.seal(row)
            elif elder < 0:
                index.publish(row, key)
            own.append(position)
        finished = partial(self._sealed, batch, item, client, sequence, ids, own, answers, finish)
        self._ask(
            [ids[position] for position in own],
            [rows[position] for position in own],
            lambda part, positions: ("seal", client.id, sequence, part, [hashes[own[p]] for p in positions]),
            finished,
            now,
        )

    def _sealed(
        self,
        batch: Batch,
        item: int,
        client: Client,
        sequence: int,
        ids: list[int],
        own: list[int],
        answers: list[Any],
        finish: bool,
        sealed: list[Any],
        now: float,
    ) -> None:
        for position, outcome in zip(own, sealed, strict=True):
            if outcome is not True:
                answers[position] = outcome
                self._ledger.forget(ids[position])
        answer = ("sealed", answers)
        if not finish:
            self._ledger.answer(batch, item, answer)
            return
        self._release(client, sequence, ids, lambda _codes, _now: self._ledger.answer(batch, item, answer), now)

    # -- release --------------------------------------------------------------------------------------------------

    def release(self, batch: Batch, client_id: str, items: Sequence[tuple[Any, ...]], now: float) -> None:
        """End one lease on each of the ids. The items of a batch go to the devices in one operation each."""
        client = self._ledger.client(client_id)
        all_ids: list[int] = []
        ends: list[tuple[int, int]] = []
        sequence = -1
        for item, (sequence, ids, _trace) in enumerate(items):
            try:
                for cache_id in ids:
                    self._ledger.row(client, cache_id)
            except KvpoolError as error:
                self._ledger.answer(batch, item, ("error", *error.to_wire()))
                continue
            all_ids += ids
            ends.append((item, len(all_ids)))

        def released(codes: list[Any], _now: float) -> None:
            start = 0
            for item, end in ends:
                self._ledger.answer(batch, item, ("released", codes[start:end]))
                start = end

        self._release(client, sequence, all_ids, released, now)

    def _release(
        self,
        client: Client,
        sequence: int,
        ids: list[int],
        done: Callable[[list[Any], float], None],
        now: float,
    ) -> None:
        index = self._ledger.index
        known = [position for position, cache_id in enumerate(ids) if index.live_row(cache_id) >= 0]
        live = [ids[position] for position in known]

        def released(codes: list[Any], now: float) -> None:
            self._settle(live, codes, now)
            outcomes: list[Any] = [True] * len(ids)  # a cache that is gone, with its device or client, is released
            for position, code in zip(known, codes, strict=True):
                if code not in (FREED, RELEASED):
                    outcomes[position] = code
            done(outcomes, now)
            self._memory_freed(now)

        self._ask(
            live,
            [index.live_row(cache_id) for cache_id in live],
            lambda part, _positions: ("release", client.id, sequence, part),
            released,
            now,
        )

    def _settle(self, ids: Sequence[int], codes: Sequence[Any], now: float) -> None:
        """Enter ended leases into the books, the last id first, so that a chain's tail becomes evictable first."""
        index = self._ledger.index
        unpinned: list[int] = []
        for cache_id, code in zip(reversed(ids), reversed(codes), strict=True):
            row = index.live_row(cache_id)
            if row < 0:
                continue
            if code == FREED:
                index.remove(row)
            elif code == RELEASED:
                unpinned.append(row)
        if unpinned:
            index.unpin(unpinned, now=now)

    # -- pins -----------------------------------------------------------------------------------------------------

    def pin(self, batch: Batch, client_id: str, items: Sequence[tuple[Any, ...]], held: bool, now: float) -> None:
        """Hold sealed caches by the tenant's word (``held``), beyond any lease, or stop holding them."""
        self._each(batch, client_id, items, partial(self._pin, held, now))

    def _pin(self, held: bool, now: float, batch: Batch, item: int, client: Client, content: tuple[Any, ...]) -> None:
        sequence, ids, _trace = content
        ledger = self._ledger
        index = ledger.index
        rows = [ledger.row(client, cache_id) for cache_id in ids]
        pinner = PINNER + client.tenant
        if not held:
            finish = partial(self._unpinned, batch, item)
            self._release(Client(pinner, client.tenant, client.host, []), sequence, ids, finish, now)
            return
        for cache_id, row in zip(ids, rows, strict=True):
            if not index.is_sealed(row):
                raise NotSealedError(f"cache {cache_id} is not sealed; only sealed caches are pinned", cache_id=cache_id)
        for device in {index.device[row] for row in rows}:
            if (pinner, device) not in self._pinners:
                self._pinners.add((pinner, device))
                ledger.send(device, ("connect", pinner, client.tenant, ""), _nothing_more)
        index.pin(rows, now=now)
        self._ask(
            ids,
            rows,
            lambda part, _positions: ("lease", pinner, sequence, part),
            lambda places, _now: ledger.answer(batch, item, ("pinned", [place is not None for place in places])),
            now,
        )

    def _unpinned(self, batch: Batch, item: int, outcomes: list[Any], now: float) -> None:
        self._ledger.answer(batch, item, ("released", outcomes))

    # -- ends -----------------------------------------------------------------------------------------------------

    def leases_ended(self, ended: Sequence[int], freed: Sequence[int], now: float) -> None:
        """Enter into the books that leases on one device have ended with their client."""
        gone = set(freed)
        self._settle(ended, [FREED if cache_id in gone else RELEASED for cache_id in ended], now)
        self._memory_freed(now)

    def device_lost(self, number: int, reason: str, now: float) -> None:
        """Take a lost device and all that was only there off the books."""
        device = self._ledger.devices[number]
        device.lost = reason
        self._ledger.index.remove_device(number)
        self._pinners = {pair for pair in self._pinners if pair[1] != number}
        self._memory_freed(now)


def _nothing_more(answer: Answer, now: float) -> None:
    """Continue with nothing: the operation's outcome changes no decision."""
