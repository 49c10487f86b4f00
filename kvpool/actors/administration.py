"""The verbs of administration, as methods of the pool actor.

Whoever has the bare handle speaks as the operator: ``tenant`` None means all tenants. Given a tenant, a method sees and
touches nothing of another's; that is how :class:`kvpool.CachePool` calls them, with its own. (Who can get the handle at
all is Ray's authentication.) The eviction policy and the warm reserve are the whole pool's, and so are
:meth:`Administration.set_policy` and :meth:`Administration.trim`: neither removes or shows content.

Everything goes in and out as built-in types, and errors are raised as their own classes.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Sequence
from typing import Any

from kvpool.actors.executor import Executor
from kvpool.actors.fleet import Fleet
from kvpool.actors.pool_telemetry import PoolTelemetry
from kvpool.actors.protocol import errors_of
from kvpool.errors import DeviceLostError, InvalidRequestError, from_wire
from kvpool.pool.instructions import (
    Batch,
    EvictRequested,
    FlushRequested,
    InvalidateRequested,
    QuotaSet,
    RevokeRequested,
)
from kvpool.pool.leases import PINNER
from kvpool.pool.listing import list_caches, list_models
from kvpool.pool.state import PoolState
from kvpool.pool.waiting import list_waiting
from kvpool.sizes import MIB
from kvpool.telemetry.context import Carrier, is_carrier

_COMPACT_BYTES = 1 * MIB
"""Bytes that a device moves in one step of compaction, for which operations behind it wait."""


class Administration:
    """What an operator may do with a pool; a base of :class:`~kvpool.actors.pool_actor.PoolActor`."""

    _state: PoolState
    _executor: Executor
    _fleet: Fleet
    _telemetry: PoolTelemetry

    # -- to see ---------------------------------------------------------------------------------------------------

    async def ls(
        self,
        tenant: str | None = None,
        model: str | int | None = None,
        limit: int = 100,
        sort: str | None = None,
        after: int | None = None,
    ) -> dict[str, Any]:
        """List models, and caches: ``{"models": [...], "caches": [...], "total": int, "next": cursor or None}``.

        See :func:`kvpool.pool.listing.list_models` and :func:`~kvpool.pool.listing.list_caches` for their fields.

        Parameters
        ----------
        model
            Name or number of the models whose caches are listed; None: all.
        limit
            Most caches of this answer, 0 to 1000; ``total`` says how many there are.
        sort
            ``recent``, ``uses`` or ``bytes``: the most first. None: in the order of the table, in parts:
        after
            ``next`` of the answer before.
        """
        ledger = self._state.ledger
        caches = list_caches(ledger, self._state.leases, tenant, model, limit, sort, after, time.monotonic())
        return {"models": list_models(ledger, tenant, model)} | caches

    async def leases(self, tenant: str | None = None) -> list[dict[str, Any]]:
        """Tell who holds what, the one with most bytes first; what a tenant pinned by word is held by ``pin:TENANT``.

        Each is ``{"client", "tenant", "bytes", "caches", "age_s", "connected_s", "pid", "hostname", "job", "node"}``:
        ``age_s`` are the seconds since the oldest of its leases began; what a client did not say of itself is None.
        """
        now = time.monotonic()
        held: dict[str, list[float]] = {}
        for report in (await self._fleet.ask(self._alive(), "holders")).values():
            for client, (caches, size_bytes, age_s) in report.items():
                known = held.setdefault(client, [0, 0, 0.0])
                known[0] += caches
                known[1] += size_bytes
                known[2] = max(known[2], age_s)
        rows = []
        for name, (caches, size_bytes, age_s) in sorted(held.items(), key=lambda item: (-item[1][1], item[0])):
            client = self._state.ledger.clients.get(name)
            if client is None and not name.startswith(PINNER):
                continue  # it has left since the devices told
            owner = client.tenant if client is not None else name.removeprefix(PINNER)
            if tenant not in (None, owner):
                continue
            who = client.who if client is not None else {}
            rows.append(
                {
                    "client": name,
                    "tenant": owner,
                    "bytes": int(size_bytes),
                    "caches": int(caches),
                    "age_s": age_s,
                    "connected_s": now - client.since if client is not None else None,
                    **{field: who.get(field) for field in ("pid", "hostname", "job", "node")},
                }
            )
        return rows

    async def waiting(self, tenant: str | None = None, limit: int = 100) -> dict[str, Any]:
        """List who waits for memory, in the order of the queue: ``{"requests": [...], "total": int}``.

        See :func:`kvpool.pool.waiting.list_waiting` for their fields, and for the limit.
        """
        state = self._state
        return list_waiting(state.ledger, state.allocations.queue, tenant, limit, time.monotonic())

    async def contains(self, tenant: str, items: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        """Tell how much of each chain is resident, and where. Takes no lease and counts as no use.

        Parameters
        ----------
        items
            For each chain the model, by its number or a name that only one model of the tenant has, and the hashes:
            16 bytes each, joined. A trace context may follow.

        Returns
        -------
        list of tuple
            ``("contains", {"model": number, "blocks": n, "devices": {name: blocks}, "hosts": {host: blocks}})``, or
            ``("error", class, message, details)``.
        """
        began = time.monotonic()
        answers: list[tuple[Any, ...]] = []
        questions = [(model, hashes, _carrier(more)) for model, hashes, *more in items]
        with self._telemetry.batch("contains", questions) as spans:
            for model, hashes, _ in questions:
                try:
                    answers.append(("contains", self._state.directory.contains(tenant, model, hashes)))
                except InvalidRequestError as error:
                    answers.append(("error", *error.to_wire()))
            spans.failed(errors_of(answers))
        self._telemetry.answered("contains", questions, answers, time.monotonic() - began)
        return answers

    async def events(
        self, seen: int | None = None, wait_s: float = 0.0, tenant: str | None = None
    ) -> tuple[int, list[tuple[Any, ...]]]:
        """Return ``(number of the last event, events after number seen)``, waiting for one up to ``wait_s`` (30 s).

        Begin with ``seen`` None, which answers at once with the number to go on from. An event is a tuple of the fields
        of :class:`kvpool.pool.journal.Happened`. Events are kept for 60 s after the last poll of anyone, at most 65,536
        of them: who polls too seldom gets one of kind ``missed``, and must begin again from :meth:`ls`.
        """
        return await self._executor.feed.poll(seen, wait_s, tenant)

    # -- to change ------------------------------------------------------------------------------------------------

    async def evict(
        self, tenant: str | None, model: str | int | None, device: str | None, size_bytes: int | None
    ) -> dict[str, int]:
        """Evict what nobody holds, in the order of the policy, until ``size_bytes`` are found; None: all.

        None of ``tenant``, ``model`` and ``device`` means of all. Nothing has a default: no call evicts more than it
        says.

        Returns ``{"caches", "bytes", "leased_caches", "leased_bytes"}``; see
        :meth:`kvpool.pool.evictions.Evictions.evict`.
        """
        return dict(await self._decide(EvictRequested(Batch(1), tenant, model, device, size_bytes)))

    async def invalidate(
        self, model: str | int, keys: Sequence[bytes] | None = None, tenant: str | None = None
    ) -> dict[str, Any]:
        """Remove a model's content, or that under some keys and all that is chained behind it, so that nobody finds it.

        Returns, once the memory is zeroed, ``{"caches", "bytes", "unsealed", "lower_keys", "held": {client: (caches,
        bytes)}}``; see :meth:`kvpool.pool.invalidation.Invalidations.invalidate` for what it guarantees.
        """
        return dict(await self._decide(InvalidateRequested(Batch(1), tenant, model, keys)))

    async def revoke(self, client: str, tenant: str | None = None) -> dict[str, Any]:
        """End all leases of a client, and the client with them, without its help.

        Returns ``{"client", "caches", "bytes", "mapped_bytes"}``; see
        :meth:`kvpool.pool.revocation.Revocations.revoke`.
        """
        return dict(await self._decide(RevokeRequested(Batch(1), client, tenant)))

    async def trim(self) -> int:
        """Give warm pages back to the system; returns their bytes, those included that are zombies first."""
        given = await asyncio.gather(*(self._fleet.operate(number, ("trim",)) for number in self._alive()))
        return sum(size_bytes for size_bytes in given if isinstance(size_bytes, int))

    async def defragment(self) -> dict[str, int]:
        """Compact the memory of all devices; returns ``{"moved_bytes", "freed_pages"}``.

        It goes in steps, between which the devices serve requests. What somebody has leased stays where it is. A device
        that is lost meanwhile counts with what it did.

        Raises
        ------
        KvpoolError
            If a device could not go on; the others have been compacted.
        """
        outcomes = await asyncio.gather(*map(self._compact, self._alive()), return_exceptions=True)
        done = []
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
            done.append(outcome)
        return {"moved_bytes": sum(moved for moved, _ in done), "freed_pages": sum(pages for _, pages in done)}

    async def _compact(self, number: int) -> tuple[int, int]:
        moved_bytes = freed_pages = 0
        more = True
        while more:
            answer = await self._fleet.operate(number, ("compact", _COMPACT_BYTES))
            if answer[0] == "error":
                error = from_wire(answer[1:])
                if isinstance(error, DeviceLostError):  # and what was fragmented there with it
                    break
                raise error
            moved, pages, more = answer
            moved_bytes, freed_pages = moved_bytes + moved, freed_pages + pages
        return moved_bytes, freed_pages

    async def flush(self, tenant: str | None = None) -> dict[str, int]:
        """Write all that is stored to the disks below the devices, so that it survives the pool.

        Returns ``{"caches", "bytes", "displaced"}``; see :meth:`kvpool.pool.flush.Flushes.flush`.
        """
        return dict(await self._decide(FlushRequested(Batch(1), tenant)))

    async def set_policy(self, name: str) -> str:
        """Let another eviction policy decide from now on; returns its name. It takes over what is resident.

        Raises
        ------
        UnknownPolicyError
            If there is none of that name.
        """
        self._state.set_policy(name, time.monotonic())
        gc.collect()
        gc.freeze()  # as at the start: else each full collection goes through the new policy's lists, 5 ms for 150,000
        return self._state.policy_name

    async def set_quota(
        self,
        tenant: str,
        model: str | int | None = None,
        guaranteed: int | str = 0,
        limit: int | str | None = None,
        revision: int | None = None,
    ) -> dict[str, Any]:
        """State the whole quota of a tenant, or of a model of it; see :meth:`kvpool.CachePool.set_quota`."""
        return dict(await self._decide(QuotaSet(Batch(1), tenant, model, guaranteed, limit, revision)))

    async def quotas(self, tenant: str | None = None) -> list[dict[str, Any]]:
        """Return the quotas of a tenant or of all; see :meth:`kvpool.CachePool.quotas`."""
        return self._state.quotas(tenant)

    # -- carrying out ---------------------------------------------------------------------------------------------

    async def _decide(
        self, event: EvictRequested | FlushRequested | InvalidateRequested | QuotaSet | RevokeRequested
    ) -> dict[str, Any]:
        instructions = self._state.handle(event, time.monotonic())
        (answer,) = await self._executor.finish(event.batch, instructions)
        if isinstance(answer, tuple):
            raise from_wire(answer[1:])
        return dict(answer)

    async def _leased_bytes(self) -> dict[str, int]:
        """Return the bytes that each client holds leased, over all devices."""
        held: dict[str, int] = {}
        for report in (await self._fleet.ask(self._alive(), "leases")).values():
            for client, size_bytes in report.items():
                held[client] = held.get(client, 0) + size_bytes
        return held

    def _alive(self) -> list[int]:
        return [device.number for device in self._state.ledger.devices if device.lost is None]


def _carrier(more: Sequence[Any]) -> Carrier | None:
    """Return the trace context in what follows a question; questions by the bare handle have none."""
    return more[0] if more and is_carrier(more[0]) else None
