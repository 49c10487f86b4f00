"""All caches of a pool: found by key, linked into chains, held by leases, ranked by a policy when nobody holds them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from kvpool.cache.chains import Rows, depths, unique
from kvpool.cache.eviction import CacheEvictionPolicy
from kvpool.cache.guarded_policy import make_policy
from kvpool.cache.heads import Heads
from kvpool.cache.key import SHARDS, BlockHash, KeyShards, key_shards
from kvpool.cache.meter import Meter
from kvpool.cache.table import KEYED, MAX_STAMP, NO_ROW, RESIDENT, SEALED, CacheTable
from kvpool.errors import PolicyError, ensure

_COMPLETE = RESIDENT | SEALED | KEYED
_MANY = 512
"""Caches that leave at once, from which on it pays to go through the columns as a whole."""


class CacheIndex(CacheTable):
    """Caches by row, key and id; their leases and chains; and the policy that ranks those nobody holds.

    Methods trust the rows they are given; ids from outside go through :meth:`row_of`. Times (``now``) are seconds of
    the caller's clock.

    A published row takes 186 bytes (150,000 rows, CPython 3.11): 45 in columns, 16 in those of the LRU policy, the rest
    the hash, its place in the dictionary and the row number there. A full collection takes 1 to 2 ms longer for them.

    Parameters
    ----------
    policy
        Name of the eviction policy, one of :func:`kvpool.cache.eviction.policy_names`.
    seed
        Of what the policy draws at random: the same calls then have the same outcome.

    Raises
    ------
    UnknownPolicyError
        If there is no policy of that name.
    PolicyError
        If it cannot be made; and from any method, if it fails there and :attr:`policy_failed` raises that.
    """

    def __init__(self, policy: str = "lru", seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self._hashes: list[BlockHash | None] = []  # by row
        self._spaces: dict[tuple[str, str], int] = {}
        self._tenants: list[str] = []  # by space
        self._rows_by_hash: list[KeyShards] = []  # by space
        self._void: set[int] = set()  # spaces in which nothing is ever looked up
        self._accounts: list[int] = []  # by space; 0: that of all that have no quota
        self._partitions: dict[tuple[int, int], int] = {}  # by device and account
        self.partitions: list[tuple[int, int]] = []
        """By partition, its device and account."""
        self._by_device: list[list[int]] = []  # partitions
        self.orphans: set[int] = set()
        """Rows whose parent left before them: no chain leads to them, though a key may."""
        self.meter: Meter | None = None
        self.policy_failed: Callable[[PolicyError, float], None] = _give_up
        """Called when a policy of one's own fails, with the time of the last event: must raise, or replace it."""
        self.policy: CacheEvictionPolicy = make_policy(policy, self)

    @property
    def published(self) -> int:
        """Caches that have a key."""
        return sum(len(shard) for shards in self._rows_by_hash for shard in shards)

    def space(self, tenant: str, fingerprint: str) -> int:
        """Return the number of a namespace of keys; equal hashes in different spaces are different keys."""
        number = self._spaces.setdefault((tenant, fingerprint), len(self._tenants))
        if number == len(self._tenants):
            self._add_space(tenant, 0)
        return number

    # -- content that is void ---------------------------------------------------------------------------------------

    @property
    def has_void(self) -> bool:
        """Whether any content was declared void so far."""
        return bool(self._void)

    def is_void(self, row: int) -> bool:
        """Whether a cache's content was declared void: it may not be published, and nobody finds it."""
        return self._space[row] in self._void

    def bury(self, space: int, rows: Rows) -> Rows:
        """Declare the content of those of these rows that are in ``space`` void: from now on no key leads to them.

        They are returned; the others were buried before, for chains go on into graves. They stay where they are, with
        their leases, and go like all others. Takes 60 ms for 200,000 published rows.
        """
        rows = rows[np.frombuffer(self._space, np.int32)[rows] == space]
        grave = self._make_grave(space)
        known, buried, hashes = self._rows_by_hash[space], self._rows_by_hash[grave], self._hashes
        for row in rows.tolist():
            block_hash = hashes[row]
            if block_hash is not None:
                shard = block_hash[-1] % SHARDS
                buried[shard][block_hash] = known[shard].pop(block_hash)
        np.frombuffer(self._space, np.int32)[rows] = grave
        return rows

    def bury_all(self, space: int) -> None:
        """Declare all that is in a space void, as :meth:`bury` does; takes 1 ms whatever its size."""
        grave = self._make_grave(space)
        spaces = np.frombuffer(self._space, np.int32)
        spaces[spaces == space] = grave
        self._rows_by_hash[grave] = self._rows_by_hash[space]
        self._rows_by_hash[space] = key_shards()

    def _make_grave(self, space: int) -> int:
        """Return a void space of the same tenant and account with nothing in it.

        Keys in it may be equal to those buried before.
        """
        owner = self._tenants[space], self._accounts[space]
        for grave in self._void:
            same = (self._tenants[grave], self._accounts[grave]) == owner
            if same and not any(self._rows_by_hash[grave]) and not len(self.rows_of(grave)):
                return grave
        self._void.add(len(self._tenants))
        self._add_space(*owner)
        return len(self._tenants) - 1

    def _add_space(self, tenant: str, account: int) -> None:
        self._tenants.append(tenant)
        self._accounts.append(account)
        self._rows_by_hash.append(key_shards())

    # -- accounts -----------------------------------------------------------------------------------------------------

    def add_device(self, number: int) -> None:
        super().add_device(number)
        self._by_device.append([])
        self._partition_of(number, 0)

    def account_of(self, space: int) -> int:
        """Return the account to which a namespace's caches are charged."""
        return self._accounts[space]

    def set_accounts(self, accounts: Mapping[int, int], *, now: float) -> None:
        """Charge the caches of some spaces to other accounts from now on; what was buried of them stays where it was.

        The policy ranks them apart then; it is given again all that is evictable, in order of last access. Takes 0.2 s
        for 200,000 evictable rows.
        """
        moved = [space for space, account in accounts.items() if self._accounts[space] != account]
        for space in moved:
            self._accounts[space] = accounts[space]
        rows = self.rows_of(*moved) if moved else np.array([], np.int64)
        if not len(rows):
            return
        idle = self._idle_in_order()
        told = None
        while told is not self.policy:  # one that takes over in the middle of this is given all rows as it does
            told = self.policy
            told.taken(idle, now)
        for row in rows.tolist():
            self.partition[row] = self._partition_of(self.device[row], self._accounts[self._space[row]])
        self.policy.evictable(idle, now)

    def partitions_of(self, device: int) -> list[int]:
        """Return the numbers of a device's partitions."""
        return self._by_device[device]

    def totals_by_partition(self) -> tuple[list[int], list[int]]:
        """Return by partition what its caches take, and what nobody holds of it, in bytes. O(rows)."""
        flags, sizes = np.frombuffer(self.flags, np.uint8), np.frombuffer(self.size_bytes, np.int64)
        partitions, pins = np.frombuffer(self.partition, np.int32), np.frombuffer(self.pins, np.uint32)
        used = flags != 0
        idle = used & (flags & KEYED != 0) & (pins == 0)
        held, evictable = (
            np.bincount(partitions[rows], sizes[rows], len(self.partitions)).astype(np.int64).tolist()
            for rows in (used, idle)
        )
        return held, evictable

    def victims(self, device: int) -> Iterator[int]:
        """Yield a device's rows in the order in which they would go; see the policy's method."""
        partitions = self._by_device[device]
        return self.policy.victims(partitions[0]) if len(partitions) == 1 else self.victims_of(partitions)

    def victims_of(self, partitions: Iterable[int]) -> Iterator[int]:
        """Yield the rows of some partitions in the order in which they would go."""
        heads = Heads(self.policy, partitions)
        while heads:
            yield heads.row
            heads.next()

    def _partition_of(self, device: int, account: int) -> int:
        number = self._partitions.get((device, account))
        if number is None:
            number = self._partitions[device, account] = len(self.partitions)
            self.partitions.append((device, account))
            self._by_device[device].append(number)
        return number

    def _idle_in_order(self) -> list[int]:
        """Return what is evictable in order of last access, children before their parents."""
        idle = np.frombuffer(self.pins, np.uint32) == 0
        rows = np.flatnonzero((np.frombuffer(self.flags, np.uint8) & KEYED != 0) & idle)
        accessed = np.frombuffer(self.last_accessed, np.float64)[rows]
        ordered: list[int] = rows[np.lexsort((-depths(self)[rows], accessed))].tolist()
        return ordered

    def rows_of(self, *spaces: int) -> Rows:
        """Return the rows of all caches of some spaces, published or not."""
        column = np.frombuffer(self._space, np.int32)
        there = column == spaces[0] if len(spaces) == 1 else np.isin(column, spaces)
        rows: Rows = np.flatnonzero(there & (np.frombuffer(self.flags, np.uint8) != 0))
        return rows

    def spaces_of(self, tenant: str | None) -> list[int]:
        """Return the numbers of a tenant's spaces, or of all."""
        return [space for space, owner in enumerate(self._tenants) if tenant in (None, owner)]

    def totals(self) -> tuple[list[int], list[int], list[int]]:
        """Return by space how many caches and keys it has, and what they take, in bytes."""
        flags = np.frombuffer(self.flags, np.uint8)
        used, count = np.flatnonzero(flags), len(self._tenants)
        spaces = np.frombuffer(self._space, np.int32)[used]
        caches = np.bincount(spaces, minlength=count)
        keys = np.bincount(spaces[flags[used] & KEYED != 0], minlength=count)
        size_bytes = np.bincount(spaces, np.frombuffer(self.size_bytes, np.int64)[used], minlength=count)
        return caches.tolist(), keys.tolist(), size_bytes.astype(np.int64).tolist()

    def pinned_bytes(self, device: int) -> dict[int, int]:
        """Return by space what those of its caches take of a device that somebody holds, in bytes. O(rows)."""
        held = np.frombuffer(self.pins, np.uint32) > 0
        held &= (np.frombuffer(self.device, np.int32) == device) & (np.frombuffer(self.flags, np.uint8) != 0)
        spaces, sizes = np.frombuffer(self._space, np.int32)[held], np.frombuffer(self.size_bytes, np.int64)[held]
        return {space: int(size_bytes) for space, size_bytes in enumerate(np.bincount(spaces, sizes)) if size_bytes}

    def ids_of(self, rows: Rows) -> list[int]:
        """Return the ids of the caches in some rows."""
        stamps = np.frombuffer(self._stamps, np.uint32)[rows].astype(np.int64)
        ids: list[int] = (stamps << 32 | rows).tolist()
        return ids

    def withdraw(self, row: int) -> None:
        """Take the key off a cache that somebody holds. It is immutable as before."""
        block_hash = self._hashes[row]
        if not self.pins[row] or block_hash is None:
            ensure(False, "withdrawing a cache that has no key or no holder", row=row)
            return
        del self._rows_by_hash[self._space[row]][block_hash[-1] % SHARDS][block_hash]
        self._hashes[row] = None
        self.flags[row] = RESIDENT | SEALED

    # -- life of a cache --------------------------------------------------------------------------------------------

    def replace_policy(self, name: str, *, now: float) -> None:
        """Let the policy of that name decide from now on. It takes over what is evictable, in order of last access.

        Takes 110 ms for 200,000 evictable rows and LRU.

        Raises
        ------
        UnknownPolicyError
            If there is no policy of that name; nothing is changed.
        PolicyError
            If it cannot be made, or fails as it takes over; nothing is changed.
        """
        policy = make_policy(name, self)
        policy.evictable(self._idle_in_order(), now)
        self.policy = policy

    def add(self, space: int, size_bytes: int, device: int, parent_row: int = NO_ROW, *, now: float) -> int:
        """Return the row of a new cache: not sealed, without key, pinned once by its creator."""
        return self.add_chain(space, size_bytes, device, 1, parent_row, now=now)[0]

    def add_chain(
        self,
        space: int,
        size_bytes: int,
        device: int,
        count: int,
        parent_row: int = NO_ROW,
        *,
        now: float,
        chain: Sequence[BlockHash] = (),
    ) -> list[int]:
        """Return the rows of ``count`` new caches of equal size, each the parent of the next; see :meth:`add`.

        ``chain`` is the request whose blocks they are, if they are known to be such.
        """
        rows = self._add(space, size_bytes, device, count, parent_row, now, ())
        if rows:
            if self.meter is not None:
                self.meter.charge(self.partition[rows[0]], count * size_bytes, 0)
            if chain:
                self.policy.stored(space, chain, rows, now)
        return rows

    def add_complete(
        self,
        space: int,
        size_bytes: int,
        device: int,
        hashes: Sequence[BlockHash],
        parent_row: int = NO_ROW,
        *,
        now: float,
        chain: Sequence[BlockHash] = (),
    ) -> list[int]:
        """Do as :meth:`add_chain`, :meth:`publish_all` and :meth:`unpin` in one step, for caches nobody has to write.

        There is one for each of ``hashes``, which must be free; they become evictable tail first.
        """
        count = len(hashes)
        if count == 1:
            return self._add_block(space, size_bytes, device, hashes[0], parent_row, now, chain)
        shards = self._rows_by_hash[space]
        for block_hash in hashes:
            shard = shards[block_hash[-1] % SHARDS]
            if block_hash in shard:
                ensure(False, "publishing under a key that is taken", holder=shard[block_hash])
        if len(set(hashes)) < count:
            ensure(False, "publishing two caches under one key", caches=count)
        if space in self._void:
            ensure(False, "publishing where nothing is looked up", space=space)
        rows = self._add(space, size_bytes, device, count, parent_row, now, hashes)
        if not rows:
            return rows
        added_bytes = count * size_bytes
        if self.meter is not None:
            self.meter.charge(self.partition[rows[0]], added_bytes, added_bytes)
        if chain:
            self.policy.stored(space, chain, rows, now)
        self.evictable_bytes[device] += added_bytes
        self.policy.evictable(rows[::-1], now)
        return rows

    def _add(
        self,
        space: int,
        size_bytes: int,
        device: int,
        count: int,
        parent_row: int,
        now: float,
        hashes: Sequence[BlockHash],
    ) -> list[int]:
        """Fill the columns for :meth:`add_chain`, and those of keys, too, for :meth:`add_complete`.

        In one pass: a simulation spends a tenth of its time here.
        """
        if not 0 <= device < len(self.resident_bytes):
            ensure(False, "a device that was not added", device=device)
        if not count:
            return []
        parent, children, pins, flags = self.parent, self.children, self.pins, self.flags
        devices, sizes, spaces = self.device, self.size_bytes, self._space
        accessed, accesses, free = self.last_accessed, self.access_count, self._free
        if parent_row >= 0:
            if not flags[parent_row]:
                ensure(False, "a parent that is gone", row=parent_row)
            if flags[parent_row] & KEYED and not pins[parent_row]:
                self.policy.sheltered(parent_row)
        while len(free) < count:
            self._grow()
        rows: list[int] = []
        above = parent_row
        account = self._accounts[space]
        partition = self._partition_of(device, account) if account else self._by_device[device][0]
        partitions = self.partition
        known, shards = self._hashes, self._rows_by_hash[space]
        leases, state = (0, RESIDENT | SEALED | KEYED) if hashes else (1, RESIDENT)
        for place in range(count):
            row = free.pop()
            parent[row] = above
            if above >= 0:
                children[above] += 1
            pins[row] = leases
            devices[row] = device
            partitions[row] = partition
            sizes[row] = size_bytes
            spaces[row] = space
            accessed[row] = now
            accesses[row] = 0
            flags[row] = state
            rows.append(row)
            above = row
            if hashes:
                known[row] = block_hash = hashes[place]
                shards[block_hash[-1] % SHARDS][block_hash] = row
        self._resident += count
        self.resident_bytes[device] += count * size_bytes
        return rows

    def _add_block(
        self,
        space: int,
        size_bytes: int,
        device: int,
        block_hash: BlockHash,
        parent_row: int,
        now: float,
        chain: Sequence[BlockHash],
    ) -> list[int]:
        """:meth:`add_complete` a single block, in half the time: most requests that miss come here."""
        shard = self._rows_by_hash[space][block_hash[-1] % SHARDS]
        if block_hash in shard:
            ensure(False, "publishing under a key that is taken", holder=shard[block_hash])
        if space in self._void:
            ensure(False, "publishing where nothing is looked up", space=space)
        partition = self._partitions.get((device, self._accounts[space]))
        if partition is None:
            if not 0 <= device < len(self.resident_bytes):
                ensure(False, "a device that was not added", device=device)
            partition = self._partition_of(device, self._accounts[space])
        if not self._free:
            self._grow()
        if parent_row >= 0:
            if not self.flags[parent_row]:
                ensure(False, "a parent that is gone", row=parent_row)
            if self.flags[parent_row] & KEYED and not self.pins[parent_row]:
                self.policy.sheltered(parent_row)
            self.children[parent_row] += 1
        row = self._free.pop()
        shard[block_hash] = row
        self.parent[row] = parent_row
        self.partition[row] = partition
        self.pins[row] = 0
        self.device[row] = device
        self.size_bytes[row] = size_bytes
        self._space[row] = space
        self.last_accessed[row] = now
        self.access_count[row] = 0
        self.flags[row] = _COMPLETE
        self._hashes[row] = block_hash
        self._resident += 1
        self.resident_bytes[device] += size_bytes
        if self.meter is not None:
            self.meter.charge(partition, size_bytes, size_bytes)
        rows = [row]
        if chain:
            self.policy.stored(space, chain, rows, now)
        self.evictable_bytes[device] += size_bytes
        self.policy.evictable(rows, now)
        return rows

    def adopt(self, row: int, elder: int) -> None:
        """Chain those behind a duplicate behind the cache that has its key, before they are cut off.

        Those that nobody holds stay: the policy has ranked them where they are. O(rows) if there are any.
        """
        if not self.children[row]:
            return
        above = elder
        while above >= 0:
            if above == row:  # it has the key of one before it in its own chain
                return
            above = self.parent[above]
        behind = np.flatnonzero(
            (np.frombuffer(self.parent, np.int32) == row) & (np.frombuffer(self.flags, np.uint8) != 0)
        )
        held = [child for child in behind.tolist() if self.pins[child] or not self.flags[child] & KEYED]
        if not held:
            return
        if not self.pins[elder]:
            self.policy.sheltered(elder)
        for child in held:
            self.parent[child] = elder
        self.children[elder] += len(held)
        self.children[row] -= len(held)

    def resize(self, row: int, size_bytes: int, asked_bytes: int) -> None:
        """Enter what a cache that is not sealed takes of its device from now on, and what has a meaning in it."""
        ensure(self.flags[row] == RESIDENT, "resizing a cache that is sealed or gone", row=row)
        more_bytes = size_bytes - self.size_bytes[row]
        self.resident_bytes[self.device[row]] += more_bytes
        if self.meter is not None:
            self.meter.charge(self.partition[row], more_bytes, 0)
        self.size_bytes[row], self.asked_bytes[row] = size_bytes, asked_bytes

    def seal(self, row: int) -> None:
        """Mark a cache immutable; it gets no key by that. Idempotent."""
        ensure(self.flags[row], "sealing a cache that is gone", row=row)
        self.flags[row] |= SEALED

    def publish(self, row: int, block_hash: BlockHash) -> None:
        """Seal a pinned cache and make it known under its key, which must be free (see :meth:`find`)."""
        self.publish_all((row,), (block_hash,))

    def publish_all(self, rows: Sequence[int], hashes: Sequence[BlockHash]) -> None:
        """Seal and :meth:`publish` several caches."""
        flags, pins, spaces, known = self.flags, self.pins, self._space, self._hashes
        void, by_hash = self._void, self._rows_by_hash
        if len(rows) != len(hashes):
            ensure(False, "publishing caches under fewer or more keys", caches=len(rows), keys=len(hashes))
        for place, row in enumerate(rows):
            block_hash, space, state = hashes[place], spaces[row], flags[row]
            if not state or state & KEYED or not pins[row] or space in void:
                ensure(False, "publishing a cache that is gone, has a key or has no holder", row=row)
            shard = by_hash[space][block_hash[-1] % SHARDS]
            if block_hash in shard:
                ensure(False, "publishing under a key that is taken", row=row, holder=shard[block_hash])
            shard[block_hash] = row
            known[row] = block_hash
            flags[row] = RESIDENT | SEALED | KEYED

    def find(self, space: int, block_hash: BlockHash) -> int:
        """Return the row published under a key, or -1."""
        return self._rows_by_hash[space][block_hash[-1] % SHARDS].get(block_hash, NO_ROW)

    def find_all(self, space: int, hashes: Iterable[BlockHash]) -> list[int]:
        """Return for each key the row published under it, or -1."""
        shards = self._rows_by_hash[space]
        return [shards[block_hash[-1] % SHARDS].get(block_hash, NO_ROW) for block_hash in hashes]

    def match(self, space: int, hashes: Sequence[BlockHash]) -> list[int]:
        """Return the rows of the leading run of ``hashes`` that is published."""
        shards = self._rows_by_hash[space]
        rows = []
        for block_hash in hashes:
            row = shards[block_hash[-1] % SHARDS].get(block_hash)
            if row is None:
                break
            rows.append(row)
        return rows

    def look_up(self, space: int, hashes: Sequence[BlockHash], *, now: float) -> list[int]:
        """:meth:`match` for a request, of which the policy is told."""
        shards = self._rows_by_hash[space]
        rows = []
        for block_hash in hashes:  # as match() does: this is what every request begins with
            row = shards[block_hash[-1] % SHARDS].get(block_hash)
            if row is None:
                break
            rows.append(row)
        self.policy.looked_up(space, hashes, rows, now)
        return rows

    def guard(self, rows: Sequence[int], *, now: float) -> None:
        """:meth:`pin` for the pool's own sake: it is no access."""
        pins, flags = self.pins, self.flags
        taken = []
        for row in rows:
            if not pins[row] and flags[row] & KEYED:
                taken.append(row)
                self.evictable_bytes[self.device[row]] -= self.size_bytes[row]
            pins[row] += 1
        if taken:
            self._taken(taken, now)

    @contextmanager
    def shielded(self, rows: Sequence[int], *, now: float) -> Iterator[None]:
        """Guard the rows of a chain for the length of a decision, which a meter is not told of."""
        meter, self.meter = self.meter, None
        self.guard(rows, now=now)
        self.meter = meter
        try:
            yield
        finally:
            self.meter = None
            self.unpin(rows[::-1], now=now)
            self.meter = meter

    def pin(self, rows: Sequence[int], *, now: float) -> None:
        """Add a lease to each; a chain in the order of the chain. Pinned caches never go."""
        if not rows:
            return
        pins, flags, accessed, accesses = self.pins, self.flags, self.last_accessed, self.access_count
        if len(rows) == 1:
            row = rows[0]
            leases = pins[row]
            pins[row] = leases + 1
            accessed[row] = now
            accesses[row] += 1
            if not leases and flags[row] & KEYED:
                size_bytes = self.size_bytes[row]
                self.evictable_bytes[self.device[row]] -= size_bytes
                self.policy.taken(rows, now)
                if self.meter is not None:
                    self.meter.charge(self.partition[row], 0, -size_bytes)
            return
        taken = []
        for row in rows:
            leases = pins[row]
            if not leases and flags[row] & KEYED:
                taken.append(row)
                self.evictable_bytes[self.device[row]] -= self.size_bytes[row]
            pins[row] = leases + 1
            accessed[row] = now
            accesses[row] += 1
        if taken:
            self._taken(taken, now)

    def unpin(self, rows: Sequence[int], *, now: float) -> None:
        """Take a lease off each; a chain tail first. A published cache that loses its last one may go from then on."""
        if not rows:
            return
        pins, flags, accessed = self.pins, self.flags, self.last_accessed
        if len(rows) == 1:
            row = rows[0]
            leases = pins[row]
            if leases > 1:
                pins[row] = leases - 1
                return
            if not leases:
                ensure(False, "a lease given back that nobody holds", row=row)
            pins[row] = 0
            accessed[row] = now
            if flags[row] & KEYED:
                size_bytes = self.size_bytes[row]
                self.evictable_bytes[self.device[row]] += size_bytes
                self.policy.evictable(rows, now)
                if self.meter is not None:
                    self.meter.charge(self.partition[row], 0, size_bytes)
            return
        devices, sizes, evictable_bytes = self.device, self.size_bytes, self.evictable_bytes
        evictable = []
        for row in rows:
            leases = pins[row]
            if leases > 1:
                pins[row] = leases - 1
                continue
            if not leases:
                ensure(False, "a lease given back that nobody holds", row=row)
            pins[row] = 0
            accessed[row] = now
            if flags[row] & KEYED:
                evictable.append(row)
                evictable_bytes[devices[row]] += sizes[row]
        if evictable:
            self.policy.evictable(evictable, now)
            if self.meter is not None:
                for row in evictable:
                    self.meter.charge(self.partition[row], 0, sizes[row])

    def _taken(self, rows: Sequence[int], now: float) -> None:
        self.policy.taken(rows, now)
        if self.meter is not None:
            for row in rows:
                self.meter.charge(self.partition[row], 0, -self.size_bytes[row])

    def remove(self, row: int) -> None:
        """Forget a cache: its id becomes stale, its key free, its leases void; see :meth:`remove_all`."""
        self.remove_all((row,))

    def remove_all(self, rows: Sequence[int]) -> None:
        """Forget several caches, children before their parents.

        Resident children of a removed cache stay as roots that no chain leads to any more, and go in their turn.
        Eviction never removes such a cache: it happens when memory is lost.
        """
        if len(rows) == 1:
            self._remove_block(rows)
            return
        if len(rows) >= _MANY:
            self._remove_many(np.array(rows, np.int64))
            self._resident -= len(rows)
            self.policy.removed(rows)
            return
        parent, children, pins, flags, hashes = self.parent, self.children, self.pins, self.flags, self._hashes
        devices, sizes, stamps, spaces = self.device, self.size_bytes, self._stamps, self._space
        resident_bytes, evictable_bytes = self.resident_bytes, self.evictable_bytes
        by_hash, free, orphans = self._rows_by_hash, self._free, self.orphans
        if self.meter is not None:
            for row in rows:
                idle = flags[row] & KEYED and not pins[row]
                self.meter.charge(self.partition[row], -sizes[row], -sizes[row] if idle else 0)
        for row in rows:
            if not flags[row]:
                ensure(False, "removing a cache that is gone", row=row)
            flags[row] = 0
            if orphans:
                orphans.discard(row)
            if children[row]:
                self._orphan(np.array([row]))
            above = parent[row]
            if above >= 0:
                children[above] -= 1
            device, size_bytes = devices[row], sizes[row]
            resident_bytes[device] -= size_bytes
            block_hash = hashes[row]
            if block_hash is not None:
                if not pins[row]:
                    evictable_bytes[device] -= size_bytes
                del by_hash[spaces[row]][block_hash[-1] % SHARDS][block_hash]
                hashes[row] = None
            stamp = stamps[row] + 1
            stamps[row] = stamp
            if stamp < MAX_STAMP:  # else the row is retired, so that no id ever comes back
                free.append(row)
        self._resident -= len(rows)
        self.policy.removed(rows)

    def _remove_block(self, rows: Sequence[int]) -> None:
        """Do as :meth:`remove_all` for one: two thirds of the time, as nothing is fetched for a loop."""
        row = rows[0]
        state, size_bytes, device = self.flags[row], self.size_bytes[row], self.device[row]
        if not state:
            ensure(False, "removing a cache that is gone", row=row)
        idle = state & KEYED and not self.pins[row]
        if self.meter is not None:
            self.meter.charge(self.partition[row], -size_bytes, -size_bytes if idle else 0)
        self.flags[row] = 0
        if self.orphans:
            self.orphans.discard(row)
        if self.children[row]:
            self._orphan(np.array([row]))
        above = self.parent[row]
        if above >= 0:
            self.children[above] -= 1
        self.resident_bytes[device] -= size_bytes
        if idle:
            self.evictable_bytes[device] -= size_bytes
        block_hash = self._hashes[row]
        if block_hash is not None:
            self._hashes[row] = None
            del self._rows_by_hash[self._space[row]][block_hash[-1] % SHARDS][block_hash]
        self._stamps[row] = stamp = self._stamps[row] + 1
        if stamp < MAX_STAMP:
            self._free.append(row)
        self._resident -= 1
        self.policy.removed(rows)

    def _remove_many(self, rows: Rows) -> None:
        """Do as :meth:`remove_all`, column by column: a third of the time where there are thousands."""
        flags, stamps = np.frombuffer(self.flags, np.uint8), np.frombuffer(self._stamps, np.uint32)
        parent, children = np.frombuffer(self.parent, np.int32), np.frombuffer(self.children, np.uint32)
        ensure(bool(flags[rows].all()) and len(unique(rows)) == len(rows), "removing a cache that is gone")
        above = parent[rows]
        np.subtract.at(children, above[above >= 0], np.uint32(1))
        if len(left_behind := rows[children[rows] != 0]):
            self._orphan(left_behind)
        keyed = rows[flags[rows] & KEYED != 0]
        idle = keyed[np.frombuffer(self.pins, np.uint32)[keyed] == 0]
        devices, sizes = np.frombuffer(self.device, np.int32), np.frombuffer(self.size_bytes, np.int64)
        for gone, bytes_left in ((rows, self.resident_bytes), (idle, self.evictable_bytes)):
            for device in unique(devices[gone]).tolist():
                bytes_left[device] -= int(sizes[gone[devices[gone] == device]].sum())
        if self.meter is not None:
            partitions = np.frombuffer(self.partition, np.int32)
            for partition in unique(partitions[rows]).tolist():
                held_bytes, idle_bytes = (
                    int(sizes[gone[partitions[gone] == partition]].sum()) for gone in (rows, idle)
                )
                self.meter.charge(partition, -held_bytes, -idle_bytes)
        hashes = self._hashes
        spaces = np.frombuffer(self._space, np.int32)[keyed]
        for space in unique(spaces).tolist():
            shards = self._rows_by_hash[space]
            for row in keyed[spaces == space].tolist():
                block_hash = hashes[row]
                if block_hash is not None:
                    del shards[block_hash[-1] % SHARDS][block_hash]
                    hashes[row] = None
        flags[rows] = 0
        if self.orphans:
            self.orphans.difference_update(rows.tolist())
        stamps[rows] += 1
        self._free.extend(rows[stamps[rows] < MAX_STAMP].tolist())

    def remove_device(self, number: int) -> int:
        """Forget all caches of a device that is lost, leased or not; returns how many. Its number is not used again."""
        there = (np.frombuffer(self.device, np.int32) == number) & (np.frombuffer(self.flags, np.uint8) != 0)
        rows = np.flatnonzero(there)
        self._orphan(rows)
        self.remove_all(rows.tolist())
        return len(rows)

    def key_of(self, row: int) -> BlockHash | None:
        """Return the hash under which a cache is published, or None."""
        return self._hashes[row]

    def parent_key_of(self, row: int) -> BlockHash | None:
        """Return the hash under which a cache's parent is published, or None."""
        above = self.parent[row]
        return self._hashes[above] if above >= 0 else None

    def space_of(self, row: int) -> int:
        """Return the namespace for which a cache was made."""
        return self._space[row]

    def tenant_of(self, row: int) -> str:
        """Return the tenant to whom a cache belongs."""
        return self._tenants[self._space[row]]

    def check(self) -> None:
        """Raise InvariantError unless counts, keys and rows agree. O(rows), for tests."""
        flags, devices = np.array(self.flags), np.array(self.device)
        used, keyed = np.flatnonzero(flags), np.flatnonzero(flags & KEYED)
        above = np.array(self.parent)[used]
        above = above[above >= 0]
        idle, sizes = keyed[np.array(self.pins)[keyed] == 0], np.array(self.size_bytes)
        ensure(len(used) == self._resident and len(keyed) == self.published, "counts of caches and keys")
        ensure(bool(flags[above].all()), "a parent that is gone")
        ensure(np.bincount(above, minlength=len(flags)).tolist() == list(self.children), "counts of children")
        for rows, kept in ((used, self.resident_bytes), (idle, self.evictable_bytes)):
            counted = [int(sizes[rows[devices[rows] == device]].sum()) for device in range(len(kept))]
            ensure(counted == kept, "bytes by device", counted=counted, kept=kept)
        names = {row: block_hash for row, block_hash in enumerate(self._hashes) if block_hash is not None}
        ensure(set(names) == set(keyed.tolist()), "a key without a row, or the reverse")
        for row, block_hash in names.items():
            ensure(self.find(self._space[row], block_hash) == row, "row of a key", row=row)
        for row in used.tolist():
            where = self.device[row], self._accounts[self._space[row]]
            ensure(
                self._space[row] in self._void or self.partitions[self.partition[row]] == where, "partition", row=row
            )
        ensure(
            all(flags[row] and self.parent[row] < 0 for row in self.orphans), "orphans that are gone, or have a parent"
        )
        free = set(self._free)
        ensure(len(free) == len(self._free) and free.isdisjoint(used.tolist()), "rows both free and in use")

    def _orphan(self, lost: np.ndarray) -> None:
        """Cut the children of these rows off."""
        parent, children = np.frombuffer(self.parent, np.int32), np.frombuffer(self.children, np.uint32)
        cut_off = np.flatnonzero(np.isin(parent, lost))
        self.orphans.update(cut_off[np.frombuffer(self.flags, np.uint8)[cut_off] != 0].tolist())
        parent[cut_off] = NO_ROW  # of free rows too, which have no parent
        children[lost] = 0

    def _grow(self) -> int:
        added = super()._grow()
        self._hashes.extend([None] * added)
        self.policy.grown(len(self.flags))
        return added


def _give_up(error: PolicyError, _now: float) -> None:
    raise error
