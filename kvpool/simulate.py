"""What a policy would hit on a workload: the pool's own index and policy, without memory, Ray or clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice, takewhile
from time import thread_time
from typing import TypedDict

from kvpool.bound import most_prefix_hits
from kvpool.cache.eviction import CacheEvictionPolicy, plain_name
from kvpool.cache.host_index import HostEntry, HostIndex, Kind
from kvpool.cache.index import CacheIndex
from kvpool.cache.key import BlockHash, CacheKey, encode_block_id
from kvpool.cache.table import NO_ROW
from kvpool.errors import InvalidRequestError
from kvpool.sizes import format_count
from kvpool.workload import TraceRequest, unique_blocks

_REPORT_EVERY = 256


class SimulationRow(TypedDict):
    """Outcome of one simulation, as it goes into tables and JSON."""

    policy: str
    seed: int
    capacity: float
    """As asked: share of the unique blocks, or blocks."""
    capacity_blocks: int
    host_capacity_blocks: int
    """Of a host tier below; 0: there is none."""
    requests: int
    blocks: int
    """Blocks looked up, all requests together."""
    prefix_hit_ratio: float
    """Leading resident blocks of the requests / all their blocks, looked up before the request changes anything."""
    host_hit_ratio: float
    """The part of it that came from the host tier."""
    evictions: int
    accesses_per_s: float
    """Blocks handled in a second of one core's time, whatever else runs there; encoding the ids is not counted."""


def capacity_in_blocks(capacity: float, unique: int) -> int:
    """Return a capacity in blocks.

    Parameters
    ----------
    capacity
        A float is a share of the unique blocks, above 0 and at most 1; an int is a number of blocks.
    unique
        Unique blocks of the workload.

    Raises
    ------
    InvalidRequestError
        If it is neither, or less than one block.
    """
    if isinstance(capacity, float):
        if not 0 < capacity <= 1:
            raise InvalidRequestError(
                f"a capacity is a share of the unique blocks above 0 and at most 1.0, or a whole number of blocks; "
                f"asked for {capacity}",
                asked=capacity,
            )
        blocks = round(capacity * unique)
        if not blocks:
            raise InvalidRequestError(
                f"capacity {capacity} of {unique} unique blocks is less than one block: ask for more", asked=capacity
            )
        return blocks
    if isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 1:
        raise InvalidRequestError(
            f"a capacity in blocks is a whole number of at least 1, asked for {capacity!r}", asked=repr(capacity)
        )
    return capacity


def offline_bound(requests: Sequence[TraceRequest], capacity: float, host_capacity: float | None = None) -> float:
    """Return the prefix hit ratio that no policy can pass at that capacity, because it would take the future.

    With a host tier, that of both together: what lies in either is a hit, but a hit is on the device as a whole in the
    end. So of a chain no more than ``capacity`` blocks are ever hit, from the first on, however large the host is.

    Raises
    ------
    InvalidRequestError
        As :func:`simulate` does.
    """
    unique = _unique_blocks(requests)
    capacity_blocks = capacity_in_blocks(capacity, unique)
    chains = [request.hash_ids[:capacity_blocks] for request in requests]
    if host_capacity is not None:
        capacity_blocks = min(capacity_blocks + capacity_in_blocks(host_capacity, unique), unique)
    return most_prefix_hits(chains, capacity_blocks) / sum(len(request.hash_ids) for request in requests)


def simulate(
    requests: Sequence[TraceRequest],
    policy: str = "lru",
    capacity: float = 0.05,
    on_progress: Callable[[int], None] | None = None,
    seed: int = 0,
    host_capacity: float | None = None,
) -> SimulationRow:
    """Replay the requests one after another against a pool of ``capacity`` blocks.

    Each request leases the prefix it hits, makes room for what is missing by evicting what the policy values least,
    stores as far as it fits, and gives all its blocks back, tail first, before the next one begins.

    Parameters
    ----------
    requests
        The workload, in order of arrival.
    policy
        Name of the eviction policy.
    capacity
        Share of the workload's unique blocks (float), or number of blocks (int).
    on_progress
        Told now and then how many requests are done.
    seed
        Of what the policy draws at random.
    host_capacity
        Of a host tier below, in the same terms: what is evicted goes there, and comes up again with the next request
        for it. None: there is none.

    Raises
    ------
    InvalidRequestError
        If no request names a block, or the capacity is less than one block.
    UnknownPolicyError
        If there is no policy of that name.
    """
    capacity_blocks = capacity_in_blocks(capacity, _unique_blocks(requests))
    index = CacheIndex(policy, seed)
    host = None if host_capacity is None else _Host(capacity_in_blocks(host_capacity, _unique_blocks(requests)))
    chains = _encode(requests)
    blocks = sum(map(len, chains))
    hits = host_hits = evictions = 0
    started_s = thread_time()
    index.add_device(0)
    space = index.space("default", "simulated")
    deciding = index.policy
    for done, (request, hashes) in enumerate(zip(requests, chains, strict=True)):
        now = request.timestamp_ms / 1000
        rows = index.look_up(space, hashes, now=now)
        hits += len(rows)
        if rows:
            index.pin(rows, now=now)
        if host is not None and (coming := host.run(hashes[len(rows) :])):
            wanted = hashes[len(rows) : len(rows) + len(coming)]
            short = len(index) + len(wanted) - capacity_blocks
            if short > 0:
                victims = list(islice(deciding.victims(0), short))
                host.lower(index, victims)
                index.remove_all(victims)
                evictions += len(victims)
            raised = wanted[: capacity_blocks - len(index)]
            hits += len(raised)
            host_hits += len(raised)
            new = index.add_chain(space, 1, 0, len(raised), rows[-1] if rows else NO_ROW, now=now, chain=hashes)
            index.publish_all(new, raised)
            host.raised(coming, len(raised))
            rows += new
        if hashes:
            deciding.answered(space, hashes, rows, request.output_length, now)
        found = len(rows)
        missing = len(hashes) - found
        if missing:
            room = capacity_blocks - len(index)
            short = missing - room
            if short > 0 and host is None:  # what a policy would not store has its place below
                admitted = deciding.admit(space, hashes, rows, (0,), 1, short, now)
                short -= missing - admitted
                missing = admitted
            if short > 0:
                victims = _victims(deciding, short)
                if host is not None:
                    host.lower(index, victims)
                index.remove_all(victims)
                room += len(victims)
                evictions += len(victims)
            stored = hashes[found : found + min(missing, room)]
            above = rows[-1] if rows else NO_ROW
            index.add_complete(space, 1, 0, stored, above, now=now, chain=hashes)
        if rows:
            rows.reverse()
            index.unpin(rows, now=now)
        if on_progress is not None and not done % _REPORT_EVERY:
            on_progress(done)
    elapsed_s = thread_time() - started_s
    if on_progress is not None:
        on_progress(len(requests))
    return SimulationRow(
        policy=plain_name(policy),
        seed=seed,
        capacity=capacity,
        capacity_blocks=capacity_blocks,
        host_capacity_blocks=0 if host is None else host.index.budget_bytes,
        requests=len(requests),
        blocks=blocks,
        prefix_hit_ratio=hits / blocks,
        host_hit_ratio=host_hits / blocks,
        evictions=evictions,
        accesses_per_s=blocks / max(elapsed_s, 1e-9),  # a clock may not have moved
    )


def _victims(policy: CacheEvictionPolicy, count: int) -> list[int]:
    """Return what goes first on the one device."""
    if count == 1:
        row = policy.victim()
        return [] if row < 0 else [row]
    return list(islice(policy.victims(0), count))


class _Host:
    """A host tier of so many blocks: the index of the real one, with blocks of one byte."""

    def __init__(self, capacity_blocks: int) -> None:
        self.index = HostIndex(capacity_blocks)

    def run(self, hashes: Sequence[BlockHash]) -> list[HostEntry]:
        """Return the leading blocks that are here, held, so that what goes down for them does not push them out."""
        entries = list(takewhile(lambda entry: entry is not None, map(self.index.get, map(_key, hashes))))
        found = [entry for entry in entries if entry is not None]
        for entry in found:
            self.index.hold(entry)
        return found

    def raised(self, entries: Sequence[HostEntry], count: int) -> None:
        """Note that the first ``count`` of these have come up; the others stay."""
        for place, entry in enumerate(entries):
            if place < count:
                self.index.use(entry, Kind.COPY)
            self.index.release(entry)

    def lower(self, index: CacheIndex, rows: Sequence[int]) -> None:
        """Take what is about to be evicted."""
        for row in rows:
            block_hash = index.key_of(row)
            if block_hash is None:
                continue
            key = _key(block_hash)
            entry = self.index.get(key)
            if entry is not None:
                self.index.use(entry, Kind.SOLE)
                continue
            if not self.index.fits(1):
                going = self.index.oldest(Kind.SOLE)
                if going is None:
                    continue
                self.index.drop(going.key)
            self.index.add(HostEntry(key, None, 1, 1, Kind.SOLE))


def _key(block_hash: BlockHash) -> CacheKey:
    return CacheKey("default", "simulated", block_hash)


def _unique_blocks(requests: Sequence[TraceRequest]) -> int:
    unique = unique_blocks(requests)
    if not requests:
        raise InvalidRequestError("there is no request to simulate")
    if not unique:
        raise InvalidRequestError(
            f"of {format_count(len(requests), 'request')} none names a block, so nothing can be hit: use a "
            "trace with hash_ids"
        )
    return unique


def _encode(requests: Sequence[TraceRequest]) -> list[list[BlockHash]]:
    """Return the hashes of each request, equal ids as the same object."""
    known: dict[int, BlockHash] = {}
    chains = []
    for request in requests:
        chain = []
        for block in request.hash_ids:
            block_hash = known.get(block)
            if block_hash is None:
                block_hash = known[block] = encode_block_id(block)
            chain.append(block_hash)
        chains.append(chain)
    return chains
