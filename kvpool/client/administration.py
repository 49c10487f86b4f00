"""The verbs of administration, within the tenant of a connection.

Each is a method of the pool's actor, too (:class:`kvpool.actors.administration.Administration`), and a command of
``kvpool``. From here a pool can be administered as far as its own tenant goes: another's models, clients and content
are neither shown nor touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvpool.actors.protocol import STEPS_S
from kvpool.client.connection import Connection
from kvpool.client.events import EventStream
from kvpool.client.model import Model
from kvpool.client.spec import content_hashes, join_hashes
from kvpool.errors import InvalidRequestError
from kvpool.sizes import parse_size

EVERYTHING = "all"
"""In place of a size."""


class Administration:
    """What can be seen and done of a pool beyond one's own caches; a base of :class:`~kvpool.CachePool`."""

    _connection: Connection

    async def ls(
        self,
        model: Model | str | int | None = None,
        *,
        limit: int = 100,
        sort: str | None = None,
        after: int | None = None,
    ) -> dict[str, Any]:
        """List models and caches: ``{"models": [...], "caches": [...], "total": int, "next": cursor or None}``.

        Parameters
        ----------
        model
            Whose caches; by default those of all models.
        limit
            Most caches to return, 0 to 1000; ``total`` tells how many there are.
        sort
            ``recent``, ``uses`` or ``bytes``: the most first. By default in no order, but in parts that follow each
            other:
        after
            ``next`` of the answer before.
        """
        actor, tenant = self._connection.actor, self._connection.tenant
        return dict(await self._connection.call(actor.ls, tenant, _named(model), limit, sort, after))

    async def holders(self) -> list[dict[str, Any]]:
        """Tell who holds what: client, process, host, job, bytes, caches and age of each that has leases.

        (``leases()`` tells of this process alone.) What was pinned by word is held by ``pin:TENANT``.
        """
        return list(await self._connection.call(self._connection.actor.leases, self._connection.tenant))

    async def waiting(self, *, limit: int = 100) -> dict[str, Any]:
        """List this tenant's requests that wait for memory, in the order of the queue.

        Parameters
        ----------
        limit
            Most requests to return, 0 to 1000; ``total`` tells how many wait.

        Returns
        -------
        dict
            ``{"requests": [...], "total": int}``. Each request is ``{"client", "tenant", "model", "number", "bytes",
            "kind", "cache", "device", "limit_of", "priority", "waited_s", "left_s", "pid", "hostname", "job",
            "node"}``: who asked; name and number of the model; what it needs; ``new`` or ``growth``, of which cache
            and on which device (None: a new one goes to any of its host); whose limit leaves no room (None: memory is
            short); how long it has waited, and until it is refused, in seconds; and the process.
        """
        return dict(await self._connection.call(self._connection.actor.waiting, self._connection.tenant, limit))

    async def revoke(self, client: str) -> dict[str, Any]:
        """End all leases of a client, which cannot use the pool then before it connects again.

        Its handles raise :class:`~kvpool.errors.LeaseRevokedError`; tensors it has stay mapped, and what it can still
        write to is given to nobody until it has dropped them or its process has ended. A client that is stopped or
        hangs is not waited for. Returns ``{"client", "caches", "bytes", "mapped_bytes"}``.

        Raises
        ------
        InvalidRequestError
            If no such client of this tenant is connected.
        """
        connection = self._connection
        return dict(await connection.call(connection.actor.revoke, client, connection.tenant))

    async def contains(self, model: Model | str | int, keys: bytes | str | Sequence[bytes | str]) -> dict[str, Any]:
        """Tell how many leading ``keys`` of a chain are resident, and where, without a lease: for routers.

        Counts as no use: neither the policy nor the statistics see it. Concurrent calls leave in one.

        Parameters
        ----------
        model
            A model, its number, or a name that only one model has.
        keys
            Hashes of 16 bytes, or what was given to ``seal(key=...)``; one, or several in a sequence.

        Returns
        -------
        dict
            ``{"model": number, "blocks": n, "devices": {device name: blocks}, "hosts": {host: blocks}}``.

        Raises
        ------
        InvalidRequestError
            If a key is none, there is no such model, or several have that name (revisions, shards): then give its
            number, from :meth:`ls` or :attr:`Model.number`.
        """
        return await self._connection.contains(_named(model), join_hashes(content_hashes(keys)))

    async def evict(
        self, size: int | str, *, model: Model | str | int | None = None, device: str | None = None
    ) -> dict[str, int]:
        """Evict what nobody holds, in the order of the policy.

        Parameters
        ----------
        size
            Stop when so much is found, bytes or text; ``"all"``: evict all of it.
        model, device
            Only a model's caches, only those on one device.

        Returns
        -------
        dict
            ``{"caches", "bytes", "leased_caches", "leased_bytes"}``: what went, and what stays because it is held.
        """
        connection, size_bytes = self._connection, None if size == EVERYTHING else parse_size(size)
        return dict(
            await connection.call(
                connection.actor.evict, connection.tenant, _named(model), device, size_bytes, timeout_s=STEPS_S
            )
        )

    async def invalidate(
        self, model: Model | str | int, keys: bytes | str | Sequence[bytes | str] | None = None
    ) -> dict[str, Any]:
        """Remove a model's content, or that under some keys and all that is chained behind it, for good.

        When it returns, no look-up by anyone finds what was stored before, what was being written when it was called
        cannot be sealed (:class:`~kvpool.errors.InvalidatedError`), pins on it have ended, and memory that nobody holds
        is zeroed: of the caches that went, and all that was free in this tenant. Clients that hold a lease on such
        content keep it until they end it; it is zeroed then.

        Parameters
        ----------
        keys
            Hashes of 16 bytes, or what was given to ``seal(key=...)``; one, or several in a sequence. By default all
            content of the model.

        Returns
        -------
        dict
            ``caches`` and ``bytes`` that were published on devices, how many were ``unsealed``, ``lower_keys`` that lay
            in lower tiers (of which a device may have had a copy), and what is still ``held``: ``{client: (caches,
            bytes)}``.

        Raises
        ------
        TierError
            If a disk may still have some of it, of a device that is lost, say: the next pool of this name could find
            that, and is to be told again. In this one it is gone. Also, of cause ``unnamed``, if a model was named by
            name, and content lies on disk of which nobody knows the model's name.
        """
        connection, hashes = self._connection, None if keys is None else content_hashes(keys)
        return dict(
            await connection.call(
                connection.actor.invalidate, _named(model), hashes, connection.tenant, timeout_s=STEPS_S
            )
        )

    async def trim(self) -> int:
        """Give the warm pages of the whole pool back to the system; returns their bytes.

        What clients still map they are asked for, and the system has it when they have let go: moments later.
        """
        return int(await self._connection.call(self._connection.actor.trim, timeout_s=STEPS_S))

    async def defragment(self) -> dict[str, int]:
        """Compact the memory of the whole pool; returns ``{"moved_bytes", "freed_pages"}``.

        What somebody has leased stays where it is.
        """
        return dict(await self._connection.call(self._connection.actor.defragment, timeout_s=STEPS_S))

    async def flush(self) -> dict[str, int]:
        """Write all that this tenant has stored to disk: what a pool keeps of it after :meth:`delete`, and a new start.

        It covers what was sealed under a key when it was called; so let writers end before it. Once it returns,
        everything survives the pool, every process and a failure of power.

        Returns
        -------
        dict
            ``{"caches", "bytes", "displaced"}``: what lies on disk now, and how many caches the disk dropped for it, or
            did not take. If any, ``disk_budget`` is too small for all, and the least recently used are not there, nor
            the tail of a chain that is longer.

        Raises
        ------
        TierError
            If the pool has no disk tier, or some could not be written.
        """
        connection = self._connection
        return dict(await connection.call(connection.actor.flush, connection.tenant, timeout_s=STEPS_S))

    async def set_policy(self, name: str) -> str:
        """Let another eviction policy decide in the whole pool from now on; it takes over what is resident.

        Raises
        ------
        UnknownPolicyError
            If there is none of that name.
        """
        return str(await self._connection.call(self._connection.actor.set_policy, name))

    async def set_quota(
        self,
        *,
        model: Model | str | int | None = None,
        tenant: str | None = None,
        guaranteed: int | str = 0,
        limit: int | str | None = None,
        revision: int | None = None,
    ) -> dict[str, Any]:
        """State the whole quota of a model, or of this connection's tenant: what is not given is nothing, or no limit.

        Parameters
        ----------
        model
            Its name covers all revisions, adapters and shards, also those that are registered later.
        tenant
            In place of a model: this connection's own. (An operator sets others': ``kvpool quota``.)
        guaranteed, limit
            Bytes, text (``"10GiB"``), a share of the pool (``"40%"``), or ``"none"``. Caches that nobody holds are
            evicted down to a limit at once, others as their leases end.
        revision
            A number from 1 to 2**63 - 1. Nothing is changed if that one, or a later one, holds already; by default the
            next one.

        Returns
        -------
        dict
            What holds now, as in :meth:`quotas`, and ``applied``: whether it was changed by this. A name that no model
            is registered by is accepted, for it may come, and ``warning`` says so.

        Raises
        ------
        InvalidRequestError
            If neither a model nor a tenant is named, or both, or the guarantee is more than the limit.
        """
        connection = self._connection
        if model is None and tenant is None:
            raise InvalidRequestError(
                "a quota is a model's or a tenant's, and neither is named: give model=, or "
                f"tenant={connection.tenant!r} for all models of this connection's tenant"
            )
        if model is not None and tenant is not None:
            raise InvalidRequestError(
                f"a quota is a model's or a tenant's, and both are named: give model= alone for that model of tenant "
                f"{connection.tenant!r}, or tenant= alone for all its models"
            )
        if tenant not in (None, connection.tenant):
            raise InvalidRequestError(
                f"this connection is tenant {connection.tenant!r}'s, and sets no quota of tenant {tenant!r}: an "
                f"operator does ('kvpool quota --tenant {tenant}')",
                asked=tenant,
            )
        named = model.spec.name if isinstance(model, Model) else _named(model)
        return dict(
            await connection.call(connection.actor.set_quota, connection.tenant, named, guaranteed, limit, revision)
        )

    async def quotas(self) -> list[dict[str, Any]]:
        """Return the quotas of this tenant and its models.

        Each is ``{"tenant", "model", "guaranteed", "limit", "guaranteed_bytes", "limit_bytes", "held_bytes",
        "leased_bytes", "registered", "waiting", "revision", "warning"}``: model None for the tenant as a whole; as it
        was set; what that comes to now; what is held, and held by leases or pins; whether anybody has that name; how
        many requests wait; and a text, else None, of a line for each of these: it has a guarantee, and all guarantees
        of the pool together exceed its memory; more is held than its limit, and drains.

        One that guarantees and limits nothing is among them while there is a model of that name, or of that tenant.
        """
        return list(await self._connection.call(self._connection.actor.quotas, self._connection.tenant))

    def events(self) -> EventStream:
        """Return the stream of events: ``async for event in pool.events()``."""
        return EventStream(self._connection)


def _named(model: Any) -> Any:
    """Return the number of a model (of the blocking client, too), or what names it."""
    return getattr(model, "number", model)
