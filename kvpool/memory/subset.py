"""Which of some sizes add up to a number, or to the least below it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_MOST_SIZES = 64
"""Different sizes that are tried; of more, as many are taken evenly."""


def evenly(sizes: Sequence[int]) -> Sequence[int]:
    """Return as many of some sizes as are tried."""
    if len(sizes) <= _MOST_SIZES:
        return sizes
    return [sizes[number * len(sizes) // _MOST_SIZES] for number in range(_MOST_SIZES)]


class SubsetSums:
    """All sums of what is in stock, up to a bound.

    A set of sums is one integer: bit n says that n can be made. So a size more is one shift, whatever the number of
    sums: some hundred sizes and sums up to 10,000 take less than a millisecond.

    Parameters
    ----------
    stock
        How many there are of each size. Sizes are positive.
    most
        No larger sum is looked at.
    """

    def __init__(self, stock: Mapping[int, int], most: int) -> None:
        sizes = evenly(sorted(size for size, count in stock.items() if count and size <= most))
        #: Each so many of a size at once, by powers of two, with the sums that could be made before.
        self._steps: list[tuple[int, int, int]] = []
        self._sums = 1
        mask = (1 << most + 1) - 1
        for size in reversed(sizes):
            left, count = min(stock[size], most // size), 1
            while left:
                count = min(count, left)
                self._steps.append((size, count, self._sums))
                self._sums |= self._sums << size * count & mask
                left -= count
                count *= 2

    def at_most(self, bound: int) -> int:
        """Return the largest sum that is no larger than ``bound``; 0 is one."""
        return (self._sums & (1 << bound + 1) - 1).bit_length() - 1

    def parts(self, total: int) -> list[int]:
        """Return sizes that add up to ``total``, a sum that can be made, the largest first."""
        found: list[int] = []
        for size, count, before in reversed(self._steps):
            if not before >> total & 1:
                found += [size] * count
                total -= size * count
        return sorted(found, reverse=True)
