"""The pool's decisions: ``handle(event, now) -> list[instruction]``. No Ray, no clock, no waiting.

The same code runs in the pool actor, in tests and in simulations. An event is a client's batch, a device's answer,
the end of a client or device, or the passing of time; an instruction is an operation for a device, a finished batch,
or a grant to a client that waited.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from kvpool.amount import parse_amount, parse_limit
from kvpool.cache.eviction import load_present_code, plain_name
from kvpool.cache.key import fingerprint
from kvpool.errors import (
    DeviceLostError,
    InvalidRequestError,
    InvariantError,
    KvpoolError,
    PolicyError,
    ProtocolError,
)
from kvpool.pool.ahead import CopiesAhead
from kvpool.pool.allocation import Allocations
from kvpool.pool.backing import BackingChanges
from kvpool.pool.below import Below
from kvpool.pool.blocks import BlockAllocations
from kvpool.pool.clearance import Clearance
from kvpool.pool.client import Client
from kvpool.pool.device import Device
from kvpool.pool.directory import Directory
from kvpool.pool.durability import Durability
from kvpool.pool.evictions import Evictions
from kvpool.pool.fanout import Fanout
from kvpool.pool.flush import Flushes
from kvpool.pool.instructions import (
    Answer,
    Batch,
    BlocksRequested,
    CachesRequested,
    ChangesRequested,
    ClientGone,
    DeviceAnswered,
    DeviceFreed,
    DeviceLost,
    Event,
    EvictRequested,
    Failed,
    FlushRequested,
    Instruction,
    InvalidateRequested,
    LowerGone,
    Move,
    Moved,
    PersistRequested,
    PinRequested,
    PolicyFailed,
    PrefixesFetched,
    PrefixesLookedUp,
    QuotaSet,
    ReleaseRequested,
    RevokeRequested,
    SealRequested,
    Send,
    Tick,
    TicketsCancelled,
)
from kvpool.pool.invalidation import Invalidations
from kvpool.pool.leases import PINNER, RAISER, Leases
from kvpool.pool.ledger import Ledger, listed
from kvpool.pool.model import Model
from kvpool.pool.quota import Owner
from kvpool.pool.raising import Raising
from kvpool.pool.registration import Noted, register_model, restore_models
from kvpool.pool.revocation import Revocations
from kvpool.pool.room import Room

FALLBACK_POLICY = "lru"
"""Decides when a policy of one's own has failed."""


class PoolState:
    """Everything the pool knows and decides.

    Parameters
    ----------
    name
        Name of the pool.
    policy, placement
        Names of the eviction and placement policy.
    queue_limit
        How many requests may wait for memory at once.
    gc_threshold
        Share of a device in use from which on what is next to go is copied to the tiers below.
    """

    def __init__(self, name: str, policy: str, placement: str, queue_limit: int, gc_threshold: float = 0.8) -> None:
        self.name = name
        self.policy_name = plain_name(policy)
        self.policy_failure: str | None = None
        """Why the policy that was asked for last does not decide any more."""
        self.placement_name = placement
        self.ledger = Ledger(policy, placement)
        self.ledger.index.policy_failed = self._policy_failed
        self.below = Below(self.ledger)
        room = self._room = Room(self.ledger, Clearance(self.ledger, self.below))
        self.allocations = Allocations(self.ledger, room, queue_limit)
        self.changes = BackingChanges(self.ledger, room, self.allocations)
        self.blocks = BlockAllocations(self.ledger, room, self.allocations)
        fanout = Fanout(self.ledger)
        self.leases = Leases(self.ledger, fanout, self.allocations.retry)
        self.directory = Directory(self.ledger, fanout, self.leases)
        self.raising = Raising(self.ledger, room, self.below, self.directory, fanout, self.leases)
        self.copies = CopiesAhead(self.ledger, gc_threshold)
        self.durability = Durability(self.ledger, fanout, self.allocations.retry)
        self.flushes = Flushes(self.ledger, self.durability)
        self.evictions = Evictions(self.ledger, self.leases, self.below)
        self.invalidations = Invalidations(self.ledger, self.leases, self.allocations.queue, self.below)
        self.revocations = Revocations(self.ledger, self.leases, self.allocations, self.raising)

    def add_device(
        self,
        name: str,
        host: str,
        capacity_bytes: int,
        page_bytes: int,
        min_block_bytes: int,
        arena_bytes: int,
        has_lower: bool = False,
        disk_url: str | None = None,
    ) -> Device:
        """Enter a device into the books; clients that connect from now on can be given its memory."""
        device = Device(
            len(self.ledger.devices), name, host, capacity_bytes, page_bytes, min_block_bytes, arena_bytes,
            has_lower=has_lower, disk_url=disk_url,
        )  # fmt: skip
        self.ledger.devices.append(device)
        if has_lower:
            self.directory.bring_up = self.raising.begin
        self.ledger.index.add_device(device.number)
        return device

    def connect(
        self, client: str, tenant: str, host: str, token: str, who: dict[str, Any] | None = None, now: float = 0.0
    ) -> tuple[Client, Batch, list[Instruction]]:
        """Enter a client into the books and make it known to the devices of its host.

        ``who`` is what it says of itself. The batch is done when each of them knows it.

        Raises
        ------
        ProtocolError
            If it is connected already, or no device is on its host.
        DeviceLostError
            If all devices are lost.
        """
        ledger = self.ledger
        if client in ledger.clients or client in ledger.revoked or client.startswith((PINNER, RAISER)):
            raise ProtocolError(f"client {client!r} is connected already, or its name is not for clients")
        reachable = [d.number for d in ledger.devices if d.host == host and d.lost is None]
        if not reachable:
            hosts = sorted({device.host for device in ledger.devices if device.lost is None})
            if ledger.devices and not hosts:
                raise DeviceLostError(f"all devices of pool {self.name!r} are lost: delete it and start it again")
            raise ProtocolError(
                f"pool {self.name!r} has no device on this host ({host}); its devices are on "
                f"{', '.join(hosts) or 'no host'}: run the client on one of those nodes"
            )
        known = ledger.clients[client] = Client(client, tenant, host, reachable, dict(who or {}), now)
        ledger.out = []
        batch = Batch(len(reachable))

        def connected(item: int, answer: Answer, now: float) -> None:
            ledger.answer(batch, item, answer)

        for item, number in enumerate(reachable):
            ledger.send(number, ("connect", client, tenant, token), partial(connected, item))
        return known, batch, ledger.out

    def disconnect(self, client: str) -> tuple[Batch, list[Instruction]]:
        """End all that a client holds: it leaves by its own will. The batch is done when its leases have ended."""
        ledger = self.ledger
        ledger.out = []
        self.allocations.cancel_client(client)
        self.raising.cancel_client(client)
        left = ledger.clients.pop(client, None) or ledger.revoked.pop(client, None)
        devices = [n for n in left.devices if ledger.devices[n].lost is None] if left else []
        batch = Batch(len(devices))

        def ended(item: int, answer: Answer, now: float) -> None:
            if answer[0] != "error":
                self.leases.leases_ended(answer[0], answer[1], now)
            ledger.answer(batch, item, True)

        for item, number in enumerate(devices):
            ledger.send(number, ("disconnect", client), partial(ended, item))
        return batch, ledger.out

    def register_model(self, client: str, spec: dict[str, Any], now: float = 0.0) -> tuple[Model, list[Instruction]]:
        """Return the model that a client describes, registered once per tenant, name and content.

        The devices are to know it before anything else is asked of them.

        ``spec``: ``name``, ``identity`` (all that makes bytes differ), ``block_bytes`` and ``limit_bytes`` or None.
        """
        ledger = self.ledger
        ledger.out = []
        identity = spec["identity"]
        noted = spec["name"], identity.get("revision", ""), spec["block_bytes"], spec["limit_bytes"]
        model = register_model(ledger, ledger.client(client).tenant, fingerprint(**identity), noted, now)
        return model, ledger.out

    def restore_models(
        self, spaces: Iterable[tuple[str, str, Sequence[Noted]]], unread: Iterable[str] = (), now: float = 0.0
    ) -> list[Instruction]:
        """Enter the models of what the devices found below them: ``(tenant, fingerprint, models)``. After all devices.

        ``unread``: folders of which that is not known.
        """
        self.ledger.out = []
        self.ledger.unread.update(unread)
        for tenant, digest, noted in spaces:
            restore_models(self.ledger, tenant, digest, noted, now)
        return self.ledger.out

    def find_model(self, client: str, spec: dict[str, Any]) -> Model | None:
        """Return the model that a client describes as for :meth:`register_model`; None if nobody has registered it."""
        tenant = self.ledger.client(client).tenant
        identity = fingerprint(**spec["identity"])
        return self.ledger.known_model(tenant, spec["name"], identity, spec["block_bytes"], spec["limit_bytes"])

    def set_policy(self, name: str, now: float) -> None:
        """Let another eviction policy decide from now on; it takes over what is resident.

        One of one's own is what its file says now, though it was imported before.

        Raises
        ------
        UnknownPolicyError
            If there is none of that name, or its module cannot be imported; nothing is changed.
        PolicyError
            If it fails as it takes over; nothing is changed.
        """
        load_present_code(name)
        self.ledger.index.replace_policy(name, now=now)
        self.policy_name = plain_name(name)
        self.policy_failure = None

    def _policy_failed(self, error: PolicyError, now: float) -> None:
        # In the middle of a decision, which goes on with the policy that takes over: whoever asked is served.
        self.ledger.index.replace_policy(FALLBACK_POLICY, now=now)
        self.policy_name = FALLBACK_POLICY
        self.policy_failure = error.message
        self.ledger.count_error(error)
        self.ledger.out.append(PolicyFailed(error))

    def _set_quota(
        self,
        batch: Batch,
        tenant: str,
        model: str | int | None,
        guaranteed: int | str,
        limit: int | str | None,
        revision: int | None,
        now: float,
    ) -> None:
        """Set the whole quota of a tenant, or of a model by its name; see :mod:`kvpool.pool.quota`.

        The answer is what holds now, with ``applied``: False where the revision is not newer than the one that holds.
        Its warning says also where nobody has that name: it may be mistaken, or its model be registered later.

        Raises
        ------
        InvalidRequestError
            If it makes no sense. Nothing is changed.
        """
        if not isinstance(tenant, str) or not tenant:
            raise InvalidRequestError(f"a quota is a tenant's, or that of a model of it; got tenant {tenant!r}")
        if isinstance(model, int):
            model = self.ledger.find_models(model, tenant)[0].name
        if model is not None and (not isinstance(model, str) or not model):
            raise InvalidRequestError(f"a model with a quota is named by text or number, not {model!r}")
        amounts = parse_amount(guaranteed), parse_limit(limit)
        quotas = self.ledger.quotas
        applied = quotas.set(tenant, model, *amounts, revision, now)
        if applied:
            self.allocations.line_up_anew()
            self._follow_quotas(now)
            self.allocations.retry(now)
        owner = quotas.owner(tenant, model)
        answer = self._described(owner) | {"applied": applied}
        if not answer["registered"]:
            said = [] if answer["warning"] is None else [answer["warning"]]
            answer["warning"] = "\n".join([*said, self._not_registered(owner)])
        self.ledger.answer(batch, 0, answer)

    def _not_registered(self, owner: Owner) -> str:
        ledger, kept = self.ledger, "" if owner.has_none else ": the quota is kept for when there is one"
        if owner.model is None:
            tenants = {model.tenant for model in ledger.models} | {each.tenant for each in ledger.clients.values()}
            who = f"no client of tenant {owner.tenant!r} is connected now, and no model of it is registered"
            return f"{who} (there is {listed(tenants)}){kept}"
        names = {each.name for each in ledger.models if each.tenant == owner.tenant}
        return f"no model {owner.model!r} is registered by tenant {owner.tenant!r} now (there is {listed(names)}){kept}"

    def quotas(self, tenant: str | None = None) -> list[dict[str, Any]]:
        """Return the quotas of a tenant or of all: what was set, what it comes to, what is held, and who waits."""
        return [self._described(owner) for owner in self.ledger.quotas.owners(tenant)]

    def _described(self, owner: Owner) -> dict[str, Any]:
        registered = self.ledger.quotas.is_registered(owner) or (
            owner.model is None and any(client.tenant == owner.tenant for client in self.ledger.clients.values())
        )
        waiting = self.allocations.waiting_of(owner)
        return self.ledger.quotas.describe(owner) | {"registered": registered, "waiting": waiting}

    def _follow_quotas(self, now: float) -> None:
        quotas = self.ledger.quotas
        if quotas.active:
            quotas.follow_devices()
            if quotas.reckoned:
                quotas.reckoned = False
                self.allocations.refuse_above_limits(now)
            if quotas.draining:
                self._room.drain()

    def handle(self, event: Event, now: float) -> list[Instruction]:
        """Decide on one event at time ``now`` (seconds) and return what is to be done, in order.

        Raises
        ------
        ProtocolError
            If the event names a client that is not connected; nothing is changed.
        """
        self.ledger.out = []
        self.ledger.journal.pass_time(now)
        match event:  # the most frequent ones first
            case DeviceAnswered():
                self._device_answered(event, now)
            case CachesRequested():
                self.allocations.request_caches(event.batch, event.client, event.items, now)
            case ReleaseRequested():
                self.leases.release(event.batch, event.client, event.items, now)
            case ChangesRequested():
                self.changes.request(event.batch, event.client, event.items, now)
            case PrefixesLookedUp():
                self.directory.look_up(event.batch, event.client, event.items, now)
            case BlocksRequested():
                self.blocks.request_blocks(event.batch, event.client, event.items, now)
            case SealRequested():
                self.directory.seal(event.batch, event.client, event.items, event.finish, now)
                self.changes.sealed([cache_id for _, _, ids, *_ in event.items for cache_id in ids], now)
            case PinRequested():
                self.leases.pin(event.batch, event.client, event.items, event.held, now)
            case EvictRequested():
                self.evictions.evict(*event, now)
            case FlushRequested():
                self.flushes.flush(*event, now)
            case InvalidateRequested():
                self.invalidations.invalidate(*event, now)
            case RevokeRequested():
                self.revocations.revoke(*event, now)
            case QuotaSet():
                self._set_quota(*event, now)
            case PrefixesFetched():
                self.raising.fetch(event.batch, event.client, event.items, now)
            case PersistRequested():
                self.durability.persist(event.batch, event.client, event.items, now)
            case TicketsCancelled():
                self.raising.cancel(event.client, event.tickets)
                self.allocations.cancel(event.client, event.tickets)
                self.allocations.retry(now)
            case DeviceFreed():
                self.ledger.devices[event.device].note_zombies(event.zombies)
                self.allocations.retry(now)
            case Moved():
                self._go_on(event.move, event.answer, now)
            case LowerGone():
                self.below.gone(event.device, event.keys, event.stamp)
            case ClientGone():
                self.allocations.cancel_client(event.client)
                self.raising.cancel_client(event.client)
                # One that was revoked is told so whenever it calls: its connection to the device ends before it knows.
                if self.ledger.clients.pop(event.client, None) is not None:
                    self.ledger.counters.clients_died += 1
                self.leases.leases_ended(event.ended, event.freed, now)
            case DeviceLost():
                self.below.device_lost(event.device)
                self.leases.device_lost(event.device, event.reason)
                self._follow_quotas(now)  # what a share of the pool comes to is less before anybody is granted more
                self.allocations.retry(now)
            case Tick():
                self.raising.expire(now)
                self.allocations.expire(now)
                self.allocations.retry(now)
        self._follow_quotas(now)
        self.allocations.follow_up(now)
        self.copies.follow_up(now)
        return self.ledger.out

    def is_waiting(self, ticket: int) -> bool:
        """Whether a request still waits, for memory or for what comes up."""
        return ticket in self.allocations.queue or ticket in self.raising

    def _device_answered(self, event: DeviceAnswered, now: float) -> None:
        if len(event.sent) != len(event.answers):
            raise InvariantError(f"device {event.device} answered {len(event.answers)} of {len(event.sent)} operations")
        self.ledger.devices[event.device].note_zombies(event.zombies)
        for sent, answer in zip(event.sent, event.answers, strict=True):
            self._go_on(sent, answer, now)

    def _go_on(self, sent: Send | Move, answer: Answer, now: float) -> None:
        try:
            sent.then(answer, now)
        except Exception as error:  # noqa: BLE001 - whatever it is
            # A bug, told by an instruction: raised from here it would keep the operations behind this one from going
            # on, and what was decided before it from being carried out, and their clients would wait for ever.
            self.ledger.out.append(Failed(sent.operation if isinstance(sent, Send) else (sent.method,), error))

    def fail_operations(self, sent: list[Send], error: KvpoolError, now: float) -> list[Instruction]:
        """Answer operations that a lost device will never carry out with ``error``."""
        self.ledger.out = []
        for send in sent:
            self._go_on(send, ("error", *error.to_wire()), now)
        self._follow_quotas(now)
        self.allocations.follow_up(now)
        return self.ledger.out

    def next_deadline(self) -> float | None:
        """Return when the next waiting request must be answered, or None if none waits."""
        deadlines = (self.allocations.next_deadline(), self.raising.next_deadline())
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    def check(self) -> None:
        """Raise :class:`~kvpool.errors.InvariantError` if the books do not add up."""
        self.ledger.check()
