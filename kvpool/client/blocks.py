"""Blocks of a chain: the prefix that was found, and new blocks to be written."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvpool.client.connection import Connection
from kvpool.client.lane import Lane
from kvpool.client.lease import Lease
from kvpool.client.spec import ModelSpec, join_hashes
from kvpool.client.view import open_view
from kvpool.errors import KvpoolError, PoolUnavailableError, TierError, from_wire
from kvpool.memory.backend import Access
from kvpool.memory.dlpack import MappedTensorSource, as_numpy, as_torch
from kvpool.sizes import format_count

if TYPE_CHECKING:
    import numpy
    import torch


class LeasedBlocks:
    """Leased blocks of one model, in the order of their chain. Leaving the context releases them."""

    def __init__(
        self,
        connection: Connection,
        spec: ModelSpec,
        ids: Sequence[int],
        devices: Sequence[int],
        places: Sequence[Any],
    ) -> None:
        self._connection = connection
        self._spec = spec
        self._ids = list(ids)
        self._devices = list(devices)
        self._places = list(places)
        self._block_bytes = spec.block_size_bytes or 0
        self._lease = Lease(connection, ids, self._block_bytes * len(ids))

    def __repr__(self) -> str:
        state = ", released" if self._lease.released else ""
        blocks = format_count(self.num_blocks, "block")
        return f"<{type(self).__name__} of {self._spec.name}: {blocks}{self._also()}{state}>"

    def _also(self) -> str:
        return ""

    @property
    def access(self) -> Access:
        """What this process may do with the blocks."""
        return Access.READ

    @property
    def num_blocks(self) -> int:
        """How many blocks are leased."""
        return len(self._ids)

    def __len__(self) -> int:
        return len(self._ids)

    def __bool__(self) -> bool:
        return bool(self._ids)

    async def map(self) -> None:
        """Map the blocks' pages in this process (done before the blocks are handed to the caller)."""
        with self._lease.given_back_on_failure():
            await self._connection.map(self._devices, self._places, self.access)

    def addresses(self) -> list[int]:
        """Return where each block begins in this process's memory. Valid until the blocks are released."""
        self._lease.addressed = True
        return self._addresses()

    def _addresses(self) -> list[int]:
        self._lease.check_held()
        arenas, access = self._connection.arenas, self.access
        wanted: dict[int, dict[tuple[int, int], None]] = {}
        for device, place in zip(self._devices, self._places, strict=True):
            wanted.setdefault(device, {}).update(dict.fromkeys(place[1]))
        for device, pages in wanted.items():
            # Mapped already, but for the read-only view of blocks that were sealed here; raises if the device is lost.
            arenas[device].ensure(list(pages), access)
        return [
            arenas[device].address(place[0], access) for device, place in zip(self._devices, self._places, strict=True)
        ]

    def tensors(self) -> list[torch.Tensor]:
        """Return a torch tensor over each block, without a copy.

        The first tensor of a process imports torch, if nothing has: a second or more in which its event loop stands
        still. Import it at the start.
        """
        return [as_torch(view) for view in self._views()]

    def numpy(self) -> list[numpy.ndarray[Any, Any]]:
        """Return a numpy array over each block, without a copy."""
        return [as_numpy(view) for view in self._views()]

    def _views(self) -> list[MappedTensorSource]:
        shape, dtype, access = self._spec.shape, self._spec.block_dtype, self.access
        return [open_view(self._lease, address, shape, dtype, access) for address in self._addresses()]

    async def release(self) -> None:
        """End the lease, now or when the last tensor over the blocks is gone; with a closed connection it has ended.

        Raises
        ------
        DoubleReleaseError
            If it was released before.
        """
        if self._ids:
            await self._lease.release()
        else:  # the pool knows nothing of it; what is on its way to it is given back when it comes
            self._lease.released = True

    async def __aexit__(self, *_: object) -> None:
        if not self._lease.released:
            await self.release()


class PrefixHit(LeasedBlocks):
    """The longest resident run of the hashes that were looked up: read-only, perhaps empty.

    Blocks behind it may lie in a lower tier (:attr:`coming`); :meth:`fetch` adds them.
    """

    def __init__(
        self, connection: Connection, spec: ModelSpec, model: int, hashes: Sequence[bytes], answer: Any
    ) -> None:
        _, ids, devices, places, _sizes, coming = answer
        super().__init__(connection, spec, ids, devices, places)
        self.coming: int = coming
        """How many blocks behind these lie in lower tiers, and are being brought up since the look-up."""
        self._model = model
        self._hashes = list(hashes)

    def _also(self) -> str:
        return f", {self.coming} coming" if self.coming else ""

    async def __aenter__(self) -> PrefixHit:
        return self

    async def fetch(self, *, timeout_s: float | None = None) -> int:
        """Wait until the blocks that are :attr:`coming` are there, and add them; returns how many there are now.

        Fewer come if a tier has lost them, or if there is no room for them on the device. Cancelled, or timed out, it
        can be called again: what is on its way comes all the same.

        Parameters
        ----------
        timeout_s
            How long to wait, seconds; what is there by then is added. By default the pool's ``timeout_s``.

        Raises
        ------
        CacheStateError
            If the blocks were released.
        """
        self._lease.check_held()
        if not self.coming:
            return self.num_blocks
        wait_s = self._connection.config["timeout_s"] if timeout_s is None else timeout_s
        joined = join_hashes(self._hashes)
        coming, self.coming = self.coming, 0  # a second call meanwhile must not add them twice
        clock = asyncio.get_running_loop().time
        deadline = clock() + wait_s
        try:
            _, ids, devices, places, *_ = await self._connection.fetch(self._model, joined, self.num_blocks, wait_s)
        except BaseException:
            self.coming = coming
            raise
        if clock() >= deadline:  # else what is not there will not come
            self.coming = max(coming - len(ids), 0)
        if ids and not self._lease.extend(ids, self._block_bytes * len(ids)):
            self._connection.release_soon(ids)
            self._lease.check_held()
        self._ids += ids
        self._devices += devices
        self._places += places
        await self._connection.map(devices, places, self.access)
        return self.num_blocks


class NewBlocks(LeasedBlocks):
    """New blocks to be written and sealed. Unsealed at release or death: they never were."""

    def __init__(
        self,
        connection: Connection,
        spec: ModelSpec,
        model: int,
        hashes: Sequence[bytes],
        answer: Any,
    ) -> None:
        _, resident, ids, devices, places = answer
        super().__init__(connection, spec, ids, devices, places)
        self.resident: int = resident
        """How many of the hashes were in the pool already; the new blocks are those of the hashes after them."""
        self.hashes = list(hashes[resident : resident + len(ids)])
        self._all_hashes = list(hashes[: resident + len(ids)])
        self._model = model
        self._sealed = False

    @property
    def access(self) -> Access:
        """Writable until the blocks are sealed, read-only from then on (views that are open stay as they are)."""
        return Access.READ if self._sealed else Access.READ_WRITE

    @property
    def stored(self) -> int:
        """How many leading hashes are in the pool once these blocks are sealed."""
        return self.resident + len(self._ids)

    def _also(self) -> str:
        return f" behind {self.resident} resident{', sealed' if self._sealed else ''}"

    async def __aenter__(self) -> NewBlocks:
        return self

    async def seal(self, *, durable: bool = False) -> None:
        """Make the blocks immutable and visible to all. What another client stored meanwhile stays in their place.

        With ``durable``, or where the pool's ``write_policy`` is ``write_through``, it returns when they are on disk
        and survive every process; :class:`~kvpool.errors.TierError` says that they are sealed, but not surely there.

        New views are read-only from then on, also when the call is cancelled: the pool may have sealed them already.
        """
        if self._ids:
            await self._seal_new()
        # By word also what was there before, of which nobody may have asked that.
        wanted = self._all_hashes if durable else self.hashes
        if wanted and self._is_durable(durable):
            _, written = await self._connection.ask(self._connection.persists, self._model, join_hashes(wanted))
            check_written(written)

    async def _seal_new(self) -> None:
        before, self._sealed = self._sealed, True
        try:
            outcomes = await self._ask(self._connection.seals)
        except PoolUnavailableError:
            raise  # whether they were sealed is not known
        except KvpoolError:
            self._sealed = before
            raise
        if not any(map(_stored, outcomes)):
            self._sealed = before
        _check(outcomes)

    def _is_durable(self, asked: bool) -> bool:
        return asked or self._connection.config["write_policy"] == "write_through"

    async def finish(self, *, durable: bool = False) -> None:
        """:meth:`seal` and :meth:`release`; in one call to the pool, unless they are to be durable."""
        self._connection.check_loop()
        if durable or (self._ids and self._is_durable(durable)):
            try:
                await self.seal(durable=durable)
            finally:
                await self.release()
            return
        if not self._ids:
            return
        if not self._lease.release_by_word():  # views are alive: the lease ends with the last of them
            await self.seal()
            return
        try:
            outcomes = await self._ask(self._connection.finishes)
        except PoolUnavailableError:
            raise  # whether it released them is not known; a second release could end another lease on them
        except KvpoolError:
            self._connection.release_soon(self._ids)  # a call that is refused has released nothing
            raise
        _check(outcomes)

    async def _ask(self, lane: Lane) -> Any:
        _, outcomes = await self._connection.ask(lane, self._model, self._ids, self.hashes)
        return outcomes


def _stored(outcome: Any) -> bool:
    return outcome is True or outcome == "duplicate"


def _check(outcomes: Any) -> None:
    for outcome in outcomes:
        if not _stored(outcome):
            raise from_wire(outcome[1:])


def check_written(outcomes: Any) -> None:
    """Raise the first error among the answers of ``persist``; a tier's does not mean that the content is lost."""
    for there, outcome in enumerate(outcomes):
        if outcome is not True:
            error = from_wire(outcome[1:])
            if isinstance(error, TierError) and error.details.get("cause") != "gone":
                on_disk = f" (on disk: the first {there} of {len(outcomes)} blocks)" if len(outcomes) > 1 else ""
                told = f"sealed and in the pool, but not durable: {error.message}{on_disk}"
                raise TierError(told, **error.details | {"blocks_on_disk": there})
            raise error
