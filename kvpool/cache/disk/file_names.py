"""Names of the tier's files: they carry the whole key, so that a restart finds what is there without opening a file.

::

    <folder>/<fingerprint>@<tenant>.kvspace/<hash>-<parent>-<bytes>.kvcache     a cache
    <folder>/<fingerprint>@<tenant>.kvspace/<32 digits>.kvpack                  a pack: small caches in one file
    <folder>/<fingerprint>@<tenant>.kvspace/names.kvmodels                      which models these are of
    <folder>/<number>.kvremoved                                                 a removal that is decided
    ….kvtmp                                                                     a file that is not complete

Hash and parent are 32 hexadecimal digits (``root``: no parent), tenant and fingerprint are percent-encoded. A cache in
a pack is told by the names of both, ``<32 digits>.kvpack:<hash>-<parent>-<bytes>.kvcache``. Reading
100,000 names takes 0.4 s (2.5 s after a start of the machine); opening as many files for their headers takes three
times as long, and on an object store it would be one request each.
"""

from __future__ import annotations

import re
import secrets
from functools import lru_cache
from typing import NamedTuple
from urllib.parse import quote, unquote

from kvpool.cache.key import BlockHash, CacheKey

SPACE_SUFFIX = ".kvspace"
CACHE_SUFFIX = ".kvcache"
PACK_SUFFIX = ".kvpack"
MODELS_SUFFIX = ".kvmodels"
REMOVED_SUFFIX = ".kvremoved"
TEMPORARY_SUFFIX = ".kvtmp"
LOCK_NAME = "kvpool.lock"
MODELS_NAME = f"names{MODELS_SUFFIX}"

_ROOT = "root"
_IN_PACK = ":"  # never in the name of a file: what could have one is percent-encoded
_PACK = rf"[0-9a-f]{{32}}{re.escape(PACK_SUFFIX)}"
_CACHE = re.compile(
    rf"(?:({_PACK}){_IN_PACK})?([0-9a-f]{{32}})-([0-9a-f]{{32}}|{_ROOT})-(0|[1-9][0-9]{{0,18}}){re.escape(CACHE_SUFFIX)}"
)
_SPACE = re.compile(rf"([A-Za-z0-9_.~%-]*)@([A-Za-z0-9_.~%-]*){re.escape(SPACE_SUFFIX)}")
_REMOVED_DIGITS = 18
_REMOVED = re.compile(rf"([0-9]{{1,{_REMOVED_DIGITS}}}){re.escape(REMOVED_SUFFIX)}")


class CacheName(NamedTuple):
    """What the name of a cache's file says beside its folder."""

    block_hash: BlockHash
    parent: BlockHash | None
    payload_bytes: int
    pack: str | None = None
    """The name of the pack that it lies in; None if it has a file of its own."""


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


def models_path(space: str) -> str:
    """Return where it is said which models the content of a folder is of."""
    return f"{space}/{MODELS_NAME}"


def cache_path(key: CacheKey, name: CacheName) -> str:
    """Return where a cache lies, relative to the tier's folder."""
    return f"{space_name(key.tenant, key.fingerprint)}/{cache_name(name)}"


def cache_name(name: CacheName) -> str:
    """Return what tells a cache from the others of its folder."""
    block_hash, parent, payload_bytes, pack = name
    above = _ROOT if parent is None else parent.hex()
    file = f"{block_hash.hex()}-{above}-{payload_bytes}{CACHE_SUFFIX}"
    return file if pack is None else packed_path(pack, file)


def parse_cache(name: str) -> CacheName | None:
    """Return what the name of a cache says, or None for any other name."""
    match = _CACHE.fullmatch(name)
    if match is None:
        return None
    pack, block_hash, above, payload_bytes = match.groups()
    parent = None if above == _ROOT else bytes.fromhex(above)
    return CacheName(bytes.fromhex(block_hash), parent, int(payload_bytes), pack)


def new_pack_name() -> str:
    """Return a name that no pack ever had: what is to be removed is told by it, also in a later life."""
    return secrets.token_hex(16) + PACK_SUFFIX


def packed_path(pack: str, file: str) -> str:
    """Return where a cache lies in the pack at a path: what :func:`split_pack` splits."""
    return f"{pack}{_IN_PACK}{file}"


def is_pack(name: str) -> bool:
    """Whether a file's name is that of a pack."""
    return re.fullmatch(_PACK, name) is not None


def split_pack(path: str) -> tuple[str, str] | None:
    """Return the path of a pack and the name of the cache in it, or None for the path of a file."""
    pack, separator, file = path.rpartition(_IN_PACK)
    return (pack, file) if separator and pack.endswith(PACK_SUFFIX) else None


def new_removal_number() -> int:
    """Return a number that no removal ever had.

    Not the next one: where nothing locks a folder that an earlier pool has left, several devices may remove there.
    """
    return secrets.randbelow(10**_REMOVED_DIGITS)


def removal_name(number: int) -> str:
    """Return the name of a decided removal."""
    return f"{number}{REMOVED_SUFFIX}"


def parse_removal(name: str) -> int | None:
    """Return the number of a decided removal, or None for any other name."""
    match = _REMOVED.fullmatch(name)
    return None if match is None else int(match.group(1))


def is_ours(name: str) -> bool:
    """Whether a file bears one of the tier's suffixes. All others are somebody else's and left alone."""
    return name.endswith((CACHE_SUFFIX, PACK_SUFFIX, MODELS_SUFFIX, REMOVED_SUFFIX, TEMPORARY_SUFFIX))


def _quote(text: str) -> str:
    return quote(text, safe="", errors="surrogatepass")
