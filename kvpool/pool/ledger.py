"""The pool's books: which devices, clients and models there are, and what lies where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kvpool.cache.index import CacheIndex
from kvpool.errors import DeviceLostError, InvalidRequestError, KvpoolError, ProtocolError, UnknownCacheError, ensure
from kvpool.pool.instructions import Batch, BatchDone, Continuation, Instruction, Send
from kvpool.pool.placement import make_placement
from kvpool.sizes import round_up


@dataclass(slots=True)
class Device:
    """One device, as the pool sees it."""

    number: int
    name: str
    host: str
    capacity_bytes: int
    page_bytes: int
    min_block_bytes: int
    arena_bytes: int
    zombie_bytes: int = 0
    zombie_stamp: int = 0
    lost: str | None = None
    evictions: int = 0

    def footprint_bytes(self, size_bytes: int, max_size_bytes: int) -> int:
        """Return what a cache takes here: whole pages, unless it is small enough to share one.

        A small one that may grow takes its whole range at once: in shared pages addresses are memory.
        """
        if max_size_bytes >= self.page_bytes:
            return round_up(size_bytes, self.page_bytes)
        if max_size_bytes > size_bytes:
            return max(self.min_block_bytes, 1 << (max_size_bytes - 1).bit_length())
        return round_up(size_bytes, self.min_block_bytes)

    def can_grow_to(self, size_bytes: int, max_size_bytes: int) -> bool:
        """Whether the addresses for ``max_size_bytes`` exist: a growing cache takes a power of two of them."""
        if max_size_bytes == size_bytes:
            return size_bytes <= self.capacity_bytes
        return 1 << (max_size_bytes - 1).bit_length() <= 1 << (self.arena_bytes.bit_length() - 1)

    def note_zombies(self, zombies: tuple[int, int]) -> None:
        """Take in ``(stamp, zombie bytes)`` unless a newer figure has come already."""
        if zombies[0] > self.zombie_stamp:
            self.zombie_stamp, self.zombie_bytes = zombies


@dataclass(slots=True)
class Client:
    """One connected process."""

    id: str
    tenant: str
    host: str
    devices: list[int]
    """Numbers of the devices whose memory it can map: those of its own host."""


@dataclass(slots=True)
class Model:
    """What was registered once: the namespace of its keys and its limits."""

    number: int
    name: str
    tenant: str
    space: int
    block_bytes: int | None
    limit_bytes: int | None
    caches: int = 0


@dataclass(slots=True)
class Counters:
    """Totals since the pool began."""

    requests: int = 0
    grants: int = 0
    refusals: int = 0
    lookups: int = 0
    blocks_looked_up: int = 0
    blocks_hit: int = 0
    blocks_stored: int = 0
    evictions: int = 0
    evicted_bytes: int = 0
    clients_died: int = 0
    duplicates: int = 0
    errors: dict[str, int] = field(default_factory=dict)


class Ledger:
    """Index, policy, devices, clients and models, and the instructions that are being written.

    Parameters
    ----------
    policy, placement
        Names; :class:`~kvpool.errors.UnknownPolicyError` if there is none of that name.
    """

    def __init__(self, policy: str, placement: str) -> None:
        self.index = CacheIndex(policy)
        self.policy = self.index.policy
        self.placement = make_placement(placement)
        self.devices: list[Device] = []
        self.clients: dict[str, Client] = {}
        self.models: list[Model] = []
        self.counters = Counters()
        self.writers: dict[int, str] = {}
        """Who writes each cache that is not sealed yet: the only client that may seal it."""
        self.out: list[Instruction] = []
        self._models: dict[tuple[str, str, str], int] = {}

    def send(self, device: int, operation: tuple[Any, ...], then: Continuation) -> None:
        """Write the instruction to give ``device`` an operation."""
        self.out.append(Send(device, operation, then))

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
        """Return a connected client, or raise :class:`~kvpool.errors.ProtocolError`."""
        found = self.clients.get(client)
        if found is None:
            raise ProtocolError(f"client {client!r} is not connected to this pool (any more): connect again")
        return found

    def model(self, client: Client, number: int) -> Model:
        """Return a model of the client's tenant, or raise :class:`~kvpool.errors.InvalidRequestError`."""
        if 0 <= number < len(self.models) and self.models[number].tenant == client.tenant:
            return self.models[number]
        raise InvalidRequestError(f"model {number} is not registered by tenant {client.tenant!r}: call model() first")

    def register_model(
        self, tenant: str, name: str, fingerprint: str, block_bytes: int | None, limit_bytes: int | None
    ) -> Model:
        """Return the model of that tenant, name and fingerprint, made if need be.

        Raises
        ------
        InvalidRequestError
            If it exists with another block size or limit.
        """
        known = self._models.get((tenant, name, fingerprint))
        if known is None:
            known = len(self.models)
            space = self.index.space(tenant, fingerprint)
            self.models.append(Model(known, name, tenant, space, block_bytes, limit_bytes))
            self._models[tenant, name, fingerprint] = known
        model = self.models[known]
        if (model.block_bytes, model.limit_bytes) != (block_bytes, limit_bytes):
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
        parent_row: int,
        now: float,
    ) -> int:
        """Enter a cache that ``client`` will write; returns its row."""
        footprint_bytes = device.footprint_bytes(size_bytes, max_size_bytes)
        row = self.index.add(space, footprint_bytes, device.number, parent_row, now=now)
        self._enter(client, [row], size_bytes)
        return row

    def add_chain(
        self,
        client: Client,
        space: int,
        device: Device,
        size_bytes: int,
        count: int,
        parent_row: int,
        chain: Sequence[bytes],
        now: float,
    ) -> list[int]:
        """Enter ``count`` blocks of ``chain``, each the parent of the next, for ``client`` to write; returns rows."""
        footprint_bytes = device.footprint_bytes(size_bytes, size_bytes)
        rows = self.index.add_chain(space, footprint_bytes, device.number, count, parent_row, now=now, chain=chain)
        self._enter(client, rows, size_bytes)
        return rows

    def _enter(self, client: Client, rows: Sequence[int], size_bytes: int) -> None:
        index, writers = self.index, self.writers
        for row in rows:
            index.asked_bytes[row] = size_bytes
            writers[index.id_of(row)] = client.id

    def forget(self, cache_id: int) -> None:
        """Take a cache off the books, unless it is off already (its client's death may have been first)."""
        self.writers.pop(cache_id, None)
        row = self.index.live_row(cache_id)
        if row >= 0:
            self.index.remove(row)

    def check(self) -> None:
        """Raise :class:`~kvpool.errors.InvariantError` if the books do not add up."""
        self.index.check()
        for cache_id in self.writers:
            row = self.index.live_row(cache_id)
            ensure(
                row >= 0 and not self.index.is_sealed(row), "a writer of a cache that is sealed or gone", id=cache_id
            )
