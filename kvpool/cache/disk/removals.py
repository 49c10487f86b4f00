"""Removals on their way: until one is complete, its keys are neither found nor written."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Sequence

from kvpool.cache.disk.advice import advice_on
from kvpool.cache.disk.file_names import new_removal_number, space_name
from kvpool.cache.disk.folder import Folder
from kvpool.cache.disk.index import DiskEntry, DiskIndex
from kvpool.cache.disk.removal import Removal
from kvpool.cache.disk.statistics import DiskCounters, cause_of
from kvpool.cache.disk.threads import Threads
from kvpool.cache.key import CacheKey
from kvpool.errors import TierError
from kvpool.sizes import format_count


class Removals:
    """Carries removals out, again when the store refused. Callers hold a thread and their keys.

    Parameters
    ----------
    folder, index, counters, threads
        Of the tier.
    """

    def __init__(self, folder: Folder, index: DiskIndex, counters: DiskCounters, threads: Threads) -> None:
        self._folder, self._index, self._counters, self._threads = folder, index, counters, threads
        self._stuck: dict[CacheKey, list[Removal]] = {}
        # Those whose callers have given up, in the order in which they are tried again. (No others: two threads must
        # not write down one removal at the same moment.)
        self._left: dict[Removal, None] = {}
        self._doubtful: set[str] = set()  # folders that may hold files which the index does not know
        self._one_at_a_time = asyncio.Lock()  # two keys may be stuck in one removal

    def take_over(self, removals: Iterable[Removal], unread: Iterable[str]) -> None:
        """Go on with removals that the start could not complete, and in mind of folders that it could not read."""
        self._doubtful.update(unread)
        for removal in removals:
            self._enter(removal)
            self._left[removal] = None

    def is_stuck(self, key: CacheKey) -> bool:
        """Whether a key is to go and has not gone yet."""
        return key in self._stuck

    @property
    def pending(self) -> int:
        """How many caches are to go, are hidden, and have not gone yet."""
        return len(self._stuck)

    async def again(self) -> None:
        """Try again what its callers could not complete, until one fails: the others are before that next time."""
        for removal in list(self._left):
            if not await self._carry_out(removal):
                del self._left[removal]
                self._left[removal] = None
                return

    async def note_left(self) -> None:
        """Try once more to write down what the next start would find otherwise."""
        for removal in list(self._left):
            if not removal.decided:
                await self._carry_out(removal)

    async def complete(self, key: CacheKey) -> bool:
        """Complete what a key is stuck in, if anything; True if it may be written now."""
        for removal in list(self._stuck.get(key, ())):
            if not await self._carry_out(removal):
                return False
        return True

    async def note(self, entries: Iterable[DiskEntry]) -> Removal:
        """Decide on the removal of files whose keys the caller does not hold yet, unless the store refuses that.

        Also then it must go to :meth:`remove`: what was written down may be there, and would remove what is written
        later.
        """
        removal = self._new(entries)
        await self._decide(removal)
        return removal

    async def remove(self, keys: Iterable[CacheKey], noted: Removal | None = None) -> int:
        """Remove caches for good; returns how many there were. ``noted``: what was decided for some of them before.

        Raises
        ------
        TierError
            If it is not sure that none of them comes back.
        """
        wanted = sorted(keys)
        there = 0
        if noted is not None:
            there = sum(self._index.drop(key) is not None for key in {entry.key for entry in noted.entries})
            self._enter(noted)
        covered = {key for key in wanted if key in self._stuck}
        unknown = [key for key in wanted if self._index.get(key) is None and key not in covered]
        strays: list[DiskEntry] = []
        unsure_of_others: TierError | None = None
        try:
            strays = await self._threads.run(_find_strays, self._folder, unknown, self._doubtful)
            # What was evicted is unlinked already, but a failure of power could still bring it back.
            await self._threads.run(_sync_spaces, self._folder, unknown)
        except Exception as error:  # noqa: BLE001  raised once what is known is hidden
            unsure_of_others = self._may_be_there(error)
        entries = [entry for key in wanted if (entry := self._index.drop(key)) is not None] + strays
        if entries:
            removal = self._new(entries)
            self._enter(removal)
            await self._decide(removal)  # before it stands in line behind others, of which one may hang
        for removal in dict.fromkeys(removal for key in wanted for removal in self._stuck.get(key, ())):
            if not await self._carry_out(removal):
                self._left[removal] = None
        undecided = {key: [each for each in self._stuck.get(key, ()) if not each.decided] for key in wanted}
        unsure = [removals[0] for removals in undecided.values() if removals]
        if unsure:
            raise self._not_sure(len(unsure), len(wanted), unsure[0].refused)
        there += len({entry.key for entry in entries})
        self._counters.removed_files += there
        if unsure_of_others is not None:
            raise unsure_of_others
        return there

    async def space(self, tenant: str, fingerprint: str) -> set[CacheKey]:
        """Return the keys of a tenant and fingerprint that have files, or may have.

        Raises
        ------
        TierError
            If the store does not tell.
        """
        name = space_name(tenant, fingerprint)
        try:
            found = await self._threads.run(_find_space, self._folder, name, self._doubtful)
        except Exception as error:
            raise self._may_be_there(error) from error
        known = [entry.key for entry in self._index] + list(self._stuck)
        return found.union(key for key in known if (key.tenant, key.fingerprint) == (tenant, fingerprint))

    async def undo(self, entry: DiskEntry) -> None:
        """Make sure that a write that failed has left nothing, or remember that it may have."""
        try:
            await self._threads.run(self._folder.remove, entry.path)
        except Exception as error:  # noqa: BLE001  drivers raise what they like
            self._counters.count_error(f"clearing {entry.path}", error)
            self._doubtful.add(space_name(entry.key.tenant, entry.key.fingerprint))

    def _not_sure(self, unsure: int, wanted: int, error: Exception | None) -> TierError:
        cause = "removal" if error is None else cause_of(error)
        return TierError(
            f"{unsure} of {format_count(wanted, 'cache')} could not be removed from the disk tier at "
            f"{self._folder.url}: {error}; {advice_on(cause)}. They are hidden, and go by themselves once that is "
            "mended; but if the pool ends before, the next start that has this folder finds them: call again, until "
            "that is not refused",
            cause=cause,
        )

    def _may_be_there(self, error: Exception) -> TierError:
        cause = self._counters.count_error("looking for what is to be removed", error)
        return TierError(
            f"caches to be removed may still be on disk, in {self._folder.url}, and be found by the next start: "
            f"{error}; {advice_on(cause)}. Call again once that is mended",
            cause=cause,
        )

    def _new(self, entries: Iterable[DiskEntry]) -> Removal:
        return Removal(new_removal_number(), entries)

    def _enter(self, removal: Removal) -> None:
        for entry in removal.entries:
            stuck = self._stuck.setdefault(entry.key, [])
            if not stuck:
                self._index.claim(entry)  # it takes room until it is gone
            if removal not in stuck:
                stuck.append(removal)

    async def _carry_out(self, removal: Removal) -> bool:
        """Decide and complete a removal as far as the store lets us; True if it is complete."""
        async with self._one_at_a_time:
            return removal.completed or await self._try(removal)

    async def _decide(self, removal: Removal) -> None:
        try:
            if not removal.decided:
                await self._threads.run(removal.decide, self._folder)
        except Exception as error:  # noqa: BLE001  nothing is lost if it can be completed without
            self._counters.count_error("noting a removal", error)
            removal.refused = error

    async def _try(self, removal: Removal) -> bool:
        await self._decide(removal)
        try:
            # A key may have several files: each pack has a name of its own.
            keys = {entry.key for entry in removal.entries}
            removal.add(await self._threads.run(_find_strays, self._folder, keys, self._doubtful))
            await self._threads.run(removal.complete, self._folder)
        except Exception as error:  # noqa: BLE001  drivers raise what they like
            self._counters.count_error("completing a removal", error)
            return False
        self._counters.completed_removal()
        self._left.pop(removal, None)
        for key in {entry.key for entry in removal.entries}:
            stuck = self._stuck[key]
            stuck.remove(removal)
            if not stuck:
                del self._stuck[key]
                self._index.unclaim(key)
        return True


def _find_strays(folder: Folder, keys: Collection[CacheKey], doubtful: Collection[str]) -> list[DiskEntry]:
    """Return all files of these keys in doubtful folders."""
    wanted = set(keys)
    strays: list[DiskEntry] = []
    for space in sorted({space_name(key.tenant, key.fingerprint) for key in keys}.intersection(doubtful)):
        for found in folder.list(space):
            entry = DiskEntry.at(f"{space}/{found.name}")
            if entry is not None and entry.key in wanted:
                strays.append(entry)
    return strays


def _find_space(folder: Folder, name: str, doubtful: Collection[str]) -> set[CacheKey]:
    """Make sure that nothing evicted comes back; returns the keys of all files if any of them may be unknown."""
    folder.sync(name)
    if name not in doubtful:
        return set()
    entries = (DiskEntry.at(f"{name}/{found.name}") for found in folder.list(name))
    return {entry.key for entry in entries if entry is not None}


def _sync_spaces(folder: Folder, keys: Sequence[CacheKey]) -> None:
    for space in sorted({space_name(key.tenant, key.fingerprint) for key in keys}):
        folder.sync(space)
