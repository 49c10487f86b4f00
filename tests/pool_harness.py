"""A whole pool in one process: the real state, the real device stores, real memory; no Ray, no sockets.

Operations wait in a queue for each device and are carried out when the harness is told to (``settle`` for all, ``step``
for one device), so that tests choose the interleaving.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Sequence
from typing import Any

from kvpool.actors.lower_operations import KINDS
from kvpool.cache.key import encode_block_id
from kvpool.cache.store import DeviceStore
from kvpool.errors import InvalidatedError
from kvpool.memory.allocator import GPUMemoryAllocator
from kvpool.memory.host import HostBackend
from kvpool.pool.instructions import (
    Batch,
    BatchDone,
    BlocksRequested,
    CachesRequested,
    ClientGone,
    DeviceAnswered,
    DeviceFreed,
    EvictRequested,
    Failed,
    FlushRequested,
    Grant,
    InvalidateRequested,
    Move,
    Moved,
    PinRequested,
    PrefixesFetched,
    PrefixesLookedUp,
    ReleaseRequested,
    RevokeRequested,
    SealRequested,
    Send,
    Tick,
)
from kvpool.pool.state import PoolState

PAGE = 64 * 1024


class Shelf:
    """What lies below one device: real bytes, without limits and without delay."""

    def __init__(self) -> None:
        self.content: dict[tuple[str, str, bytes], tuple[bytes | None, bytes]] = {}
        self.refuses = False
        """It keeps nothing of what goes down."""
        self.fills = 0

    def carry_out(self, store: DeviceStore, operation: Any) -> Any:
        match operation:
            case ("lower" | "copy", tenant, fingerprint, entries):
                return [self._keep(store, tenant, fingerprint, *entry) for entry in entries]
            case ("forget", _, tenant, fingerprint, names):
                for key in list(self.content):
                    if key[:2] == (tenant, fingerprint) and (names is None or key[2] in names):
                        del self.content[key]
        return True

    def _keep(self, store: DeviceStore, tenant: str, fingerprint: str, cache_id: int, key: bytes, parent: Any) -> bool:
        record = store.sealed(cache_id)
        if record is None or self.refuses:
            return False
        read = ctypes.string_at(store.allocator.address + record.offset, record.size_bytes)
        self.content[tenant, fingerprint, key] = parent, read
        return True

    def fill(self, store: DeviceStore, tenant: str, fingerprint: str, entries: Any) -> list[bool]:
        self.fills += 1
        filled = []
        for cache_id, key in entries:
            record, found = store.record(cache_id), self.content.get((tenant, fingerprint, key))
            if found is not None:
                ctypes.memmove(store.allocator.address + record.offset, found[1], len(found[1]))
            filled.append(found is not None)
        return filled

    def forgotten(self, store: DeviceStore, *name: Any) -> int:
        return 0

    def save(self, store: DeviceStore, tenant: str | None, since: int = 0, again: Sequence[Any] = ()) -> dict[str, Any]:
        caches = [content for key, (_, content) in self.content.items() if tenant in (None, key[0])]
        size_bytes = sum(map(len, caches))
        return {
            "caches": len(caches),
            "bytes": size_bytes,
            "mark": 0,
            "evicted_before": 0,
            "evicted": 0,
            "refused": [],
            "failed": [],
            "error": None,
        }

    def persist(self, store: DeviceStore, tenant: str, fingerprint: str, entries: Any) -> list[Any]:
        gone = ("error", *InvalidatedError("not to be kept any more").to_wire())
        return [True if self._keep(store, tenant, fingerprint, *entry) else gone for entry in entries]


class LocalPool:
    """State and devices of a pool, driven by hand."""

    def __init__(
        self,
        devices: int = 1,
        pages: int = 4,
        page_bytes: int = PAGE,
        queue_limit: int = 100,
        placement="least_loaded",
        policy="lru",
        lower: bool = False,
        gc_threshold: float = 1.0,
    ):
        self.now = 0.0
        self.moves: list[Move] = []
        self.shelves = [Shelf() for _ in range(devices)] if lower else []
        self.state = PoolState("test", policy, placement, queue_limit, gc_threshold)
        self.stores: list[DeviceStore] = []
        self.outboxes: list[deque[Send]] = []
        self.grants: dict[str, list[tuple[int, Any]]] = {}
        self.done: dict[Batch, list[Any]] = {}
        for number in range(devices):
            allocator = GPUMemoryAllocator(HostBackend(), pages * page_bytes, page_bytes)
            self.stores.append(DeviceStore(allocator, compaction_step_bytes=page_bytes))
            self.outboxes.append(deque())
            self.state.add_device(
                f"host-{number}", "here", pages * page_bytes, page_bytes, 4096, 8 * pages * page_bytes, lower,
                f"/disk/host-{number}" if lower else None,
            )  # fmt: skip

    def close(self) -> None:
        for store in self.stores:
            store.allocator.close()

    # -- carrying out ---------------------------------------------------------------------------------------------

    def take(self, instructions) -> None:
        for instruction in instructions:
            match instruction:
                case Send():
                    self.outboxes[instruction.device].append(instruction)
                case Move():
                    self.moves.append(instruction)
                case BatchDone():
                    self.done[instruction.batch] = instruction.batch.answers
                case Failed():
                    raise instruction.error
                case Grant():
                    self.grants.setdefault(instruction.client, []).append((instruction.ticket, instruction.answer))

    def step(self, device: int) -> bool:
        """Let one device carry out all that waits for it."""
        sent = list(self.outboxes[device])
        if not sent:
            return False
        self.outboxes[device].clear()
        answers = [self._carry_out(device, send.operation) for send in sent]
        zombies = (self.stamp(), self.stores[device].allocator.usage().zombie_bytes)
        self.take(self.state.handle(DeviceAnswered(device, sent, answers, zombies), self.now))
        return True

    def _carry_out(self, device: int, operation: Any) -> Any:
        if operation[0] in KINDS:
            return self.shelves[device].carry_out(self.stores[device], operation)
        return self.stores[device].apply([operation])[0]

    def move(self, number: int = 0) -> None:
        """Let a device carry out one of the moves that it was told."""
        move = self.moves.pop(number)
        answer = getattr(self.shelves[move.device], move.method)(self.stores[move.device], *move.arguments)
        self.take(self.state.handle(Moved(move, answer), self.now))

    def tick(self) -> None:
        """Time has passed."""
        self.handle(Tick())

    def settle_all(self) -> None:
        """Let the devices carry out all that they were told, moves included."""
        self.settle()
        while self.moves:
            self.move()
            self.settle()

    def stamp(self) -> int:
        self._last_stamp = getattr(self, "_last_stamp", 0) + 1
        return self._last_stamp

    def settle(self) -> None:
        while sum(self.step(device) for device in range(len(self.stores))):
            pass

    def handle(self, event) -> None:
        self.take(self.state.handle(event, self.now))

    def ask(self, event_type, client: str, items, *more) -> list[Any]:
        """Submit a batch, settle everything, return its answers."""
        batch = Batch(len(items))
        self.handle(event_type(batch, client, items, *more))
        self.settle()
        return self.done.pop(batch)

    # -- what a client does ---------------------------------------------------------------------------------------

    def connect(self, client: str = "c", tenant: str = "default") -> None:
        _, batch, instructions = self.state.connect(client, tenant, "here", f"token-{client}")
        self.take(instructions)
        self.settle()
        assert self.done.pop(batch) == [True] * len(self.stores)

    def model(self, client: str = "c", name: str = "m", block_bytes: int | None = 4096, limit_bytes=None) -> int:
        spec = {"name": name, "identity": {"model": name}, "block_bytes": block_bytes, "limit_bytes": limit_bytes}
        model, instructions = self.state.register_model(client, spec)
        self.take(instructions)
        return model.number

    def request(self, size, client="c", model=0, max_size=None, timeout_s=0.0, priority=0):
        return self.ask(CachesRequested, client, [(1, model, size, max_size or size, timeout_s, priority, None)])[0]

    def blocks(self, ids, client="c", model=0, parent=None, output_tokens=None):
        return self.ask(BlocksRequested, client, [(1, model, hashes(ids), parent, output_tokens, None)])[0]

    def look_up(self, ids, client="c", model=0):
        return self.ask(PrefixesLookedUp, client, [(1, model, hashes(ids), None)])[0]

    def seal(self, cache_ids, keys, client="c", model=0, finish=False):
        return self.ask(SealRequested, client, [(1, model, cache_ids, keys, None)], finish)[0]

    def fetch(self, ids, first, client="c", model=0, timeout_s=30.0):
        return self.ask(PrefixesFetched, client, [(1, model, hashes(ids), first, timeout_s, None)])[0]

    def read(self, ids, client="c", model=0) -> list[int]:
        """Look a chain up, fetch what is below, and return the first byte of each block."""
        hit = self.look_up(ids, client, model)
        places, found = list(zip(hit[2], hit[3], strict=True)), list(hit[1])
        if hit[5]:
            more = self.fetch(ids, len(found), client, model)
            if more[0] == "queued":
                self.settle_all()
                ((_, more),) = [each for each in self.grants.pop(client) if each[0] == more[1]]
            places += zip(more[2], more[3], strict=True)
            found += more[1]
        seen = [ctypes.string_at(self.stores[d].allocator.address + place[0], 1)[0] for d, place in places]
        if found:
            self.release(found, client)
        return seen

    def store(self, ids, client="c", model=0, block_bytes=4096) -> int:
        """Store a chain whose blocks hold their ids' lowest byte; returns how many blocks are in the pool then."""
        _, resident, cache_ids, devices, places = self.blocks(ids, client, model)
        for block, device, place in zip(ids[resident:], devices, places, strict=False):
            self.fill(device, place, block_bytes, block % 256)
        if cache_ids:
            self.seal(cache_ids, keys_of(ids)[resident : resident + len(cache_ids)], client, model, finish=True)
        return resident + len(cache_ids)

    def release(self, cache_ids, client="c"):
        return self.ask(ReleaseRequested, client, [(1, list(cache_ids), None)])[0]

    def pin(self, cache_ids, held, client="c"):
        return self.ask(PinRequested, client, [(1, list(cache_ids), None)], held)[0]

    def put(self, ids, client="c", model=0):
        """Store a chain: new blocks, sealed and released. Returns the ``blocks`` answer."""
        answer = self.blocks(ids, client, model)
        _, resident, cache_ids, _, _ = answer
        if cache_ids:
            self.seal(cache_ids, keys_of(ids)[resident : resident + len(cache_ids)], client, model, finish=True)
        return answer

    def evict(self, tenant=None, model=None, device=None, size_bytes=None):
        return self.administer(EvictRequested(Batch(1), tenant, model, device, size_bytes))

    def flush(self, tenant=None):
        batch = Batch(1)
        self.handle(FlushRequested(batch, tenant))
        self.settle_all()
        return self.done.pop(batch)[0]

    def invalidate(self, model="m", keys=None, tenant=None):
        return self.administer(InvalidateRequested(Batch(1), tenant, model, keys))

    def revoke(self, client, tenant=None):
        return self.administer(RevokeRequested(Batch(1), client, tenant))

    def administer(self, event) -> dict[str, Any]:
        self.handle(event)
        self.settle()
        (answer,) = self.done.pop(event.batch)
        return answer

    def left(self, byte: int) -> int:
        """How many bytes of that value are in the pages of all devices."""
        found = 0
        for store in self.stores:
            allocator = store.allocator
            for index in allocator._table._mapped:
                page = ctypes.string_at(
                    allocator.address + index * allocator.page_size_bytes, allocator.page_size_bytes
                )
                found += page.count(byte)
        return found

    def fill(self, device: int, place: Any, size_bytes: int, byte: int) -> None:
        ctypes.memset(self.stores[device].allocator.address + place[0], byte, size_bytes)

    def kill(self, client: str) -> None:
        """The client's process dies: every device sees it and tells the pool."""
        for number, store in enumerate(self.stores):
            ended, freed = store.disconnect(client)
            store.allocator.holder_gone(client)
            self.handle(ClientGone(client, number, ended, freed))
            self.handle(DeviceFreed(number, (self.stamp(), store.allocator.usage().zombie_bytes)))
        self.settle()

    def check(self) -> None:
        """Books, devices and addresses agree."""
        self.state.check()
        for store in self.stores:
            store.allocator.check()
            assert store.lease_count == sum(record.leases for record in store._caches.values())

    def live_bytes(self) -> int:
        return sum(store.allocator.usage().live_bytes for store in self.stores)


def keys_of(ids) -> list[bytes]:
    return [encode_block_id(block_id) for block_id in ids]


def hashes(ids) -> bytes:
    return b"".join(keys_of(ids))
