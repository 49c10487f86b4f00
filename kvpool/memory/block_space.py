"""Blocks of one size inside a cache: which are in use, which are free, which have memory. Numbers only, no clock.

What an inference engine's block manager asks for thousands of times a second. Blocks come in *groups*, as many as
share pages: a group is backed as a whole, and may lose its memory when none of its blocks is in use. Blocks are taken
from the first groups that have free ones, so that the last ones come to be empty.

Memory is kept *ahead* of what is in use: when fewer blocks than that are free, groups are to be backed until twice as
many are; when more than three times as many are free, empty groups may go until twice as many are. So what comes and
goes around one level costs no change of memory.
"""

from __future__ import annotations

import heapq
import operator
from collections.abc import Iterable, Sequence
from typing import Any

from kvpool.errors import CapacityError, DoubleReleaseError, InvalidRequestError, InvalidSizeError, ensure
from kvpool.sizes import format_count

_FREE, _USED = 0, 1


class BlockSpace:
    """Hands out the numbers ``0`` to ``num_blocks - 1``. Belongs to one thread at a time.

    Parameters
    ----------
    num_blocks
        How many there are.
    group_blocks
        How many are backed together; the last group may have fewer.
    ahead_blocks
        How many are to be free and backed, ahead of use.
    backed
        Groups that have memory already.

    Raises
    ------
    InvalidSizeError
        If a number is below 1 (``ahead_blocks``: below 0).
    """

    def __init__(self, num_blocks: int, group_blocks: int, ahead_blocks: int, backed: Sequence[int] = ()) -> None:
        if num_blocks < 1 or group_blocks < 1 or ahead_blocks < 0:
            raise InvalidSizeError(
                f"{num_blocks} blocks in groups of {group_blocks}, {ahead_blocks} ahead: give at least 1, 1 and 0"
            )
        self.num_blocks = num_blocks
        self.group_blocks = group_blocks
        self.ahead_blocks = ahead_blocks
        self.num_groups = -(-num_blocks // group_blocks)
        self.free_blocks = 0
        """Blocks that :meth:`allocate` could hand out now."""
        self._states = bytearray(num_blocks)
        #: By group: numbers of free blocks; None: it has no memory, or is about to lose it.
        self._free: list[list[int] | None] = [None] * self.num_groups
        #: Heap of groups that may have free blocks, and which those are.
        self._open: list[int] = []
        self._is_open = bytearray(self.num_groups)
        #: Backed groups of which no block is in use.
        self._empty: set[int] = set()
        self._unbacked = list(range(self.num_groups))  # a heap
        #: Backed groups that are about to lose their memory.
        self._leaving: set[int] = set()
        #: Blocks that somebody reserved memory for, and has not allocated since.
        self._reserved = 0
        #: Nothing was asked for since all that is empty was given back: nothing is wanted ahead.
        self._resting = False
        self.note_backed(backed)

    # -- blocks -----------------------------------------------------------------------------------------------------

    def allocate(self, count: int) -> list[int]:
        """Return the numbers of ``count`` blocks that have memory, ascending; all of them, or none.

        Raises
        ------
        CapacityError
            If fewer are free.
        InvalidRequestError
            If ``count`` is no whole number of at least 0.
        """
        count = _count(count)
        self._resting = False
        if count > self.free_blocks:
            raise self._too_few(count)
        self.free_blocks -= count
        if self._reserved:
            self._reserved = max(0, self._reserved - count)
        states, numbers = self._states, []
        while count:
            group = self._open[0]
            free = self._free[group]
            if not free:
                heapq.heappop(self._open)
                self._is_open[group] = False
                continue
            self._empty.discard(group)
            taken = free[-count:]
            del free[-count:]
            for number in taken:
                states[number] = _USED
            numbers += taken
            count -= len(taken)
        numbers.sort()
        return numbers

    def free(self, numbers: Iterable[int]) -> None:
        """Take blocks back, from a list of their numbers or an array of any kind; all of them, or none.

        Raises
        ------
        DoubleReleaseError
            If one is free already, or named twice.
        InvalidRequestError
            If one is no number of a block.
        """
        states, num_blocks = self._states, self.num_blocks
        numbers = _plain(numbers)
        done = 0
        for number in numbers:
            if not 0 <= number < num_blocks or states[number] != _USED:
                break
            states[number] = _FREE
            done += 1
        if done != len(numbers):
            for number in numbers[:done]:
                states[number] = _USED
            raise self._cannot_free(numbers, done)
        group_blocks, all_free = self.group_blocks, self._free
        for number in numbers:
            group = number // group_blocks
            free = all_free[group]
            if free is None:
                ensure(False, "a block in use has memory", number=number)
                continue
            free.append(number)
            if not self._is_open[group]:
                self._is_open[group] = True
                heapq.heappush(self._open, group)
            if len(free) == group_blocks or len(free) == self._size(group):
                self._empty.add(group)
        self.free_blocks += done

    @property
    def used_blocks(self) -> int:
        """Blocks that are handed out."""
        return self._states.count(_USED)

    # -- memory -----------------------------------------------------------------------------------------------------

    @property
    def unbalanced(self) -> bool:
        """Whether :meth:`missing` or :meth:`take_surplus` would name anything."""
        free_blocks, ahead_blocks = self.free_blocks, self.ahead_blocks
        if free_blocks < ahead_blocks:
            return bool(self._unbacked) and not self._resting
        if free_blocks <= 3 * ahead_blocks or not self._empty:
            return False
        return free_blocks - self._size(max(self._empty)) >= self._kept()

    def missing(self) -> list[int]:
        """Return the groups to be backed now, so that enough is free ahead of use: the first that are not."""
        few = self.free_blocks < self.ahead_blocks and not self._resting
        return self._unbacked_for(2 * self.ahead_blocks) if few else []

    def missing_for(self, count: int) -> list[int]:
        """Return the groups to be backed so that ``count`` blocks are free, and keep so many until they are allocated.

        Raises
        ------
        CapacityError
            If there are not so many blocks that are not in use.
        InvalidSizeError
            If there are not so many at all.
        InvalidRequestError
            If ``count`` is no whole number of at least 0.
        """
        count = _count(count)
        if count > self.num_blocks:
            raise InvalidSizeError(
                f"asked for {format_count(count, 'block')}, of {self.num_blocks} in all, so that can never "
                "be: ask for less, or for a cache with a larger max_size",
                asked_blocks=count,
                num_blocks=self.num_blocks,
            )
        groups = self._unbacked_for(count)
        if count > self.free_blocks + sum(map(self._size, groups)):
            raise self._too_few(count)
        self._reserved = max(self._reserved, count)
        return groups

    def needed_of(self, groups: list[int], count: int) -> list[int]:
        """Return the first of ``groups``, as many as are still to be backed so that ``count`` blocks are free."""
        free_blocks = self.free_blocks
        for number, group in enumerate(groups):
            if free_blocks >= count:
                return groups[:number]
            free_blocks += self._size(group)
        return groups

    def free_blocks_without(self, groups: list[int], count: int) -> int | None:
        """Return from how many free blocks on the last of ``groups`` is not needed; None if there is none."""
        return count - sum(map(self._size, groups[:-1])) if groups else None

    def is_unbacked(self, group: int) -> bool:
        """Whether a group has no memory, as far as is known."""
        return self._free[group] is None and group not in self._leaving

    def note_backed(self, groups: Sequence[int]) -> None:
        """Take in that groups have memory now, or keep the one that :meth:`take_surplus` wanted to take."""
        for group in groups:
            ensure(self._free[group] is None, "a group is backed once", group=group)
            if group in self._leaving:
                self._leaving.remove(group)
            else:
                self._unbacked.remove(group)
            first = group * self.group_blocks
            self._free[group] = list(range(first + self._size(group) - 1, first - 1, -1))
            self.free_blocks += self._size(group)
            self._empty.add(group)
            if not self._is_open[group]:
                self._is_open[group] = True
                heapq.heappush(self._open, group)
        heapq.heapify(self._unbacked)

    def take_surplus(self) -> list[int]:
        """Take empty groups, the last ones, of which there are too many; none of their blocks is handed out any more.

        To be followed by :meth:`note_unbacked` when their memory is gone, or by :meth:`note_backed` if it stays.
        """
        return self._take(self._kept()) if self.free_blocks > 3 * self.ahead_blocks else []

    def take_empty(self) -> list[int]:
        """Take all empty groups, as :meth:`take_surplus` does. Nothing is wanted ahead until something is asked for."""
        self._reserved = 0
        self._resting = True
        return self._take(0)

    def note_unbacked(self, groups: Sequence[int]) -> None:
        """Take in that groups which were taken have no memory any more."""
        for group in groups:
            self._leaving.remove(group)
            heapq.heappush(self._unbacked, group)

    def check(self) -> None:
        """Raise :class:`~kvpool.errors.InvariantError` unless states, groups and counts tell the same."""
        free = [number for numbers in self._free if numbers is not None for number in numbers]
        ensure(len(free) == len(set(free)) == self.free_blocks, "free blocks are counted", free=len(free))
        ensure(not any(self._states[number] for number in free), "a free block is not in use")
        without = self._leaving.union(self._unbacked)
        ensure(
            without == {group for group, numbers in enumerate(self._free) if numbers is None}
            and len(without) == len(self._unbacked) + len(self._leaving),
            "a group has memory, is about to lose it, or has none",
        )
        unknown = self.num_blocks - len(free) - self.used_blocks - sum(map(self._size, without))
        ensure(unknown == 0, "each block is free, in use or without memory", unknown=unknown)
        for group, numbers in enumerate(self._free):
            ensure(
                (group in self._empty) == (numbers is not None and len(numbers) == self._size(group)), "empty groups"
            )
            ensure(not numbers or self._is_open[group], "a group with free blocks is found", group=group)
        ensure(sorted(self._open) == [group for group, is_open in enumerate(self._is_open) if is_open], "open groups")

    def _size(self, group: int) -> int:
        return min(self.group_blocks, self.num_blocks - group * self.group_blocks)

    def _kept(self) -> int:
        """How many blocks stay free and backed when others lose their memory."""
        return max(2 * self.ahead_blocks, self._reserved)

    def _unbacked_for(self, count: int) -> list[int]:
        groups: list[int] = []
        free_blocks = self.free_blocks
        for group in sorted(self._unbacked):
            if free_blocks >= count:
                break
            groups.append(group)
            free_blocks += self._size(group)
        return groups

    def _take(self, least_free: int) -> list[int]:
        taken = []
        for group in sorted(self._empty, reverse=True):
            if self.free_blocks - self._size(group) < least_free:
                break
            self._empty.remove(group)
            self._free[group] = None
            self._leaving.add(group)
            self.free_blocks -= self._size(group)
            taken.append(group)
        return taken

    def _too_few(self, count: int) -> CapacityError:
        unbacked = sum(map(self._size, self._leaving.union(self._unbacked)))
        return CapacityError(
            f"asked for {format_count(count, 'block')}: {self.free_blocks} are free and have memory, "
            f"{unbacked} have none, and {self.used_blocks} of {self.num_blocks} are in use: free some, or "
            "reserve() memory for more",
            asked_blocks=count,
            free_blocks=self.free_blocks,
            unbacked_blocks=unbacked,
            num_blocks=self.num_blocks,
        )

    def _cannot_free(self, numbers: Sequence[int], done: int) -> DoubleReleaseError | InvalidRequestError:
        number = numbers[done]
        if 0 <= number < self.num_blocks:
            return DoubleReleaseError(
                f"block {number} is free already: free each once (nothing was freed)", block=number
            )
        return InvalidRequestError(
            f"{number!r} is no block that was allocated here: they are 0 to {self.num_blocks - 1} (nothing was freed)",
            asked=repr(number),
        )


def _count(count: Any) -> int:
    """Return a number of blocks as a plain integer, or raise :class:`InvalidRequestError`."""
    try:
        plain = operator.index(count)
    except TypeError:
        plain = -1
    if type(plain) is not int or isinstance(count, bool) or plain < 0:
        raise InvalidRequestError(f"give a whole number of blocks, not {count!r}", asked=repr(count))
    return plain


def _plain(numbers: Any) -> list[int]:
    """Return numbers as plain integers: what is kept must not change when a caller writes to its array again."""
    tolist = getattr(numbers, "tolist", None)
    try:
        plain = list(numbers if tolist is None else tolist())
        if set(map(type, plain)) <= {int}:
            return plain
        wrong = [number for number in plain if isinstance(number, bool) or type(operator.index(number)) is not int]
        if not wrong:
            return list(map(operator.index, plain))
    except TypeError:
        pass  # told below, with all else that is no number
    raise InvalidRequestError(
        f"{numbers!r:.200} are no numbers of blocks: give whole numbers, or a one-dimensional array of them (nothing "
        "was freed)",
        asked=f"{numbers!r:.200}",
    )
