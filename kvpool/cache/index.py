"""All caches of a pool: found by key, linked into chains, held by leases, ranked by a policy when nobody holds them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from kvpool.cache.chains import idle_in_order, unique
from kvpool.cache.guarded_policy import make_policy
from kvpool.cache.heads import victims_of
from kvpool.cache.key import SHARDS, BlockHash
from kvpool.cache.key_table import KeyTable
from kvpool.cache.leased_table import LeasedTable
from kvpool.cache.partitions import Partitions
from kvpool.cache.spaces import Spaces
from kvpool.cache.table import KEYED, MAX_STAMP, NO_ROW, RESIDENT, SEALED, Rows
from kvpool.errors import PolicyError, ensure

_COMPLETE = RESIDENT | SEALED | KEYED
_MANY = 512
"""Caches that leave at once, from which on it pays to go through the columns as a whole."""


class CacheIndex(LeasedTable):
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
        self.spaces = Spaces()
        self.partitions = Partitions()
        self._keys = KeyTable()
        self.find = self._keys.find
        self.find_all = self._keys.find_all
        self.match = self._keys.match
        self.policy_failed: Callable[[PolicyError, float], None] = _give_up
        """Called when a policy of one's own fails, with the time of the last event: must raise, or replace it."""
        self.policy = make_policy(policy, self)

    @property
    def published(self) -> int:
        """Caches that have a key."""
        return len(self._keys)

    def space(self, tenant: str, fingerprint: str) -> int:
        """Return the number of a namespace of keys; equal hashes in different spaces are different keys."""
        number = self.spaces.number(tenant, fingerprint)
        self._keys.add_spaces(len(self.spaces))
        return number

    # -- content that is void ---------------------------------------------------------------------------------------

    def is_void(self, row: int) -> bool:
        """Whether a cache's content was declared void: it may not be published, and nobody finds it."""
        return self._space[row] in self.spaces.void

    def bury(self, space: int, rows: Rows) -> Rows:
        """Declare the content of those of these rows that are in ``space`` void: from now on no key leads to them.

        They are returned; the others were buried before, for chains go on into graves. They stay where they are, with
        their leases, and go like all others. Takes 60 ms for 200,000 published rows.
        """
        rows = rows[np.frombuffer(self._space, np.int32)[rows] == space]
        grave = self._empty_grave(space)
        self._keys.move(rows.tolist(), space, grave)
        np.frombuffer(self._space, np.int32)[rows] = grave
        return rows

    def bury_all(self, space: int) -> None:
        """Declare all that is in a space void, as :meth:`bury` does; takes 1 ms whatever its size."""
        grave = self._empty_grave(space)
        spaces = np.frombuffer(self._space, np.int32)
        spaces[spaces == space] = grave
        self._keys.move_all(space, grave)

    def _empty_grave(self, space: int) -> int:
        """Return a grave with nothing in it: keys may be equal to those that were buried before."""
        for grave in self.spaces.graves(space):
            if self._keys.is_empty(grave) and not len(self.rows_of(grave)):
                return grave
        grave = self.spaces.add_grave(space)
        self._keys.add_spaces(len(self.spaces))
        return grave

    # -- accounts, and what is worth least ------------------------------------------------------------------------

    def add_device(self, number: int) -> None:
        super().add_device(number)
        self.partitions.add_device(number)

    def set_accounts(self, accounts: Mapping[int, int], *, now: float) -> None:
        """Charge the caches of some spaces to other accounts from now on; what was buried of them stays where it was.

        The policy ranks them apart then; it is given again all that is evictable, in order of last access. Takes 0.2 s
        for 200,000 evictable rows.
        """
        account_of = self.spaces.accounts
        moved = [space for space, account in accounts.items() if account_of[space] != account]
        for space in moved:
            account_of[space] = accounts[space]
        rows = self.rows_of(*moved) if moved else np.array([], np.int64)
        if not len(rows):
            return
        idle = idle_in_order(self)
        told = None
        while told is not self.policy:  # one that takes over in the middle of this is given all rows as it does
            told = self.policy
            told.taken(idle, now)
        for row in rows.tolist():
            self.partition[row] = self.partitions.number(self.device[row], account_of[self._space[row]])
        self.policy.evictable(idle, now)

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
        policy.evictable(idle_in_order(self), now)
        self.policy = policy

    def victims(self, device: int) -> Iterator[int]:
        """Yield a device's rows in the order in which they would go; see the policy's method."""
        partitions = self.partitions.of(device)
        return self.policy.victims(partitions[0]) if len(partitions) == 1 else victims_of(self.policy, partitions)

    # -- life of a cache --------------------------------------------------------------------------------------------

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
        self._keys.ensure_free(space, hashes)
        if space in self.spaces.void:
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
        account = self.spaces.accounts[space]
        partition = self.partitions.number(device, account) if account else self.partitions.of(device)[0]
        partitions = self.partition
        known, shards = self._keys.hashes, self._keys.rows[space]
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
        keys, account = self._keys, self.spaces.accounts[space]
        shard = keys.rows[space][block_hash[-1] % SHARDS]
        if block_hash in shard:
            ensure(False, "publishing under a key that is taken", holder=shard[block_hash])
        if space in self.spaces.void:
            ensure(False, "publishing where nothing is looked up", space=space)
        partition = self.partitions.numbers.get((device, account))
        if partition is None:
            if not 0 <= device < len(self.resident_bytes):
                ensure(False, "a device that was not added", device=device)
            partition = self.partitions.number(device, account)
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
        keys.hashes[row] = block_hash
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

    def publish(self, row: int, block_hash: BlockHash) -> None:
        """Seal a pinned cache and make it known under its key, which must be free (see :meth:`find`)."""
        self.publish_all((row,), (block_hash,))

    def publish_all(self, rows: Sequence[int], hashes: Sequence[BlockHash]) -> None:
        """Seal and :meth:`publish` several caches."""
        flags, pins, spaces, known = self.flags, self.pins, self._space, self._keys.hashes
        void, by_hash = self.spaces.void, self._keys.rows
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

    def withdraw(self, row: int) -> None:
        """Take the key off a cache that somebody holds. It is immutable as before."""
        if not self.pins[row] or self._keys.hashes[row] is None:
            ensure(False, "withdrawing a cache that has no key or no holder", row=row)
        self._keys.drop(self._space[row], row)
        self.flags[row] = RESIDENT | SEALED

    def look_up(self, space: int, hashes: Sequence[BlockHash], *, now: float) -> list[int]:
        """:meth:`match` for a request, of which the policy is told."""
        shards = self._keys.rows[space]
        rows = []
        for block_hash in hashes:  # as match() does: this is what every request begins with
            row = shards[block_hash[-1] % SHARDS].get(block_hash)
            if row is None:
                break
            rows.append(row)
        self.policy.looked_up(space, hashes, rows, now)
        return rows

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
        parent, children, pins, flags, hashes = self.parent, self.children, self.pins, self.flags, self._keys.hashes
        devices, sizes, stamps, spaces = self.device, self.size_bytes, self._stamps, self._space
        resident_bytes, evictable_bytes = self.resident_bytes, self.evictable_bytes
        by_hash, free, orphans = self._keys.rows, self._free, self.orphans
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
                self._cut_off(np.array([row]))
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
            self._cut_off(np.array([row]))
        above = self.parent[row]
        if above >= 0:
            self.children[above] -= 1
        self.resident_bytes[device] -= size_bytes
        if idle:
            self.evictable_bytes[device] -= size_bytes
        keys = self._keys
        block_hash = keys.hashes[row]
        if block_hash is not None:
            keys.hashes[row] = None
            del keys.rows[self._space[row]][block_hash[-1] % SHARDS][block_hash]
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
            self._cut_off(left_behind)
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
        self._keys.drop_all(keyed, np.frombuffer(self._space, np.int32)[keyed])
        flags[rows] = 0
        if self.orphans:
            self.orphans.difference_update(rows.tolist())
        stamps[rows] += 1
        self._free.extend(rows[stamps[rows] < MAX_STAMP].tolist())

    def remove_device(self, number: int) -> int:
        """Forget all caches of a device that is lost, leased or not; returns how many. Its number is not used again."""
        there = (np.frombuffer(self.device, np.int32) == number) & (np.frombuffer(self.flags, np.uint8) != 0)
        rows = np.flatnonzero(there)
        self._cut_off(rows)
        self.remove_all(rows.tolist())
        return len(rows)

    def key_of(self, row: int) -> BlockHash | None:
        """Return the hash under which a cache is published, or None."""
        return self._keys.hashes[row]

    def parent_key_of(self, row: int) -> BlockHash | None:
        """Return the hash under which a cache's parent is published, or None."""
        above = self.parent[row]
        return self._keys.hashes[above] if above >= 0 else None

    def space_of(self, row: int) -> int:
        """Return the namespace for which a cache was made."""
        return self._space[row]

    def tenant_of(self, row: int) -> str:
        """Return the tenant to whom a cache belongs."""
        return self.spaces.tenants[self._space[row]]

    def check(self) -> None:
        """Raise InvariantError unless keys, partitions and rows agree, too."""
        super().check()
        keyed = np.flatnonzero(np.array(self.flags) & KEYED)
        ensure(len(keyed) == self.published, "counts of keys")
        names = dict(self._keys.published())
        ensure(set(names) == set(keyed.tolist()), "a key without a row, or the reverse")
        for row, block_hash in names.items():
            ensure(self.find(self._space[row], block_hash) == row, "row of a key", row=row)
        for row in np.flatnonzero(np.array(self.flags)).tolist():
            where = self.device[row], self.spaces.accounts[self._space[row]]
            ensure(self.is_void(row) or self.partitions[self.partition[row]] == where, "partition", row=row)

    def _grow(self) -> int:
        added = super()._grow()
        self._keys.add_rows(added)
        self.policy.grown(len(self.flags))
        return added


def _give_up(error: PolicyError, _now: float) -> None:
    raise error
