"""What the pool asks of a device's lower tiers, carried out beside what lives on the device.

Operations come in order with those of the store (:mod:`kvpool.cache.store`), each awaited before the next:

============================================================ =======================================================
operation                                                    answer
============================================================ =======================================================
``("lower", tenant, fingerprint, entries)``                  for each whether it can be found below from now on
``("copy", tenant, fingerprint, entries)``                   the same; they are not about to be freed
``("hold", tenant, fingerprint, hashes)``                    ``True``: not to be pushed out until they are filled
``("unhold", tenant, fingerprint, hashes)``                  ``True``
``("forget", number, tenant, fingerprint, hashes or None)``  ``True``: begun; :meth:`LowerOperations.forgotten` waits
``("name", tenant, fingerprint, models)``                    ``True``: known from now on as these models'
============================================================ =======================================================

An entry is ``(id, hash, parent's hash or None)``, a model ``(name, revision, block bytes, limit bytes)``. What takes as
long as a disk takes is a method of its own.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any

from kvpool.cache.disk.folder import folder_at
from kvpool.cache.disk.leftovers import Leftovers
from kvpool.cache.disk.models_file import NotedModel
from kvpool.cache.disk.tier import DiskTier
from kvpool.cache.host_tier import HostTier
from kvpool.cache.key import CacheKey
from kvpool.cache.lower_tiers import LowerTiers
from kvpool.cache.source import Source
from kvpool.cache.store import DeviceStore
from kvpool.config import TierPlan
from kvpool.errors import InvalidatedError, InvariantError, KvpoolError, UnknownCacheError, ensure
from kvpool.memory.host import HostBackend
from kvpool.sizes import MIB

logger = logging.getLogger("kvpool.device")

KINDS = ("lower", "copy", "hold", "unhold", "forget", "name")
"""Operations that are not the store's."""

Entry = tuple[int, bytes, bytes | None]

_TRIES, _PAUSE_S = 10, 0.3
"""How often, and how long apart, a folder is tried that another process uses."""

_SCRUB_BYTES = 64 * MIB
"""Host memory that is zeroed in one step: about 10 ms."""


async def open_tiers(
    plan: TierPlan, page_bytes: int, on_gone: Callable[[Sequence[CacheKey]], None]
) -> tuple[LowerTiers, list[CacheKey]] | None:
    """Start the tiers that a plan names; returns them and what was found there, or None if it names none.

    Raises
    ------
    ConfigError
        If the URL of the disk tier cannot be used.
    """
    url = plan.disk_url if plan.write_policy != "none" else None
    if plan.host_bytes < page_bytes and url is None:
        return None
    for left in reversed(range(_TRIES)):
        host = HostTier(HostBackend(), plan.host_bytes, page_bytes) if plan.host_bytes >= page_bytes else None
        disk = None if url is None else DiskTier(folder_at(url), plan.disk_bytes)
        leftovers = None if disk is None or plan.pool_url is None else Leftovers(plan.pool_url, plan.devices)
        tiers = LowerTiers(host, disk, on_gone, leftovers)
        found = await tiers.start()
        if tiers.problem_cause != "locked" or not left:
            return tiers, found
        await tiers.close()  # the device of a pool before this one may be about to end
        await asyncio.sleep(_PAUSE_S)
    return None


class LowerOperations:
    """Moves caches between a device's memory and its lower tiers, by the ids and keys that the pool names.

    Parameters
    ----------
    store
        What lives on the device.
    tiers
        What lies below it.
    """

    def __init__(self, store: DeviceStore, tiers: LowerTiers) -> None:
        self._store = store
        self._tiers = tiers
        self._removals: dict[tuple[int, str, str], asyncio.Future[Any]] = {}

    async def carry_out(self, operation: tuple[Any, ...]) -> Any:
        """Carry out one operation; returns its answer, also where a bug keeps it from being carried out."""
        try:
            return await self._carry_out(operation)
        except Exception as error:  # those beside it were carried out, and their callers wait for the answers
            logger.exception("a device could not carry out %r", operation[0])
            return ("error", *InvariantError(f"{operation[0]} failed: {error}").to_wire())

    async def _carry_out(self, operation: tuple[Any, ...]) -> Any:
        match operation:
            case ("lower", tenant, fingerprint, entries):
                return await self._move_down(tenant, fingerprint, entries, self._tiers.demote)
            case ("copy", tenant, fingerprint, entries):
                return await self._move_down(tenant, fingerprint, entries, self._tiers.copy_ahead)
            case ("hold", tenant, fingerprint, hashes):
                self._tiers.hold([CacheKey(tenant, fingerprint, each) for each in hashes])
            case ("unhold", tenant, fingerprint, hashes):
                self._tiers.unhold([CacheKey(tenant, fingerprint, each) for each in hashes])
            case ("forget", number, tenant, fingerprint, hashes):
                removal = asyncio.ensure_future(self._remove(number, tenant, fingerprint, hashes))
                self._removal(number, tenant, fingerprint).set_result(removal)
            case ("name", tenant, fingerprint, models):
                self._tiers.name(tenant, fingerprint, [NotedModel(*model) for model in models])
        return True

    async def _remove(self, number: int, tenant: str, fingerprint: str, hashes: Sequence[bytes] | None) -> int:
        try:
            if hashes is None:
                return await self._tiers.remove_space(tenant, fingerprint)
            keys = [CacheKey(tenant, fingerprint, each) for each in hashes]
            return await self._tiers.remove(self._tiers.with_descendants(keys))
        finally:
            # What was dropped before has left its bytes. Each step does its part: this polls nothing.
            while not self._tiers.scrub(tenant, number, _SCRUB_BYTES):  # noqa: ASYNC110
                await asyncio.sleep(0)

    def _removal(self, *name: Any) -> asyncio.Future[Any]:
        return self._removals.setdefault(name, asyncio.get_running_loop().create_future())

    async def forgotten(self, number: int, tenant: str, fingerprint: str) -> Any:
        """Wait until a removal that was told by ``forget`` is sure; returns how many caches it was of, or an error."""
        name = (number, tenant, fingerprint)
        try:
            removal = await self._removal(*name)  # this call may have overtaken the operation
            return await removal
        except KvpoolError as error:
            return ("error", *error.to_wire())
        finally:
            self._removals.pop(name, None)

    async def _move_down(
        self, tenant: str, fingerprint: str, entries: Sequence[Entry], move: Callable[[list[Source]], Any]
    ) -> list[bool]:
        sources = [self._source(tenant, fingerprint, entry) for entry in entries]
        there = [entry[0] for entry, source in zip(entries, sources, strict=True) if source is not None]
        self._store.hold(there)
        try:
            moved = iter(await move([source for source in sources if source is not None]))
        finally:
            self._store.unhold(there)  # before the operation that evicts them, which would be refused
        return [source is not None and next(moved) for source in sources]

    def _source(self, tenant: str, fingerprint: str, entry: Entry) -> Source | None:
        """Return a cache's bytes by their address; None if it is not whole, or not to be kept.

        The caller holds it in the store before it awaits anything: compaction runs beside this on the same loop, and
        moves what nobody holds.
        """
        self._store.allocator.finish_move()  # one that the system interrupted has left bytes half-way
        cache_id, block_hash, parent = entry
        record = self._store.sealed(cache_id)
        if record is None:
            return None
        address = self._store.allocator.address + record.offset
        return Source(CacheKey(tenant, fingerprint, block_hash), parent, address, record.size_bytes)

    async def fill(self, tenant: str, fingerprint: str, entries: Sequence[tuple[int, bytes]]) -> list[bool | None]:
        """Bring content up into caches that are leased for it: ``(id, hash)``.

        For each True if it is there, False if it is gone, None if it lies below still but could not be had now. A cache
        whose bytes the store did not give in time keeps its memory until the store lets go of that.
        """
        keys = [CacheKey(tenant, fingerprint, block_hash) for _, block_hash in entries]
        base = self._store.allocator.address
        self._store.allocator.finish_move()
        try:
            records = [self._store.record(cache_id) for cache_id, _ in entries]
            targets = [
                Source(key, None, base + record.offset, record.size_bytes)
                for key, record in zip(keys, records, strict=True)
                if record is not None
            ]
            ensure(len(targets) == len(entries), "what is filled is leased until then")
            filled = await self._tiers.fill(targets)
            for (cache_id, _), target in zip(entries, targets, strict=True):
                self._hold_while_late(cache_id, target)
            return [
                True if there else (None if self._tiers.locate(key) is not None else False)
                for key, there in zip(keys, filled, strict=True)
            ]
        finally:
            self._tiers.unhold(keys)  # they were held since the pool decided on this

    async def persist(self, tenant: str, fingerprint: str, entries: Sequence[Entry]) -> list[Any]:
        """Write caches through to the disk; returns True or an error for each."""
        outcomes: list[Any] = [None] * len(entries)
        sources: list[Source] = []
        for position, entry in enumerate(entries):
            source = self._source(tenant, fingerprint, entry)
            if source is None:
                gone = InvalidatedError if self._store.record(entry[0]) is not None else UnknownCacheError
                error: KvpoolError = gone(
                    f"cache {entry[0]} is not to be kept any more: store it again if it is still wanted",
                    cache_id=entry[0],
                )
                outcomes[position] = ("error", *error.to_wire())
            else:
                sources.append(source)
        wanted = [position for position, outcome in enumerate(outcomes) if outcome is None]
        # Held beyond the client's lease, which may end with the client while a thread reads this.
        self._store.hold([entries[position][0] for position in wanted])
        try:
            errors = await self._tiers.write_through(sources)
        finally:
            for place, source in zip(wanted, sources, strict=True):
                self._hold_while_late(entries[place][0], source)
                self._store.unhold([entries[place][0]])
        for position, failed in zip(wanted, errors, strict=True):
            outcomes[position] = True if failed is None else ("error", *failed.to_wire())
        return outcomes

    async def save(
        self, tenant: str | None, since: int = 0, again: Sequence[tuple[str, str, bytes]] = ()
    ) -> dict[str, Any]:
        """Write what a tenant, or anyone, has in host memory through to the disk.

        With ``since``, the ``"mark"`` of a call before, only what has come there since that began, and what has the
        keys ``again``.

        Returns ``{"caches", "bytes"}``, what lies on disk then; ``"mark"``; ``"evicted_before"`` and ``"evicted"``, how
        many files the disk had ever dropped for want of room at the begin and the end of this; ``"refused"``, the keys,
        as tuples, of what the budget had no room for; ``"failed"`` and ``"error"``, the keys of what else could not be
        written, or was and cannot be counted on, and the first error.
        """
        before, mark = self._tiers.displaced, self._tiers.mark
        errors = await self._tiers.save(tenant, since, {CacheKey(*key) for key in again})
        entries, unsure = await self._tiers.on_disk(tenant)
        if unsure is not None:
            errors |= {entry.key: unsure for entry in entries}
            entries = []
        refused = [key for key, error in errors.items() if error.details.get("cause") == "budget"]
        for key in refused:
            del errors[key]
        return {
            "caches": len(entries),
            "bytes": sum(entry.size_bytes for entry in entries),
            "mark": mark,
            "evicted_before": before,
            "evicted": self._tiers.displaced,
            "refused": [tuple(key) for key in refused],
            "failed": [tuple(key) for key in errors],
            "error": next((("error", *error.to_wire()) for error in errors.values()), None),
        }

    def _hold_while_late(self, cache_id: int, source: Source) -> None:
        """Keep a cache in its place for as long as a call that hangs in the store uses its memory."""
        late = self._tiers.late(source)
        if late is not None:
            self._store.hold([cache_id])
            late.add_done_callback(lambda _: self._store.unhold([cache_id]))
