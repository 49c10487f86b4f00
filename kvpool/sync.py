"""The client in blocking form: the same names, for code without an event loop.

::

    from kvpool.sync import CachePool

    with CachePool.connect("kvpool") as pool, pool.request_cache("m", size_mb=256) as cache:
        cache.tensor(torch.bfloat16, (1024, 1024))

One event loop in a background thread runs :mod:`kvpool.client`; every call here waits for it.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from kvpool import client
from kvpool.cache.record import CacheBlock
from kvpool.client import ModelSpec
from kvpool.client.blocking import BlockingAdministration
from kvpool.config import PoolConfig
from kvpool.errors import ForkedHandleError
from kvpool.memory.backend import Access
from kvpool.pool.statistics import PoolStatistics

if TYPE_CHECKING:
    import numpy
    import torch

__all__ = ["BlockAllocator", "CachePool", "Model", "NewBlocks", "PrefixHit", "VirtualKVCache", "delete"]

_Result = TypeVar("_Result")


class _Loop:
    """The event loop of all blocking clients of this process, started when first needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = 0

    def run(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        """Run ``work`` on the loop and wait for its result."""
        with self._lock:
            if self._loop is None:
                self._loop, self._pid = asyncio.new_event_loop(), os.getpid()
                threading.Thread(target=self._loop.run_forever, name="kvpool-sync", daemon=True).start()
            loop = self._loop
        if self._pid != os.getpid():
            work.close()
            raise ForkedHandleError(
                f"the blocking client belongs to process {self._pid}: import and connect in the child by 'spawn'"
            )
        return asyncio.run_coroutine_threadsafe(work, loop).result()


_loop = _Loop()


def _run(make: Callable[..., Coroutine[Any, Any, _Result]], *arguments: Any, **keywords: Any) -> _Result:
    return _loop.run(make(*arguments, **keywords))


class VirtualKVCache:
    """Blocking form of :class:`kvpool.VirtualKVCache`; its attributes are read through."""

    def __init__(self, cache: client.VirtualKVCache) -> None:
        self._cache = cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def __repr__(self) -> str:
        return repr(self._cache)

    @property
    def blocks(self) -> tuple[CacheBlock, ...]:
        """The power-of-two ranges of the device's arena that it is made of."""
        return self._cache.blocks

    def tensor(
        self, dtype: Any, shape: Sequence[int] | int, *, offset_bytes: int = 0, access: Access | None = None
    ) -> torch.Tensor:
        """See :meth:`kvpool.VirtualKVCache.tensor`."""
        return self._cache.tensor(dtype, shape, offset_bytes=offset_bytes, access=access)

    def resize(self, size: int | str, *, timeout_s: float | None = None) -> None:
        """See :meth:`kvpool.VirtualKVCache.resize`."""
        _run(self._cache.resize, size, timeout_s=timeout_s)

    def back(self, ranges: Iterable[tuple[int, int]], *, timeout_s: float | None = None) -> None:
        """See :meth:`kvpool.VirtualKVCache.back`."""
        _run(self._cache.back, ranges, timeout_s=timeout_s)

    def unback(self, ranges: Iterable[tuple[int, int]]) -> None:
        """See :meth:`kvpool.VirtualKVCache.unback`."""
        _run(self._cache.unback, ranges)

    def block_allocator(
        self, block_bytes: int | str, *, planes: int = 1, ahead_blocks: int | None = None
    ) -> BlockAllocator:
        """See :meth:`kvpool.VirtualKVCache.block_allocator`."""

        async def open_it() -> client.BlockAllocator:
            return self._cache.block_allocator(block_bytes, planes=planes, ahead_blocks=ahead_blocks)

        return BlockAllocator(_run(open_it))

    def seal(self, key: bytes | str | None = None, *, durable: bool = False) -> None:
        """See :meth:`kvpool.VirtualKVCache.seal`."""
        _run(self._cache.seal, key, durable=durable)

    def info(self) -> dict[str, Any]:
        """See :meth:`kvpool.VirtualKVCache.info`."""
        return _run(self._cache.info)

    def pin(self) -> None:
        """See :meth:`kvpool.VirtualKVCache.pin`."""
        _run(self._cache.pin)

    def unpin(self) -> None:
        """See :meth:`kvpool.VirtualKVCache.unpin`."""
        _run(self._cache.unpin)

    def release(self) -> None:
        """See :meth:`kvpool.VirtualKVCache.release`."""
        _run(self._cache.release)

    def __enter__(self) -> VirtualKVCache:
        _run(self._cache.__aenter__)
        return self

    def __exit__(self, *exception: object) -> None:
        _run(self._cache.__aexit__, *exception)


class BlockAllocator:
    """Blocking form of :class:`kvpool.BlockAllocator`; its attributes are read through."""

    def __init__(self, blocks: client.BlockAllocator) -> None:
        self._blocks = blocks
        # As they are: neither waits for anything, and both are called thousands of times a second.
        self.allocate = blocks.allocate
        self.free = blocks.free

    def __getattr__(self, name: str) -> Any:
        return getattr(self._blocks, name)

    def reserve(self, count: int, *, timeout_s: float | None = None) -> None:
        """See :meth:`kvpool.BlockAllocator.reserve`."""
        _run(self._blocks.reserve, count, timeout_s=timeout_s)

    def trim(self) -> int:
        """See :meth:`kvpool.BlockAllocator.trim`."""
        return _run(self._blocks.trim)


class _LeasedBlocks:
    """What found and new blocks have in common."""

    def __init__(self, blocks: client.PrefixHit | client.NewBlocks) -> None:
        self._leased = blocks

    def __repr__(self) -> str:
        return repr(self._leased)

    @property
    def num_blocks(self) -> int:
        """How many blocks are leased."""
        return self._leased.num_blocks

    def __len__(self) -> int:
        return len(self._leased)

    def addresses(self) -> list[int]:
        """See :meth:`kvpool.NewBlocks.addresses`."""
        return self._leased.addresses()

    def tensors(self) -> list[torch.Tensor]:
        """See :meth:`kvpool.NewBlocks.tensors`."""
        return self._leased.tensors()

    def numpy(self) -> list[numpy.ndarray[Any, Any]]:
        """See :meth:`kvpool.NewBlocks.numpy`."""
        return self._leased.numpy()

    def release(self) -> None:
        """See :meth:`kvpool.NewBlocks.release`."""
        _run(self._leased.release)

    def __exit__(self, *exception: object) -> None:
        _run(self._leased.__aexit__, *exception)


class PrefixHit(_LeasedBlocks):
    """Blocking form of :class:`kvpool.PrefixHit`."""

    def __init__(self, hit: client.PrefixHit) -> None:
        super().__init__(hit)
        self._hit = hit

    @property
    def coming(self) -> int:
        """How many blocks behind these lie in lower tiers, and are being brought up."""
        return self._hit.coming

    def fetch(self, *, timeout_s: float | None = None) -> int:
        """See :meth:`kvpool.PrefixHit.fetch`."""
        return _run(self._hit.fetch, timeout_s=timeout_s)

    def __enter__(self) -> PrefixHit:
        return self


class NewBlocks(_LeasedBlocks):
    """Blocking form of :class:`kvpool.NewBlocks`."""

    def __init__(self, blocks: client.NewBlocks) -> None:
        super().__init__(blocks)
        self._blocks = blocks

    @property
    def resident(self) -> int:
        """How many of the hashes were in the pool already."""
        return self._blocks.resident

    @property
    def stored(self) -> int:
        """How many leading hashes are in the pool once these blocks are sealed."""
        return self._blocks.stored

    @property
    def hashes(self) -> list[bytes]:
        """Hashes of the new blocks, in their order."""
        return self._blocks.hashes

    def seal(self, *, durable: bool = False) -> None:
        """See :meth:`kvpool.NewBlocks.seal`."""
        _run(self._blocks.seal, durable=durable)

    def finish(self, *, durable: bool = False) -> None:
        """See :meth:`kvpool.NewBlocks.finish`."""
        _run(self._blocks.finish, durable=durable)

    def __enter__(self) -> NewBlocks:
        return self


class Model:
    """Blocking form of :class:`kvpool.Model`."""

    def __init__(self, model: client.Model) -> None:
        self._model = model

    @property
    def name(self) -> str:
        """The model's name."""
        return self._model.name

    @property
    def spec(self) -> ModelSpec:
        """What the model was registered as."""
        return self._model.spec

    def request_cache(
        self,
        size: int | str,
        *,
        max_size: int | str | None = None,
        timeout_s: float | None = None,
        priority: int = 0,
    ) -> VirtualKVCache:
        """See :meth:`kvpool.Model.request_cache`."""
        return VirtualKVCache(
            _run(self._model.request_cache, size, max_size=max_size, timeout_s=timeout_s, priority=priority)
        )

    def find_cache(self, key: bytes | str) -> VirtualKVCache | None:
        """See :meth:`kvpool.Model.find_cache`."""
        found = _run(self._model.find_cache, key)
        return None if found is None else VirtualKVCache(found)

    def match_prefix(self, hashes: Sequence[bytes]) -> PrefixHit:
        """See :meth:`kvpool.Model.match_prefix`."""
        return PrefixHit(_run(self._model.match_prefix, hashes))

    @property
    def number(self) -> int:
        """By which the pool knows it."""
        return self._model.number

    def contains(self, keys: bytes | str | Sequence[bytes | str]) -> dict[str, Any]:
        """See :meth:`kvpool.Model.contains`."""
        return _run(self._model.contains, keys)

    def new_blocks(
        self, hashes: Sequence[bytes], *, parent: bytes | None = None, output_tokens: int | None = None
    ) -> NewBlocks:
        """See :meth:`kvpool.Model.new_blocks`."""
        return NewBlocks(_run(self._model.new_blocks, hashes, parent=parent, output_tokens=output_tokens))

    def put_blocks(
        self,
        hashes: Sequence[bytes],
        tensors: Any,
        *,
        parent: bytes | None = None,
        output_tokens: int | None = None,
        durable: bool = False,
    ) -> int:
        """See :meth:`kvpool.Model.put_blocks`."""
        return _run(
            self._model.put_blocks, hashes, tensors, parent=parent, output_tokens=output_tokens, durable=durable
        )


class CachePool(BlockingAdministration):
    """Blocking form of :class:`kvpool.CachePool`."""

    _run = staticmethod(_run)

    def __init__(self, pool: client.CachePool) -> None:
        self._pool = pool

    @classmethod
    def create(cls, config: PoolConfig | None = None, *, tenant: str = "default", **settings: Any) -> CachePool:
        """See :meth:`kvpool.CachePool.create`."""
        return cls(_run(client.CachePool.create, config, tenant=tenant, **settings))

    @classmethod
    def connect(cls, name: str | None = None, *, tenant: str = "default") -> CachePool:
        """See :meth:`kvpool.CachePool.connect`."""
        return cls(_run(client.CachePool.connect, name, tenant=tenant))

    @property
    def name(self) -> str:
        """The pool's name."""
        return self._pool.name

    @property
    def config(self) -> dict[str, Any]:
        """The pool's configuration."""
        return self._pool.config

    @property
    def actor(self) -> Any:
        """The bare handle of the pool actor; see :attr:`kvpool.CachePool.actor`."""
        return self._pool.actor

    @property
    def client_id(self) -> str:
        """By which the pool knows this connection."""
        return self._pool.client_id

    def model(self, spec: ModelSpec | str) -> Model:
        """See :meth:`kvpool.CachePool.model`."""
        return Model(_run(self._pool.model, spec))

    def request_cache(
        self,
        model_name: str,
        size_mb: float | None = None,
        *,
        size: int | str | None = None,
        max_size_mb: float | None = None,
        max_size: int | str | None = None,
        timeout_s: float | None = None,
        priority: int = 0,
    ) -> VirtualKVCache:
        """See :meth:`kvpool.CachePool.request_cache`."""
        how = {"size": size, "max_size_mb": max_size_mb, "max_size": max_size, "priority": priority}
        return VirtualKVCache(_run(self._pool.request_cache, model_name, size_mb, timeout_s=timeout_s, **how))

    def find_cache(self, model_name: str, key: bytes | str) -> VirtualKVCache | None:
        """See :meth:`kvpool.CachePool.find_cache`."""
        found = _run(self._pool.find_cache, model_name, key)
        return None if found is None else VirtualKVCache(found)

    def stats(self) -> PoolStatistics:
        """See :meth:`kvpool.CachePool.stats`."""
        return _run(self._pool.stats)

    def leases(self) -> list[dict[str, Any]]:
        """See :meth:`kvpool.CachePool.leases`."""

        async def leases() -> list[dict[str, Any]]:
            return self._pool.leases()  # on the loop's thread, which adds to them

        return _run(leases)

    def delete(self, *, drain_s: float | None = None) -> None:
        """See :meth:`kvpool.CachePool.delete`."""
        _run(self._pool.delete, drain_s=drain_s)

    def close(self) -> None:
        """See :meth:`kvpool.CachePool.close`."""
        _run(self._pool.close)

    def __enter__(self) -> CachePool:
        return self

    def __exit__(self, *exception: object) -> None:
        _run(self._pool.__aexit__, *exception)


def delete(name: str | None = None, *, drain_s: float | None = None) -> None:
    """See :func:`kvpool.delete`."""
    _run(client.delete, name, drain_s=drain_s)
