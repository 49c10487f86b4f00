"""As much of a connection as a lease sees."""

from __future__ import annotations

import weakref
from typing import Any

from kvpool.errors import CacheStateError


class LeaseConnection:
    """Notes which leases are ended."""

    closed = ended = False

    def __init__(self) -> None:
        self.leases: weakref.WeakSet[Any] = weakref.WeakSet()
        self.released: list[int] = []

    def check_usable(self) -> None:
        """It is until it has ended."""
        if self.ended:
            raise CacheStateError("closed")

    def check_loop(self) -> None:
        """It belongs to any."""
        self.check_usable()

    def check_not_revoked(self) -> None:
        """It never is."""

    def lease_unused(self) -> None:
        """Nobody waits for that."""

    async def release(self, ids: list[int]) -> None:
        self.released += ids

    def release_soon(self, ids: list[int]) -> None:
        self.released += ids
