"""Errors for want of room, told with what is held where it is missing, and by whom.

The books know of which model what is held is. Which clients hold it the devices know, so they are asked first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from math import inf
from typing import NamedTuple

from kvpool.errors import CapacityError
from kvpool.pool.instructions import Answer
from kvpool.pool.leases import PINNER, RAISER
from kvpool.pool.ledger import Ledger
from kvpool.pool.requests import CacheRequest
from kvpool.sizes import format_size

_FRESH_S = 1.0
"""How old what a device told may be, seconds. To tell it takes a device as long as there are leases."""

_PATIENCE_S = 0.25
"""How long an error waits for devices to tell, seconds: one that hangs must not keep it back."""

_TOLD_AGE_S = 0.1
"""From which age on an error says how old its figures are, seconds: they may not add up with the others then."""

_NAMED = 3
"""Models, and holders, that an error names, those with most bytes."""


class _Refused(NamedTuple):
    request: CacheRequest
    error: CapacityError
    due: float


class Refusals:
    """Refused requests, until it is known who holds what they lack.

    Parameters
    ----------
    ledger
        The pool's books.
    deliver
        Answers a request with an error.
    """

    def __init__(self, ledger: Ledger, deliver: Callable[[CacheRequest, CapacityError, float], None]) -> None:
        self._ledger = ledger
        self._deliver = deliver
        self._fresh: list[_Refused] = []
        """Of this event."""
        self._waiting: list[_Refused] = []
        """For devices to tell."""
        self._asked: set[int] = set()
        """Devices that have not told yet."""
        self._told: dict[int, tuple[float, dict[str, int]]] = {}
        """By device, when it last told, and the bytes of each holder."""
        self._counted: dict[int, tuple[float, dict[int, int]]] = {}
        """By device, when it was last counted, and the held bytes of each namespace."""

    def refuse(self, request: CacheRequest, error: CapacityError, now: float) -> None:
        """Answer a request with an error, at the end of this event or when devices have told who holds what."""
        if error.details.get("pinned_bytes"):
            self._fresh.append(_Refused(request, error, now + _PATIENCE_S))
        else:
            self._deliver(request, error, now)

    def follow_up(self, now: float) -> None:
        """Ask, once for all that were refused, or answer. For the end of each event."""
        if not self._fresh:
            return
        refused, self._fresh = self._fresh, []
        for number in sorted({number for each in refused for number in each.request.devices}):
            if self._counted.get(number, (-inf,))[0] + _FRESH_S <= now:
                self._counted[number] = now, self._ledger.index.pinned_bytes(number)
            stale = self._told.get(number, (-inf,))[0] + _FRESH_S <= now
            if stale and number not in self._asked and self._ledger.devices[number].lost is None:
                self._asked.add(number)
                self._ledger.send(number, ("holders",), partial(self._device_told, number))
        for each in refused:
            if self._asked.isdisjoint(each.request.devices):
                self._answer(each, now)
            else:
                self._waiting.append(each)

    def _device_told(self, number: int, answer: Answer, now: float) -> None:
        self._asked.discard(number)
        if isinstance(answer, dict):  # else it is lost
            self._told[number] = now, {holder: held_bytes for holder, (_, held_bytes, _) in answer.items()}
        waiting, self._waiting = self._waiting, []
        for each in waiting:
            if self._asked.isdisjoint(each.request.devices):
                self._answer(each, now)
            else:
                self._waiting.append(each)

    def next_deadline(self) -> float | None:
        """Return when the next error is told, whatever is known by then; None if none waits."""
        return self._waiting[0].due if self._waiting else None

    def expire(self, now: float) -> None:
        """Tell what has waited long enough."""
        while self._waiting and self._waiting[0].due <= now:
            self._answer(self._waiting.pop(0), now)

    def _answer(self, refused: _Refused, now: float) -> None:
        request, error, _ = refused
        models, holders = self._models(request), self._holders(request)
        if models or holders:
            who = ", by ".join(_listed(each) for each in (models, holders) if each)
            seen = [at[number][0] for at in (self._counted, self._told) for number in request.devices if number in at]
            age_s = now - min(seen)
            who += f", {age_s:.1f} s ago" if age_s >= _TOLD_AGE_S else ""
            error = CapacityError(
                f"{error.message} (pinned are {who}: 'kvpool leases' shows who holds what)",
                **error.details,
                pinned_by=dict(_most(models)),
                held_by=dict(_most(holders)),
            )
        self._deliver(request, error, now)

    def _models(self, request: CacheRequest) -> dict[str, int]:
        """Return by model what is held where a request could have been met; other tenants' models have no names."""
        ledger, held = self._ledger, dict[str, int]()
        own = set(ledger.index.spaces.of(request.client.tenant))
        for number in request.devices:
            if ledger.devices[number].lost is not None:
                continue
            for space, held_bytes in self._counted.get(number, (0.0, {}))[1].items():
                name = ledger.name_in(space)
                whose = "other tenants" if space not in own else f"model {name}" if name else "what was invalidated"
                held[whose] = held.get(whose, 0) + held_bytes
        return held

    def _holders(self, request: CacheRequest) -> dict[str, int]:
        """Return by holder what is held where a request could have been met; other tenants' clients have no names."""
        held: dict[str, int] = {}
        tenant = request.client.tenant
        for number in request.devices:
            for name, held_bytes in self._told.get(number, (0.0, {}))[1].items():
                holder = self._holder(name, tenant)
                held[holder] = held.get(holder, 0) + held_bytes
        return held

    def _holder(self, name: str, tenant: str) -> str:
        if name == PINNER + tenant:
            return "pinned by word"
        if name == RAISER + tenant:
            return "on its way up from lower tiers"
        known = self._ledger.clients.get(name) or self._ledger.revoked.get(name)
        return f"client {name}" if known is not None and known.tenant == tenant else "other tenants"


def _most(held: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(held.items(), key=lambda each: (-each[1], each[0]))[:_NAMED]


def _listed(held: Mapping[str, int]) -> str:
    named = _most(held)
    more = f" and {len(held) - len(named)} more" if len(held) > len(named) else ""
    return ", ".join(f"{who} ({format_size(held_bytes)})" for who, held_bytes in named) + more
