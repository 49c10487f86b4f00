"""The namespaces of keys: whose each is, to which account its caches are charged, and whether it is void."""

from __future__ import annotations

from collections.abc import Iterator


class Spaces:
    """Spaces by number, from 0. One is made for each tenant and fingerprint, and for content that was declared void.

    A *grave* is a space in which nothing is ever looked up: keys of what is void go there. It is of the tenant and of
    the account where they were.
    """

    def __init__(self) -> None:
        self._numbers: dict[tuple[str, str], int] = {}
        self.tenants: list[str] = []
        """By space."""
        self.accounts: list[int] = []
        """By space; 0: that of all that have no quota."""
        self.void: set[int] = set()
        """The graves."""

    def __len__(self) -> int:
        """Spaces so far, graves included."""
        return len(self.tenants)

    def number(self, tenant: str, fingerprint: str) -> int:
        """Return the number of a namespace, which is made if there is none."""
        number = self._numbers.setdefault((tenant, fingerprint), len(self.tenants))
        return self._add(tenant, 0) if number == len(self.tenants) else number

    def of(self, tenant: str | None) -> list[int]:
        """Return the numbers of a tenant's spaces, or of all."""
        return [space for space, owner in enumerate(self.tenants) if tenant in (None, owner)]

    def graves(self, space: int) -> Iterator[int]:
        """Yield the graves that there are for what was in a space."""
        owner = self.tenants[space], self.accounts[space]
        return (grave for grave in self.void if (self.tenants[grave], self.accounts[grave]) == owner)

    def add_grave(self, space: int) -> int:
        """Return the number of a new grave for what was in a space."""
        grave = self._add(self.tenants[space], self.accounts[space])
        self.void.add(grave)
        return grave

    def _add(self, tenant: str, account: int) -> int:
        self.tenants.append(tenant)
        self.accounts.append(account)
        return len(self.tenants) - 1
