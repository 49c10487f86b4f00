"""An amount of memory: bytes, or a share of the pool."""

from __future__ import annotations

import re
from typing import NamedTuple

from kvpool.errors import InvalidSizeError
from kvpool.sizes import parse_size

_SHARE = re.compile(r"\s*([0-9]{1,3}(?:\.[0-9]{1,30})?)\s*%\s*")


class Amount(NamedTuple):
    """Bytes, or a share of whatever the pool's capacity is."""

    size_bytes: int
    share: float
    text: str
    """As it was given."""

    def of(self, capacity_bytes: int) -> int:
        """Return the bytes it is, of a capacity."""
        return self.size_bytes + int(self.share * capacity_bytes)

    @property
    def is_nothing(self) -> bool:
        """Whether it is no byte of any capacity."""
        return not self.size_bytes and not self.share

    def exceeds(self, other: Amount) -> bool:
        """Whether it is more than another of whatever capacity; not where one is bytes and the other a share."""
        if (self.size_bytes and other.share) or (self.share and other.size_bytes):
            return False
        return (self.size_bytes, self.share) > (other.size_bytes, other.share)


NOTHING = Amount(0, 0.0, "0")
_NONE = "none"


def parse_amount(amount: int | str) -> Amount:
    """Return an amount from bytes (0 or more), text with a unit (``"10GiB"``), a percentage (``"40%"``), or ``"none"``.

    Raises
    ------
    InvalidSizeError
        If it is not readable, negative, or more than 100 %.
    """
    if isinstance(amount, str) and (match := _SHARE.fullmatch(amount)):
        share = float(match[1]) / 100
        if share > 1:
            raise InvalidSizeError(f"a share is 0% to 100% of the pool, not {amount!r}", asked=amount)
        return Amount(0, share, f"{float(match[1]):g}%")
    if isinstance(amount, str) and "%" in amount:
        raise InvalidSizeError(f"cannot read the share {amount!r}: write 0% to 100%", asked=amount)
    if _is_none(amount):
        return NOTHING
    try:
        size_bytes = parse_size(amount, least_bytes=0)
    except InvalidSizeError as error:
        raise InvalidSizeError(f"{error.message}; a share of the pool is text: '40%'", **error.details) from None
    return Amount(size_bytes, 0.0, str(amount))


def parse_limit(limit: int | str | None) -> Amount | None:
    """Return a limit as :func:`parse_amount` reads it, but None, which is no limit, for None and ``"none"``.

    Raises
    ------
    InvalidSizeError
        As there.
    """
    return None if limit is None or _is_none(limit) else parse_amount(limit)


def _is_none(given: object) -> bool:
    return isinstance(given, str) and given.strip().lower() == _NONE
