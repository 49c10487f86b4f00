"""What happens to the content of a pool, as it happens."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

from kvpool.client.connection import Connection
from kvpool.client.lane import ANSWER_S

_POLL_S = 20.0


@dataclass(frozen=True, slots=True)
class PoolEvent:
    """One event; what does not apply is None.

    ``kind`` is ``stored``, ``removed``, ``cleared`` (all content of the model at once), ``device_lost`` (with all that
    was on it) or ``missed``: events were lost on the way here, so that whoever keeps a list must begin again from
    :meth:`CachePool.ls`. ``reason`` tells why content was removed: ``capacity``, ``request`` (an administrator's) or
    ``invalidate``; ``gone`` if its writer died while it was being sealed.

    ``number`` is that of the model, as in :meth:`CachePool.ls`: it tells models apart that share a name, whose
    revision, shard or layout differ. It stays the same as long as the pool lives.
    """

    kind: str
    tenant: str | None = None
    model: str | None = None
    key: bytes | None = None
    parent: bytes | None = None
    device: str | None = None
    size_bytes: int | None = None
    reason: str | None = None
    number: int | None = None
    revision: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return what applies, as JSON types: hashes as hexadecimal digits."""
        fields = {name: value for name, value in asdict(self).items() if value is not None}
        return {name: value.hex() if isinstance(value, bytes) else value for name, value in fields.items()}


class EventReader:
    """Reads the events of one pool by long polls of its actor.

    Parameters
    ----------
    call
        Calls a method of the pool's actor: ``call(seen, wait_s, tenant)``.
    tenant
        Whose events; None: all.
    """

    def __init__(self, call: Any, tenant: str | None) -> None:
        self._call = call
        self._tenant = tenant
        self._seen: int | None = None

    async def start(self) -> None:
        """Begin to listen: what happens from now on will be read. Done by the first read, too."""
        if self._seen is None:
            self._seen, _ = await self._call(None, 0.0, self._tenant)

    async def poll(self, wait_s: float = _POLL_S) -> list[PoolEvent]:
        """Return what has happened since the last poll, waiting for an event up to ``wait_s`` (30 s at most)."""
        await self.start()
        self._seen, events = await self._call(self._seen, wait_s, self._tenant)
        return [PoolEvent(*event) for event in events]


class EventStream:
    """The events of a pool, of this connection's tenant: ``async for event in pool.events()``. It has no end.

    Listening begins with the first step of the loop, or with :meth:`start`. An error ends it when the pool is gone.
    """

    def __init__(self, connection: Connection) -> None:
        async def call(seen: int | None, wait_s: float, tenant: str | None) -> Any:
            return await connection.call(connection.actor.events, seen, wait_s, tenant, timeout_s=wait_s + ANSWER_S)

        self._reader = EventReader(call, connection.tenant)
        self._came: deque[PoolEvent] = deque()
        self._filling = asyncio.Lock()

    async def start(self) -> EventStream:
        """Begin to listen, and return this stream: what happens after this is in it."""
        await self._reader.start()
        return self

    async def next(self, wait_s: float = _POLL_S) -> PoolEvent | None:
        """Return the next event; None if there is none within ``wait_s``, 30 s at most."""
        await self.fill(wait_s)
        return self.take()

    async def fill(self, wait_s: float = _POLL_S) -> None:
        """Wait until there is an event to :meth:`take`, ``wait_s`` at most. Nothing is lost with one that is abandoned.

        One that is abandoned without being cancelled goes on, and those that follow wait for it: two polls at once
        would bring the same events.
        """
        if self._came:
            return
        try:
            async with asyncio.timeout(wait_s):
                await self._filling.acquire()
        except TimeoutError:
            return
        try:
            if not self._came:
                self._came.extend(await self._reader.poll(wait_s))
        finally:
            self._filling.release()

    def take(self) -> PoolEvent | None:
        """Return the next of the events that have come, None if there is none. From any thread."""
        try:
            return self._came.popleft()
        except IndexError:
            return None

    def __aiter__(self) -> EventStream:
        return self

    async def __anext__(self) -> PoolEvent:
        while True:
            event = await self.next()
            if event is not None:
                return event
