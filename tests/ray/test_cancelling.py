"""Ray tasks that use a pool and are cancelled: Ray then cancels the calls that were made in their context, too."""

from __future__ import annotations

import pytest
import ray
from pool_actors import until_leased, until_waiting

MIB = 1 << 20


async def test_a_cancelled_task_takes_no_request_of_others_along(pool, start_process):
    process = await start_process(pool)
    held = await pool.request_cache("m", size=2 * MIB)
    # The requests of one process share calls, so that those begun by this task carry what others ask for as well.
    task = process.ask_until_cancelled(MIB)
    await until_waiting(pool, 1)
    await process.ask_for_more(1, MIB)
    await until_waiting(pool, 2)
    ray.cancel(task)
    with pytest.raises(ray.exceptions.TaskCancelledError):
        await task
    await held.release()
    assert await process.take_what_was_asked_for() == 2
    await process.release()
    await until_leased(pool, 0)
