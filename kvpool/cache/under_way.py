"""What is under way on each key, and removals, which make it void."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

from kvpool.cache.key import CacheKey


class _Cancellable(Protocol):
    def cancel(self) -> object: ...


class Work:
    """One operation on one key."""

    __slots__ = ("key", "task", "void")

    def __init__(self, key: CacheKey) -> None:
        self.key = key
        self.void = False
        """The key was removed meanwhile: whatever comes out, nobody may find it."""
        self.task: _Cancellable | None = None
        """Cancelled when the work becomes void; for what may wait long."""


class _Watch(NamedTuple):
    """Whose removal somebody wants to know of, and what has been removed of that."""

    keys: frozenset[CacheKey]
    removed: set[CacheKey]


class UnderWay:
    """Work by key. A removal refuses new work on its keys, makes what is under way void, and waits for its end."""

    def __init__(self) -> None:
        self._works: dict[CacheKey, set[Work]] = {}
        self._ends: dict[CacheKey, asyncio.Future[None]] = {}  # of keys that somebody waits for
        self._removed_keys: Counter[CacheKey] = Counter()
        self._removed_spaces: Counter[tuple[str, str]] = Counter()
        self._watches: list[_Watch] = []
        self._open = True

    @property
    def closed(self) -> bool:
        """Whether all work is refused."""
        return not self._open

    def refuses(self, key: CacheKey) -> bool:
        """Whether a key is being removed, or everything was closed."""
        return not self._open or key in self._removed_keys or (key.tenant, key.fingerprint) in self._removed_spaces

    def begin(self, key: CacheKey) -> Work | None:
        """Begin work on a key, or return None if that is refused."""
        if self.refuses(key):
            return None
        work = Work(key)
        self._works.setdefault(key, set()).add(work)
        return work

    def end(self, work: Work) -> None:
        """End a work, once."""
        works = self._works[work.key]
        works.remove(work)
        if not works:
            del self._works[work.key]
            end = self._ends.pop(work.key, None)
            if end is not None:
                end.set_result(None)

    @contextmanager
    def removal(self, keys: Collection[CacheKey]) -> Iterator[None]:
        """Refuse work on these keys within the block, and make void what is under way."""
        self._removed_keys.update(keys)
        for watch in self._watches:
            watch.removed.update(watch.keys.intersection(keys))
        self.cancel(keys)
        try:
            yield
        finally:
            for key in keys:
                self._removed_keys[key] -= 1
                if not self._removed_keys[key]:
                    del self._removed_keys[key]

    @contextmanager
    def removal_of_space(self, tenant: str, fingerprint: str) -> Iterator[None]:
        """Do as :meth:`removal` for all keys of a tenant and fingerprint."""
        space = (tenant, fingerprint)
        self._removed_spaces[space] += 1
        for watch in self._watches:
            watch.removed.update(key for key in watch.keys if key[:2] == space)
        self.cancel(self.keys_of(tenant, fingerprint))
        try:
            yield
        finally:
            self._removed_spaces[space] -= 1
            if not self._removed_spaces[space]:
                del self._removed_spaces[space]

    @contextmanager
    def watching(self, keys: Iterable[CacheKey]) -> Iterator[Collection[CacheKey]]:
        """Yield what of these keys is removed, from now on and within the block.

        For who does several works on a key, one after the other: a removal that comes and goes between two of them
        meets neither, and what the second would store is what was removed.
        """
        watch = _Watch(frozenset(keys), set())
        watch.removed.update(key for key in watch.keys if self.refuses(key))
        self._watches.append(watch)
        try:
            yield watch.removed
        finally:
            self._watches = [each for each in self._watches if each is not watch]

    async def close(self) -> None:
        """Refuse all work from now on, make void what is under way, and return when it has ended."""
        self._open = False
        keys = list(self._works)
        self.cancel(keys)
        await self.idle(keys)

    def keys_of(self, tenant: str, fingerprint: str) -> list[CacheKey]:
        """Return those of a tenant and fingerprint."""
        return [key for key in self._works if (key.tenant, key.fingerprint) == (tenant, fingerprint)]

    def cancel(self, keys: Iterable[CacheKey]) -> None:
        """Make void what is under way on these keys."""
        for key in keys:
            for work in self._works.get(key, ()):
                work.void = True
                if work.task is not None:
                    work.task.cancel()

    async def idle(self, keys: Iterable[CacheKey]) -> None:
        """Return once nothing that was under way on these keys still is."""
        ends = []
        for key in keys:
            if key in self._works:
                if key not in self._ends:
                    self._ends[key] = asyncio.get_running_loop().create_future()
                ends.append(self._ends[key])
        if ends:
            await asyncio.wait(ends)
