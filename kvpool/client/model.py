"""A model that is registered with a pool: caches and blocks in its own namespace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvpool.cache.key import check_hash
from kvpool.client.blocks import NewBlocks, PrefixHit
from kvpool.client.cache import VirtualKVCache
from kvpool.client.connection import Connection
from kvpool.client.copying import source_addresses
from kvpool.client.putting import fill
from kvpool.client.spec import ModelSpec, content_hash, content_hashes, is_number, join_hashes, wait_of
from kvpool.errors import InvalidRequestError
from kvpool.sizes import parse_size


class Model:
    """A registered model: asks for caches and blocks in its own namespace. Made by :meth:`CachePool.model`."""

    def __init__(self, connection: Connection, spec: ModelSpec, number: int) -> None:
        self.spec = spec
        self.number = number
        self._connection = connection

    @property
    def name(self) -> str:
        """The model's name."""
        return self.spec.name

    async def request_cache(
        self,
        size: int | str,
        *,
        max_size: int | str | None = None,
        timeout_s: float | None = None,
        priority: int = 0,
    ) -> VirtualKVCache:
        """Lease a new cache of ``size`` (bytes or text), waiting for memory if need be.

        Parameters
        ----------
        max_size
            Reserve addresses up to this size, for :meth:`VirtualKVCache.resize`; they cost no memory, and no quota
            counts them.
        timeout_s
            How long to wait for memory, seconds; by default the pool's ``timeout_s``. 0 does not wait.
        priority
            Where to wait: in front of all of a lower number, behind those of an equal one.

        Raises
        ------
        InvalidSizeError, LimitError
            If it could never be granted.
        CapacityError
            If there is no room in time; :class:`~kvpool.errors.QueueFullError`, at once, if too many wait already: its
            ``details["retry_after_s"]`` says when to try again.
        """
        size_bytes = parse_size(size)
        if not isinstance(priority, int) or isinstance(priority, bool):
            raise InvalidRequestError(f"a priority is a whole number, the higher the sooner, not {priority!r}")
        max_size_bytes = parse_size(max_size) if max_size is not None else size_bytes
        wait_s = wait_of(timeout_s, self._connection.config["timeout_s"])
        granted = await self._connection.request_cache(self.number, size_bytes, max_size_bytes, wait_s, priority)
        cache = VirtualKVCache(self._connection, self.number, self.name, granted)
        await cache.map()
        return cache

    async def find_cache(self, key: bytes | str) -> VirtualKVCache | None:
        """Lease the sealed cache that has this key (as given to ``seal(key=...)``); None if there is none.

        Its tensors are read-only.
        """
        hashed = content_hash(key)
        answer = await self._connection.ask(self._connection.prefixes, self.number, hashed)
        if answer[5]:  # it lies in a lower tier
            answer = await self._connection.fetch(self.number, hashed, 0, self._connection.config["timeout_s"])
        _, ids, devices, places, sizes, _ = answer
        if not ids:
            return None
        hit = ids[0], devices[0], places[0], sizes[0] if sizes else self.spec.block_size_bytes
        return await VirtualKVCache.found(self._connection, self.number, self.name, hashed, hit)

    async def match_prefix(self, hashes: Sequence[bytes]) -> PrefixHit:
        """Find and lease the longest run of leading ``hashes`` that is on a device; empty if there is none.

        What lies behind it in lower tiers begins to come up: the hit says how many blocks are ``coming``, and
        ``await hit.fetch()`` adds them. Meanwhile the first ones can be used.
        """
        answer = await self._connection.ask(self._connection.prefixes, self.number, join_hashes(hashes))
        hit = PrefixHit(self._connection, self.spec, self.number, hashes, answer)
        await hit.map()
        return hit

    async def contains(self, keys: bytes | str | Sequence[bytes | str]) -> dict[str, Any]:
        """Tell how many leading ``keys`` are resident, and where; see :meth:`CachePool.contains`.

        What lies in the tiers below is not resident, and does not count.
        """
        return await self._connection.contains(self.number, join_hashes(content_hashes(keys)))

    async def new_blocks(
        self, hashes: Sequence[bytes], *, parent: bytes | None = None, output_tokens: int | None = None
    ) -> NewBlocks:
        """Lease new blocks for those of a chain's ``hashes`` that are not in the pool, as many as fit.

        Write into their tensors, then ``seal()``. ``parent`` is the hash in front of the first; None: a root.
        ``output_tokens``: length of the answer to the request, a hint for the eviction policy. A policy may find
        blocks worth less than what would have to go for them; they are then not given either.

        Raises
        ------
        InvalidRequestError
            If ``output_tokens`` is not a whole number of at least 0.
        ParentNotResidentError
            If ``parent`` is not in the pool.
        """
        _ = self.spec.shape  # a model without blocks is told so before the pool is asked
        return await self._new_blocks(hashes, parent, output_tokens)

    async def put_blocks(
        self,
        hashes: Sequence[bytes],
        tensors: Any,
        *,
        parent: bytes | None = None,
        output_tokens: int | None = None,
        durable: bool = False,
    ) -> int:
        """Store blocks with one copy, as many from the front as there is room for.

        Parameters
        ----------
        hashes
            Of the blocks, in the order of their chain.
        tensors
            The blocks: a sequence of tensors or arrays, or one with the blocks in its first dimension.
        parent
            Hash in front of the first block; None: a root.
        output_tokens
            Length of the answer to the request, where it is known: a hint for the eviction policy.
        durable
            Return only when all of them that are in the pool then are on disk, so that they survive every process.

        Returns
        -------
        int
            How many leading ``hashes`` are in the pool now: those that were there already and those that were stored by
            this call. For the blocks behind them there was no room, or the policy found them not worth it.

        Raises
        ------
        InvalidRequestError
            If ``output_tokens`` is not a whole number of at least 0.
        TensorMismatchError
            If number, shape or dtype do not fit the model.
        ParentNotResidentError
            If ``parent`` is not in the pool.
        TierError
            If ``durable`` was asked for, and they are stored but not surely on disk.
        DeviceLostError
            If their device died meanwhile.
        """
        sources, keep = source_addresses(self.spec, tensors, len(hashes))
        blocks = await self._new_blocks(hashes, parent, output_tokens)
        wanted = sources[blocks.resident : blocks.stored]
        await fill(blocks, wanted, self.spec.block_size_bytes or 0, durable=durable)
        del keep
        return blocks.stored

    async def _new_blocks(self, hashes: Sequence[bytes], parent: bytes | None, output_tokens: int | None) -> NewBlocks:
        _check_parent(parent)
        if output_tokens is not None and (
            not is_number(output_tokens, at_least=0) or output_tokens != int(output_tokens)
        ):
            raise InvalidRequestError(f"output_tokens is how many tokens the answer has, not {output_tokens!r}")
        joined = join_hashes(hashes)
        answer = await self._connection.ask(self._connection.blocks, self.number, joined, parent, output_tokens)
        blocks = NewBlocks(self._connection, self.spec, self.number, hashes, answer)
        await blocks.map()
        return blocks


def _check_parent(parent: bytes | None) -> None:
    if parent is not None:
        check_hash(parent)
