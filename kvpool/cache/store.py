"""What lives on one device: caches and leases over the device's memory. The truth that the pool asks and instructs.

The store is pure bookkeeping over :class:`~kvpool.memory.allocator.GPUMemoryAllocator`: no Ray, no clock, no socket.
The pool speaks to it in batches of operations, tuples of built-in types, each answered by a value or by
``("error", class, message, details)``:

=================================================================== ================================================
operation                                                           answer
=================================================================== ================================================
``("connect", client, tenant, token)``                              ``True``
``("disconnect", client)``                                          ``(ids whose lease ended, ids freed)``
``("allocate", client, sequence, tenant, ids, size, max, evict)``   ``(places, refused ids, shortage or None)``
``("lease", client, sequence, ids)``                                a place or ``None`` for each id
``("resize", client, sequence, id, size, evict)``                   ``(extents, place, refused ids, shortage or None)``
``("back", client, sequence, id, ranges, evict)``                   the same; ranges are ``(start, end)`` in bytes
``("unback", client, sequence, id, ranges, evict)``                 the same
``("seal", client, sequence, ids, keys)``                           ``True`` or an error for each id
``("release", client, sequence, ids)``                              ``RELEASED``, ``FREED`` or an error for each id
``("finish", client, sequence, ids, keys)``                         the same; seals before it releases (key None: not)
``("evict", ids)``                                                  refused ids
``("void", ids, pins)``                                             ``(ids whose lease ended, ids freed, held)``
``("scrub", tenant, number, most bytes)``                           ``True`` when it was the last step
``("revoke", client)``                                              ``(ids whose lease ended, ids freed, figures)``
``("trim",)``                                                       bytes given back to the system
``("compact", most bytes)``                                         ``(bytes moved, pages freed, whether more is left)``
``("holders",)``                                                    ``{client: (caches, bytes, age of the oldest)}``
=================================================================== ================================================

``compact`` moves caches that nobody has leased, and so do ``allocate``, ``resize`` and ``back`` where there is no room,
in each batch for a few milliseconds. If there may be more to gain by it, the shortage has ``compaction_left`` in its
details: asked again for what is missing, the device goes on, and others are served in between. A cache's next lease
gives its new place, with a higher generation.

A *place* is ``(offset, pages, generation)``, with pages as ``((index, serial), ...)``. ``allocate`` first evicts, then
places as many of its ids as fit, in their order; each is leased to the client before the answer leaves.

``resize``, ``back`` and ``unback`` change what is backed of a cache that its client writes; they, too, evict first, and
then do all of it or nothing. Each answer tells all that is backed from then on. Their places have a new generation, by
which a client tells a late answer from the latest.

``void`` declares content void: what nobody holds is zeroed and freed, the rest with its last lease; leases of clients
whose names begin with ``pins`` end with it. *Held* is ``{client: (caches, bytes)}`` for those that are still leased.
``revoke`` ends all leases of a client that may not know it, and lets it do nothing any more; what it may still write to
is kept from everybody (:mod:`kvpool.memory.pages`). Its figures are ``(caches, bytes, bytes it may still map)``.
"""

from __future__ import annotations

import hmac
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from kvpool.cache.record import CacheRecord
from kvpool.errors import (
    BackendError,
    CacheStateError,
    CapacityError,
    DoubleReleaseError,
    InvariantError,
    KvpoolError,
    LeaseRevokedError,
    ProtocolError,
    SealedError,
    UnknownCacheError,
)
from kvpool.memory.allocation import Allocation
from kvpool.memory.allocator import GPUMemoryAllocator
from kvpool.memory.extents import Extents
from kvpool.sizes import MIB

logger = logging.getLogger("kvpool.device.store")

RELEASED, FREED = 0, 1

STEP_BYTES = 16 * MIB
"""What operations of a batch may copy by compaction before others are served: 2 to 6 ms."""

Place = tuple[int, tuple[tuple[int, int], ...], int]
Operation = tuple[Any, ...]


def _bytes(token: str) -> bytes:
    """Return any text as bytes: ``compare_digest`` takes no text beyond ASCII, and a client may show what it likes."""
    return token.encode("utf-8", "surrogatepass")


@dataclass(slots=True)
class _Client:
    tenant: str
    token: str
    leases: dict[int, int] = field(default_factory=dict)
    since: dict[int, float] = field(default_factory=dict)
    """When each of them began, the oldest first."""
    revoked: bool = False


class DeviceStore:
    """Caches and leases of one device.

    Parameters
    ----------
    allocator
        The device's memory. The store is its only user.
    compaction_step_bytes
        Bytes after which the operations of a batch begin no more compaction. (A page may be more.)
    """

    def __init__(self, allocator: GPUMemoryAllocator, compaction_step_bytes: int = STEP_BYTES) -> None:
        self.allocator = allocator
        self._compaction_step_bytes = compaction_step_bytes
        allocator.compactor.owner = self
        self._caches: dict[int, CacheRecord] = {}
        self._clients: dict[str, _Client] = {}
        self._lease_count = 0
        #: Gone here, and not from memory yet, because the system refused something: by id, whether to be zeroed.
        self._leaving: dict[int, bool] = {}
        self._now = 0.0
        self._handlers: dict[str, Callable[..., Any]] = {
            "connect": self._connect,
            "disconnect": self.disconnect,
            "allocate": self._allocate,
            "resize": partial(self._change, self.allocator.resize),
            "back": partial(self._change, self.allocator.back),
            "unback": partial(self._change, self.allocator.unback),
            "lease": self._lease,
            "seal": self._seal,
            "release": self._release,
            "finish": self._finish,
            "evict": self._evict,
            "void": self._void,
            "scrub": self.allocator.scrub,
            "revoke": self._revoke,
            "trim": self.allocator.trim,
            "compact": self.allocator.compact,
            "holders": lambda: self.holders(self._now),
        }

    def apply(
        self,
        operations: Sequence[Operation],
        now: float = 0.0,
        done: Callable[[Operation, Any], None] | None = None,
    ) -> list[Any]:
        """Carry the operations out in order; one that fails answers with its error and does no more than evict.

        Parameters
        ----------
        now
            Seconds of the caller's clock, from which the age of a lease counts (see :meth:`holders`).
        done
            Told of each operation, with its answer, as soon as it is carried out.
        """
        self._now = now
        self.allocator.compactor.allowance_bytes = self._compaction_step_bytes
        answers: list[Any] = []
        with self.allocator.change():
            for cache_id, void in list(self._leaving.items()):
                self._let_go(cache_id, void)
            for operation in operations:
                try:
                    answers.append(self._handlers[operation[0]](*operation[1:]))
                except InvariantError as error:  # a bug that was found; here and below its place is not in the answer
                    logger.exception("operation %r failed", operation[0])
                    answers.append(("error", *error.to_wire()))
                except KvpoolError as error:
                    answers.append(("error", *error.to_wire()))
                except Exception as error:  # a bug: those who wait for the others' answers are to get them
                    logger.exception("operation %r failed", operation[0])
                    wrong = InvariantError(f"operation {operation[0]!r} of a device failed: {error!r}")
                    answers.append(("error", *wrong.to_wire()))
                if done is not None:
                    done(operation, answers[-1])
        return answers

    def authorize(self, client: str, token: str) -> str:
        """Return the tenant of a client that shows the right token (for the page channel).

        Raises
        ------
        ProtocolError
            If the client is not connected here or the token is not its own.
        """
        known = self._clients.get(client)
        if known is None or not known.token or not hmac.compare_digest(_bytes(known.token), _bytes(token)):
            raise ProtocolError(f"client {client!r} is not connected to this device, or shows another's token")
        return known.tenant

    def is_revoked(self, client: str) -> bool:
        """Whether a client's leases were revoked, and it has not left yet."""
        known = self._clients.get(client)
        return known is not None and known.revoked

    def record(self, cache_id: int) -> CacheRecord | None:
        """Return what is known of a cache here, or None."""
        return self._caches.get(cache_id)

    def sealed(self, cache_id: int) -> CacheRecord | None:
        """Return a cache whose content is whole and to be kept, or None."""
        record = self._caches.get(cache_id)
        return record if record is not None and record.sealed and not (record.void or record.doomed) else None

    def hold(self, ids: Sequence[int]) -> None:
        """Keep caches in their place beyond all leases, while their bytes are read."""
        for cache_id in ids:
            self._caches[cache_id].leases += 1
            self._lease_count += 1

    def unhold(self, ids: Sequence[int]) -> None:
        """End what :meth:`hold` began."""
        for cache_id in ids:
            self._end_leases(self._caches[cache_id], 1)

    def may_move(self, cache_id: int) -> bool:
        """Whether nobody has a cache leased. (What nobody has leased is sealed, or it would be gone.)"""
        record = self._caches.get(cache_id)
        return record is not None and not record.leases

    def moved(self, allocation: Allocation) -> None:
        """Enter where a cache lies now; references to it are resolved by its generation."""
        record = self._caches.get(allocation.cache_id)
        if record is None:
            return  # it went while its move could not be finished
        record.offset, record.pages = allocation.offset, allocation.pages
        record.generation += 1

    @property
    def caches(self) -> int:
        """Number of caches on this device."""
        return len(self._caches)

    @property
    def lease_count(self) -> int:
        """Number of leases that are held here; a cache may have several."""
        return self._lease_count

    def leases(self) -> dict[str, int]:
        """Return the number of bytes that each client holds leased."""
        held = {
            name: sum(self._caches[cache_id].size_bytes for cache_id in client.leases)
            for name, client in self._clients.items()
        }
        return {name: size_bytes for name, size_bytes in held.items() if size_bytes}

    def holders(self, now: float) -> dict[str, tuple[int, int, float]]:
        """Return for each client that holds leases ``(caches, bytes, seconds since the oldest of them began)``."""
        leased = self.leases()
        return {
            name: (len(client.leases), leased[name], now - next(iter(client.since.values())))
            for name, client in self._clients.items()
            if name in leased
        }

    def disconnect(self, client: str) -> tuple[list[int], list[int]]:
        """End all leases of a client that left or died; returns ``(ids whose lease ended, ids freed)``.

        An id is repeated as often as it was leased. Idempotent: an unknown client has no leases. Pages that the
        client was given stay on its account until it drops them or its process is seen dead.
        """
        known = self._clients.pop(client, None)
        return ([], []) if known is None else self._end_all(known)

    def _end_all(self, client: _Client) -> tuple[list[int], list[int]]:
        ended: list[int] = []
        freed: list[int] = []
        for cache_id, count in client.leases.items():
            ended += [cache_id] * count
            if self._end_leases(self._caches[cache_id], count):
                freed.append(cache_id)
        client.leases, client.since = {}, {}
        return ended, freed

    def _revoke(self, client: str) -> tuple[list[int], list[int], tuple[int, int, int]]:
        known = self._clients.get(client)
        if known is None:
            return [], [], (0, 0, 0)
        figures = len(known.leases), sum(self._caches[cache_id].size_bytes for cache_id in known.leases)
        for cache_id in known.leases:
            self.allocator.quarantine(client, cache_id)
        known.revoked = True
        return *self._end_all(known), (*figures, self.allocator.held_bytes(client))

    def _connect(self, client: str, tenant: str, token: str) -> bool:
        if client in self._clients:
            raise ProtocolError(f"client {client!r} is connected already")
        self._clients[client] = _Client(tenant, token)
        return True

    def _client(self, client: str) -> _Client:
        known = self._clients.get(client)
        if known is None:
            raise ProtocolError(f"client {client!r} is not connected to this device: connect to the pool again")
        if known.revoked:
            raise LeaseRevokedError(f"the leases of client {client!r} were revoked: connect to the pool again")
        return known

    def _allocate(
        self,
        client: str,
        sequence: int,
        tenant: str,
        ids: Sequence[int],
        size_bytes: int,
        max_size_bytes: int,
        evict: Sequence[int],
    ) -> tuple[list[Place], list[int], dict[str, Any] | None]:
        refused = self._evict(evict)  # first: the pool has forgotten these, whatever becomes of the client
        known = self._client(client)
        leases, since = known.leases, known.since
        allocate = self.allocator.allocate
        places: list[Place] = []
        for cache_id in ids:
            try:
                found = allocate(cache_id, size_bytes, tenant=tenant, max_size_bytes=max_size_bytes)
            except (CapacityError, BackendError) as error:  # the system may have less memory than was promised to us
                name, message, details = error.to_wire()
                return places, refused, {"class": name, "message": message, "details": details}
            except KvpoolError:  # an id that lives already, or a size that cannot be: nothing of this is done
                for placed in ids[: len(places)]:
                    del leases[placed], since[placed]
                    self._lease_count -= 1
                    self._free(placed)
                raise
            self._caches[cache_id] = CacheRecord(
                cache_id, 0, tenant, size_bytes, max_size_bytes, found.offset, found.pages, leases=1
            )
            leases[cache_id], since[cache_id] = 1, self._now
            self._lease_count += 1
            places.append((found.offset, found.pages, 0))
        return places, refused, None

    def _change(
        self,
        change: Callable[[int, Any], Allocation],
        client: str,
        sequence: int,
        cache_id: int,
        asked: Any,
        evict: Sequence[int],
    ) -> tuple[Extents, Place, list[int], dict[str, Any] | None]:
        refused = self._evict(evict)
        if cache_id not in self._client(client).leases:
            raise self._not_leased(client, cache_id)
        record = self._caches[cache_id]
        if record.sealed:
            raise SealedError(f"cache {cache_id} is sealed: it keeps its size", cache_id=cache_id)
        shortage = None
        try:
            found = change(cache_id, asked)
            record.generation += 1
        except (CapacityError, BackendError) as error:
            name, message, details = error.to_wire()
            shortage = {"class": name, "message": message, "details": details}
            found = self.allocator.allocation(cache_id)
        record.size_bytes, record.pages = found.size_bytes, found.pages
        return found.extents, (record.offset, record.pages, record.generation), refused, shortage

    def _lease(self, client: str, sequence: int, ids: Sequence[int]) -> list[Place | None]:
        known = self._client(client)
        leases, caches = known.leases, self._caches
        self.allocator.finish_move()
        places: list[Place | None] = []
        for cache_id in ids:
            record = caches.get(cache_id)
            if record is None or record.doomed or not record.sealed or record.tenant != known.tenant:
                places.append(None)
                continue
            record.leases += 1
            self._lease_count += 1
            leases[cache_id] = leases.get(cache_id, 0) + 1
            known.since.setdefault(cache_id, self._now)
            places.append((record.offset, record.pages, record.generation))
        return places

    def _seal(self, client: str, sequence: int, ids: Sequence[int], keys: Sequence[bytes | None]) -> list[Any]:
        leases = self._client(client).leases
        answers: list[Any] = []
        for cache_id, key in zip(ids, keys, strict=True):
            if cache_id not in leases:
                answers.append(("error", *self._not_leased(client, cache_id).to_wire()))
                continue
            record = self._caches[cache_id]
            if record.sealed and record.key != key:
                error = SealedError(f"cache {cache_id} is sealed already, with another key", cache_id=cache_id)
                answers.append(("error", *error.to_wire()))
                continue
            # What is sealed is copied, moved and mapped by its bytes, from the first on.
            if self.allocator.allocation(cache_id).span_bytes != record.size_bytes or not record.size_bytes:
                refused = CacheStateError(f"cache {cache_id} is not backed from its front on", cache_id=cache_id)
                answers.append(("error", *refused.to_wire()))
                continue
            record.sealed, record.key = True, key
            answers.append(True)
        return answers

    def _release(self, client: str, sequence: int, ids: Sequence[int]) -> list[Any]:
        known = self._client(client)
        leases = known.leases
        answers: list[Any] = []
        for cache_id in ids:
            count = leases.get(cache_id)
            if count is None:
                answers.append(("error", *self._not_leased(client, cache_id).to_wire()))
                continue
            if count == 1:
                del leases[cache_id], known.since[cache_id]
            else:
                leases[cache_id] = count - 1
            answers.append(FREED if self._end_leases(self._caches[cache_id], 1) else RELEASED)
        return answers

    def _finish(self, client: str, sequence: int, ids: Sequence[int], keys: Sequence[bytes | None]) -> list[Any]:
        sealable = [(cache_id, key) for cache_id, key in zip(ids, keys, strict=True) if key is not None]
        outcomes = self._seal(client, sequence, *zip(*sealable, strict=True)) if sealable else []
        failed = {pair[0]: outcome for pair, outcome in zip(sealable, outcomes, strict=True) if outcome is not True}
        released = iter(self._release(client, sequence, [cache_id for cache_id in ids if cache_id not in failed]))
        return [failed[cache_id] if cache_id in failed else next(released) for cache_id in ids]

    def _not_leased(self, client: str, cache_id: int) -> KvpoolError:
        if cache_id in self._caches:
            return DoubleReleaseError(
                f"client {client!r} holds no lease on cache {cache_id}: it was released already", cache_id=cache_id
            )
        return UnknownCacheError(f"there is no cache {cache_id} on this device (any more)", cache_id=cache_id)

    def _end_leases(self, record: CacheRecord, count: int) -> bool:
        """End ``count`` leases; True if the cache was freed because nothing can find it again."""
        record.leases -= count
        self._lease_count -= count
        if record.leases or (record.key is not None and not record.doomed):
            return False
        self._free(record.id)
        return True

    def _evict(self, ids: Sequence[int]) -> list[int]:
        refused = []
        for cache_id in ids:
            record = self._caches.get(cache_id)
            if record is None:
                continue
            if record.leases:
                # A lease came between the pool's decision and this operation. The pool forgets the key either way,
                # so nobody can find the cache again: it goes with its last lease.
                record.doomed = True
                refused.append(cache_id)
            else:
                self._free(cache_id)
        return refused

    def _void(self, ids: Sequence[int], pins: str) -> tuple[list[int], list[int], dict[str, tuple[int, int]]]:
        ended: list[int] = []
        freed: list[int] = []
        held_ids: set[int] = set()
        for record in filter(None, map(self._caches.get, ids)):
            record.doomed = record.void = True
            pinner = self._clients.get(pins + record.tenant)
            if pinner is not None and record.id in pinner.leases:
                del pinner.since[record.id]
                count = pinner.leases.pop(record.id)
                ended += [record.id] * count
                record.leases -= count
                self._lease_count -= count
            if not record.leases:
                self._free(record.id)
                freed.append(record.id)
                continue
            held_ids.add(record.id)
        held = {name: client.leases.keys() & held_ids for name, client in self._clients.items()}
        sizes = {name: (len(ids), sum(self._caches[i].size_bytes for i in ids)) for name, ids in held.items() if ids}
        return ended, freed, sizes

    def _free(self, cache_id: int) -> None:
        self._let_go(cache_id, self._caches.pop(cache_id).void)

    def _let_go(self, cache_id: int, void: bool) -> None:
        """Free the memory of a cache that is gone; if the system refuses what comes before that, in a later batch.

        (Whoever told it to go has forgotten it, and would not say so twice.)
        """
        try:
            if void:
                self.allocator.wipe(cache_id)
            self.allocator.free(cache_id)
        except BackendError:
            self._leaving[cache_id] = void
            return
        self._leaving.pop(cache_id, None)
