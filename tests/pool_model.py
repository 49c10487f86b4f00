"""What clients of a pool know and may rely on: the model that property tests and simulations check a pool against.

Clients act on what they were answered, never on what they asked for. Whoever drives the model chooses who does what
and when each device works; the model checks every answer, and :mod:`pool_checks` everything in between.
"""

from __future__ import annotations

import ctypes
import os
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from interleaved_pool import InterleavedPool
from pool_clients import BLOCK_BYTES, Key, Made, Process, content_of, is_error, whole
from pool_harness import keys_of

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
from kvpool.pool.quota import Owner


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
            assert all(answer is True or is_error(answer, DeviceLostError) for answer in answers)
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
        self.overcommitted = self.overcommitted_now()

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
            self.overcommitted = self.overcommitted_now()
        self.quotas[tenant, model] = revision
        assert [(answer["applied"], answer["revision"]) for answer in answers] == [
            (True, revision), (False, revision), (False, revision)
        ]  # fmt: skip
        assert answers[1] == answers[2] | {"waiting": answers[1]["waiting"]}
        assert all(answer["guaranteed"] == answers[0]["guaranteed"] for answer in answers)

    def overcommitted_now(self) -> int:
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
            void = (InvalidatedError,) if made.id in self.void else ()
            kinds = (CapacityError, InvalidSizeError, LimitError, *void)
            given_up = made.id not in process.sure() and is_error(answer, CacheStateError)
            assert answer is None or given_up or is_error(answer, *kinds), answer
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
        gone = not process.alive and is_error(answer, ProtocolError, LeaseRevokedError)
        assert is_error(answer, *kinds) or gone, answer

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
            content_of(key), extents=front(size_bytes), max_size_bytes=max(max_size_bytes, size_bytes),
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
            lost = self.pool.lost and is_error(answer, DeviceLostError)
            gone = not process.alive and is_error(answer, ProtocolError, LeaseRevokedError)
            assert lost or gone or (is_error(answer, ParentNotResidentError) and not is_sure), answer
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
                made.written = content_of(made.asked)
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
            assert is_error(answer, CacheStateError, InvalidRequestError), answer
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
                assert is_error(outcome, CacheStateError, ProtocolError, DeviceLostError), outcome
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
            assert self.read(made, made.extents) == whole(content_of(key), made.size_bytes, made.extents)
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
                assert is_error(outcome, DoubleReleaseError, UnknownCacheError, StaleCacheError), outcome
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
            assert outcome is True or (held and outcome is False) or is_error(outcome, KvpoolError), outcome
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
        filled = whole(made.written, made.max_size_bytes, front(made.max_size_bytes))
        for start, end in extents:
            ctypes.memmove(self._address(made) + start, filled[start:end], end - start)

    def read(self, made: Made, extents: Extents) -> bytes:
        return b"".join(ctypes.string_at(self._address(made) + start, end - start) for start, end in extents)
