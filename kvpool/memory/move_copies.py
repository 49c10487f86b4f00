"""The copies that moves are made of, and which moves are whole when an error cuts them short."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import length_hint

from kvpool.errors import ensure
from kvpool.memory.backend import Copy
from kvpool.memory.moves import Move, Moves, runs


def copies_of(moves: Moves, address: int) -> list[Copy]:
    """Return what is to be copied, in this order: one copy for caches that lie side by side, before and after.

    Parameters
    ----------
    address
        Of the arena's first byte, from which moves count.
    """
    copies: list[Copy] = []
    if not moves:
        return copies
    # Of caches side by side: where the first one lies, how far it goes, and the end of the last.
    start = end = moves.sources[0]
    way = moves.destinations[0] - start
    for source, destination, size_bytes in zip(moves.sources, moves.destinations, moves.sizes_bytes, strict=True):
        if source != end or destination - source != way:
            if end - start <= way or start - end >= way:
                copies.append((address + start + way, address + start, end - start))
            else:
                _add(copies, address + start, address + start + way, end - start, 0)
            start, way = source, destination - source
        end = source + size_bytes
    _add(copies, address + start, address + start + way, end - start, 0)
    return copies


def rest_of(move: Move, done_bytes: int, address: int) -> list[Copy]:
    """Return what is still to be copied of a move of which ``done_bytes`` are."""
    copies: list[Copy] = []
    _add(copies, address + move.source, address + move.destination, move.size_bytes, done_bytes)
    return copies


def _add(copies: list[Copy], source: int, destination: int, size_bytes: int, done_bytes: int) -> None:
    """Add the copy of ``size_bytes``, of which ``done_bytes`` are copied already.

    What slides over a part of its own place is copied in pieces as long as the way it goes, so that each piece is
    whole until the next one is begun.
    """
    way_bytes = abs(source - destination)
    if way_bytes >= size_bytes:
        copies.append((destination + done_bytes, source + done_bytes, size_bytes - done_bytes))
        return
    ensure(destination < source, "what slides over itself slides down", source=source)
    while done_bytes < size_bytes:
        piece_bytes = min(way_bytes, size_bytes - done_bytes)
        copies.append((destination + done_bytes, source + done_bytes, piece_bytes))
        done_bytes += piece_bytes


def count_complete(copies: Sequence[Copy], under_way: Iterator[Copy]) -> int:
    """Return how many copies are complete after an error: all that the backend took, but the last.

    That one may be in part, or whole. It can be made again: it does not write where it reads.

    Parameters
    ----------
    under_way
        The iterator over ``copies`` that the backend was given.
    """
    return max(len(copies) - length_hint(under_way) - 1, 0)


def copied(moves: Moves, complete: int) -> tuple[Moves, tuple[Move, int] | None]:
    """Return the moves of which all copies are complete, and the one that must be finished, with the bytes copied.

    The piece after those that are complete may have been written over what they were copied from.

    Parameters
    ----------
    complete
        How many of :func:`copies_of` these moves are.
    """
    count = 0
    for run in runs(moves):
        run_bytes = sum(move.size_bytes for move in run)
        piece_bytes = min(abs(run[0].source - run[0].destination), run_bytes)
        copied_bytes = complete * piece_bytes
        complete -= -(-run_bytes // piece_bytes)
        for move in run:
            if copied_bytes < move.size_bytes:
                return moves[:count], (move, copied_bytes) if copied_bytes else None
            count += 1
            copied_bytes -= move.size_bytes
    return moves, None
