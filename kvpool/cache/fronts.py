"""Which of several caches are to lie on a disk that has no room for all: of each chain the front."""

from __future__ import annotations

from collections.abc import Sequence

from kvpool.cache.source import Source
from kvpool.errors import TierError


class Fronts:
    """Chains, or parts of them, that are written together, and what each hangs on among them.

    Caches are named by their places. What is asked of one write is told by its errors, None for what is stored, and
    why there was no room for others by the causes that mean that.

    Parameters
    ----------
    sources
        In the order in which they are to be stored where nothing hangs on anything.
    no_room
        Causes of errors. What failed for another is not tried again, and is no gap that could be filled.
    """

    def __init__(self, sources: Sequence[Source], no_room: Sequence[str]) -> None:
        places = {source.key: place for place, source in enumerate(sources)}
        self._above: list[int | None] = [
            None if source.parent is None else places.get(source.key._replace(block_hash=source.parent))
            for source in sources
        ]
        depths = _depths(self._above)
        self._order = sorted(range(len(sources)), key=depths.__getitem__)  # the head of a chain before its tail
        self._no_room = no_room

    def refused(self, errors: Sequence[TierError | None]) -> list[int]:
        """Return for what there was no room, the front first."""
        return [place for place in self._order if self._is_refused(errors[place])]

    def behind(self, errors: Sequence[TierError | None]) -> list[int]:
        """Return what is stored behind a gap that could be filled, and cannot be hit there; the front first."""
        cut_off: dict[int, None] = {}
        for place in self._order:
            if self._is_refused(errors[place]) or self._above[place] in cut_off:
                cut_off[place] = None
        return [place for place in cut_off if errors[place] is None]

    def worth_filling(self, refused: Sequence[int], behind: Sequence[int]) -> list[int]:
        """Return of what found no room what comes before as many that are stored behind a gap, the last of them first.

        Where all are of one size these make room for those: the front grows, and nothing else goes.
        """
        rank = {place: number for number, place in enumerate(self._order)}
        return [place for place, last in zip(refused, reversed(behind), strict=False) if rank[place] < rank[last]]

    def _is_refused(self, error: TierError | None) -> bool:
        return cause_of(error) in self._no_room


def cause_of(error: TierError | None) -> str | None:
    """Return the cause of an error, if there is one."""
    return None if error is None else error.details.get("cause")


def _depths(above: Sequence[int | None]) -> list[int]:
    """Return how many of the others each hangs on, one behind the other."""
    depths = [-1] * len(above)
    for place in range(len(above)):
        chain = []
        each: int | None = place
        while each is not None and depths[each] < 0:
            depths[each] = 0  # for now; and so that keys that hang on each other, which no chain has, come to an end
            chain.append(each)
            each = above[each]
        depth = -1 if each is None else depths[each]
        for each in reversed(chain):
            depth += 1
            depths[each] = depth
    return depths
