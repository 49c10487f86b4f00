"""Names of the tier's files: they carry the whole key, so that a restart finds what is there without opening a file.

::

    <folder>/<fingerprint>@<tenant>.kvspace/<hash>-<parent>-<bytes>.kvcache     a cache
    <folder>/<number>.kvremoved                                                 a removal that is decided
    ….kvtmp                                                                     a file that is not complete

Hash and parent are 32 hexadecimal digits (``root``: no parent), tenant and fingerprint are percent-encoded. Reading
100,000 names takes 0.4 s (2.5 s after a start of the machine); opening as many files for their headers takes three
times as long, and on an object store it would be one request each.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple
from urllib.parse import quote, unquote

from kvpool.cache.key import BlockHash, CacheKey

SPACE_SUFFIX = ".kvspace"
CACHE_SUFFIX = ".kvcache"
REMOVED_SUFFIX = ".kvremoved"
TEMPORARY_SUFFIX = ".kvtmp"
LOCK_NAME = "kvpool.lock"

_ROOT = "root"
_CACHE = re.compile(rf"([0-9a-f]{{32}})-([0-9a-f]{{32}}|{_ROOT})-(0|[1-9][0-9]{{0,18}}){re.escape(CACHE_SUFFIX)}")
_SPACE = re.compile(rf"([A-Za-z0-9_.~%-]*)@([A-Za-z0-9_.~%-]*){re.escape(SPACE_SUFFIX)}")
_REMOVED = re.compile(rf"([0-9]{{1,18}}){re.escape(REMOVED_SUFFIX)}")


class CacheName(NamedTuple):
    """What the name of a cache's file says beside its folder."""

    block_hash: BlockHash
    parent: BlockHash | None
    payload_bytes: int


@lru_cache(maxsize=1024)  # few tenants and models, asked for with each file
def space_name(tenant: str, fingerprint: str) -> str:
    """Return the folder of all keys of a tenant and fingerprint."""
    return f"{_quote(fingerprint)}@{_quote(tenant)}{SPACE_SUFFIX}"


def parse_space(name: str) -> tuple[str, str] | None:
    """Return ``(tenant, fingerprint)`` of such a folder, or None for any other name."""
    match = _SPACE.fullmatch(name)
    if match is None:
        return None
    try:
        fingerprint, tenant = (unquote(part, errors="surrogatepass") for part in match.groups())
    except UnicodeDecodeError:
        return None
    return (tenant, fingerprint) if space_name(tenant, fingerprint) == name else None


def cache_path(key: CacheKey, parent: BlockHash | None, payload_bytes: int) -> str:
    """Return where a cache lies, relative to the tier's folder."""
    above = _ROOT if parent is None else parent.hex()
    folder = space_name(key.tenant, key.fingerprint)
    return f"{folder}/{key.block_hash.hex()}-{above}-{payload_bytes}{CACHE_SUFFIX}"


def parse_cache(name: str) -> CacheName | None:
    """Return what the name of a cache's file says, or None for any other name."""
    match = _CACHE.fullmatch(name)
    if match is None:
        return None
    block_hash, above, payload_bytes = match.groups()
    return CacheName(bytes.fromhex(block_hash), None if above == _ROOT else bytes.fromhex(above), int(payload_bytes))


def removal_name(number: int) -> str:
    """Return the name of a decided removal."""
    return f"{number}{REMOVED_SUFFIX}"


def parse_removal(name: str) -> int | None:
    """Return the number of a decided removal, or None for any other name."""
    match = _REMOVED.fullmatch(name)
    return None if match is None else int(match.group(1))


def is_ours(name: str) -> bool:
    """Whether a file bears one of the tier's suffixes. All others are somebody else's and left alone."""
    return name.endswith((CACHE_SUFFIX, REMOVED_SUFFIX, TEMPORARY_SUFFIX))


def _quote(text: str) -> str:
    return quote(text, safe="", errors="surrogatepass")
