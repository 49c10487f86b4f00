"""Which bytes of a cache a part of a tensor has."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any

from kvpool.errors import InvalidRequestError
from kvpool.memory.dlpack import check_shape, tensor_bytes
from kvpool.memory.extents import union


def byte_ranges(dtype: Any, shape: Sequence[int] | int, index: Any, *, offset_bytes: int = 0) -> list[tuple[int, int]]:
    """Return the bytes of ``tensor[index]`` within a cache, for :meth:`VirtualKVCache.back` and ``unback``.

    ::

        # Keys and values of blocks 64 to 127, where the tensor has the dimension of its blocks second:
        await cache.back(byte_ranges(torch.bfloat16, (2, 4096, 16, 8, 128), (slice(None), slice(64, 128))))

    Parameters
    ----------
    dtype, shape
        Of the whole tensor, as given to :meth:`VirtualKVCache.tensor`.
    index
        What is meant of it: an integer or a slice without a step for each of the first dimensions (``numpy.s_`` makes
        one); all of the others.
    offset_bytes
        Where the tensor begins in the cache.

    Returns
    -------
    list
        ``(start, end)`` of each contiguous run, ascending: one for each combination of the indexes in front of the last
        that leaves something out; none of an empty slice.

    Raises
    ------
    InvalidRequestError
        If the index does not fit the shape.
    TensorMismatchError
        If shape or dtype are none.
    """
    shape = check_shape(shape)
    parts = [_part(each, size) for each, size in zip(_indexes(index, shape), shape, strict=False)]
    while parts and len(parts[-1]) == shape[len(parts) - 1]:
        parts.pop()  # all of it: the run goes on
    if not all(parts):
        return []  # an empty slice
    if not parts:
        return [(offset_bytes, offset_bytes + tensor_bytes(shape, dtype))]
    # Of each dimension: how many bytes one step in it takes.
    strides = [tensor_bytes(shape[place + 1 :], dtype) for place in range(len(parts))]
    run_bytes = len(parts[-1]) * strides[-1]
    found = []
    for steps in itertools.product(*parts[:-1]):
        start = offset_bytes + sum(map(operator.mul, [*steps, parts[-1].start], strides))
        found.append((start, start + run_bytes))
    return list(union(found))


def _indexes(index: Any, shape: tuple[int, ...]) -> tuple[Any, ...]:
    indexes = index if isinstance(index, tuple) else (index,)
    if len(indexes) > len(shape):
        raise InvalidRequestError(f"{len(indexes)} indexes for the {len(shape)} dimensions of {shape}")
    return indexes


def _part(index: Any, size: int) -> range:
    try:
        if isinstance(index, slice):
            part = range(size)[index]
        else:
            number = operator.index(index)
            part = range(size)[number : number + 1 or None]
    except TypeError:
        raise InvalidRequestError(f"an index is a number or a slice, not {index!r}") from None
    if part.step != 1 or not (part or isinstance(index, slice)):
        raise InvalidRequestError(f"{index!r} of a dimension of {size} is outside of it, or has a step")
    return part
