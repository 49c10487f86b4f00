"""Sizes and counts as people write them: ``"256MiB"`` to bytes and back, ``"1 cache"``, ``"1,000 caches"``."""

from __future__ import annotations

import re

from kvpool.errors import InvalidSizeError

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40

_UNITS = {
    "": 1,
    "b": 1,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "tib": TIB,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}
_TEXT = re.compile(r"\s*([0-9]{1,30}(?:\.[0-9]{1,30})?)\s*([a-zA-Z]*)\s*")  # bounded: Python refuses 4,301 digits


def parse_size(size: int | str, least_bytes: int = 1) -> int:
    """Return ``size`` in bytes.

    Parameters
    ----------
    size
        Bytes as an integer, or text with a unit: ``"64KiB"``, ``"1.5 GiB"``, ``"500MB"``.
    least_bytes
        What it must be at least.

    Raises
    ------
    InvalidSizeError
        If it is not readable, or less than ``least_bytes``.
    """
    if isinstance(size, bool) or not isinstance(size, (int, str)):
        raise InvalidSizeError(f"a size is bytes (int) or text such as '256MiB', not {size!r}", asked=repr(size))
    if isinstance(size, str):
        match = _TEXT.fullmatch(size)
        unit = _UNITS.get(match.group(2).lower()) if match else None
        if match is None or unit is None:
            raise InvalidSizeError(
                f"cannot read the size {size!r}: write a positive number and a unit (KiB, MiB, GiB; kB, MB, GB)",
                asked=size,
            )
        size_bytes = int(float(match.group(1)) * unit) if "." in match.group(1) else int(match.group(1)) * unit
    else:
        size_bytes = size
    if size_bytes < least_bytes:
        least = format_count(least_bytes, "byte")
        raise InvalidSizeError(f"a size must be at least {least}, asked for {size_bytes}", asked_bytes=size_bytes)
    return size_bytes


def format_size(size_bytes: int) -> str:
    """Return ``size_bytes`` as text in the largest binary unit that keeps it at least 1 (``"1.5 GiB"``)."""
    for unit, name in ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(size_bytes) >= unit:
            return f"{size_bytes / unit:.4g} {name}"
    return f"{size_bytes} B"


def round_up(size_bytes: int, multiple: int) -> int:
    """Return the smallest multiple of ``multiple`` that is at least ``size_bytes``."""
    return -(-size_bytes // multiple) * multiple


def format_count(count: int, noun: str) -> str:
    """Return a count with its noun, which takes an s but for one: ``"1 cache"``, ``"0 caches"``, ``"1,000 caches"``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
