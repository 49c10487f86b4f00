"""The format of a pack: small caches of one tenant and fingerprint, written together as one file.

A table of 4 KiB, then the caches, each as its own file would be (:mod:`~kvpool.cache.disk.header`) and at a multiple of
4 KiB, so that the file system takes back the room of each by itself. The table has 64 places of 64 bytes, of which the
first describes the pack and each of the others at most one cache:

============================  =============================  =====================================================
the pack                      a cache
============================  =============================  =====================================================
``8 s``  magic, kvpack\\r\\n    ``16 s``  block hash
``u16``  format version       ``16 s``  parent's hash        or zeros
``u16``  caches               ``u64``   bytes of the payload
``u32``  0                    ``u32``   where it begins      in units of 4 KiB
``u64``  when it was written  ``u16``   bytes of its header  (when: nanoseconds of the file system's clock)
``24 s`` zeros                ``u16``   1: there is a parent
``16 s`` xxh3-128             ``16 s``  xxh3-128             of the 48 bytes before it
============================  =============================  =====================================================

Integers are little-endian. Nothing of a pack is ever written anew but the place of a cache that is removed: zeros,
which no disk writes in part, since it is within one sector.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import xxhash

from kvpool.cache.disk.names import CacheName

PACK_VERSION = 1
UNIT_BYTES = 4096
PLACE_BYTES = 64
MOST_CACHES = UNIT_BYTES // PLACE_BYTES - 1

_MAGIC = b"kvpack\r\n"
_PACK = struct.Struct("<8sHHIQ24x")
_CACHE = struct.Struct("<16s16sQIHH")
_CHECKSUM_BYTES = 16
_GONE = bytes(PLACE_BYTES)


class Packed(NamedTuple):
    """A cache in a pack."""

    name: CacheName
    """Without the pack's."""
    header_bytes: int
    start: int
    """Where it begins, in bytes."""
    place: int
    """Where the table describes it, in bytes."""

    @property
    def file_bytes(self) -> int:
        """Header and payload."""
        return self.header_bytes + self.name.payload_bytes

    @property
    def end(self) -> int:
        """Where its room ends."""
        return rounded_up(self.start + self.file_bytes)


class Table(NamedTuple):
    """What a pack says of itself."""

    written_ns: int
    caches: list[Packed]
    """Those that have not been removed, in the order in which they lie."""
    removed_places: list[int]

    def find(self, name: CacheName) -> Packed | None:
        """Return a cache by name, or None if it is not there."""
        return next((packed for packed in self.caches if packed.name == name), None)

    def holes(self, size_bytes: int) -> Iterator[tuple[int, int]]:
        """Yield the parts of a pack of so many bytes that no cache takes, as start and length."""
        start = UNIT_BYTES
        for packed in self.caches:
            if packed.start > start:
                yield start, packed.start - start
            start = packed.end
        if size_bytes > start:
            yield start, rounded_up(size_bytes) - start


def rounded_up(size_bytes: int) -> int:
    """Return the next multiple of what a file system takes back."""
    return -(-size_bytes // UNIT_BYTES) * UNIT_BYTES


def padding(size_bytes: int) -> bytes:
    """Return what stands between a cache of so many bytes and the next."""
    return bytes(rounded_up(size_bytes) - size_bytes)


def make_table(caches: Sequence[tuple[CacheName, int]], written_ns: int) -> bytes:
    """Return the table of a pack of caches, given with the bytes of their headers, that lie in this order."""
    table = bytearray(_with_checksum(_PACK.pack(_MAGIC, PACK_VERSION, len(caches), 0, written_ns)))
    start = UNIT_BYTES
    for name, header_bytes in caches:
        fields = _CACHE.pack(
            name.block_hash,
            name.parent or b"",
            name.payload_bytes,
            start // UNIT_BYTES,
            header_bytes,
            name.parent is not None,
        )
        table += _with_checksum(fields)
        start = rounded_up(start + header_bytes + name.payload_bytes)
    return bytes(table.ljust(UNIT_BYTES, b"\0"))


def parse_table(block: bytes) -> Table | None:
    """Return what the first 4 KiB of a pack say, or None if they are not what they should be."""
    if len(block) != UNIT_BYTES or not _is_sound(block[:PLACE_BYTES]):
        return None
    magic, version, count, _, written_ns = _PACK.unpack_from(block)
    if magic != _MAGIC or version != PACK_VERSION or count > MOST_CACHES:
        return None
    table = Table(written_ns, [], [])
    end = UNIT_BYTES
    for place in range(PLACE_BYTES, PLACE_BYTES * (1 + count), PLACE_BYTES):
        described = block[place : place + PLACE_BYTES]
        if described == _GONE:
            table.removed_places.append(place)
            continue
        if not _is_sound(described):
            return None
        block_hash, above, payload_bytes, unit, header_bytes, has_parent = _CACHE.unpack_from(described)
        name = CacheName(block_hash, above if has_parent else None, payload_bytes)
        packed = Packed(name, header_bytes, unit * UNIT_BYTES, place)
        if packed.start < end:
            return None
        table.caches.append(packed)
        end = packed.end
    return table


def _with_checksum(fields: bytes) -> bytes:
    return fields + xxhash.xxh3_128_digest(fields)


def _is_sound(described: bytes) -> bool:
    return xxhash.xxh3_128_digest(described[:-_CHECKSUM_BYTES]) == described[-_CHECKSUM_BYTES:]
