"""The keys of published caches: by space and hash the row, and by row the hash."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from kvpool.cache.chains import unique
from kvpool.cache.key import SHARDS, BlockHash, KeyShards, key_shards
from kvpool.cache.table import NO_ROW, Rows
from kvpool.errors import ensure


class KeyTable:
    """Rows by key and keys by row. Equal hashes in different spaces are different keys.

    Whatever is in one of :attr:`rows` and :attr:`hashes` is in the other, too. Both are open to the index, which makes
    no call for each key where it adds and removes caches.
    """

    def __init__(self) -> None:
        self.rows: list[KeyShards] = []
        """By space, then by hash."""
        self.hashes: list[BlockHash | None] = []
        """By row; None: it is not published."""

    def __len__(self) -> int:
        """Keys of all spaces."""
        return sum(len(shard) for shards in self.rows for shard in shards)

    def add_spaces(self, count: int) -> None:
        """Let there be so many spaces, at least."""
        while len(self.rows) < count:
            self.rows.append(key_shards())

    def add_rows(self, count: int) -> None:
        """Let there be so many more rows."""
        self.hashes.extend([None] * count)

    def find(self, space: int, block_hash: BlockHash) -> int:
        """Return the row published under a key, or -1."""
        return self.rows[space][block_hash[-1] % SHARDS].get(block_hash, NO_ROW)

    def find_all(self, space: int, hashes: Iterable[BlockHash]) -> list[int]:
        """Return for each key the row published under it, or -1."""
        shards = self.rows[space]
        return [shards[block_hash[-1] % SHARDS].get(block_hash, NO_ROW) for block_hash in hashes]

    def match(self, space: int, hashes: Sequence[BlockHash]) -> list[int]:
        """Return the rows of the leading run of ``hashes`` that is published."""
        shards = self.rows[space]
        rows = []
        for block_hash in hashes:
            row = shards[block_hash[-1] % SHARDS].get(block_hash)
            if row is None:
                break
            rows.append(row)
        return rows

    def is_empty(self, space: int) -> bool:
        """Whether nothing is published in a space."""
        return not any(self.rows[space])

    def ensure_free(self, space: int, hashes: Sequence[BlockHash]) -> None:
        """Raise InvariantError if one of these keys is taken, or two of them are the same."""
        shards = self.rows[space]
        for block_hash in hashes:
            shard = shards[block_hash[-1] % SHARDS]
            if block_hash in shard:
                ensure(False, "publishing under a key that is taken", holder=shard[block_hash])
        if len(set(hashes)) < len(hashes):
            ensure(False, "publishing two caches under one key", caches=len(hashes))

    def drop(self, space: int, row: int) -> None:
        """Take the key off a row of a space, if it has one."""
        block_hash = self.hashes[row]
        if block_hash is not None:
            del self.rows[space][block_hash[-1] % SHARDS][block_hash]
            self.hashes[row] = None

    def drop_all(self, rows: Rows, spaces: Rows) -> None:
        """Take the keys off many rows, each of the space in the same place of ``spaces``."""
        hashes = self.hashes
        for space in unique(spaces).tolist():
            shards = self.rows[space]
            for row in rows[spaces == space].tolist():
                block_hash = hashes[row]
                if block_hash is not None:
                    del shards[block_hash[-1] % SHARDS][block_hash]
                    hashes[row] = None

    def move(self, rows: Iterable[int], space: int, to: int) -> None:
        """Let the keys of some rows of a space be in another one."""
        known, there, hashes = self.rows[space], self.rows[to], self.hashes
        for row in rows:
            block_hash = hashes[row]
            if block_hash is not None:
                shard = block_hash[-1] % SHARDS
                there[shard][block_hash] = known[shard].pop(block_hash)

    def move_all(self, space: int, to: int) -> None:
        """Let all keys of a space be in another one, which is empty; takes no time, whatever its size."""
        ensure(self.is_empty(to), "keys go to a space that is not empty", space=to)
        self.rows[to] = self.rows[space]
        self.rows[space] = key_shards()

    def published(self) -> Iterator[tuple[int, BlockHash]]:
        """Yield row and hash of all that is published. O(rows), for tests."""
        return ((row, block_hash) for row, block_hash in enumerate(self.hashes) if block_hash is not None)
