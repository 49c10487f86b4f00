"""The pool's books: which devices, clients and models there are, and what lies where."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

from kvpool.cache.eviction import CacheEvictionPolicy
from kvpool.cache.index import CacheIndex
from kvpool.errors import (
    DeviceLostError,
    InvalidatedError,
    InvalidRequestError,
    KvpoolError,
    LeaseRevokedError,
    ProtocolError,
    UnknownCacheError,
    ensure,
)
from kvpool.memory.extents import front
from kvpool.memory.packing import shares_pages
from kvpool.pool.client import Backing, Client, Writer
from kvpool.pool.counters import Counters
from kvpool.pool.device import Device
from kvpool.pool.instructions import Batch, BatchDone, Continuation, Instruction, Send
from kvpool.pool.journal import Happened, Journal
from kvpool.pool.model import Model
from kvpool.pool.placement import make_placement
from kvpool.pool.quota import Quotas
from kvpool.pool.void_marks import VoidMarks
from kvpool.sizes import format_count


class Ledger:
    """Index, policy, devices, clients and models, and the instructions that are being written.

    Parameters
    ----------
    policy, placement
        Names; :class:`~kvpool.errors.UnknownPolicyError` if there is none of that name.
    """

    def __init__(self, policy: str, placement: str) -> None:
        self.index = CacheIndex(policy)
        self.placement = make_placement(placement)
        self.devices: list[Device] = []
        self.quotas = Quotas(self.index, self.devices)
        self.clients: dict[str, Client] = {}
        self.models: list[Model] = []
        self.counters = Counters()
        self.writers: dict[int, Writer] = {}
        """By id, caches that are not sealed yet."""
        self.revoked: dict[str, Client] = {}
        """Clients whose leases were revoked, until they leave by word or too many others were."""
        self.journal = Journal()
        self.invalidations = 0
        """How many there have been."""
        self.void_marks = VoidMarks()
        """Which of them older writers must heed."""
        self.out: list[Instruction] = []
        self._models: dict[tuple[str, str, str], int] = {}
        self._by_space: dict[int, list[Model]] = {}
        self.unnamed: set[tuple[str, str]] = set()
        """Tenant and fingerprint of content that was found below the devices and whose models nobody knows."""
        self.unread: set[str] = set()
        """Folders below the devices of which it is not known what content they have."""

    @property
    def policy(self) -> CacheEvictionPolicy:
        """What ranks the caches that nobody holds."""
        return self.index.policy

    def send(self, device: int, operation: tuple[Any, ...], then: Continuation, traces: tuple[Any, ...] = ()) -> None:
        """Write the instruction to give ``device`` an operation, on behalf of the items with these traces."""
        self.out.append(Send(device, operation, then, traces))

    def answer(self, batch: Batch, item: int, answer: Any) -> None:
        """Record an item's answer; the last one completes the batch."""
        batch.put(item, answer)
        if not batch.open_items:
            self.out.append(BatchDone(batch))

    def refuse(self, batch: Batch, item: int, error: KvpoolError) -> None:
        """Answer an item with an error, and count it."""
        self.counters.refusals += 1
        self.count_error(error)
        self.answer(batch, item, ("error", *error.to_wire()))

    def count_error(self, error: KvpoolError) -> None:
        """Count an error by its class."""
        name = type(error).__name__
        self.counters.errors[name] = self.counters.errors.get(name, 0) + 1

    def free_bytes(self, device: Device) -> int:
        """Return what can still be allocated on a device without evicting; -1 if it is lost."""
        if device.lost is not None:
            return -1
        return device.capacity_bytes - device.zombie_bytes - self.index.resident_bytes[device.number]

    def usable(self, client: Client) -> list[Device]:
        """Return the devices that a client can map and that live.

        Raises
        ------
        DeviceLostError
            If all of them are lost.
        """
        usable = [self.devices[number] for number in client.devices if self.devices[number].lost is None]
        if not usable:
            raise DeviceLostError("all devices of this host are lost: delete the pool and start it again")
        return usable

    def client(self, client: str) -> Client:
        """Return a connected client, or raise what :meth:`not_connected` returns."""
        found = self.clients.get(client)
        if found is None:
            raise self.not_connected(client)
        return found

    def has_left(self, client: Client) -> bool:
        """Whether nobody would take what a client has asked for: it ended, or was revoked."""
        return self.clients.get(client.id) is not client

    def not_connected(self, client: str) -> KvpoolError:
        """Return the error that tells why a client is not connected (any more)."""
        if client in self.revoked:
            return LeaseRevokedError(
                f"the leases of client {client!r} were revoked by an administrator: connect again, and ask for what is "
                "still needed",
                client=client,
            )
        return ProtocolError(f"client {client!r} is not connected to this pool (any more): connect again")

    def model(self, client: Client, number: int) -> Model:
        """Return a model of the client's tenant, or raise :class:`~kvpool.errors.InvalidRequestError`."""
        if 0 <= number < len(self.models) and self.models[number].tenant == client.tenant:
            return self.models[number]
        raise InvalidRequestError(f"model {number} is not registered by tenant {client.tenant!r}: call model() first")

    def find_models(self, model: str | int, tenant: str | None) -> list[Model]:
        """Return the models of that number or name, of one tenant or of all.

        Raises
        ------
        InvalidRequestError
            If there is none; names those that there are.
        """
        visible = [each for each in self.models if tenant in (None, each.tenant)]
        found = [each for each in visible if model == (each.name if isinstance(model, str) else each.number)]
        if found and not isinstance(model, bool):
            return found
        names = {each.name for each in visible}
        raise InvalidRequestError(
            f"no model {model!r} is registered{'' if tenant is None else f' by tenant {tenant!r}'}: there is "
            f"{listed(names)}{self.unnamed_below(tenant, '. And ')}",
            asked=model,
        )

    def unnamed_below(self, tenant: str | None, before: str = "") -> str:
        """Return what is to be said, after ``before``, of content below whose models nobody knows; nothing: none is.

        Of a tenant, or of all.
        """
        told = []
        if count := sum(tenant in (None, each) for each, _ in self.unnamed):
            told.append(
                f"content of {format_count(count, 'model')} lies below the devices whose name is not known: it was "
                "written by a version of kvpool that did not note it, or the note was lost. It may be what is meant: "
                "register its model as it was (CachePool.model), and call again; or delete the pool, and its folders, "
                "too"
            )
        if self.unread:
            told.append(
                f"of what models there is content in {', '.join(sorted(self.unread))} is not known: that could not be "
                "read when the pool started. Once it can be, start the pool again, and call again"
            )
        return before + ". And ".join(told) if told else ""

    def register_model(
        self,
        tenant: str,
        name: str,
        fingerprint: str,
        block_bytes: int | None,
        limit_bytes: int | None,
        revision: str = "",
        now: float = 0.0,
    ) -> Model:
        """Return the model of that tenant, name and fingerprint, made if need be; raises as :meth:`known_model`."""
        known = self.known_model(tenant, name, fingerprint, block_bytes, limit_bytes)
        if known is not None:
            return known
        number, space = len(self.models), self.index.space(tenant, fingerprint)
        model = Model(number, name, tenant, space, block_bytes, limit_bytes, fingerprint=fingerprint, revision=revision)
        self.models.append(model)
        self._by_space.setdefault(space, []).append(model)
        self.unnamed.discard((tenant, fingerprint))
        self._models[tenant, name, fingerprint] = number
        self.quotas.register(space, tenant, name, limit_bytes, now)
        return model

    def known_model(
        self, tenant: str, name: str, fingerprint: str, block_bytes: int | None, limit_bytes: int | None
    ) -> Model | None:
        """Return the model of that tenant, name and fingerprint, None if it was never registered.

        Raises
        ------
        InvalidRequestError
            If somebody has registered it with another block size or limit.
        """
        number = self._models.get((tenant, name, fingerprint))
        if number is None:
            return None
        model = self.models[number]
        if not model.restored and (model.block_bytes, model.limit_bytes) != (block_bytes, limit_bytes):
            raise InvalidRequestError(
                f"model {name!r} is registered with block_bytes={model.block_bytes}, limit={model.limit_bytes}; "
                f"asked for block_bytes={block_bytes}, limit={limit_bytes}: use the same, or another revision"
            )
        return model

    def row(self, client: Client, cache_id: int) -> int:
        """Return the row of a cache that the client may name.

        Raises
        ------
        UnknownCacheError
            For a foreign id: never handed out, or another tenant's.
        StaleCacheError
            For an id whose cache is gone.
        """
        row = self.index.row_of(cache_id)
        if self.index.tenant_of(row) != client.tenant:
            raise UnknownCacheError(f"there is no cache {cache_id} in tenant {client.tenant!r}", cache_id=cache_id)
        return row

    def add(
        self,
        client: Client,
        space: int,
        device: Device,
        size_bytes: int,
        max_size_bytes: int,
        now: float,
        born: int | None = None,
        priority: int = 0,
    ) -> int:
        """Enter a cache that ``client`` will write; returns its row.

        ``born``: how many invalidations there had been when it was asked for, if that was not now.
        """
        (row,) = self.add_run(client, space, device, size_bytes, max_size_bytes, 1, now, born, priority)
        return row

    def add_run(
        self,
        client: Client,
        space: int,
        device: Device,
        size_bytes: int,
        max_size_bytes: int,
        count: int,
        now: float,
        born: int | None = None,
        priority: int = 0,
    ) -> list[int]:
        """Enter caches for the same, no two of one chain; see :meth:`add`."""
        footprint_bytes = device.footprint_bytes(size_bytes, max_size_bytes)
        shared = shares_pages(size_bytes, max_size_bytes, device.page_bytes)
        index, writers, asked_bytes = self.index, self.writers, self.index.asked_bytes
        born = self.invalidations if born is None else born
        rows = []
        for _ in range(count):
            row = index.add(space, footprint_bytes, device.number, now=now)
            asked_bytes[row] = size_bytes
            backing = None
            if max_size_bytes > size_bytes:
                backing = Backing(max_size_bytes, front(size_bytes), front(size_bytes), shared)
            writers[index.id_of(row)] = Writer(client.id, born, None, priority, backing)
            rows.append(row)
        return rows

    def add_chain(
        self,
        client: Client,
        space: int,
        device: Device,
        size_bytes: int,
        planned: Sequence[bytes],
        parent_row: int,
        chain: Sequence[bytes],
        now: float,
    ) -> list[int]:
        """Enter the blocks that ``client`` will write for the hashes ``planned`` of a chain; returns their rows."""
        footprint_bytes = device.footprint_bytes(size_bytes, size_bytes)
        rows = self.index.add_chain(
            space, footprint_bytes, device.number, len(planned), parent_row, now=now, chain=chain
        )
        index, writers = self.index, self.writers
        for row, key in zip(rows, planned, strict=True):
            index.asked_bytes[row] = size_bytes
            writers[index.id_of(row)] = Writer(client.id, self.invalidations, key)
        return rows

    def forget(self, cache_id: int) -> None:
        """Take a cache off the books, unless it is off already (its client's death may have been first)."""
        self.writers.pop(cache_id, None)
        row = self.index.live_row(cache_id)
        if row >= 0:
            self.note_removed((row,), "gone")
            self.index.remove(row)

    # -- content --------------------------------------------------------------------------------------------------

    def model_of(self, row: int) -> Model | None:
        """Return the model for which a cache was made; None once its content is void."""
        models = self._by_space.get(self.index.space_of(row))
        return None if models is None else models[0]

    def name_in(self, space: int) -> str | None:
        """Return the name of the model whose content a namespace has; None if that was declared void."""
        models = self._by_space.get(space)
        return None if models is None else models[0].name

    def models_in(self, space: int) -> Sequence[Model]:
        """Return all models whose content a namespace has: the same under different names."""
        return self._by_space.get(space, ())

    def model_in(self, space: int) -> Model:
        """Return the model whose content a namespace has."""
        return self._by_space[space][0]

    def check_not_void(self, row: int, cache_id: int, key: bytes | None = None) -> None:
        """Raise :class:`~kvpool.errors.InvalidatedError` if a cache's content was declared void, or may not get a key.

        With ``key``: also when that key, or all of the model, was invalidated after the cache had been asked for, or
        so many keys that they are not remembered one by one (:class:`~kvpool.pool.void_marks.VoidMarks`).
        """
        void = self.index.is_void(row)
        if not void and key is not None and (writer := self.writers.get(cache_id)) is not None:
            void = self.void_marks.last(self.index.space_of(row), key) > writer.born
        if void:
            raise InvalidatedError(
                f"the content of cache {cache_id} was invalidated after it had been asked for: release it, and compute "
                "and store it anew if it is still wanted",
                cache_id=cache_id,
            )

    def count_evictions(self, rows: Sequence[int], reason: str) -> int:
        """Count caches that are about to leave, and tell who listens; returns their bytes."""
        index, counters = self.index, self.counters
        sizes = index.size_bytes
        size_bytes = sum([sizes[row] for row in rows])
        for device, count in Counter(map(index.device.__getitem__, rows)).items():
            self.devices[device].evictions += count
        counters.evictions += len(rows)
        counters.evicted_bytes += size_bytes
        counters.evictions_by_reason[reason] += len(rows)
        self.note_removed(rows, reason)
        return size_bytes

    def note_stored(self, rows: Sequence[int]) -> None:
        """Tell who listens that these caches were published."""
        if self.journal.open:
            for row in rows:
                above = self.index.parent[row]
                self._note("stored", row, self.index.key_of(above) if above >= 0 else None, None)

    def note_removed(self, rows: Sequence[int], reason: str) -> None:
        """Tell who listens that no key leads to these caches any more; call it while their keys are still known."""
        if self.journal.open:
            for row in rows:
                self._note("removed", row, None, reason)

    def _note(self, kind: str, row: int, parent: bytes | None, reason: str | None) -> None:
        index, model = self.index, self.model_of(row)
        key = index.key_of(row)
        if key is not None and model is not None:
            device, size_bytes = self.devices[index.device[row]].name, index.asked_bytes[row]
            about = device, size_bytes, reason, model.number, model.revision
            self.journal.add(Happened(kind, model.tenant, model.name, key, parent, *about))

    def check(self) -> None:
        """Raise :class:`~kvpool.errors.InvariantError` if the books do not add up."""
        self.index.check()
        self.quotas.check()
        for cache_id in self.writers:
            row = self.index.live_row(cache_id)
            ensure(
                row >= 0 and not self.index.is_sealed(row), "a writer of a cache that is sealed or gone", id=cache_id
            )


def listed(names: Collection[str]) -> str:
    """Return names for a message: the first twenty of them."""
    return f"{', '.join(sorted(names)[:20]) or 'none'}{' …' if len(names) > 20 else ''}"
