"""What is in the pool: look-ups and seals.

A key is published at the moment of the decision, before the device has answered. That is safe because operations
reach a device in the order of the decisions: a lease that follows a seal is applied after it, and a device leases
nothing that is not sealed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from kvpool.cache.key import check_hash, split_hashes
from kvpool.cache.store import FREED, RELEASED
from kvpool.errors import CacheStateError, InvalidRequestError, SealedError, UnknownCacheError
from kvpool.pool.backing import check_sealable
from kvpool.pool.client import Client
from kvpool.pool.fanout import Fanout, nothing_more
from kvpool.pool.instructions import Answer, Batch
from kvpool.pool.leases import Leases
from kvpool.pool.ledger import Ledger
from kvpool.pool.model import Model

BringUp = Callable[[Client, Model, Sequence[bytes], Sequence[int], float], tuple[int, Any]]
"""Begins to bring up what lies below behind a chain's leading run; returns how many blocks are on their way."""


class Directory:
    """Finds sealed caches by their keys, and enters new ones.

    Parameters
    ----------
    ledger
        The pool's books.
    fanout
        The way to the devices.
    leases
        Told of leases that end with a seal.
    """

    def __init__(self, ledger: Ledger, fanout: Fanout, leases: Leases) -> None:
        self._ledger = ledger
        self._fanout = fanout
        self._leases = leases
        self.bring_up: BringUp | None = None
        """Set where devices have lower tiers."""

    def look_up(self, batch: Batch, client_id: str, items: Sequence[tuple[Any, ...]], now: float) -> None:
        """Find and lease the longest resident run of each item's hashes."""
        self._fanout.each(batch, client_id, items, partial(self._look_up, now))

    def _look_up(self, now: float, batch: Batch, item: int, client: Client, content: tuple[Any, ...]) -> None:
        sequence, model_number, joined, trace = content
        ledger = self._ledger
        model = ledger.model(client, model_number)
        hashes = split_hashes(joined)
        rows = self.reachable(client, ledger.index.look_up(model.space, hashes, now=now))
        ledger.counters.lookups += 1
        coming = 0
        if self.bring_up is not None and len(rows) < len(hashes):
            # Guarded, so that making room for what comes up never cuts the chain in front of it.
            with ledger.index.shielded(rows, now=now):
                coming, _ = self.bring_up(client, model, hashes, rows, now)

        def answer(hit: Answer) -> None:
            ledger.answer(batch, item, hit)

        self.lease_run(client, sequence, model, rows, len(hashes) - coming, coming, trace, answer, now)

    def reachable(self, client: Client, rows: list[int]) -> list[int]:
        """Return the leading run of rows whose bytes lie where the client can map them: not on another host."""
        device, devices = self._ledger.index.device, set(client.devices)
        for position, row in enumerate(rows):
            if device[row] not in devices:
                return rows[:position]
        return rows

    def lease_run(
        self,
        client: Client,
        sequence: int,
        model: Model,
        rows: Sequence[int],
        asked: int,
        coming: int,
        trace: Any,
        answer: Callable[[Answer], None],
        now: float,
    ) -> None:
        """Lease these rows of a chain, and answer ``("hit", ids, devices, places, sizes, coming)``.

        ``asked`` is how many blocks they were looked up among, for the counters.
        """
        ledger = self._ledger
        index = ledger.index
        if rows and ledger.quotas.active:
            # What others are guaranteed may be cached in, not leased: from there on nothing is hit.
            leasable = ledger.quotas.leasable_run(model.space, client.host, rows)
            if leasable < len(rows):
                rows, coming = rows[:leasable], 0
        if not rows:
            self._count(model, asked, 0)
            answer(("hit", [], [], [], [], coming))
            return
        index.pin(rows, now=now)
        ids = [index.id_of(row) for row in rows]
        devices = [index.device[row] for row in rows]
        # Blocks all have the size that their model names; of whole caches only the books tell it.
        sizes = [index.asked_bytes[row] for row in rows] if model.block_bytes is None else []
        self._fanout.ask(
            ids,
            rows,
            lambda part, _positions: ("lease", client.id, sequence, part),
            partial(
                self._looked_up,
                answer,
                client,
                sequence,
                model,
                asked,
                coming,
                ids,
                devices,
                sizes,
                ledger.invalidations,
            ),
            now,
            [trace] * len(ids),
        )

    def _looked_up(
        self,
        answer: Callable[[Answer], None],
        client: Client,
        sequence: int,
        model: Model,
        asked: int,
        coming: int,
        ids: list[int],
        devices: list[int],
        sizes: list[int],
        invalidations: int,
        places: list[Any],
        now: float,
    ) -> None:
        leased = [place is not None and place[0] != "error" for place in places]
        valid = leased
        if self._ledger.invalidations != invalidations:  # what is void by now is no hit, though it is leased
            valid = [ok and not self._is_void(cache_id) for cache_id, ok in zip(ids, leased, strict=True)]
        hits = valid.index(False) if False in valid else len(valid)
        if hits < len(ids):
            # Something in the run is gone (its device, or the client itself). What is leased from there on is no hit.
            self._leases.not_given(ids[hits:], places[hits:], now)
            behind = [ids[position] for position in range(hits, len(ids)) if leased[position]]
            self._leases.release_ids(client, sequence, behind, nothing_more, now)
        self._count(model, asked, hits)
        answer(("hit", ids[:hits], devices[:hits], places[:hits], sizes[:hits], coming if hits == len(ids) else 0))

    def _count(self, model: Model, asked: int, hits: int) -> None:
        """Count a look-up's blocks. Both at once: what is looked up and not hit is a miss, and misses never go down."""
        for figures in (self._ledger.counters, model):
            figures.blocks_looked_up += asked
            figures.blocks_hit += hits

    def _is_void(self, cache_id: int) -> bool:
        row = self._ledger.index.live_row(cache_id)
        return row >= 0 and self._ledger.index.is_void(row)

    def contains(self, tenant: str, model: str | int, joined: bytes) -> dict[str, Any]:
        """Return how much of a chain is resident and where, without lease; it counts as no use.

        ``{"model": number, "blocks": n, "devices": {device name: blocks}, "hosts": {host: blocks}}``, for the ``n``
        leading hashes that are resident.

        Raises
        ------
        InvalidRequestError
            If the tenant has no such model, or several of that name.
        """
        ledger = self._ledger
        found = ledger.find_models(model, tenant)
        if len(found) > 1:
            each = ", ".join(f"{m.number} (revision {m.revision!r}, fingerprint {m.fingerprint})" for m in found[:8])
            raise InvalidRequestError(
                f"{len(found)} models of tenant {tenant!r} are named {model!r}: name one by its number "
                f"(--model=#{found[0].number} on the command line), of {each}",
                asked=model,
            )
        rows = ledger.index.match(found[0].space, split_hashes(joined))
        devices: dict[str, int] = {}
        hosts: dict[str, int] = {}
        for row in rows:
            device = ledger.devices[ledger.index.device[row]]
            devices[device.name] = devices.get(device.name, 0) + 1
            hosts[device.host] = hosts.get(device.host, 0) + 1
        return {"model": found[0].number, "blocks": len(rows), "devices": devices, "hosts": hosts}

    def seal(self, batch: Batch, client_id: str, items: Sequence[tuple[Any, ...]], finish: bool, now: float) -> None:
        """Make caches immutable and publish their keys; with ``finish`` also release them."""
        self._fanout.each(batch, client_id, items, partial(self._seal, finish, now))

    def _seal(
        self, finish: bool, now: float, batch: Batch, item: int, client: Client, content: tuple[Any, ...]
    ) -> None:
        sequence, model_number, ids, hashes, trace = content
        ledger = self._ledger
        index = ledger.index
        model = ledger.model(client, model_number)
        if len(set(ids)) != len(ids) or len(hashes) != len(ids):
            raise InvalidRequestError(
                f"a seal names each cache once, and its key: got {len(hashes)} keys for {len(ids)} caches, "
                f"{len(set(ids))} of them different",
                asked=len(ids),
            )
        rows = [ledger.row(client, cache_id) for cache_id in ids]
        for cache_id, row, key in zip(ids, rows, hashes, strict=True):
            self._check_sealable(client, model, cache_id, row, key)
        outcomes: list[Any] = [True] * len(ids)
        keys: list[bytes | None] = [None] * len(ids)
        fresh: list[int] = []
        for position, (row, key) in enumerate(zip(rows, hashes, strict=True)):
            if index.is_sealed(row):
                continue  # with this very key: sealing again changes nothing
            elder = -1 if key is None else index.find(model.space, key)
            if elder >= 0:
                index.adopt(row, elder)
                # The first sealed cache of a key stays. This one stays unsealed, so it goes with its lease.
                outcomes[position] = "duplicate"
                ledger.counters.duplicates += 1
                continue
            if key is None:
                index.seal(row)
            else:
                index.publish(row, key)
            del ledger.writers[ids[position]]
            if key is not None:
                ledger.note_stored((row,))
            keys[position] = key
            fresh.append(position)
        if finish:
            self._fanout.ask(
                ids,
                rows,
                lambda part, positions: ("finish", client.id, sequence, part, [keys[p] for p in positions]),
                partial(self._finished, batch, item, ids, fresh, outcomes),
                now,
                [trace] * len(ids),
            )
        else:
            self._fanout.ask(
                [ids[position] for position in fresh],
                [rows[position] for position in fresh],
                lambda part, positions: ("seal", client.id, sequence, part, [keys[fresh[p]] for p in positions]),
                partial(self._sealed, batch, item, ids, fresh, outcomes),
                now,
                [trace] * len(fresh),
            )

    def _check_sealable(self, client: Client, model: Model, cache_id: int, row: int, key: bytes | None) -> None:
        index = self._ledger.index
        if key is not None:
            check_hash(key)
        self._ledger.check_not_void(row, cache_id, key)
        if index.is_sealed(row):
            known = index.key_of(row)
            if known != key:
                raise SealedError(
                    f"cache {cache_id} is sealed already, {_key_text(known)}; asked to seal it {_key_text(key)}: a "
                    f"sealed cache keeps its key, or none. Copy it into a new cache and seal that {_key_text(key)}",
                    cache_id=cache_id,
                )
        elif self._ledger.writers[cache_id].client != client.id:
            raise UnknownCacheError(f"cache {cache_id} is being written by another client", cache_id=cache_id)
        else:
            check_sealable(self._ledger, cache_id)
        if key is None:
            return
        if index.space_of(row) != model.space:
            raise CacheStateError(f"cache {cache_id} was made for another model: seal it through that one")
        # Who looks a key up takes the size from the model, or from its own cache of that key: it must be the same.
        size_bytes = index.asked_bytes[row]
        if model.block_bytes is not None and size_bytes != model.block_bytes:
            raise SealedError(
                f"cache {cache_id} has {size_bytes} bytes, but model {model.name!r} has blocks of {model.block_bytes}: "
                "only caches of that size can have a key in it",
                cache_id=cache_id,
            )
        elder = index.find(model.space, key)
        if elder >= 0 and index.asked_bytes[elder] != size_bytes:
            raise SealedError(
                f"key {key.hex()} is that of a cache of {index.asked_bytes[elder]} bytes already; cache {cache_id} has "
                f"{size_bytes}: the same key means the same bytes",
                cache_id=cache_id,
            )

    def _sealed(
        self,
        batch: Batch,
        item: int,
        ids: list[int],
        fresh: list[int],
        outcomes: list[Any],
        sealed: list[Any],
        now: float,
    ) -> None:
        for position, outcome in zip(fresh, sealed, strict=True):
            if outcome is not True:  # the client died meanwhile, and the cache with it
                outcomes[position] = outcome
                self._ledger.forget(ids[position])
        self._ledger.answer(batch, item, ("sealed", outcomes))
        if any(outcome is not True for outcome in sealed):
            self._leases.memory_freed(now)

    def _finished(
        self,
        batch: Batch,
        item: int,
        ids: list[int],
        fresh: list[int],
        outcomes: list[Any],
        codes: list[Any],
        now: float,
    ) -> None:
        for position, code in enumerate(codes):
            if code not in (FREED, RELEASED):
                outcomes[position] = code
        for position in fresh:
            if codes[position] not in (FREED, RELEASED):
                self._ledger.forget(ids[position])
        self._leases.settle(ids, codes, now)
        self._ledger.answer(batch, item, ("sealed", outcomes))
        self._leases.memory_freed(now)


def _key_text(key: bytes | None) -> str:
    return f"with key {key.hex()}" if key is not None else "without a key"
