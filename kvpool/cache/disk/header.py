"""The format of a cache's file: a header that names the content, then the bytes.

======================  ========================================================================================
``8 s``                 magic, ``kvpool\\r\\n``
``u16``                 format version
``u16``                 1: there is a parent
``u16 u16``             bytes of tenant and fingerprint
``u64``                 bytes of the payload
``16 s``                block hash
``16 s``                hash of the parent, or zeros
``16 s``                xxh3-128 of the payload
``s s``                 tenant, fingerprint (UTF-8)
``16 s``                xxh3-128 of all of the header before it
======================  ========================================================================================

Integers are little-endian. The length of a header follows from its key. (xxh3-128 runs at 56 GB/s on one core for
2 MiB that are in the cache of the processor: it costs what reading the bytes from memory costs.)
"""

from __future__ import annotations

import struct
from functools import lru_cache

import xxhash

from kvpool.cache.key import BlockHash, CacheKey
from kvpool.errors import InvalidRequestError

FORMAT_VERSION = 1

_MAGIC = b"kvpool\r\n"  # a transfer that changes line ends is found at once
_FIELDS = struct.Struct("<8sHHHHQ16s16s16s")
_CHECKSUM_BYTES = 16
_MOST_NAME_BYTES = (1 << 16) - 1
_HAS_PARENT = 1


class BadFileError(Exception):
    """A file that is not what its name says. ``cause``: ``size foreign version header key checksum``."""

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause


def header_bytes(key: CacheKey) -> int:
    """Return the length of the header of this key's file."""
    return _header_bytes(key.tenant, key.fingerprint)


def make_header(key: CacheKey, parent: BlockHash | None, payload: memoryview) -> bytes:
    """Return the header of a file with this payload.

    Raises
    ------
    InvalidRequestError
        If the names of tenant or fingerprint exceed 65,535 bytes.
    """
    tenant, fingerprint = _encoded(key.tenant, key.fingerprint)
    if max(len(tenant), len(fingerprint)) > _MOST_NAME_BYTES:
        raise InvalidRequestError(f"names of tenants and fingerprints have at most {_MOST_NAME_BYTES} bytes")
    fields = _FIELDS.pack(
        _MAGIC,
        FORMAT_VERSION,
        0 if parent is None else _HAS_PARENT,
        len(tenant),
        len(fingerprint),
        payload.nbytes,
        key.block_hash,
        parent or b"",
        xxhash.xxh3_128_digest(payload),
    )
    named = fields + tenant + fingerprint
    return named + xxhash.xxh3_128_digest(named)


def check_file(
    file_bytes: int, header: bytes | bytearray, payload: memoryview, key: CacheKey, parent: BlockHash | None
) -> None:
    """Make sure that a file that was read is whole and holds just this key's bytes.

    Parameters
    ----------
    file_bytes
        Size of the file as the store tells it.
    header, payload
        What was read: all of the file when its size is right.

    Raises
    ------
    BadFileError
        If not.
    """
    if file_bytes != len(header) + payload.nbytes:
        raise BadFileError("size")
    if header == make_header(key, parent, payload):
        return
    magic, version, flags, tenant_bytes, fingerprint_bytes, payload_bytes, block_hash, above, checksum = (
        _FIELDS.unpack_from(header)
    )
    if magic != _MAGIC:
        raise BadFileError("foreign")
    if version != FORMAT_VERSION:
        raise BadFileError("version")
    named = bytes(header[:-_CHECKSUM_BYTES])
    if xxhash.xxh3_128_digest(named) != header[-_CHECKSUM_BYTES:]:
        raise BadFileError("header")
    names = named[_FIELDS.size :]
    if (
        CacheKey(_decode(names[:tenant_bytes]), _decode(names[tenant_bytes:]), block_hash) != key
        or len(names) != tenant_bytes + fingerprint_bytes
        or (above if flags & _HAS_PARENT else None) != parent
        or payload_bytes != payload.nbytes
    ):
        raise BadFileError("key")
    if xxhash.xxh3_128_digest(payload) != checksum:
        raise BadFileError("checksum")


@lru_cache(maxsize=1024)  # few tenants and models, asked for with each file
def _encoded(tenant: str, fingerprint: str) -> tuple[bytes, bytes]:
    return _encode(tenant), _encode(fingerprint)


@lru_cache(maxsize=1024)
def _header_bytes(tenant: str, fingerprint: str) -> int:
    return _FIELDS.size + sum(map(len, _encoded(tenant, fingerprint))) + _CHECKSUM_BYTES


def _encode(name: str) -> bytes:
    return name.encode("utf-8", "surrogatepass")


def _decode(name: bytes) -> str:
    return name.decode("utf-8", "surrogatepass")
