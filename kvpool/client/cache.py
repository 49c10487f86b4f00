"""The handle of one cache: a lease on a piece of pool memory, and tensors over it."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from kvpool.cache.record import CacheBlock, blocks_of
from kvpool.client.block_allocator import BlockAllocator
from kvpool.client.blocks import check_written
from kvpool.client.connection import Connection
from kvpool.client.lease import Lease
from kvpool.client.spec import content_hash, wait_of
from kvpool.client.view import open_view
from kvpool.errors import (
    CacheStateError,
    InvalidRequestError,
    InvalidSizeError,
    KvpoolError,
    PoolUnavailableError,
    SealedError,
    TensorMismatchError,
    from_wire,
)
from kvpool.memory.backend import Access
from kvpool.memory.dlpack import MappedTensorSource, as_numpy, as_torch, check_shape, dtype_name, tensor_bytes
from kvpool.memory.extents import Extents, checked, front
from kvpool.memory.packing import shares_pages
from kvpool.sizes import format_count, format_size, parse_size

if TYPE_CHECKING:
    import numpy
    import torch


_MOST_ROUNDS = 16
"""How often a key that another cache has is asked for before :meth:`VirtualKVCache.seal` gives up.

The other one may be evicted before it is looked up, and another sealed before this one is again. Where memory is turned
over as fast as it can be, that was seen three times in a row once in some thousand seals."""


class VirtualKVCache:
    """A leased cache. Use it as an async context manager: leaving it releases the lease.

    Its name in the cluster is ``(id, epoch, generation)``. Until it is sealed only this process may use it, and it is
    gone when its lease ends; sealed with a key it stays in the pool, to be looked up, until it is evicted.

    Not made by hand: see :meth:`kvpool.CachePool.request_cache`.
    """

    def __init__(self, connection: Connection, model: int, model_name: str, granted: Any) -> None:
        _, cache_id, device, size_bytes, max_size_bytes, place = granted
        self.model_name = model_name
        self.size_bytes: int = size_bytes
        self.max_size_bytes: int = max_size_bytes
        self.sealed = False
        self.key: bytes | None = None
        self._seal_answered = False
        self.last_accessed = time.time()
        """When this handle last opened a view of the memory (seconds since 1970)."""
        self.access_count = 0
        """How many views this handle opened; :meth:`info` has the pool's count of leases."""
        self.backed: Extents = front(size_bytes)
        """Parts of the cache that are backed: ``(start, end)`` in bytes; of a cache that never grew, all of it; of a
        released one, none."""
        self._connection = connection
        self._model = model
        self.changing = asyncio.Lock()
        """Held while the pool is asked to change or seal the cache, and not while a change waits for memory there."""
        self._following = asyncio.Lock()
        self._allocator: weakref.ref[BlockAllocator] | None = None
        self._follows: set[asyncio.Task[None]] = set()
        #: Changes that may have to wait for memory, until they are answered.
        self._growing: set[asyncio.Task[None]] = set()
        self._viewed: set[Access] = set()
        """The views of the arena in which the cache is mapped."""
        self._take(cache_id, device, place)
        #: Whether it lies in pages that others lie in, too: they are there whatever its size.
        self._shared = shares_pages(size_bytes, max_size_bytes, connection.devices[device]["page_bytes"])

    @classmethod
    async def found(cls, connection: Connection, model: int, model_name: str, key: bytes, hit: Any) -> VirtualKVCache:
        """Return the handle of a cache that a look-up of ``key`` found and leased, mapped in this process."""
        cache_id, device, place, size_bytes = hit
        cache = cls(connection, model, model_name, (None, cache_id, device, size_bytes, size_bytes, place))
        cache.sealed, cache.key, cache._seal_answered = True, key, True
        await cache.map()
        return cache

    def _take(self, cache_id: int, device: int, place: Any) -> None:
        self.id: int = cache_id
        self.device: str = self._connection.devices[device]["name"]
        self.epoch: int = self._connection.devices[device]["epoch"]
        self._device = device
        self._offset, self._pages, self.generation = place
        self._lease = Lease(self._connection, [cache_id], self.size_bytes)
        self._viewed.clear()

    def __repr__(self) -> str:
        state = "released" if self._lease.released else "sealed" if self.sealed else "open"
        return f"<VirtualKVCache {self.id} of {self.model_name}: {self.size_bytes} bytes on {self.device}, {state}>"

    async def map(self) -> None:
        """Map the cache's pages in this process (done before the cache is handed to the caller)."""
        with self._lease.given_back_on_failure():
            access = self._access(None)
            self._viewed.add(access)
            if self.max_size_bytes > self.size_bytes:
                self._cover(access)
            await self._connection.map_pages(self._device, self._pages, access)

    @property
    def blocks(self) -> tuple[CacheBlock, ...]:
        """The power-of-two ranges of the device's arena that it is made of."""
        return blocks_of(self._offset, self.size_bytes, self._connection.devices[self._device]["min_block_bytes"])

    @property
    def released(self) -> bool:
        """Whether :meth:`release` was called (views that are alive keep the memory until they are gone)."""
        return self._lease.released

    def tensor(
        self, dtype: Any, shape: Sequence[int] | int, *, offset_bytes: int = 0, access: Access | None = None
    ) -> torch.Tensor:
        """Return a torch tensor over the cache's memory, without a copy.

        The first tensor of a process imports torch, if nothing has: a second or more in which its event loop stands
        still. Import it at the start.

        Parameters
        ----------
        dtype
            Of torch, or its name.
        shape
            As numpy takes it, all of its dimensions 1 or more. Its bytes, from ``offset_bytes`` on, must lie within the
            cache; until it is sealed, within its ``max_size``. Pages that are not backed read as zeros, and come to
            life when they are: see :meth:`back`. Writing there is a fault (SIGSEGV).
        access
            ``Access.READ`` or ``Access.READ_WRITE``; by default writable until the cache is sealed and read-only from
            then on. Writing to a read-only tensor is a fault (SIGSEGV; ``python -X faulthandler`` shows where).

        Raises
        ------
        TensorMismatchError
            If it does not fit the cache.
        SealedError
            If a writable view of a sealed cache is asked for.
        """
        return as_torch(self._view(dtype, shape, offset_bytes, access))

    def numpy(
        self, dtype: Any, shape: Sequence[int] | int, *, offset_bytes: int = 0, access: Access | None = None
    ) -> numpy.ndarray[Any, Any]:
        """Return a numpy array over the cache's memory, without a copy; see :meth:`tensor`."""
        return as_numpy(self._view(dtype, shape, offset_bytes, access))

    def _access(self, asked: Access | None) -> Access:
        if asked is None:
            return Access.READ if self.sealed else Access.READ_WRITE
        if asked is Access.READ_WRITE and self.sealed:
            raise SealedError(
                f"cache {self.id} is sealed, so it can be read only: copy it into a new cache to change it",
                cache_id=self.id,
            )
        return asked

    def _view(
        self, dtype: Any, shape: Sequence[int] | int, offset_bytes: int, asked: Access | None
    ) -> MappedTensorSource:
        self._lease.check_held()
        access = self._access(asked)
        name = dtype_name(dtype)
        shape = check_shape(shape)
        view_bytes = tensor_bytes(shape, name)
        limit_bytes = self.size_bytes if self.sealed else self.max_size_bytes
        if (
            not isinstance(offset_bytes, int)
            or offset_bytes < 0
            or offset_bytes % tensor_bytes((1,), name)
            or offset_bytes + view_bytes > limit_bytes
        ):
            raise TensorMismatchError(
                f"{name}{list(shape)} at {offset_bytes} takes bytes {offset_bytes} to {offset_bytes + view_bytes}, but "
                f"cache {self.id} has {limit_bytes}: ask for a larger cache or a smaller tensor, at a multiple of "
                "its element's bytes",
                asked_bytes=offset_bytes + view_bytes,
                size_bytes=limit_bytes,
            )
        arena, lease = self._connection.arenas[self._device], self._lease
        with lease.held():  # this may be a thread, and the event loop may release it: nobody would end the cover then
            self._viewed.add(access)
            if not self.sealed and self.backed != ((0, self.max_size_bytes),):
                self._cover(access)
            arena.ensure(self._pages, access)
            self.last_accessed = time.time()
            self.access_count += 1
            return open_view(lease, arena.address(self._offset + offset_bytes, access), shape, name, access)

    async def resize(self, size: int | str, *, timeout_s: float | None = None) -> None:
        """Let exactly the first ``size`` of the cache be backed, in its place: tensors stay valid, and bytes stay.

        Growing waits for memory if need be, as a request for a cache does. Shrinking gives pages back to the system at
        once. 0 gives all of them back, and keeps the addresses. New bytes are zero, or what this tenant left in memory
        that was kept warm.

        Parameters
        ----------
        size
            Bytes or text, the cache's ``max_size`` at most.
        timeout_s
            How long to wait for memory, seconds; by default the pool's ``timeout_s``. 0 does not wait.

        Raises
        ------
        InvalidSizeError
            If it is above ``max_size``, or above what its device has.
        LimitError
            If it is above what its model or tenant may hold at most.
        SealedError
            If the cache is sealed: it keeps its size.
        CapacityError
            If there is no room on its device in time. Nothing has changed then.
        CacheStateError
            If a block allocator of the cache is open: it alone decides what is backed. If the cache is released, also
            while this waits.

        Notes
        -----
        Of several changes at once the last word counts, byte by byte: one that gives memory back takes its bytes from
        growth that still waits, too, which then ends, as far as that goes, as though it had been first.
        """
        self._check_changeable("resize")
        size_bytes = parse_size(size, least_bytes=0)
        ranges = ((0, size_bytes),) if size_bytes else ()
        if size_bytes > self.max_size_bytes:
            raise InvalidSizeError(
                f"cannot resize cache {self.id} to {format_size(size_bytes)}: its max_size is "
                f"{format_size(self.max_size_bytes)}, and stays: ask for a cache with a larger one",
                asked_bytes=size_bytes,
                max_size_bytes=self.max_size_bytes,
            )
        await self.change("resize", ranges, timeout_s)

    async def back(self, ranges: Iterable[tuple[int, int]], *, timeout_s: float | None = None) -> None:
        """Let more parts of the cache be backed: ``(start, end)``, bytes within its ``max_size``; see :meth:`resize`.

        So a tensor of the largest shape, whose blocks are not its first dimension, grows with its pointer and strides
        as they are: :func:`kvpool.byte_ranges` tells the ranges of a part of it. Backed are the pages that the ranges
        touch.
        """
        self._check_changeable("back")
        await self.change("back", ranges, timeout_s)

    async def unback(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Give memory under parts of the cache back: pages that no other backed part touches. They read as zeros then.

        Give back only what nothing is about to write to: that would be a fault. Raises as :meth:`resize`, but never for
        lack of room.
        """
        self._check_changeable("unback")
        await self.change("unback", ranges, None)

    def check_usable(self) -> None:
        """Raise unless the cache is leased here, in this process, and its device is alive as far as is known."""
        self._lease.check_held()
        self._connection.arenas[self._device].check_alive()

    def _check_changeable(self, kind: str) -> None:
        self._check_written_here()
        known = self._open_allocator()
        if known is not None:
            raise CacheStateError(
                f"cannot {kind} cache {self.id}: its block allocator decides what is backed, and hands it out "
                f"(in use: {format_count(known.used_blocks, 'block')}): reserve() or trim() them there, "
                "or close() it first",
                cache_id=self.id,
            )

    def _open_allocator(self) -> BlockAllocator | None:
        known = self._allocator() if self._allocator is not None else None
        return None if known is None or known.closed else known

    def _check_written_here(self) -> None:
        self._lease.check_held()
        if self.sealed:
            raise SealedError(
                f"cache {self.id} is sealed and keeps its size: copy it into a new cache to change it", cache_id=self.id
            )

    async def change(self, kind: str, ranges: Iterable[tuple[int, int]], timeout_s: float | None) -> None:
        """Do what :meth:`resize`, :meth:`back` and :meth:`unback` do (for the block allocator, too)."""
        self._check_written_here()
        asked = checked(ranges, self.max_size_bytes)
        wait_s = wait_of(timeout_s, self._connection.config["timeout_s"])
        self._connection.followers[self.id] = self
        changing = self._connection.change(self, kind, asked, wait_s)
        if kind == "unback":
            await changing
        else:
            await self._grow(asyncio.ensure_future(changing))

    async def _grow(self, growing: asyncio.Task[None]) -> None:
        """Wait for a change that may wait for memory; a release ends it, or it would hold up others for nothing."""
        self._growing.add(growing)
        try:
            await growing
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if caller is not None and not caller.cancelling():
                self._lease.check_held()
            raise
        finally:
            self._growing.discard(growing)

    def block_allocator(
        self, block_bytes: int | str, *, planes: int = 1, ahead_blocks: int | None = None
    ) -> BlockAllocator:
        """Hand out blocks of one size inside the cache, without a call for each: see :class:`BlockAllocator`.

        The cache's ``max_size`` tells how many there are; what is backed of it then follows their use.

        Parameters
        ----------
        block_bytes
            Bytes of a block, or text. Of one plane, where there are several.
        planes
            How often a block's number counts: 2 for a tensor ``(2, num_blocks, ...)`` of keys and values.
        ahead_blocks
            How many blocks are kept free and backed ahead of use. By default 64, or two groups of those that share
            pages if that is more.

        Raises
        ------
        InvalidSizeError
            If not even one block fits, or a number is none.
        SealedError
            If the cache is sealed.
        CacheStateError
            If another allocator of it is open.
        """
        self._lease.check_held()
        self._access(Access.READ_WRITE)
        if self._open_allocator() is not None:
            raise CacheStateError(f"cache {self.id} has a block allocator already: use that one, or close() it")
        page_bytes = self._connection.devices[self._device]["page_bytes"]
        allocator = BlockAllocator(self, self._connection, page_bytes, parse_size(block_bytes), planes, ahead_blocks)
        self._allocator = weakref.ref(allocator)
        return allocator

    async def follow(self, answer: Any) -> None:
        """Show in this process what the pool says is backed now. (For a change whose caller was cancelled, too.)"""
        # Whoever waits for it may be cancelled: half of it would leave pages unmapped that the cache is known to have.
        following = asyncio.ensure_future(self._follow(*answer[1:]))
        self._follows.add(following)
        following.add_done_callback(self._follows.discard)
        await asyncio.shield(following)

    async def _follow(self, cache_id: int, size_bytes: int, extents: Extents, place: Any) -> None:
        _, pages, generation = place
        async with self._following:
            if cache_id != self.id or generation <= self.generation or self._lease.released:
                return
            with self._lease.held():
                left = set(pages)
                gone = [page for page in self._pages if page not in left]
                self.size_bytes, self.backed, self._pages, self.generation = size_bytes, extents, pages, generation
                self._lease.size_bytes = size_bytes
                viewed = tuple(self._viewed)
                for access in viewed:
                    self._cover(access)
                if gone:
                    await self._connection.in_thread(self._connection.arenas[self._device].withdraw, gone)
                for access in viewed:  # what is there by now: a later answer may have come meanwhile
                    await self._connection.map_pages(self._device, self._pages, access)

    def _cover(self, access: Access) -> None:
        """Let what is not backed read as zeros in a view, until the lease ends."""
        if self._shared:
            return
        page_bytes = self._connection.devices[self._device]["page_bytes"]
        arena = self._connection.arenas[self._device]
        whole = self._offset // page_bytes, -(-self.max_size_bytes // page_bytes)
        self._lease.on_end = partial(arena.uncover, *whole)
        arena.cover(*whole, access)

    async def seal(self, key: bytes | str | None = None, *, durable: bool = False) -> None:
        """Make the cache immutable; with a key, make it known under it to all clients of the tenant.

        With ``durable``, or where the pool's ``write_policy`` is ``write_through``, it returns when a cache with a key
        is on disk and survives every process.

        A key cannot be given later: what is sealed without one is known to this process alone, cannot be looked up by
        anyone, and is gone with its lease unless it is pinned. Give the key here, or copy it into a new cache.

        Views that are open stay writable (writing on is a breach). When another client sealed the same key first,
        that cache stays, and this handle changes over to it: open tensors keep the old memory.

        Raises
        ------
        SealedError
            If it is sealed already with another key, or without one.
        CacheStateError
            If it is not backed from its first byte on, without a gap: :meth:`resize` it first.
        InvalidRequestError
            If it is to be durable, and has no key by which it could be found again.
        TierError
            If it is sealed, but not surely on disk.
        CacheStateError
            If the cache that was sealed first under the key cannot be had here: it lies where this process cannot map
            it, or is evicted and sealed anew again and again.
        """
        self._lease.check_held()
        hashed = content_hash(key) if key is not None else None
        if durable and hashed is None:
            raise InvalidRequestError("a cache is durable under its key: give seal() a key")
        if not (self._seal_answered and hashed == self.key):
            # Before the call: when it is cancelled, the pool may have sealed the cache already.
            before, self.sealed = self.sealed, True
            try:
                async with self.changing:
                    await self._seal(hashed)
            except PoolUnavailableError:
                raise  # whether it was sealed is not known
            except KvpoolError:
                self.sealed = before
                raise
        if hashed is not None and (durable or self._connection.config["write_policy"] == "write_through"):
            _, written = await self._connection.ask(self._connection.persists, self._model, hashed)
            check_written(written)

    async def _seal(self, key: bytes | None) -> None:
        for _ in range(_MOST_ROUNDS):
            _, (outcome,) = await self._connection.ask(self._connection.seals, self._model, [self.id], [key])
            if outcome is True:
                self.key, self._seal_answered = key, True
                return
            if outcome != "duplicate":
                raise from_wire(outcome[1:])
            if key is not None and await self._change_over(key):
                return
        raise CacheStateError(
            f"cache {self.id} could not be sealed: another cache has its key, and was not found {_MOST_ROUNDS} times "
            "over. It lies where this process cannot map it, or quotas let its model lease no more, or it keeps "
            "vanishing: seal it with another key, or with none"
        )

    async def _change_over(self, key: bytes) -> bool:
        """Take the cache that was sealed first under ``key``; False if it is gone again."""
        _, ids, devices, places, *_ = await self._connection.ask(self._connection.prefixes, self._model, key)
        if not ids:
            return False
        own = self._lease
        self._take(ids[0], devices[0], places[0])
        self.key, self._seal_answered = key, True
        if own.release_by_word():
            self._connection.release_soon(own.ids)
        return True

    async def info(self) -> dict[str, Any]:
        """Return what the pool knows: device, bytes, sealed, leases, ``last_accessed`` and ``access_count``."""
        (answer,) = await self._connection.call(
            self._connection.actor.describe_caches, self._connection.client, [self.id]
        )
        if isinstance(answer, tuple):
            raise from_wire(answer[1:])
        return dict(answer)

    async def pin(self) -> None:
        """Keep the sealed cache in the pool by word, beyond this lease, until :meth:`unpin`.

        Raises
        ------
        NotSealedError
            If it is not sealed.
        """
        _, (held,) = await self._connection.ask(self._connection.pins, [self.id])
        if not held:
            raise CacheStateError(f"cache {self.id} could not be pinned: its device is gone")

    async def unpin(self) -> None:
        """Let a pinned cache be evicted again. Possible after :meth:`release`, too."""
        _, (outcome,) = await self._connection.ask(self._connection.unpins, [self.id])
        if outcome is not True:
            raise from_wire(outcome[1:])

    async def release(self) -> None:
        """End the lease, now or when the last tensor over the memory is gone. Growth that waits ends at once.

        Nothing is left to do once the connection is closed, or its pool deleted.

        Raises
        ------
        DoubleReleaseError
            If it was released before.
        """
        if not self._connection.ended:
            self._connection.check_loop()
            for growing in self._growing:
                growing.cancel()
        await self._lease.release()
        self.backed = ()

    async def __aenter__(self) -> VirtualKVCache:
        self._lease.check_held()
        return self

    async def __aexit__(self, *_: object) -> None:
        if not self._lease.released:
            await self.release()
