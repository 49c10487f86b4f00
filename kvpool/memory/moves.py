"""Moves of caches, as columns: of many moves each column is gone through at once, and no object is made for each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, overload

_LEAST_BYTES = 1 << 13


class Move(NamedTuple):
    """One cache to another place."""

    cache_id: int
    source: int
    destination: int
    size_bytes: int


class Moves(Sequence[Move]):
    """Moves in the order in which they are made. The columns are as long as each other, and not to be changed."""

    __slots__ = ("destinations", "ids", "sizes_bytes", "sources")

    def __init__(
        self,
        ids: Sequence[int] = (),
        sources: Sequence[int] = (),
        destinations: Sequence[int] = (),
        sizes_bytes: Sequence[int] = (),
    ) -> None:
        self.ids = ids
        self.sources = sources
        self.destinations = destinations
        self.sizes_bytes = sizes_bytes

    @classmethod
    def of(cls, moves: Iterable[Move]) -> Moves:
        """Return the columns of moves."""
        return cls(*zip(*moves, strict=True))

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[Move]:
        return map(Move, self.ids, self.sources, self.destinations, self.sizes_bytes)

    @overload
    def __getitem__(self, which: int) -> Move: ...

    @overload
    def __getitem__(self, which: slice) -> Moves: ...

    def __getitem__(self, which: int | slice) -> Move | Moves:
        if isinstance(which, slice):
            return Moves(self.ids[which], self.sources[which], self.destinations[which], self.sizes_bytes[which])
        return Move(self.ids[which], self.sources[which], self.destinations[which], self.sizes_bytes[which])

    @property
    def moved_bytes(self) -> int:
        """Bytes to copy."""
        return sum(self.sizes_bytes)


def count_within(moves: Moves, budget_bytes: int) -> int:
    """Return how many moves, from the first, copy ``budget_bytes`` at most; at least one.

    A small cache counts for as many bytes as could be copied in the time that its bookkeeping takes.
    """
    for count, size_bytes in enumerate(moves.sizes_bytes):
        budget_bytes -= size_bytes if size_bytes > _LEAST_BYTES else _LEAST_BYTES
        if budget_bytes < 0 and count:
            return count
    return len(moves)


def runs(moves: Iterable[Move]) -> Iterator[list[Move]]:
    """Yield moves of caches that lie side by side, before and after, together: they are one copy."""
    run: list[Move] = []
    source = destination = -1
    for move in moves:
        if run and (move.source != source or move.destination != destination):
            yield run
            run = []
        run.append(move)
        source, destination = move.source + move.size_bytes, move.destination + move.size_bytes
    if run:
        yield run
