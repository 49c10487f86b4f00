"""One replica of the model: looks requests up, verifies what it hits, writes what is missing."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from kvpool.cache.key import encode_block_id
from kvpool.client import CachePool, Model, ModelSpec, NewBlocks, PrefixHit
from kvpool.replay.content import BlockContent


class Replica:
    """A model actor. The driver calls :meth:`look_up` in the trace's order, then :meth:`fill` for the same request."""

    def __init__(self, pool: str, model: str, block_bytes: int) -> None:
        self._pool_name = pool
        self._spec = ModelSpec(model, block_bytes=block_bytes)
        self._block_bytes = block_bytes
        self._content = BlockContent(block_bytes)
        self._open: dict[int, tuple[PrefixHit, tuple[int, ...], list[bytes], int]] = {}
        self._pool: CachePool | None = None
        self._model: Model | None = None

    async def start(self) -> None:
        """Connect to the pool."""
        self._pool = await CachePool.connect(self._pool_name)
        self._model = await self._pool.model(self._spec)

    async def look_up(self, number: int, ids: Sequence[int], output_tokens: int) -> int:
        """Find and lease the resident prefix of a request; returns its length in blocks."""
        if self._model is None:
            raise RuntimeError("look_up before start")
        hashes = [encode_block_id(block_id) for block_id in ids]
        hit = await self._model.match_prefix(hashes)
        await hit.fetch()
        self._open[number] = (hit, tuple(ids), hashes, output_tokens)
        return hit.num_blocks

    async def fill(self, number: int) -> dict[str, Any]:
        """Verify the hit blocks of a request, write and seal the missing ones, give everything back.

        Returns
        -------
        dict
            ``verified_bytes``, ``wrong_bytes``, ``stored`` blocks, and ``allocation_s`` (None if all was hit).
        """
        if self._model is None:
            raise RuntimeError("fill before start")
        hit, ids, hashes, output_tokens = self._open.pop(number)
        try:
            wrong_bytes = sum(
                self._content.wrong_bytes(block, block_id) for block, block_id in zip(hit.numpy(), ids, strict=False)
            )
            stored, allocation_s = 0, None
            if hit.num_blocks < len(ids):
                began = time.perf_counter()
                new = await self._model.new_blocks(hashes, output_tokens=output_tokens)
                allocation_s = time.perf_counter() - began
                async with new:
                    self._write(new, ids[new.resident :])
                    stored = new.num_blocks
                    await new.finish()
        finally:
            if hit:
                await hit.release()
        return {
            "verified_bytes": hit.num_blocks * self._block_bytes,
            "wrong_bytes": wrong_bytes,
            "stored": stored,
            "allocation_s": allocation_s,
        }

    def _write(self, new: NewBlocks, ids: Sequence[int]) -> None:
        """Write the new blocks; none when all memory is held by others. No view of them outlives this."""
        for block, block_id in zip(new.numpy(), ids, strict=False):
            self._content.write(block, block_id)

    async def stop(self) -> None:
        """Disconnect from the pool."""
        if self._pool is not None:
            await self._pool.close()
