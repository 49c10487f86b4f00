"""A model's process for tests: a Ray actor that uses a pool as it is told, and can be stopped, killed and forked."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import random
import resource
import signal
from typing import Any

import numpy as np
import ray

from kvpool import CachePool, ModelSpec, encode_block_id, sync
from kvpool.errors import CapacityError, InvalidatedError, KvpoolError

BLOCK_BYTES = 16 * 1024


def keys(ids: Any) -> list[bytes]:
    """Hashes of a chain of block ids."""
    return [encode_block_id(block_id) for block_id in ids]


@ray.remote(num_cpus=0)
class ModelProcess:
    """One client of a pool, with everything that it holds."""

    def __init__(self) -> None:
        self.pool: CachePool
        self.caches: list[Any] = []
        self.leased: list[Any] = []
        self.tensors: list[Any] = []
        self.waiting: list[asyncio.Task[Any]] = []
        self.running = False
        self.version = self.oldest_valid = 1
        self.asking = asyncio.Lock()
        self.counts = {"hits": 0}

    async def connect(self, name: str, tenant: str = "default") -> tuple[int, str]:
        """Connect; returns the process id and the client id."""
        self.pool = await CachePool.connect(name, tenant=tenant)
        self.model = await self.pool.model(ModelSpec("model", block_bytes=BLOCK_BYTES))
        return os.getpid(), self.pool.client_id

    async def connect_with_nofile(self, name: str, nofile: int) -> None:
        """Connect under a lower hard limit of open files."""
        resource.setrlimit(resource.RLIMIT_NOFILE, (nofile, nofile))
        await self.connect(name)

    # -- caches ---------------------------------------------------------------------------------------------------

    async def request(self, count: int, size_bytes: int, value: int | None = None) -> list[int]:
        """Lease caches at once and fill them with a value; returns their ids."""
        caches = await asyncio.gather(*(self.model.request_cache(size_bytes) for _ in range(count)))
        for cache in caches:
            if value is not None:
                cache.numpy("uint8", (size_bytes,))[:] = value
        self.caches += caches
        return [cache.id for cache in caches]

    async def ask_for_more(self, count: int, size_bytes: int) -> None:
        """Ask for more caches, without waiting for them."""
        self.waiting += [asyncio.create_task(self.model.request_cache(size_bytes)) for _ in range(count)]

    async def ask_until_cancelled(self, size_bytes: int) -> None:
        """Ask for one more cache, without waiting for it, and run until this call is cancelled."""
        await self.ask_for_more(1, size_bytes)
        await asyncio.Event().wait()

    async def take_what_was_asked_for(self) -> int:
        """Wait for the caches that were asked for; returns how many were granted."""
        asked, self.waiting = self.waiting, []
        granted = await asyncio.gather(*asked)
        self.caches += granted
        return len(granted)

    async def release(self) -> None:
        """Release all that is leased."""
        held, self.caches, self.leased, self.tensors = self.caches + self.leased, [], [], []
        await asyncio.gather(*(each.release() for each in held))

    # -- blocks ---------------------------------------------------------------------------------------------------

    async def put(self, ids: list[int], value: int) -> int:
        """Store a chain whose blocks hold one value."""
        return await self.model.put_blocks(keys(ids), np.full((len(ids), BLOCK_BYTES), value, np.uint8))

    async def begin_blocks(self, ids: list[int], value: int) -> list[int]:
        """Lease new blocks, fill them and keep their tensors; returns their addresses."""
        new = await self.model.new_blocks(keys(ids))
        self.leased.append(new)
        self.tensors = new.numpy()
        for block in self.tensors:
            block[:] = value
        return new.addresses()

    async def seal_blocks(self) -> None:
        await self.leased[-1].seal()

    async def match(self, ids: list[int]) -> list[int]:
        """Lease the resident prefix and keep its tensors; returns the addresses of its blocks."""
        hit = await self.model.match_prefix(keys(ids))
        self.leased.append(hit)
        self.tensors = hit.numpy()
        return hit.addresses()

    def write(self, block: int, offset: int, value: int) -> None:
        self.tensors[block][offset] = value

    def read(self, block: int, offset: int) -> int:
        return int(self.tensors[block][offset])

    def digest(self) -> list[list[int]]:
        """For each tensor that is kept, the values in it."""
        return [np.unique(tensor).tolist() for tensor in self.tensors]

    # -- content that changes -------------------------------------------------------------------------------------

    async def use_version(self, version: int) -> None:
        """From now on this process asks for blocks for these weights: their number is in every byte that it stores.

        When this returns, what it stores with others was asked for before, and its asking has been answered.
        """
        async with self.asking:
            self.version = version

    async def store_and_verify(self, chains: int, length: int, seed: int) -> dict[str, int]:
        """Look chains up and store what is missing, until :meth:`stop`; note which versions were read.

        Returns
        -------
        dict
            Rounds, blocks hit, puts that were refused as invalidated, and ``stale``: blocks of a version that had been
            invalidated before the look-up that found them began.
        """
        rng = random.Random(seed)
        self.running = True
        counts = self.counts = {"rounds": 0, "hits": 0, "refused": 0, "stale": 0, "mixed": 0}
        while self.running:
            ids = [1000 * rng.randrange(chains) + n for n in range(length)]
            oldest = self.oldest_valid
            async with await self.model.match_prefix(keys(ids)) as hit:
                for block in hit.numpy():
                    versions = np.unique(block)
                    counts["hits"] += 1
                    counts["mixed"] += len(versions) != 1
                    counts["stale"] += int(versions[0]) < oldest
                    del block
            if rng.random() < 0.5:
                ids = [10**9 * (seed + 1) + counts["rounds"] * length + n for n in range(length)]  # new to all
            async with self.asking:
                version, new = self.version, await self.model.new_blocks(keys(ids))
            for block in new.numpy():
                block[:] = version
                del block
            await asyncio.sleep(rng.random() / 60)  # the computation takes a while, and weights change meanwhile
            try:
                async with new:
                    await new.finish()
            except InvalidatedError:
                counts["refused"] += 1
            counts["rounds"] += 1
        return counts

    def progress(self) -> dict[str, int]:
        """What :meth:`store_and_verify` counted so far."""
        return self.counts

    def stop_storing(self) -> None:
        self.running = False

    def valid_from(self, version: int) -> None:
        """Everything older has been invalidated."""
        self.oldest_valid = version

    async def error_of_use(self) -> dict[str, str]:
        """What each use of what is held raises; the tensors that are kept are not touched by it."""
        cache, leased = self.caches[0], self.leased[0]
        uses = {
            "tensor": lambda: cache.numpy("uint8", (1,)),
            "blocks": leased.numpy,
            "seal": cache.seal,
            "info": cache.info,
            "request": lambda: self.model.request_cache(4096),
            "match": lambda: self.model.match_prefix(keys([1])),
            "put": lambda: self.model.put_blocks(keys([77]), np.zeros((1, BLOCK_BYTES), np.uint8)),
            "stats": self.pool.stats,
        }
        raised = {}
        for name, use in uses.items():
            try:
                work = use()
                if asyncio.iscoroutine(work):
                    await work
                raised[name] = "nothing"
            except KvpoolError as error:
                raised[name] = type(error).__name__
        return raised

    async def drop_tensors(self) -> None:
        """Forget the tensors that are kept, and the blocks whose addresses were asked for; keep the caches."""
        self.tensors = []
        for blocks in self.leased:
            await blocks.release()

    def keep_view(self, size_bytes: int) -> None:
        """Keep a tensor over the first cache."""
        self.tensors = [self.caches[0].numpy("uint8", (size_bytes,))]

    def fill(self, value: int) -> None:
        """Write to all tensors that are kept."""
        for tensor in self.tensors:
            tensor[:] = value

    async def connect_again(self) -> str:
        """Leave, and connect anew; returns the new client id."""
        self.caches, self.leased = [], []
        name = self.pool.name
        await self.pool.close()
        _, client_id = await self.connect(name)
        return client_id

    # -- churn ----------------------------------------------------------------------------------------------------

    async def churn(self, caches: int, value: int, seed: int) -> int:
        """Ask for memory, check what is in it, write our value, give it back, until so many caches were granted.

        Returns how many bytes were seen that were neither zero nor ours.
        """
        rng = random.Random(seed)
        foreign = granted = 0
        held: list[tuple[Any, int]] = []
        while granted < caches:
            size_bytes = rng.choice((4096, 16384, 65536, 100_000, 262_144))
            try:
                cache = await self.model.request_cache(size_bytes, timeout_s=0.05)
            except CapacityError:
                cache = None
            else:
                granted += 1
                view = cache.numpy("uint8", (size_bytes,))
                foreign += int(np.count_nonzero((view != 0) & (view != value)))
                view[:] = value
                del view
                held.append((cache, size_bytes))
            while held and (cache is None or len(held) > 12 or rng.random() < 0.4):
                old, old_bytes = held.pop(rng.randrange(len(held)))
                view = old.numpy("uint8", (old_bytes,))
                foreign += int(np.count_nonzero(view != value))
                del view
                await old.release()
                if cache is None:
                    break
        for old, _ in held:
            await old.release()
        return foreign

    async def take_all(self, size_bytes: int, value: int, lost_bytes: int = 0) -> dict[str, int]:
        """Lease caches until there is no room for another one; returns how many, and the bytes as :meth:`churn`.

        ``lost_bytes``: zombies of processes that do not answer. Others may take any time to give theirs back.
        """
        foreign = granted = 0
        while True:
            try:
                cache = await self.model.request_cache(size_bytes, timeout_s=3.0)
            except CapacityError as refused:
                if refused.details["zombie_bytes"] > lost_bytes:
                    continue
                return {"foreign": foreign, "caches": granted}
            granted += 1
            self.caches.append(cache)
            view = cache.numpy("uint8", (size_bytes,))
            foreign += int(np.count_nonzero((view != 0) & (view != value)))
            view[:] = value
            del view

    # -- the process ----------------------------------------------------------------------------------------------

    def fork_sleeper(self) -> int:
        """Fork a child by ``fork`` of the C library, which runs none of Python's hooks: it keeps every socket open."""
        child = ctypes.PyDLL(None).fork()
        if not child:
            while True:
                signal.pause()
        return int(child)

    async def use_in_forked_child(self, ids: list[int]) -> dict[str, str]:
        """Lease a cache and blocks, fork, and return what each use of the handles raised in the child."""
        cache = await self.model.request_cache(4096)
        new = await self.model.new_blocks(keys(ids))
        uses = {
            "request_cache": lambda: self.model.request_cache(4096),
            "model": lambda: self.pool.model("another"),
            "stats": lambda: self.pool.stats(),
            "match_prefix": lambda: self.model.match_prefix(keys(ids)),
            "put_blocks": lambda: self.model.put_blocks(keys(ids), np.zeros((len(ids), BLOCK_BYTES), np.uint8)),
            "tensor": lambda: cache.tensor("uint8", (4096,)),
            "numpy": lambda: cache.numpy("uint8", (4096,)),
            "seal": lambda: cache.seal("key"),
            "release": lambda: cache.release(),
            "info": lambda: cache.info(),
            "pin": lambda: cache.pin(),
            "blocks.numpy": new.numpy,
            "blocks.seal": lambda: new.seal(),
            "blocks.release": lambda: new.release(),
            "connect": lambda: CachePool.connect(self.pool.name),
            "create": lambda: CachePool.create(name=self.pool.name),
            "sync.connect": lambda: sync.CachePool.connect(self.pool.name),
        }
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            raised = {}
            for name, use in uses.items():
                try:
                    work = use()
                    if asyncio.iscoroutine(work):
                        asyncio.run(work)
                    raised[name] = "nothing"
                except KvpoolError as error:
                    raised[name] = type(error).__name__
                except BaseException as error:  # noqa: BLE001 - told to the test
                    raised[name] = repr(error)
            os.write(writer, json.dumps(raised).encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as answer:
            text = await asyncio.to_thread(answer.read)
        await asyncio.to_thread(os.waitpid, child, 0)
        await cache.release()
        await new.release()
        return dict(json.loads(text))

    async def close(self) -> None:
        await self.pool.close()
