"""A prefix that was found, while what lies behind it comes up."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from kvpool import encode_block_id, sync
from kvpool.client.blocks import PrefixHit, check_written
from kvpool.client.spec import ModelSpec
from kvpool.errors import CacheStateError, TierError

HASHES = [encode_block_id(number) for number in range(4)]


class Connection:
    """As much of a connection as a hit sees; ``answer()`` ends a fetch."""

    closed = ended = False

    def __init__(self) -> None:
        self.leases: set[Any] = set()
        self.config = {"timeout_s": 30.0}
        self.fetches: list[tuple[int, float, asyncio.Future[Any]]] = []
        self.given_back: list[int] = []

    def check_usable(self) -> None:
        """It always is."""

    check_not_revoked = lease_unused = check_loop = check_usable

    def release_soon(self, ids: list[int]) -> None:
        self.given_back += ids

    async def release(self, ids: list[int]) -> None:
        self.given_back += ids

    async def map(self, *_: Any) -> None:
        """All is mapped already."""

    async def fetch(self, _model: int, _hashes: bytes, first: int, timeout_s: float) -> Any:
        future = asyncio.get_running_loop().create_future()
        self.fetches.append((first, timeout_s, future))
        return await future

    async def answer(self, *ids: int) -> None:
        await asyncio.sleep(0)  # the call is made by then
        self.fetches.pop()[2].set_result(("hit", list(ids), [0] * len(ids), [(0, ())] * len(ids), [], 0))


def found(connection: Connection, resident: int, coming: int) -> PrefixHit:
    answer = ("hit", list(range(resident)), [0] * resident, [(0, ())] * resident, [], coming)
    return PrefixHit(connection, ModelSpec("m", block_bytes=4096), 0, HASHES, answer)  # type: ignore[arg-type]


@pytest.mark.parametrize("resident", [0, 1])
async def test_what_was_released_fetches_nothing(resident: int) -> None:
    connection = Connection()
    hit = found(connection, resident, 2)
    await hit.release()
    with pytest.raises(CacheStateError, match="was released"):
        await hit.fetch()
    assert connection.fetches == []


async def test_what_comes_for_a_hit_that_is_released_meanwhile_is_given_back() -> None:
    connection = Connection()
    hit = found(connection, 0, 2)
    fetching = asyncio.create_task(hit.fetch())
    await asyncio.sleep(0)
    await hit.release()
    await connection.answer(7, 8)
    with pytest.raises(CacheStateError, match="was released"):
        await fetching
    assert connection.given_back == [7, 8]


async def test_a_fetch_that_was_cancelled_can_be_made_again() -> None:
    connection = Connection()
    hit = found(connection, 1, 2)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(hit.fetch(), 0.005)
    assert (hit.num_blocks, hit.coming) == (1, 2)
    connection.fetches.clear()
    fetching = asyncio.create_task(hit.fetch())
    await connection.answer(7, 8)
    assert await fetching == 3
    assert hit.coming == 0
    await hit.release()
    assert connection.given_back == [0, 7, 8]


async def test_a_fetch_that_timed_out_can_be_made_again_and_one_that_found_less_not() -> None:
    connection = Connection()
    hit = found(connection, 0, 3)
    fetching = asyncio.create_task(hit.fetch(timeout_s=0))
    await connection.answer(7)
    assert await fetching == 1
    assert hit.coming == 2
    fetching = asyncio.create_task(hit.fetch())
    await connection.answer()
    assert await fetching == 1
    assert hit.coming == 0, "a tier has lost them"
    await hit.release()


async def test_a_hit_says_what_it_is() -> None:
    hit = found(Connection(), 1, 2)
    assert repr(sync.PrefixHit(hit)) == repr(hit) == "<PrefixHit of m: 1 block, 2 coming>"
    await hit.release()
    assert repr(hit) == "<PrefixHit of m: 1 block, 2 coming, released>"


def test_what_is_not_durable_is_not_said_to_be_lost() -> None:
    check_written([True, True])
    full = ("error", "TierError", "it does not fit", {"cause": "budget"})
    told = r"sealed and in the pool, but not durable: it does not fit \(on disk: the first 1 of 2 blocks\)"
    with pytest.raises(TierError, match=told) as caught:
        check_written([True, full])
    assert caught.value.details == {"cause": "budget", "blocks_on_disk": 1}
    with pytest.raises(TierError, match=r"^block 1 is not in the pool any more"):
        check_written([("error", "TierError", "block 1 is not in the pool any more", {"cause": "gone"})])
