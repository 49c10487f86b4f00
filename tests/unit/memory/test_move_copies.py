"""Copies that are cut short anywhere leave each cache whole: where it goes, where it was, or once it is finished."""

import random

from hypothesis import given
from hypothesis import strategies as st

from kvpool.memory.move_copies import copied, copies_of, count_complete, rest_of
from kvpool.memory.moves import Move, Moves

ADDRESS = 1 << 20
SIZE = 256


def do(memory: bytearray, copy: tuple[int, int, int], share: float = 1.0) -> None:
    destination, source, size_bytes = (copy[0] - ADDRESS, copy[1] - ADDRESS, int(copy[2] * share))
    memory[destination : destination + size_bytes] = memory[source : source + size_bytes]


@st.composite
def slides(draw: st.DrawFn) -> list[Move]:
    """Caches with gaps between them that slide down to the end of the one before, the first by a gap, too."""
    moves, source, destination = [], 0, 0
    for cache_id in range(draw(st.integers(1, 6))):
        source += draw(st.integers(0, 8))
        size_bytes = draw(st.integers(1, 30))
        if source != destination:
            moves.append(Move(cache_id, source, destination, size_bytes))
        source, destination = source + size_bytes, destination + size_bytes
    return moves


@given(slides(), st.data())
def test_whatever_is_cut_short_is_whole(moves: list[Move], data: st.DataObject) -> None:
    copies = copies_of(Moves.of(moves), ADDRESS)
    content = {move.cache_id: random.Random(move.cache_id).randbytes(move.size_bytes) for move in moves}
    memory = bytearray(SIZE)
    for move in moves:
        memory[move.source : move.source + move.size_bytes] = content[move.cache_id]
    cut = data.draw(st.integers(0, len(copies)), "copies that are taken")
    under_way = iter(copies)
    for copy in copies[: max(cut - 1, 0)]:
        next(under_way)
        do(memory, copy)
    if cut:
        do(memory, next(under_way), data.draw(st.sampled_from([0.0, 0.5, 1.0]), "of the last one"))

    whole, unfinished = copied(Moves.of(moves), count_complete(copies, under_way))

    done = list(whole)
    if unfinished is not None:
        move, done_bytes = unfinished
        for copy in rest_of(move, done_bytes, ADDRESS):
            do(memory, copy)
        done.append(move)
    for move in moves:
        offset = move.destination if move in done else move.source
        assert memory[offset : offset + move.size_bytes] == content[move.cache_id], move
