"""The format of a pack: small caches of one tenant and fingerprint, written together as one file.

A table, then the caches, each as its own file would be (:mod:`~kvpool.cache.disk.header`) and at a multiple of 4 KiB,
so that the file system takes back the room of each by itself. The table has places of 64 bytes, of which the first
describes the pack and each of the others one cache:

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
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import xxhash

from kvpool.cache.disk.file_names import CacheName

PACK_VERSION = 1
UNIT_BYTES = 4096
PLACE_BYTES = 64
MOST_CACHES = 255
MOST_TABLE_BYTES = PLACE_BYTES * (1 + MOST_CACHES)

_MAGIC = b"kvpack\r\n"
_PACK = struct.Struct("<8sHHIQ24x")
_CACHE = struct.Struct("<16s16sQIHH")
_CHECKSUM_BYTES = 16
_GONE = bytes(PLACE_BYTES)
_ZEROS = memoryview(bytes(UNIT_BYTES))


class BadTableError(Exception):
    """The table of a pack is not what it should be: nothing can be told of its caches."""


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
    end: int
    """Where the table's room ends, in bytes."""
    caches: list[Packed]
    """Those that have not been removed, in the order in which they lie."""
    removed_places: list[int]

    def holes(self, size_bytes: int) -> Iterator[tuple[int, int]]:
        """Yield the parts of a pack of so many bytes that no cache takes, as start and length."""
        start = self.end
        for packed in self.caches:
            if packed.start > start:
                yield start, packed.start - start
            start = packed.end
        if size_bytes > start:
            yield start, rounded_up(size_bytes) - start


def rounded_up(size_bytes: int) -> int:
    """Return the next multiple of what a file system takes back."""
    return -(-size_bytes // UNIT_BYTES) * UNIT_BYTES


def padding(size_bytes: int) -> memoryview:
    """Return what stands between a cache of so many bytes and the next."""
    return _ZEROS[: rounded_up(size_bytes) - size_bytes]


def make_table(caches: Sequence[tuple[CacheName, int]], written_ns: int) -> bytes:
    """Return the table of a pack of caches, given with the bytes of their headers, that lie in this order."""
    table = bytearray(_with_checksum(_PACK.pack(_MAGIC, PACK_VERSION, len(caches), 0, written_ns)))
    first = start = rounded_up(PLACE_BYTES * (1 + len(caches)))
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
    return bytes(table.ljust(first, b"\0"))


def parse_table(block: bytes) -> Table | None:
    """Return what the table of a pack says, or None if it is not what it should be.

    Parameters
    ----------
    block
        The first bytes of the pack, as many as a table has at most, or all that there are.
    """
    described = _parse_pack(block)
    if described is None:
        return None
    written_ns, count = described
    end = rounded_up(PLACE_BYTES * (1 + count))
    table = Table(written_ns, end, [], [])
    for place in range(PLACE_BYTES, PLACE_BYTES * (1 + count), PLACE_BYTES):
        if block[place : place + PLACE_BYTES] == _GONE:
            table.removed_places.append(place)
            continue
        packed = _parse_cache(block, place)
        if packed is None or packed.start < end:
            return None
        table.caches.append(packed)
        end = packed.end
    return table


def find_packed(block: bytes, name: CacheName) -> Packed | None:
    """Return one cache by name, or None if it is not there: 10 µs, where :func:`parse_table` takes 600.

    Raises
    ------
    BadTableError
        If the table is not what it should be, as far as that was looked at.
    """
    described = _parse_pack(block)
    if described is None:
        raise BadTableError
    place = block.find(name.block_hash, PLACE_BYTES)
    while place != -1 and place <= PLACE_BYTES * described[1]:
        inside = place % PLACE_BYTES
        if not inside and block[place : place + PLACE_BYTES] != _GONE:
            packed = _parse_cache(block, place)
            if packed is None:
                raise BadTableError
            if packed.name == name:
                return packed
        place = block.find(name.block_hash, place - inside + PLACE_BYTES)
    return None


def has_others(block: bytes, places: Iterable[int]) -> bool:
    """Whether a table, given as to :func:`find_packed`, has other caches than those at these places."""
    described = _parse_pack(block)
    if described is None:
        raise BadTableError
    left = bytearray(block[: PLACE_BYTES * (1 + described[1])])
    for place in places:
        left[place : place + PLACE_BYTES] = _GONE
    return any(left[PLACE_BYTES:])


def _parse_pack(block: bytes) -> tuple[int, int] | None:
    """Return when a pack was written, and how many caches it was written with."""
    if len(block) < PLACE_BYTES or not _is_sound(block[:PLACE_BYTES]):
        return None
    magic, version, count, _, written_ns = _PACK.unpack_from(block)
    whole = count <= MOST_CACHES and len(block) >= PLACE_BYTES * (1 + count)
    if magic != _MAGIC or version != PACK_VERSION or not whole:
        return None
    return written_ns, count


def _parse_cache(block: bytes, place: int) -> Packed | None:
    if not _is_sound(block[place : place + PLACE_BYTES]):
        return None
    block_hash, above, payload_bytes, unit, header_bytes, has_parent = _CACHE.unpack_from(block, place)
    name = CacheName(block_hash, above if has_parent else None, payload_bytes)
    return Packed(name, header_bytes, unit * UNIT_BYTES, place)


def _with_checksum(fields: bytes) -> bytes:
    return fields + xxhash.xxh3_128_digest(fields)


def _is_sound(described: bytes) -> bool:
    return xxhash.xxh3_128_digest(described[:-_CHECKSUM_BYTES]) == described[-_CHECKSUM_BYTES:]
