"""The blocking client, beside the asynchronous one that the fixtures use."""

import asyncio
import gc
import logging

import numpy as np
import pytest
import ray
from driver import run_driver

from kvpool import ModelSpec, encode_block_id, sync
from kvpool.errors import CacheStateError

SPEC = ModelSpec("m", block_bytes=4096)
HASHES = [encode_block_id(number) for number in range(3)]


async def test_new_blocks_are_written_finished_and_found(pool):
    def work():
        with sync.CachePool.connect(pool.name) as blocking:
            model = blocking.model(SPEC)
            with model.new_blocks(HASHES) as new:
                assert (new.hashes, len(new), len(set(new.addresses()))) == (HASHES, 3, 3)
                assert [lease["size_bytes"] for lease in blocking.leases()] == [3 * 4096]
                for number, block in enumerate(new.numpy()):
                    block[:] = number
                del block
                new.finish()
                assert blocking.leases() == []
                assert blocking.waiting() == {"requests": [], "total": 0}
            with model.match_prefix(HASHES) as hit:
                assert [np.unique(block).tolist() for block in hit.numpy()] == [[0], [1], [2]]

    await asyncio.to_thread(work)


async def test_leaving_by_an_error_does_not_hide_it_behind_live_tensors(pool, caplog):
    opened = []

    def fail():
        with sync.CachePool.connect(pool.name) as blocking:
            opened.append(blocking)
            cache = blocking.request_cache("m", size=4096)
            view = cache.numpy("uint8", (10,))
            cache.release()
            raise ZeroDivisionError(view.shape)

    with caplog.at_level(logging.WARNING), pytest.raises(ZeroDivisionError):
        await asyncio.to_thread(fail)
    assert "stays connected: still in use in this process: 1 tensor" in caplog.text
    gc.collect()  # the error's traceback held the frame, and the frame the tensor
    await asyncio.to_thread(opened.pop().close)


async def test_tensors_are_opened_also_under_an_event_loop_of_the_callers(pool):
    """As in a notebook, whose cells run on a loop of their own."""
    blocking = await asyncio.to_thread(sync.CachePool.connect, pool.name)
    cache = blocking.request_cache("m", size=4096)
    cache.numpy("uint8", (4096,))[:] = 1
    cache.release()
    blocking.close()


async def test_a_sealed_cache_is_found_by_its_key(pool):
    def find():
        with sync.CachePool.connect(pool.name) as blocking:
            assert blocking.find_cache("m", "k") is None
            with blocking.request_cache("m", size=100) as cache:
                cache.seal(key="k")
            with blocking.model("m").find_cache("k") as found:
                return found.size_bytes, found.sealed

    assert await asyncio.to_thread(find) == (100, True)


async def test_a_program_that_ends_just_after_it_made_a_block_allocator_ends_without_a_word(pool):
    program = """
        import sys
        from kvpool import sync

        sys.stderr = sys.stdout
        pool = sync.CachePool.connect(sys.argv[1])
        cache = pool.request_cache("m", size="64KiB", max_size="1MiB")
        blocks = cache.block_allocator(4096)
    """
    address = ray.get_runtime_context().gcs_address
    printed = await run_driver(program, pool.name, ray_address=address)
    assert "RuntimeError" not in printed
    assert "after interpreter shutdown" not in printed


async def test_what_ended_with_its_connection_needs_no_release_and_may_have_one(pool):
    def work():
        blocking = sync.CachePool.connect(pool.name)
        with blocking.request_cache("m", size="64KiB", max_size="1MiB") as cache:
            blocking.close()
            with pytest.raises(CacheStateError, match="is closed"):
                cache.resize("128KiB")
        cache.release()

    await asyncio.to_thread(work)


async def test_ray_does_not_complain_that_the_blocking_client_has_a_thread_of_its_own(pool):
    program = """
        import logging, sys
        import ray
        from kvpool import sync

        heard = []
        handler = logging.Handler()
        handler.emit = lambda record: heard.append(record.getMessage())
        logging.getLogger("ray._private.worker").addHandler(handler)
        sync.CachePool.connect(sys.argv[1]).close()
        logging.getLogger("ray._private.worker").warning("of another kind")
        print([text for text in heard if "SIGTERM" in text or "kind" in text])
    """
    address = ray.get_runtime_context().gcs_address
    assert await run_driver(program, pool.name, ray_address=address) == "['of another kind']\n"
