"""What was invalidated when, for those who are still writing what they asked for before."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from kvpool.cache.key import MOST_HASHES


class VoidMarks:
    """For each space the numbers of the last invalidations of its keys, as long as somebody has to heed them.

    A space keeps at most ``MOST_HASHES`` keys. When there are more they are replaced by one mark for the whole space:
    then some writers are refused a key that was not invalidated, but none is given one that was.
    """

    def __init__(self) -> None:
        self._spaces: dict[int, int] = {}
        self._keys: dict[int, dict[bytes, int]] = {}
        self._latest: dict[int, int] = {}  # by space, the highest number of its keys

    def __len__(self) -> int:
        return len(self._spaces) + sum(map(len, self._keys.values()))

    def mark_all(self, space: int, number: int) -> None:
        """Note that invalidation ``number``, the latest, was of all that is in a space."""
        self._spaces[space] = number
        self._keys.pop(space, None)

    def mark(self, space: int, keys: Iterable[bytes], number: int) -> None:
        """Note that invalidation ``number``, the latest, was of these keys."""
        self._keys.setdefault(space, {}).update(dict.fromkeys(keys, number))
        self._latest[space] = number

    def last(self, space: int, key: bytes) -> int:
        """Return the number of the last invalidation that a writer of this key must heed if it is older; 0: none."""
        return max(self._spaces.get(space, 0), self._keys.get(space, {}).get(key, 0))

    def forget(self, oldest: Mapping[int, int]) -> None:
        """Drop what nobody is old enough to have to heed.

        ``oldest`` has, for each space in which somebody writes or waits, how many invalidations there had been when the
        first of them asked.
        """
        for space, number in list(self._spaces.items()):
            if number <= oldest.get(space, number):
                del self._spaces[space]
        for space, marks in list(self._keys.items()):
            born = oldest.get(space)
            if born is None or self._latest[space] <= born:
                del self._keys[space]
            elif len(marks) > MOST_HASHES:  # looked through only then: most calls are of few keys
                marks = {key: number for key, number in marks.items() if number > born}
                self._keys[space] = marks
                if len(marks) > MOST_HASHES:
                    self.mark_all(space, self._latest[space])
