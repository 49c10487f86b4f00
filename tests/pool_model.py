"""What clients of a pool know and may rely on: the model that property tests and simulations check a pool against.

Clients act on what they were answered, never on what they asked for. Whoever drives the model chooses who does what
and when each device works; the model checks every answer, and :meth:`PoolModel.check` everything in between.
"""

from __future__ import annotations

import ctypes
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from typing import Any

from interleaved_pool import InterleavedPool
from pool_harness import PAGE, keys_of

from kvpool.cache.table import KEYED
from kvpool.errors import (
    CacheStateError,
    CapacityError,
    DeviceLostError,
    DoubleReleaseError,
    InvalidatedError,
    InvalidRequestError,
    InvalidSizeError,
    KvpoolError,
    LeaseRevokedError,
    LimitError,
    ParentNotResidentError,
    ProtocolError,
    StaleCacheError,
    UnknownCacheError,
    from_wire,
)
from kvpool.memory.extents import Extents, changed, checked, difference, front, total_bytes
from kvpool.pool.instructions import (
    Batch,
    BlocksRequested,
    CachesRequested,
    ChangesRequested,
    EvictRequested,
    InvalidateRequested,
    PinRequested,
    PrefixesLookedUp,
    QuotaSet,
    ReleaseRequested,
    RevokeRequested,
    SealRequested,
    Tick,
    TicketsCancelled,
)
from kvpool.pool.leases import PINNER
from kvpool.pool.quota import Owner
from kvpool.pool.requests import CacheRequest

BLOCK_BYTES = {"small": PAGE // 4, "large": PAGE + PAGE // 4}
"""What every tenant registers, under equal names and with equal hashes: four blocks a page, and two pages a block."""

Key = tuple[str, str, bytes]
"""Tenant, model, hash."""


@dataclass(eq=False)
class Made:
    """A cache, as its maker knows it."""

    id: int
    maker: str
    tenant: str
    model: str
    device: int
    offset: int
    size_bytes: int
    pages: tuple[tuple[int, int], ...]
    planned: bytes | None
    """Hash of the block it was asked for."""
    above: int
    """Id of the cache that it was chained behind when it was granted, -1 if there was none."""
    written: bytes
    asked: Key | None = None
    """The key under which its maker has asked to seal it, from that moment on."""
    sealed: bool = False
    generation: int = 0
    extents: Extents = ()
    """What its maker may count on: what it was told is backed, without what it has asked to give back."""
    max_size_bytes: int = 0
    changing: bool = False

    @property
    def sealable(self) -> bool:
        """Whether it is backed from its first byte on, and stays so."""
        return not self.changing and self.size_bytes > 0 and self.extents == front(self.size_bytes)


@dataclass(eq=False)
class Process:
    """A client: what it was answered, and what it has given up since."""

    name: str
    tenant: str
    models: dict[str, int]
    ready: bool = False
    alive: bool = True
    held: Counter[int] = field(default_factory=Counter)
    releasing: Counter[int] = field(default_factory=Counter)
    finishing: set[int] = field(default_factory=set)
    guessed: Counter[int] = field(default_factory=Counter)
    """Leases that it gave up before it was told of them: those of a look-up that may end without them."""
    tickets: set[int] = field(default_factory=set)

    def sure(self) -> list[int]:
        """Return the caches on which it holds a lease that it has not begun to give up."""
        return sorted(i for i, n in self.held.items() if n > self.releasing[i] and i not in self.finishing)


class PoolModel:
    """A pool and its clients."""

    def __init__(self, devices: int, pages: int, **options: Any) -> None:
        self.pool = InterleavedPool(devices, pages, self._granted_later, **options)
        self.clients: dict[str, Process] = {}
        self.made: dict[int, Made] = {}
        self.pins: dict[str, Counter[int]] = {}
        self.unpinning: dict[str, Counter[int]] = {}
        self.ever_asked: Counter[Key] = Counter()
        self.outcomes: dict[int, Any] = {}
        self.cancelled: set[int] = set()
        self.void: set[int] = set()
        """Ids of caches whose content has been invalidated, from that moment on."""
        self.sealing: Counter[int] = Counter()
        """Seals of each cache that are not answered yet."""
        self.invalidated: list[tuple[str, str, set[bytes] | None]] = []
        """Each invalidation: tenant, model, keys."""
        self.ghosts: dict[str, list[Made]] = {}
        """By revoked client, the caches that it may go on writing to until it ends."""
        self.revocations = 0
        self.quotas: dict[tuple[str, str | None], int] = {}
        """The revision that holds of each."""
        self.overcommitted = 0
        """By how much guarantees and leases exceeded the memory when a quota was set or a device lost."""
        self.hits = 0
        self.grants = 0
        self.changes: dict[int, Callable[[Any], None]] = {}
        """By ticket, who is to be told of the outcome of a change that waits."""
        self.changes_made = 0

    # -- clients ------------------------------------------------------------------------------------------------------

    def connect(self, name: str, tenant: str) -> None:
        _, batch, instructions = self.pool.state.connect(name, tenant, "here", f"token of {name}")
        models = {}
        for model, block_bytes in BLOCK_BYTES.items():
            spec = {"name": model, "identity": {"model": model}, "block_bytes": block_bytes, "limit_bytes": None}
            models[model] = self.pool.state.register_model(name, spec)[0].number
        process = self.clients[name] = Process(name, tenant, models)
        self.pins.setdefault(tenant, Counter())
        self.unpinning.setdefault(tenant, Counter())

        def connected(answers: list[Any]) -> None:
            assert all(answer is True or _error(answer, DeviceLostError) for answer in answers)
            process.ready = True

        self.pool.open[batch] = connected
        self.pool.take(instructions)

    def ready(self) -> list[str]:
        return sorted(name for name, process in self.clients.items() if process.alive and process.ready)

    def unsealed(self, name: str) -> list[int]:
        """Return the caches that a client writes and has not asked to seal."""
        return [i for i in self.writing(name) if self.made[i].sealable]

    def writing(self, name: str) -> list[int]:
        """Return all that a client writes and may change."""
        return [i for i in self.clients[name].sure() if self.made[i].maker == name and self.made[i].asked is None]

    def changeable(self, name: str) -> list[int]:
        """Return the caches of which a client may change what is backed."""
        return [i for i in self.writing(name) if not self.made[i].changing]

    def holders(self) -> list[str]:
        return [name for name in self.ready() if self.clients[name].sure()]

    def tickets(self) -> list[int]:
        return sorted(set().union(*(process.tickets for process in self.clients.values())))

    def die(self, name: str) -> None:
        self._end(name)
        self.pool.die(name)

    def leave(self, name: str) -> None:
        """The client disconnects, then its process ends."""
        self._end(name)
        batch, instructions = self.pool.state.disconnect(name)
        self.pool.open[batch] = lambda answers: None
        self.pool.take(instructions)
        self.pool.die(name)

    def revoke(self, name: str) -> None:
        """An administrator ends the client's leases. It knows nothing of it, and lives on for a while."""
        process = self.clients[name]
        mine = [
            made for made in map(self.made.__getitem__, process.sure()) if made.maker == name and made.asked is None
        ]
        self._end(name)
        self.revocations += 1
        self.pool.revoked.add(name)
        self.ghosts[name] = mine
        self._administer(RevokeRequested(Batch(1), name, process.tenant), lambda answer: None)

    def scribble(self) -> None:
        """Revoked clients write on, as far as they had mapped what they wrote to."""
        for name, ghosts in self.ghosts.items():
            for made in ghosts:
                if made.device in self.pool.lost:
                    continue
                table = self.pool.stores[made.device].allocator._table
                pages = [table._mapped.get(index) for index, _ in made.pages]
                if all(
                    page is not None and page.serial == serial and name in page.holders
                    for page, (_, serial) in zip(pages, made.pages, strict=True)
                ):
                    for start, end in made.extents:
                        ctypes.memset(self._address(made) + start, 0xEE, end - start)

    def let_go(self, name: str) -> None:
        """A revoked client's process ends, or it has closed its tensors and says so."""
        self.ghosts.pop(name)
        self.pool.die(name)

    def _administer(self, event: Any, answered: Any) -> None:
        self.pool.open[event.batch] = lambda answers: answered(answers[0])
        self.pool.handle(event)

    def evict(self, tenant: str | None, model: str | None, size_bytes: int | None) -> None:
        self._administer(EvictRequested(Batch(1), tenant, model, None, size_bytes), self._evicted)

    def _evicted(self, answer: Any) -> None:
        assert answer["caches"] >= 0
        assert (answer["bytes"] > 0) == (answer["caches"] > 0)

    def invalidate(self, tenant: str, model: str, ids: Sequence[int] | None) -> None:
        """All content of a model, or that under some keys, is void from now on."""
        keys = None if ids is None else set(keys_of(ids))
        void = self._to_be_void(tenant, model, keys)
        self.void |= void
        self.invalidated.append((tenant, model, keys))
        event = InvalidateRequested(Batch(1), tenant, model, None if keys is None else sorted(keys))
        self._administer(event, partial(self._invalidated, tenant, void))

    def _to_be_void(self, tenant: str, model: str, keys: set[bytes] | None) -> set[int]:
        index = self.pool.state.ledger.index
        mine = {
            i: made for i, made in self.made.items()
            if (made.tenant, made.model) == (tenant, model) and index.live_row(i) >= 0
        }  # fmt: skip
        if keys is None:
            return set(mine)
        void = set()
        for i, made in mine.items():
            row = index.live_row(i)
            known = index.key_of(row) if index.is_sealed(row) else made.planned
            cut_off = made.above >= 0 and index.live_row(made.above) < 0 and index.parent[row] < 0
            assert not cut_off or row in index.orphans
            if known in keys or row in index.orphans:
                void.add(i)
        while True:
            rows = {index.live_row(i) for i in void}
            more = {i for i in mine if index.parent[index.live_row(i)] in rows} - void
            if not more:
                return void
            void |= more

    def _invalidated(self, tenant: str, void: set[int], answer: Any) -> None:
        assert answer["caches"] >= 0
        for cache_id in void:
            del self.pins[tenant][cache_id]
        for device in self.pool.live:
            store = self.pool.stores[device]
            for cache_id in void & store._caches.keys():
                assert store._caches[cache_id].leases, "what nobody holds is gone"

    def _end(self, name: str) -> None:
        process = self.clients[name]
        process.alive = False
        process.held.clear()

    def lose(self, device: int) -> None:
        for counts in [process.held for process in self.clients.values()] + list(self.pins.values()):
            for cache_id in [i for i in counts if self.made[i].device == device]:
                del counts[cache_id]
        self.pool.lose(device)
        self.overcommitted = self._overcommitted()

    def advance(self, seconds: float) -> None:
        self.pool.now += seconds
        self.pool.handle(Tick())

    # -- memory -------------------------------------------------------------------------------------------------------

    def set_quota(self, tenant: str, model: str | None, guaranteed: int | str, limit: int | str | None) -> None:
        """Sets a quota, and says it again with the same revision and with an older one: nothing changes by that."""
        revision = self.quotas.get((tenant, model), 0) + 2
        answers: list[Any] = []
        events = [QuotaSet(Batch(1), tenant, model, guaranteed, limit, revision)]
        events += [QuotaSet(Batch(1), tenant, model, 1, None, older) for older in (revision, revision - 1)]
        for event in events:
            try:
                self._administer(event, answers.append)
            except InvalidRequestError:
                del self.pool.open[event.batch]
                return  # more is guaranteed than the limit
            self.overcommitted = self._overcommitted()
        self.quotas[tenant, model] = revision
        assert [(answer["applied"], answer["revision"]) for answer in answers] == [
            (True, revision), (False, revision), (False, revision)
        ]  # fmt: skip
        assert answers[1] == answers[2] | {"waiting": answers[1]["waiting"]}
        assert all(answer["guaranteed"] == answers[0]["guaranteed"] for answer in answers)

    def _overcommitted(self) -> int:
        """Return by how much what is guaranteed or leased exceeds the memory; reckoned from the rows alone."""
        index, ledger = self.pool.state.ledger.index, self.pool.state.ledger
        guaranteed = {(q["tenant"], q["model"]): q["guaranteed_bytes"] for q in self.pool.state.quotas()}
        leased: Counter[tuple[str, str | None]] = Counter()
        for row in range(len(index.flags)):
            if index.flags[row] and not (index.flags[row] & KEYED and not index.pins[row]):
                # What is void has no model any more: it counts where it did when it was buried.
                model = ledger.model_of(row) or ledger.quotas.account_in(index.partition[row]).own
                name = model.model if isinstance(model, Owner) else model and model.name
                tenant = index.tenant_of(row)
                leased[tenant, name if (tenant, name) in guaranteed else None] += index.size_bytes[row]
        needed = 0
        for tenant in {tenant for tenant, _ in (*guaranteed, *leased)}:
            parts = leased[tenant, None] + sum(
                max(n, leased[t, model]) for (t, model), n in guaranteed.items() if t == tenant and model is not None
            )
            needed += max(parts, guaranteed.get((tenant, None), 0))
        return max(needed - sum(ledger.devices[number].capacity_bytes for number in self.pool.live), 0)

    def request(
        self, name: str, model: str, sizes: Sequence[tuple[int, int]], timeout_s: float, priority: int = 0
    ) -> None:
        process = self.clients[name]
        items = [(1, process.models[model], size, maximum, timeout_s, priority, None) for size, maximum in sizes]
        self.pool.submit(CachesRequested, name, items, partial(self._requested, process, model, sizes))

    def _requested(self, process: Process, model: str, sizes: Sequence[tuple[int, int]], answers: list[Any]) -> None:
        for (size_bytes, _), answer in zip(sizes, answers, strict=True):
            match answer[0]:
                case "queued":
                    if answer[1] in self.outcomes:  # the grant came first
                        self._granted(process, self.outcomes[answer[1]])
                    else:
                        process.tickets.add(answer[1])
                case "granted":
                    assert answer[3] == size_bytes
                    self._granted(process, answer)
                case _:
                    self._refused(process, answer)

    def _granted_later(self, client: str, ticket: int, answer: Any) -> None:
        assert ticket not in self.outcomes, "a ticket has one outcome"
        assert ticket not in self.cancelled, "a cancelled ticket has none"
        self.outcomes[ticket] = answer
        process = self.clients[client]
        if ticket in process.tickets:
            process.tickets.remove(ticket)
            if ticket in self.changes:
                self.changes.pop(ticket)(answer)
            else:
                self._granted(process, answer)

    def change(
        self, name: str, cache_id: int, kind: str, ranges: Sequence[tuple[int, int]], timeout_s: float = 0.0
    ) -> None:
        """The maker of a cache changes what is backed of it; one change at a time."""
        made, process = self.made[cache_id], self.clients[name]
        before, asked = made.extents, checked(ranges, made.max_size_bytes)
        wanted = changed(kind, before, asked)
        made.changing = True
        made.extents = difference(before, difference(before, wanted))
        took = partial(self._changed, process, made, before, wanted)
        item = (1, cache_id, kind, list(ranges), timeout_s, None)
        self.pool.submit(ChangesRequested, name, [item], partial(self._change_answered, process, took))

    def _change_answered(self, process: Process, took: Callable[[Any], None], answers: list[Any]) -> None:
        (answer,) = answers
        if answer[0] != "queued":
            took(answer)
        elif answer[1] in self.outcomes:
            took(self.outcomes[answer[1]])
        else:
            process.tickets.add(answer[1])
            self.changes[answer[1]] = took

    def _changed(self, process: Process, made: Made, before: Extents, wanted: Extents, answer: Any) -> None:
        made.changing = False
        if not process.alive or made.device in self.pool.lost:
            return
        if answer is None or answer[0] == "error":
            kinds = (
                CapacityError,
                InvalidSizeError,
                LimitError,
                *((InvalidatedError,) if made.id in self.void else ()),
            )
            given_up = made.id not in process.sure() and _error(answer, CacheStateError)
            assert answer is None or given_up or _error(answer, *kinds), answer
            made.extents = before  # and its bytes: nothing was done
            return
        _, cache_id, made.size_bytes, extents, place = answer
        assert (cache_id, extents, made.size_bytes) == (made.id, wanted, total_bytes(wanted))
        assert place[0] == made.offset, "its address stays"
        assert place[2] > made.generation
        kept = {ref for ref in made.pages if ref[0] in dict(place[1])}
        assert kept <= set(place[1]), "pages that stay are the same"
        _, made.pages, made.generation = place
        made.extents = extents
        if made.id in process.sure():
            self._write(made, difference(extents, before))
        self.changes_made += 1

    def _granted(self, process: Process, answer: Any) -> None:
        if answer[0] != "granted":
            self._refused(process, answer)
            return
        _, cache_id, device, size_bytes, max_size_bytes, place = answer
        self.grants += 1
        model = next(iter(process.models))
        self._make(process, model, cache_id, device, size_bytes, place, None, max_size_bytes)

    def _refused(self, process: Process, answer: Any) -> None:
        kinds = (CapacityError, InvalidSizeError, DeviceLostError, LimitError)
        gone = not process.alive and _error(answer, ProtocolError, LeaseRevokedError)
        assert _error(answer, *kinds) or gone, answer

    def _make(
        self,
        process: Process,
        model: str,
        cache_id: int,
        device: int,
        size_bytes: int,
        place: Any,
        planned: bytes | None,
        max_size_bytes: int = 0,
    ) -> None:
        assert cache_id not in self.made, "an id is never given out again"
        if not process.alive or device in self.pool.lost:
            return
        offset, pages, _ = place
        key = (process.tenant, model, planned if planned is not None else cache_id.to_bytes(16, "little"))
        index = self.pool.state.ledger.index
        row = index.live_row(cache_id)
        above = index.id_of(index.parent[row]) if row >= 0 and index.parent[row] >= 0 else -1
        self.made[cache_id] = Made(
            cache_id, process.name, process.tenant, model, device, offset, size_bytes, pages, planned, above,
            _content(key), extents=front(size_bytes), max_size_bytes=max(max_size_bytes, size_bytes),
        )  # fmt: skip
        process.held[cache_id] = 1
        if row >= 0 and index.is_void(row):
            self.void.add(cache_id)  # while it was on its way
        self._write(self.made[cache_id])

    def blocks(self, name: str, model: str, ids: Sequence[int], parent: int | None = None) -> None:
        process = self.clients[name]
        above = None if parent is None else keys_of([parent])[0]
        is_sure = above is not None and (process.tenant, model, above) in self._surely_found()
        item = (1, process.models[model], b"".join(keys_of(ids)), above, None, None)
        since = len(self.invalidated)
        self.pool.submit(BlocksRequested, name, [item], partial(self._got_blocks, process, model, ids, is_sure, since))

    def _got_blocks(
        self, process: Process, model: str, ids: Sequence[int], is_sure: bool, since: int, answers: list[Any]
    ) -> None:
        (answer,) = answers
        if answer[0] == "error":
            lost = self.pool.lost and _error(answer, DeviceLostError)
            gone = not process.alive and _error(answer, ProtocolError, LeaseRevokedError)
            assert lost or gone or (_error(answer, ParentNotResidentError) and not is_sure), answer
            return
        _, resident, cache_ids, devices, places = answer
        assert len(cache_ids) == len(devices) == len(places) <= len(ids) - resident
        planned = keys_of(ids)[resident:]
        chain = False
        for cache_id, device, place, key in zip(cache_ids, devices, places, planned, strict=False):
            self._make(process, model, cache_id, device, BLOCK_BYTES[model], place, key)
            for tenant, name, keys in self.invalidated[since:]:  # while it was on its way
                chain |= (tenant, name) == (process.tenant, model) and (keys is None or key in keys)
            assert (
                not chain
                or cache_id in self.void
                or cache_id not in self.made
                or not self._is_here(process, [cache_id])
            )

    def cancel(self, name: str, tickets: Sequence[int]) -> None:
        process = self.clients[name]
        for ticket in tickets:
            if ticket in process.tickets and ticket in self.pool.state.allocations.queue:
                self.cancelled.add(ticket)
                process.tickets.remove(ticket)
                if ticket in self.changes:
                    self.changes.pop(ticket)(None)
        self.pool.handle(TicketsCancelled(name, list(tickets)))

    # -- sealing and sharing ------------------------------------------------------------------------------------------

    def seal(self, name: str, model: str, ids: Sequence[int], keys: Sequence[bytes], *, finish: bool) -> None:
        if any(self.sealing[cache_id] for cache_id in ids):
            return  # were the first refused for a cache beside it, the second would decide on the key
        process = self.clients[name]
        self.sealing.update(ids)
        sure = set(process.sure())
        for cache_id, key in zip(ids, keys, strict=True):
            made = self.made[cache_id]
            if made.maker == name and cache_id in sure and made.asked is None and made.model == model:
                made.asked = (made.tenant, model, key)
                made.written = _content(made.asked)
                self._write(made)
                self.ever_asked[made.asked] += 1
        if finish:
            process.finishing.update(ids)
        item = (1, process.models[model], list(ids), list(keys), None)
        void = set(ids) & self.void
        self.pool.submit(
            SealRequested, name, [item], partial(self._sealed, process, model, ids, keys, sure, finish, void), finish
        )

    def _sealed(
        self,
        process: Process,
        model: str,
        ids: Sequence[int],
        keys: Sequence[bytes],
        sure: set[int],
        finish: bool,
        void: set[int],
        answers: list[Any],
    ) -> None:
        (answer,) = answers
        self.sealing.subtract(ids)
        assert not void or answer[0] == "error", "what was asked for before an invalidation is not sealed after it"
        if finish:
            process.finishing.difference_update(ids)
        if answer[0] == "error":
            mine = all(
                i in sure and self.made[i].asked == (process.tenant, model, k) for i, k in zip(ids, keys, strict=True)
            )
            assert _error(answer, CacheStateError, InvalidRequestError), answer
            of_size = all(self.made[i].size_bytes == BLOCK_BYTES[model] for i in ids if i in self.made)
            void |= {i for i, k in zip(ids, keys, strict=True) if self._was_invalidated(process.tenant, model, k)}
            assert not mine or not of_size or void or not self._is_here(process, ids), "only a block's size has a key"
            for cache_id, key in zip(ids, keys, strict=True):  # one that is refused spoils it for all
                made = self.made.get(cache_id)
                if made is not None and made.maker == process.name and made.asked == (process.tenant, model, key):
                    made.asked = made.asked if made.sealed else None  # it may be sealed without the others
            return
        for cache_id, key, outcome in zip(ids, keys, answer[1], strict=True):
            made = self.made[cache_id]
            rightly = cache_id in sure and made.asked == (process.tenant, model, key)
            if outcome is True:
                assert made.asked == (process.tenant, model, key), "only its maker can seal a cache, once, with one key"
                made.sealed = made.sealed or rightly
            elif outcome == "duplicate":
                assert self.ever_asked[process.tenant, model, key] > (1 if rightly else 0)
                made.asked = None if rightly else made.asked
            else:
                assert _error(outcome, CacheStateError, ProtocolError, DeviceLostError), outcome
                assert not rightly or not self._is_here(process, [cache_id])
            if finish and outcome in (True, "duplicate") and self._is_here(process, [cache_id]):
                process.held[cache_id] -= 1

    def look_up(self, name: str, model: str, ids: Sequence[int]) -> None:
        process = self.clients[name]
        keys = [(process.tenant, model, key) for key in keys_of(ids)]
        found = self._surely_found()
        sure = next((n for n, key in enumerate(keys) if key not in found), len(keys))
        item = (1, process.models[model], b"".join(keys_of(ids)), None)
        since = len(self.pool.lost), len(self.invalidated)
        self.pool.submit(PrefixesLookedUp, name, [item], partial(self._looked_up, process, keys, sure, since))

    def _looked_up(
        self, process: Process, keys: list[Key], sure: int, since: tuple[int, int], answers: list[Any]
    ) -> None:
        ((kind, ids, devices, places, _, _),) = answers
        assert kind == "hit"
        if not process.alive:
            return
        changed = (len(self.pool.lost), len(self.invalidated)) != since
        assert len(ids) >= sure or changed, "what is leased and sealed is found"
        for cache_id, device, place, key in zip(ids, devices, places, keys, strict=False):
            if device in self.pool.lost:
                continue
            made = self.made[cache_id]
            assert made.asked == key, "a hit is what was sealed under that key, by its tenant, for that model"
            assert cache_id not in self.void, "nobody finds what was invalidated"
            if place[2] != made.generation:  # it was moved while nobody had it
                assert place[2] > made.generation
                made.offset, made.pages, made.generation = place
            assert (made.device, made.offset, made.pages) == (device, *place[:2])
            assert self._read(made, made.extents) == _whole(_content(key), made.size_bytes, made.extents)
            process.held[cache_id] += 1
            self.hits += 1

    def release(self, name: str, ids: Sequence[int]) -> None:
        process = self.clients[name]
        rightly = []
        for cache_id in ids:
            rightly.append(process.held[cache_id] > process.releasing[cache_id] and cache_id not in process.finishing)
            process.releasing[cache_id] += 1
        self.pool.submit(ReleaseRequested, name, [(1, list(ids), None)], partial(self._released, process, ids, rightly))

    def _released(self, process: Process, ids: Sequence[int], rightly: list[bool], answers: list[Any]) -> None:
        (answer,) = answers
        outcomes = [answer] * len(ids) if answer[0] == "error" else answer[1]
        for cache_id, may, outcome in zip(ids, rightly, outcomes, strict=True):
            process.releasing[cache_id] -= 1
            if not self._is_here(process, [cache_id]):
                continue
            if outcome is True:
                process.held[cache_id] -= 1
                process.guessed[cache_id] += not may  # below 0 by it until the look-up on its way is answered
            else:
                assert _error(outcome, DoubleReleaseError, UnknownCacheError, StaleCacheError), outcome
                assert not may or not all(rightly), "what is held can be given up"

    def pin(self, name: str, ids: Sequence[int], *, held: bool) -> None:
        process = self.clients[name]
        pins, unpinning = self.pins[process.tenant], self.unpinning[process.tenant]
        rightly = [held or pins[cache_id] > unpinning[cache_id] for cache_id in ids]
        if not held:
            unpinning.update(ids)
        item = (1, list(ids), None)
        self.pool.submit(PinRequested, name, [item], partial(self._pinned, process.tenant, ids, held, rightly), held)

    def _pinned(self, tenant: str, ids: Sequence[int], held: bool, rightly: list[bool], answers: list[Any]) -> None:
        (answer,) = answers
        outcomes = [answer] * len(ids) if answer[0] == "error" else answer[1]
        pins, unpinning = self.pins[tenant], self.unpinning[tenant]
        for cache_id, may, outcome in zip(ids, rightly, outcomes, strict=True):
            if not held:
                unpinning[cache_id] -= 1
            if self.made[cache_id].device in self.pool.lost:
                continue
            if cache_id in self.void:
                if held and outcome is True:
                    pins[cache_id] += 1  # decided before; it ends with the invalidation's answer
                continue
            assert outcome is True or (held and outcome is False) or _error(outcome, KvpoolError), outcome
            if outcome is True:
                pins[cache_id] += 1 if held else -1
            else:
                # One that is void may be gone before the invalidation's answer, and the whole item is in error then.
                assert held or not may or not all(rightly) or not self.void.isdisjoint(ids)

    def map(self, name: str, cache_id: int) -> None:
        """The client maps the pages of a cache that it holds."""
        made = self.made[cache_id]
        if made.changing:
            return  # they may not be there any more
        for index, serial in made.pages:
            os.close(self.pool.stores[made.device].allocator.export(name, made.tenant, index, serial))

    # -- what must hold -----------------------------------------------------------------------------------------------

    def check(self) -> None:
        """At any moment: the books add up, and nothing that somebody holds is gone, moved or changed."""
        self.scribble()
        self.pool.state.check()
        for quota in self.pool.state.quotas():
            is_draining = any(
                (o.tenant, o.model) == (quota["tenant"], quota["model"]) for o in self.pool.state.ledger.quotas.draining
            )
            assert quota["limit_bytes"] is None or quota["held_bytes"] <= quota["limit_bytes"] or is_draining
        assert self._overcommitted() <= self.overcommitted, "leases never take what is guaranteed to others"
        for device in self.pool.live:
            self.pool.stores[device].allocator.check()
        for process in self.clients.values():
            for cache_id in process.sure():
                made, store = self.made[cache_id], self.pool.stores[self.made[cache_id].device]
                leases = store._clients[process.name].leases[cache_id]
                assert leases >= process.held[cache_id] - process.releasing[cache_id]
                index = self.pool.state.ledger.index
                assert index.pins[index.row_of(cache_id)] >= leases
                assert store.allocator.allocation(cache_id).offset == made.offset
                there = made.extents
                if made.changing:  # unbacked where the device has done it, and its maker was not told yet
                    there = difference(there, difference(there, store.allocator.allocation(cache_id).extents))
                assert self._read(made, there) == _whole(made.written, made.max_size_bytes, there)

    def check_quiet(self) -> None:
        """When all is settled: the books say what the devices hold, all is answered, and who waits has to wait."""
        pool, index = self.pool, self.pool.state.ledger.index
        pool.settle()
        while (deadline := pool.state.next_deadline()) is not None and deadline <= pool.now:
            pool.handle(Tick())  # some were put back after their time
            pool.settle()
        assert not pool.open
        for process in self.clients.values():
            for cache_id in [i for i, n in process.held.items() if n < 0]:  # it was no part of the answer in the end
                assert -process.held[cache_id] <= process.guessed[cache_id]
                del process.held[cache_id]
            process.guessed.clear()
        for device in pool.live:
            store = pool.stores[device]
            rows = {i: index.live_row(i) for i in store._caches}
            assert all(row >= 0 and index.device[row] == device for row in rows.values()), "unknown to the books"
            assert sum(index.device[row] == device for row in range(len(index.flags)) if index.flags[row]) == len(rows)
            for cache_id, record in store._caches.items():
                row = rows[cache_id]
                assert index.pins[row] == record.leases
                assert index.asked_bytes[row] == record.size_bytes
                if not store.allocator.allocation(cache_id).shared:
                    assert index.size_bytes[row] == len(record.pages) * PAGE
                assert index.is_sealed(row) == record.sealed
                assert index.key_of(row) == (None if record.void else record.key)
                assert record.doomed == record.void
                assert not record.void or (record.leases and cache_id in self.void)
            for name, known in store._clients.items():
                mine = self.clients[name].held if name in self.clients else self.pins[name.removeprefix(PINNER)]
                assert known.leases == {i: n for i, n in mine.items() if n and self.made[i].device == device}
        if waiting := pool.state.allocations.queue:
            first: dict[Any, int] = {}  # of those who lack the same; others may pass while the books take it for placed
            for (_, ticket), _ in sorted(waiting.heads()):
                request = waiting.get(ticket)
                assert request is not None
                first.setdefault(request.short_of or request.place, ticket)
            pool.handle(Tick())
            pool.settle()
            assert self.outcomes.keys().isdisjoint(first.values()), "the first in line waited though there was room"
            for _, request in waiting.items():
                assert not self._is_above_a_limit(request), "who can never be served waits for nothing"
        for owner in pool.state.ledger.quotas.draining:
            assert not list(self._could_go(owner.tenant, owner.model)), (
                "what is above a limit goes when nobody holds it"
            )
        self.check()

    def _is_above_a_limit(self, request: CacheRequest) -> bool:
        try:
            self.pool.state.allocations._check_waiting(request)
        except LimitError:
            return True
        except KvpoolError:
            pass  # told when it is its turn
        return False

    def _could_go(self, tenant: str, model: str | None) -> Iterator[int]:
        index = self.pool.state.ledger.index
        for row in range(len(index.flags)):
            made_for = self.pool.state.ledger.model_of(row) if index.flags[row] else None
            idle = index.flags[row] & KEYED and not index.pins[row] and not index.children[row]
            if idle and made_for is not None and made_for.tenant == tenant and model in (None, made_for.name):
                yield row

    def end(self) -> None:
        """All clients give everything back and leave: nothing may remain."""
        pool = self.pool
        self.check_quiet()
        for name in list(self.ghosts):
            self.let_go(name)
        self.check_quiet()
        for name in self.ready():
            process = self.clients[name]
            pins = self.pins[process.tenant]
            self.pin(name, list(pins.elements()), held=False)
            pool.settle()
            self.cancel(name, sorted(process.tickets))
            pool.settle()  # a cancelled request may have stood before others of the same client
            self.cancel(name, sorted(process.tickets))
            while ids := process.sure():
                self.release(name, ids)
                pool.settle()
            assert not process.tickets, "each ticket has an outcome"
        for tenant in [tenant for tenant, pins in self.pins.items() if +pins]:
            self.connect(f"last of {tenant}", tenant)
            pool.settle()
            self.pin(f"last of {tenant}", list(self.pins[tenant].elements()), held=False)
        for name in self.ready():
            self.leave(name)
        self.check_quiet()
        index = pool.state.ledger.index
        assert not any(index.pins[row] for row in range(len(index.flags)) if index.flags[row])
        assert all(not store.leases() for number, store in enumerate(pool.stores) if number in pool.live)
        self.evict_everything()

    def evict_everything(self) -> None:
        """A newcomer asks for all memory there is, and gets it, once nothing is guaranteed to others."""
        for tenant, model in self.quotas:
            self.set_quota(tenant, model, 0, None)
        pool = self.pool
        self.connect("newcomer", "newcomers")
        pool.settle()
        capacity_bytes = pool.state.ledger.devices[0].capacity_bytes
        sizes = [(capacity_bytes, capacity_bytes)] * len(pool.live)
        self.request("newcomer", "small", sizes, 1.0)
        pool.settle()
        granted = self.clients["newcomer"].sure()
        assert {self.made[i].device for i in granted} == set(pool.live)
        self.release("newcomer", granted)
        pool.settle()
        assert len(pool.state.ledger.index) == 0
        for device in pool.live:
            allocator = pool.stores[device].allocator
            assert pool.stores[device].caches == 0
            assert (allocator.usage().live_bytes, allocator.usage().backed_bytes) == (0, 0)
            allocator.trim()
            assert allocator.usage().free_bytes == allocator.capacity_bytes

    def close(self) -> None:
        self.pool.close()

    # -- helpers ------------------------------------------------------------------------------------------------------

    def _surely_found(self) -> set[Key]:
        """Return the keys of caches that are known to be sealed and held: a look-up must find them."""
        held = {i for process in self.clients.values() for i in process.sure()}
        held |= {i for tenant, pins in self.pins.items() for i in pins if pins[i] > self.unpinning[tenant][i]}
        found = map(self.made.__getitem__, held - self.void)
        return {made.asked for made in found if made.sealed and made.asked is not None}

    def _was_invalidated(self, tenant: str, model: str, key: bytes) -> bool:
        return any((t, m) == (tenant, model) and (keys is None or key in keys) for t, m, keys in self.invalidated)

    def _is_here(self, process: Process, ids: Sequence[int]) -> bool:
        return process.alive and not any(i in self.made and self.made[i].device in self.pool.lost for i in ids)

    def _address(self, made: Made) -> int:
        return self.pool.stores[made.device].allocator.address + made.offset

    def _write(self, made: Made, extents: Extents | None = None) -> None:
        extents = made.extents if extents is None else extents
        whole = _whole(made.written, made.max_size_bytes, front(made.max_size_bytes))
        for start, end in extents:
            ctypes.memmove(self._address(made) + start, whole[start:end], end - start)

    def _read(self, made: Made, extents: Extents) -> bytes:
        return b"".join(ctypes.string_at(self._address(made) + start, end - start) for start, end in extents)


def _content(key: Key) -> bytes:
    return blake2b(repr(key).encode(), digest_size=16).digest()


def _whole(pattern: bytes, size_bytes: int, extents: Extents) -> bytes:
    """Return what is in these parts of a cache that was filled with a pattern from its first byte on."""
    whole = pattern * (size_bytes // len(pattern) + 1)
    return b"".join(whole[start:end] for start, end in extents)


def _error(answer: Any, *kinds: type[KvpoolError]) -> bool:
    return isinstance(answer, tuple) and answer[0] == "error" and isinstance(from_wire(answer[1:]), kinds)
