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


NOTHING = Amount(0, 0.0, "0")


def parse_amount(amount: int | str) -> Amount:
    """Return an amount from bytes (0 or more), text with a unit (``"10GiB"``), or a percentage (``"40%"``).

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
    if amount in (0, "0") and not isinstance(amount, bool):
        return NOTHING
    try:
        size_bytes = parse_size(amount)
    except InvalidSizeError as error:
        raise InvalidSizeError(f"{error.message}; a share of the pool is text: '40%'", **error.details) from None
    return Amount(size_bytes, 0.0, str(amount))
