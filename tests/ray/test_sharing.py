"""Several model processes over the same memory."""

import asyncio

import numpy as np
import pytest
from footprint import mapped_inodes, physical_page

from kvpool import Access, ModelSpec, encode_block_id
from kvpool.errors import SealedError


async def test_reader_and_writer_map_the_same_pages(pool, start_process):
    writer, reader = await asyncio.gather(start_process(pool), start_process(pool))
    written = await writer.begin_blocks([1, 2, 3, 4, 5], 7)
    assert await reader.match([1, 2, 3, 4, 5]) == []  # nothing is shared before it is sealed
    await writer.seal_blocks()
    found = await reader.match([1, 2, 3, 4, 5, 6])
    assert len(found) == 5
    assert await reader.digest() == [[7]] * 5

    pages = [physical_page(writer.pid, address) for address in written]
    assert [physical_page(reader.pid, address) for address in found] == pages
    assert len(set(pages)) == 5

    # The writer's own view stays writable: what it writes now (a breach) is seen at once, so there is no copy anywhere.
    await writer.write(3, 100, 8)
    assert await reader.read(3, 100) == 8
    await asyncio.gather(writer.release(), reader.release())


async def test_many_processes_share_what_each_of_them_stored(pool, start_process):
    processes = await asyncio.gather(*(start_process(pool) for _ in range(3)))
    for number, process in enumerate(processes):
        chain = list(range(3 * number + 3))
        assert await process.put(chain, number + 1) == len(chain)  # the first 3 * number are there already
    for process in processes:
        assert len(await process.match(list(range(9)))) == 9
        assert await process.digest() == [[1]] * 3 + [[2]] * 3 + [[3]] * 3
    stats = await pool.stats()
    assert (stats.keys, stats.blocks_stored) == (9, 9)
    assert len(set.intersection(*(mapped_inodes(process.pid) for process in processes))) == 3  # 9 blocks of 16 KiB
    await asyncio.gather(*(process.release() for process in processes))


async def test_two_processes_that_write_the_same_chain_get_one(pool, start_process):
    first, second = await asyncio.gather(start_process(pool), start_process(pool))
    await asyncio.gather(first.begin_blocks([1, 2], 1), second.begin_blocks([1, 2], 2))
    await first.seal_blocks()
    await second.seal_blocks()
    await asyncio.gather(first.release(), second.release())
    await second.match([1, 2])
    assert await second.digest() == [[1], [1]]
    assert (await pool.stats()).duplicates == 2
    await second.release()


async def test_a_sealed_cache_is_found_again_by_its_key(pool):
    assert await pool.find_cache("m", "page 1") is None
    async with await pool.request_cache("m", size=12_345) as cache:
        cache.numpy("uint8", (12_345,))[:] = 7
        await cache.seal(key="page 1")
        first = cache.id
    async with await pool.find_cache("m", "page 1") as found:
        assert (found.id, found.size_bytes, found.sealed) == (first, 12_345, True)
        assert (found.numpy("uint8", (12_345,)) == 7).all()
        with pytest.raises(SealedError):
            found.numpy("uint8", (1,), access=Access.READ_WRITE)
        await found.seal(key="page 1")  # as it is already
    assert await pool.find_cache("another model", "page 1") is None

    blocks = await pool.model(ModelSpec("blocks", block_bytes=4096))
    await blocks.put_blocks([encode_block_id(1)], np.full((1, 4096), 9, np.uint8))
    async with await blocks.find_cache(encode_block_id(1)) as found:
        assert found.size_bytes == 4096
        assert (found.numpy("uint8", (4096,)) == 9).all()
