"""Who goes before whom for memory: by priority, then in order, and nobody waits for what it does not need."""

from __future__ import annotations

import math
from collections.abc import Hashable

from kvpool.memory.tickets import Rank, TicketQueue
from kvpool.pool.ledger import Ledger
from kvpool.pool.requests import CacheRequest, Shortage
from kvpool.pool.validation import footprint_bytes


class Precedence:
    """Tells whether a request may be decided on while others wait.

    Small requests do not pass a large one that waits for what they need, too. Who waits for its own quota holds up only
    those who wait for the same, and who waits to grow on a device no new cache that has room on another.

    Parameters
    ----------
    ledger
        The pool's books.
    queue
        Those who wait.
    """

    def __init__(self, ledger: Ledger, queue: TicketQueue[CacheRequest]) -> None:
        self._ledger = ledger
        self._queue = queue

    def may_pass(self, request: CacheRequest, count: int, half_over: float = math.inf) -> int:
        """Return how many of ``count`` requests like this one are decided on now, whoever waits.

        Those behind them, if there are any left, are to be asked about again. Given a time, it passes those as well who
        will not have waited half of what they are willing to by then.
        """
        if not self._queue:
            return count
        if self.must_wait(request, half_over):
            return 0
        quotas = self._ledger.quotas
        if quotas.active:  # what lets it pass may be what is kept for it, and that is so much and no more
            account = quotas.account(request.model.space)
            entitled = quotas.entitled_bytes(account, request.client.host) // footprint_bytes(self._ledger, request)
            return min(count, entitled) if entitled else count
        return count

    def must_wait(self, request: CacheRequest, half_over: float = math.inf) -> bool:
        """Whether somebody before it waits for what it needs, too."""
        here = self.rank_of(request)
        before: set[Shortage] = set()
        for rank, line in self._queue.heads():
            if rank > here:
                break
            first = self._queue.get(rank[1])
            if first is not None and first.asked + first.timeout_s / 2 > half_over:
                continue
            if line == self.line_of(request):
                return True
            if first is not None:
                before.add(first.place if first.short_of is None else first.short_of)
        return self.lacks(request, before) is not None

    def lacks(self, request: CacheRequest, short: set[Shortage]) -> Shortage | None:
        """Return which of what others lack a request needs, too; note which devices it leaves to them."""
        quotas, host = self._ledger.quotas, request.client.host
        request.avoided = frozenset()
        if not short:
            return None
        if quotas.active:
            account = quotas.account(request.model.space)
            for owner in account.owners:
                if owner in short:
                    return owner
            if quotas.entitled_bytes(account, host) >= footprint_bytes(self._ledger, request):
                return None  # it is kept free, or evictable, for such as this
        if host in short:
            return host
        if request.change is not None:
            return request.change.device if request.change.device in short else None
        request.avoided = frozenset(number for number in request.devices if number in short)
        usable = (number for number in request.devices if self._ledger.devices[number].lost is None)
        return host if request.avoided and request.avoided.issuperset(usable) else None

    def line_of(self, request: CacheRequest) -> Hashable:
        """Return where it waits: with all who need memory of the same host, or device, and have the same account."""
        return request.place, self._ledger.index.spaces.accounts[request.model.space]

    def rank_of(self, request: CacheRequest) -> Rank:
        """Return where it stands, or would if it began to wait now."""
        if request.ticket is None:
            return self._queue.next_rank(request.priority)
        return -request.priority, request.ticket
