"""Storing blocks with one copy: ask for memory, copy, seal."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from kvpool.client.blocks import NewBlocks
from kvpool.client.copying import copy_blocks

_INLINE_BYTES = 1 << 18
"""Copies up to this size are done on the event loop: handing them to a thread would take longer."""


async def fill(blocks: NewBlocks, sources: Sequence[int], block_bytes: int) -> None:
    """Copy the bytes at ``sources`` into leased new blocks, and seal and release them.

    (Copying in parts, while the pool is asked for the next ones and seals the ones before, was slower on two cores:
    see docs/performance.md.)
    """
    async with blocks:
        if not blocks:
            return
        destinations = blocks.addresses()
        if len(destinations) * block_bytes <= _INLINE_BYTES:
            copy_blocks(destinations, sources, block_bytes)
        else:
            await _in_thread(destinations, sources, block_bytes)
        await blocks.finish()


async def _in_thread(destinations: Sequence[int], sources: Sequence[int], block_bytes: int) -> None:
    """Copy in a thread, and wait for its end even when cancelled, however often: it writes into leased memory."""
    # No task, which the end of asyncio.run() would cancel while its thread goes on.
    running = asyncio.get_running_loop().run_in_executor(None, copy_blocks, destinations, sources, block_bytes)
    cancelled: asyncio.CancelledError | None = None
    while not running.done():
        try:
            await asyncio.wait([running])
        except asyncio.CancelledError as error:
            cancelled = error  # also a second time: the lease must not end under the thread
    if cancelled is not None:
        raise cancelled
    running.result()
