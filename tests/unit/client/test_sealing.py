"""A cache that is sealed with a key that another one has, while others come and go."""

from __future__ import annotations

from typing import Any

import pytest
from lease_connection import LeaseConnection

from kvpool.client.cache import VirtualKVCache
from kvpool.client.spec import content_hash
from kvpool.errors import CacheStateError

PAGE = 65536
PLACE = (0, ((0, 1),), 0)


class Connection(LeaseConnection):
    """As much of a connection as a seal needs: the pool's answers to it come from ``elders``.

    Each is how often a look-up, made after the seal was told of it, still finds the other cache: 0 or 1.
    """

    def __init__(self, elders: list[int]) -> None:
        super().__init__()
        self.elders = elders
        self.seals, self.prefixes = "seals", "prefixes"
        self.config = {"write_policy": "write_back"}
        self.devices = {0: {"page_bytes": PAGE, "name": "host:0", "epoch": 1, "min_block_bytes": PAGE}}

    async def ask(self, lane: str, *_: Any) -> Any:
        if lane == "seals":
            return "sealed", ["duplicate" if self.elders else True]
        found = self.elders.pop(0)
        return "hit", [9] * found, [0] * found, [PLACE] * found, [PAGE] * found, 0


def cache_of(connection: Any) -> VirtualKVCache:
    return VirtualKVCache(connection, 0, "m", (None, 7, 0, PAGE, PAGE, PLACE))


async def test_one_whose_elder_vanishes_and_is_stored_anew_time_after_time_is_sealed_at_last():
    connection = Connection([0] * 10)
    cache = cache_of(connection)
    await cache.seal(key="k")
    assert (cache.id, cache.key, connection.released) == (7, content_hash("k"), [])


async def test_an_elder_that_is_found_takes_its_place():
    connection = Connection([0, 0, 0, 1])
    cache = cache_of(connection)
    await cache.seal(key="k")
    assert (cache.id, cache.sealed, connection.released) == (9, True, [7])


async def test_an_elder_that_is_never_found_is_told_and_the_cache_stays_writable():
    connection = Connection([0] * 100)
    cache = cache_of(connection)
    with pytest.raises(CacheStateError, match="another cache has its key, and was not found"):
        await cache.seal(key="k")
    assert not cache.sealed
    assert cache.key is None
    assert len(connection.elders) < 100
