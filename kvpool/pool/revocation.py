"""Leases that end by an administrator's word, without their holder's help."""

from __future__ import annotations

from functools import partial
from typing import Any

from kvpool.errors import InvalidRequestError
from kvpool.pool.allocation import Allocations
from kvpool.pool.instructions import Answer, Batch
from kvpool.pool.leases import PINNER, Leases
from kvpool.pool.ledger import Ledger
from kvpool.pool.raising import Raising

_MOST_REMEMBERED = 10_000
"""Revoked clients that are told so when they call; those beyond, the first to be revoked, are told to be unknown."""


class Revocations:
    """Ends all that a client holds, and the client with it.

    A revoked client is fenced off: its requests are refused, those that wait are answered, and it gets no more pages.
    (To take single leases away would leave a process that holds tensors over memory which it may not use beside others
    which it may, with nothing to tell the two apart.) It connects again to go on.

    Parameters
    ----------
    ledger
        The pool's books.
    leases
        Told of the leases that end.
    allocations, raising
        Answer its waiting requests.
    """

    def __init__(self, ledger: Ledger, leases: Leases, allocations: Allocations, raising: Raising) -> None:
        self._ledger = ledger
        self._leases = leases
        self._allocations = allocations
        self._raising = raising

    def revoke(self, batch: Batch, name: str, tenant: str | None, now: float) -> None:
        """End the leases of a client of a tenant, or of any; ``pin:TENANT`` names what that tenant pinned by word.

        The answer is ``{"client", "caches", "bytes", "mapped_bytes"}``: what it had leased, and the memory that it may
        still map; of that, nobody gets what it could write to before it has dropped it.

        Raises
        ------
        InvalidRequestError
            If no such client is connected.
        """
        ledger = self._ledger
        pinned = name.startswith(PINNER)
        client = ledger.clients.get(name)
        owner = name.removeprefix(PINNER) if pinned else client.tenant if client is not None else None
        if owner is None or tenant not in (None, owner):
            raise InvalidRequestError(
                f"no client {name!r} is connected{'' if tenant is None else f' in tenant {tenant!r}'}: 'kvpool leases' "
                "lists who holds what",
                asked=name,
            )
        if client is not None:
            del ledger.clients[name]
            ledger.revoked[name] = client
            if len(ledger.revoked) > _MOST_REMEMBERED:
                del ledger.revoked[next(iter(ledger.revoked))]
            self._allocations.refuse_client(name, ledger.not_connected(name), now)
            self._raising.refuse_client(name, ledger.not_connected(name))
            devices = [number for number in client.devices if ledger.devices[number].lost is None]
        else:
            devices = self._leases.forget_pinner(name)
        answer = {"client": name, "caches": 0, "bytes": 0, "mapped_bytes": 0}
        if not devices:
            ledger.answer(batch, 0, answer)
            return
        left = set(devices)
        for number in devices:
            ledger.send(number, ("revoke", name), partial(self._revoked, batch, answer, left, number, pinned))
            if pinned:  # as if it had never been: the next pin connects it anew
                ledger.send(number, ("disconnect", name), lambda _answer, _now: None)

    def _revoked(
        self,
        batch: Batch,
        result: dict[str, Any],
        left: set[int],
        number: int,
        pinned: bool,
        answer: Answer,
        now: float,
    ) -> None:
        if answer[0] != "error":  # else the device is lost, and the leases there with it
            ended, freed, figures = answer
            for figure, value in zip(("caches", "bytes", "mapped_bytes"), figures, strict=True):
                result[figure] += value
            if pinned:
                self._leases.pins_ended(ended, freed, now)
            else:
                self._leases.leases_ended(ended, freed, now)
        left.discard(number)
        if not left:
            self._ledger.answer(batch, 0, result)
