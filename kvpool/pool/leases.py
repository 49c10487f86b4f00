"""Who holds what: releases, pins, and the end of clients and devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from kvpool.cache.store import FREED, RELEASED
from kvpool.errors import CacheStateError, CapacityError, KvpoolError, NotSealedError
from kvpool.pool.client import Client
from kvpool.pool.fanout import Fanout, nothing_more
from kvpool.pool.instructions import Batch
from kvpool.pool.journal import Happened
from kvpool.pool.ledger import Ledger
from kvpool.sizes import format_size

PINNER = "pin:"
"""Prefix of the pseudo-client that holds what a tenant pinned by word. It has no token, so nobody can connect as it."""

RAISER = "raise:"
"""Prefix of the pseudo-client that holds what comes up for a tenant from the tiers below, until it is there."""


class Leases:
    """Ends leases, and holds what is pinned by word.

    Parameters
    ----------
    ledger
        The pool's books.
    fanout
        The way to the devices.
    memory_freed
        Called when something became evictable or free, so that waiting requests are tried again.
    """

    def __init__(self, ledger: Ledger, fanout: Fanout, memory_freed: Callable[[float], None]) -> None:
        self._ledger = ledger
        self._fanout = fanout
        self.memory_freed = memory_freed
        self._pinners: set[tuple[str, int]] = set()
        self.pinned: dict[int, int] = {}
        """By id, how often a cache is pinned by word."""

    # -- release --------------------------------------------------------------------------------------------------

    def release(self, batch: Batch, client_id: str, items: Sequence[tuple[Any, ...]], now: float) -> None:
        """End one lease on each of the ids. The items of a batch go to the devices in one operation each."""
        client = self._ledger.client(client_id)
        all_ids: list[int] = []
        traces: list[Any] = []
        ends: list[tuple[int, int]] = []
        for item, (_sequence, ids, trace) in enumerate(items):
            try:
                for cache_id in ids:
                    self._ledger.row(client, cache_id)
            except KvpoolError as error:
                self._ledger.answer(batch, item, ("error", *error.to_wire()))
                continue
            all_ids += ids
            traces += [trace] * len(ids)
            ends.append((item, len(all_ids)))

        def released(codes: list[Any], _now: float) -> None:
            start = 0
            for item, end in ends:
                self._ledger.answer(batch, item, ("released", codes[start:end]))
                start = end

        self.release_ids(client, items[0][0], all_ids, released, now, traces)

    def release_ids(
        self,
        client: Client,
        sequence: int,
        ids: list[int],
        done: Callable[[list[Any], float], None],
        now: float,
        traces: Sequence[Any] = (),
    ) -> None:
        """End one lease on each id, for as many traces or none; ``done`` gets True or an error for each."""
        index = self._ledger.index
        known = [position for position, cache_id in enumerate(ids) if index.live_row(cache_id) >= 0]
        live = [ids[position] for position in known]

        def released(codes: list[Any], now: float) -> None:
            self.settle(live, codes, now)
            outcomes: list[Any] = [True] * len(ids)  # a cache that is gone, with its device or client, is released
            for position, code in zip(known, codes, strict=True):
                if code not in (FREED, RELEASED):
                    outcomes[position] = code
            done(outcomes, now)
            self.memory_freed(now)

        self._fanout.ask(
            live,
            [index.live_row(cache_id) for cache_id in live],
            lambda part, _positions: ("release", client.id, sequence, part),
            released,
            now,
            [traces[position] for position in known] if traces else (),
        )

    def settle(self, ids: Sequence[int], codes: Sequence[Any], now: float) -> None:
        """Enter ended leases into the books, the last id first, so that a chain's tail becomes evictable first."""
        index = self._ledger.index
        unpinned: list[int] = []
        for cache_id, code in zip(reversed(ids), reversed(codes), strict=True):
            row = index.live_row(cache_id)
            if row < 0:
                continue
            if code == FREED:
                self._ledger.forget(cache_id)
            elif code == RELEASED:
                unpinned.append(row)
        if unpinned:
            index.unpin(unpinned, now=now)

    def not_given(self, ids: Sequence[int], places: Sequence[Any], now: float) -> None:
        """Correct the books where leases were refused: the cache is gone (None), or its holder is (an error)."""
        refused = [(i, place) for i, place in zip(ids, places, strict=True) if place is None or place[0] == "error"]
        codes = [FREED if place is None else RELEASED for _, place in refused]
        self.settle([cache_id for cache_id, _ in refused], codes, now)

    # -- pins -----------------------------------------------------------------------------------------------------

    def pin(self, batch: Batch, client_id: str, items: Sequence[tuple[Any, ...]], held: bool, now: float) -> None:
        """Hold sealed caches by the tenant's word (``held``), beyond any lease, or stop holding them."""
        self._fanout.each(batch, client_id, items, partial(self._pin, held, now))

    def _pin(self, held: bool, now: float, batch: Batch, item: int, client: Client, content: tuple[Any, ...]) -> None:
        sequence, ids, trace = content
        ledger = self._ledger
        index = ledger.index
        rows = [ledger.row(client, cache_id) for cache_id in ids]
        pinner = PINNER + client.tenant
        if not held:
            for cache_id, row in zip(ids, rows, strict=True):
                if (pinner, index.device[row]) not in self._pinners:
                    raise CacheStateError(f"cache {cache_id} is not pinned", cache_id=cache_id)
            finish = partial(self._unpinned, batch, item, ids)
            holder = Client(pinner, client.tenant, client.host, [])
            self.release_ids(holder, sequence, ids, finish, now, [trace] * len(ids))
            return
        for cache_id, row in zip(ids, rows, strict=True):
            ledger.check_not_void(row, cache_id)
            if not index.is_sealed(row):
                raise NotSealedError(
                    f"cache {cache_id} is not sealed; only sealed caches are pinned", cache_id=cache_id
                )
        self._check_leasable(client, rows)
        for device in {index.device[row] for row in rows}:
            if (pinner, device) not in self._pinners:
                self._pinners.add((pinner, device))
                ledger.send(device, ("connect", pinner, client.tenant, ""), nothing_more)
        index.pin(rows, now=now)
        self._fanout.ask(
            ids,
            rows,
            lambda part, _positions: ("lease", pinner, sequence, part),
            partial(self._pinned, batch, item, ids),
            now,
            [trace] * len(ids),
        )

    def _check_leasable(self, client: Client, rows: Sequence[int]) -> None:
        """Raise :class:`~kvpool.errors.CapacityError` if others' guarantees leave no room to hold these caches."""
        ledger = self._ledger
        if not ledger.quotas.active:
            return
        size_bytes = sum(ledger.index.size_bytes[row] for row in set(rows) if not ledger.index.pins[row])
        for space in {ledger.index.space_of(row) for row in rows}:  # all together, as if they were one model's
            leasable = ledger.quotas.leasable_bytes(ledger.quotas.account(space), client.host)
            if leasable < size_bytes:
                raise CapacityError(
                    f"asked to pin {format_size(size_bytes)}, but what others are guaranteed leaves "
                    f"{format_size(leasable)} to hold: pin less, or release leases (see 'kvpool quota')",
                    asked_bytes=size_bytes,
                    leasable_bytes=leasable,
                )

    def _pinned(self, batch: Batch, item: int, ids: list[int], places: list[Any], now: float) -> None:
        self.not_given(ids, places, now)
        held = [place is not None and place[0] != "error" for place in places]
        for cache_id, is_held in zip(ids, held, strict=True):
            if is_held:
                self.pinned[cache_id] = self.pinned.get(cache_id, 0) + 1
        self._ledger.answer(batch, item, ("pinned", held))

    def _unpinned(self, batch: Batch, item: int, ids: list[int], outcomes: list[Any], now: float) -> None:
        self._count_unpinned([cache_id for cache_id, outcome in zip(ids, outcomes, strict=True) if outcome is True])
        self._ledger.answer(batch, item, ("released", outcomes))

    def _count_unpinned(self, ids: Sequence[int]) -> None:
        for cache_id in ids:
            left = self.pinned.pop(cache_id, 0) - 1
            if left > 0:
                self.pinned[cache_id] = left

    def forget_pinner(self, pinner: str) -> list[int]:
        """Forget that a pseudo-client is known to devices, and return which: its pins are about to be ended there."""
        devices = sorted(number for name, number in self._pinners if name == pinner)
        self._pinners.difference_update((pinner, number) for number in devices)
        return devices

    def pins_ended(self, ended: Sequence[int], freed: Sequence[int], now: float) -> None:
        """Enter into the books that a device ended pins, each id as often as it was pinned."""
        self._count_unpinned(ended)
        self.leases_ended(ended, freed, now)

    # -- ends -----------------------------------------------------------------------------------------------------

    def leases_ended(self, ended: Sequence[int], freed: Sequence[int], now: float) -> None:
        """Enter into the books that leases on one device have ended with their client."""
        gone = set(freed)
        self.settle(ended, [FREED if cache_id in gone else RELEASED for cache_id in ended], now)
        self.memory_freed(now)

    def device_lost(self, number: int, reason: str) -> None:
        """Take a lost device and all that was only there off the books. Quotas are to follow, then those who wait."""
        device = self._ledger.devices[number]
        device.lost = reason
        index = self._ledger.index
        index.remove_device(number)
        for cache_id in [cache_id for cache_id in self._ledger.writers if index.live_row(cache_id) < 0]:
            del self._ledger.writers[cache_id]
        self._pinners = {pair for pair in self._pinners if pair[1] != number}
        self.pinned = {cache_id: n for cache_id, n in self.pinned.items() if index.live_row(cache_id) >= 0}
        if self._ledger.journal.open:
            self._ledger.journal.add(Happened("device_lost", device=device.name, reason=reason))
