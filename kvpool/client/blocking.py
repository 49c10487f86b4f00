"""The verbs of administration in blocking form, for :class:`kvpool.sync.CachePool`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from kvpool.client.events import EventStream, PoolEvent
from kvpool.client.pool import CachePool

_POLL_S = 1.0
"""How long one wait for events takes at most: an interrupted program leaves it behind."""


class BlockingAdministration:
    """Blocking form of :class:`kvpool.client.administration.Administration`; ``_run`` runs a coroutine function."""

    _pool: CachePool
    _run: Callable[..., Any]

    def ls(
        self, model: Any = None, *, limit: int = 100, sort: str | None = None, after: int | None = None
    ) -> dict[str, Any]:
        """See :meth:`kvpool.CachePool.ls`."""
        return dict(self._run(self._pool.ls, model, limit=limit, sort=sort, after=after))

    def holders(self) -> list[dict[str, Any]]:
        """See :meth:`kvpool.CachePool.holders`."""
        return list(self._run(self._pool.holders))

    def waiting(self, *, limit: int = 100) -> dict[str, Any]:
        """See :meth:`kvpool.CachePool.waiting`."""
        return dict(self._run(self._pool.waiting, limit=limit))

    def revoke(self, client: str) -> dict[str, Any]:
        """See :meth:`kvpool.CachePool.revoke`."""
        return dict(self._run(self._pool.revoke, client))

    def contains(self, model: Any, keys: bytes | str | Sequence[bytes | str]) -> dict[str, Any]:
        """See :meth:`kvpool.CachePool.contains`."""
        return dict(self._run(self._pool.contains, model, keys))

    def evict(self, size: int | str, *, model: Any = None, device: str | None = None) -> dict[str, int]:
        """See :meth:`kvpool.CachePool.evict`."""
        return dict(self._run(self._pool.evict, size, model=model, device=device))

    def invalidate(self, model: Any, keys: bytes | str | Sequence[bytes | str] | None = None) -> dict[str, Any]:
        """See :meth:`kvpool.CachePool.invalidate`."""
        return dict(self._run(self._pool.invalidate, model, keys))

    def trim(self) -> int:
        """See :meth:`kvpool.CachePool.trim`."""
        return int(self._run(self._pool.trim))

    def defragment(self) -> dict[str, int]:
        """See :meth:`kvpool.CachePool.defragment`."""
        return dict(self._run(self._pool.defragment))

    def flush(self) -> dict[str, int]:
        """See :meth:`kvpool.CachePool.flush`."""
        return dict(self._run(self._pool.flush))

    def set_policy(self, name: str) -> str:
        """See :meth:`kvpool.CachePool.set_policy`."""
        return str(self._run(self._pool.set_policy, name))

    def set_quota(
        self,
        *,
        model: Any = None,
        tenant: str | None = None,
        guaranteed: int | str = 0,
        limit: int | str | None = None,
        revision: int | None = None,
    ) -> dict[str, Any]:
        """See :meth:`kvpool.CachePool.set_quota`."""
        asked = {"model": model, "tenant": tenant, "guaranteed": guaranteed, "limit": limit, "revision": revision}
        return dict(self._run(self._pool.set_quota, **asked))

    def quotas(self) -> list[dict[str, Any]]:
        """See :meth:`kvpool.CachePool.quotas`."""
        return list(self._run(self._pool.quotas))

    def events(self) -> BlockingEventStream:
        """See :meth:`kvpool.CachePool.events`; here ``for event in pool.events()``."""
        return BlockingEventStream(self._pool.events(), self._run)


class BlockingEventStream:
    """Blocking form of :class:`kvpool.client.EventStream`."""

    def __init__(self, stream: EventStream, run: Callable[..., Any]) -> None:
        self._stream = stream
        self._run = run

    def start(self) -> BlockingEventStream:
        """Begin to listen, and return this stream: what happens after this is in it."""
        self._run(self._stream.start)
        return self

    def next(self, wait_s: float = _POLL_S) -> PoolEvent | None:
        """Return the next event; None if there is none within ``wait_s``, 30 s at most."""
        # An interrupted wait is left behind on the event loop: what comes to it must not be taken there.
        self._run(self._stream.fill, wait_s)
        return self._stream.take()

    def __iter__(self) -> Iterator[PoolEvent]:
        while True:
            event = self.next()
            if event is not None:
                yield event
