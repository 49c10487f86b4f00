"""As much of a connection as a lease sees."""

from __future__ import annotations

import weakref
from typing import Any


class LeaseConnection:
    """Notes which leases are ended."""

    closed = False

    def __init__(self) -> None:
        self.leases: weakref.WeakSet[Any] = weakref.WeakSet()
        self.released: list[int] = []

    def check_usable(self) -> None:
        """It always is."""

    def check_not_revoked(self) -> None:
        """It never is."""

    def lease_unused(self) -> None:
        """Nobody waits for that."""

    def release_soon(self, ids: list[int]) -> None:
        self.released += ids
