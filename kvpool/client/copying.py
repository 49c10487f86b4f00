"""Where the blocks of ``put_blocks`` lie that are copied into pool memory."""

from __future__ import annotations

from typing import Any

from kvpool.client.spec import ModelSpec
from kvpool.errors import TensorMismatchError
from kvpool.memory.dlpack import dtype_name


def source_addresses(spec: ModelSpec, tensors: Any, count: int) -> tuple[list[int], list[Any]]:
    """Return where each of ``count`` blocks lies now, and what must stay alive while it is read.

    Parameters
    ----------
    spec
        Whose block shape and dtype the tensors must have.
    tensors
        Torch tensors or numpy arrays in host memory: a sequence of blocks, or one with the blocks in its first
        dimension. One that is not contiguous is copied once more.

    Raises
    ------
    TensorMismatchError
        If number, shape, dtype or device do not fit.
    """
    if len(tensors) != count:
        raise TensorMismatchError(
            f"each hash needs a block: {count:,} of them, got {len(tensors):,}", asked=len(tensors)
        )
    whole = getattr(tensors, "shape", None)
    if whole is not None and (stacked := _contiguous(tensors)) is not None:
        _check(spec, stacked, tuple(whole[1:]))
        first, step = _address(stacked), spec.block_size_bytes or 0
        return [first + step * number for number in range(count)], [stacked]
    blocks = [_contiguous(block) if hasattr(block, "shape") else None for block in tensors]
    for block in blocks:
        if block is None:
            raise TensorMismatchError("blocks are torch tensors or numpy arrays in host memory")
        _check(spec, block, tuple(block.shape))
    return [_address(block) for block in blocks], blocks


def _contiguous(block: Any) -> Any:
    if hasattr(block, "data_ptr"):
        if block.device.type != "cpu":
            raise TensorMismatchError(f"blocks must be in host memory, this one is on {block.device}")
        # A conjugated or negated view keeps the bytes of what it was made of.
        return block.resolve_conj().resolve_neg().contiguous()
    if hasattr(block, "ctypes"):
        return block if block.flags.c_contiguous else block.copy(order="C")
    return None


def _address(block: Any) -> int:
    return int(block.data_ptr() if hasattr(block, "data_ptr") else block.ctypes.data)


def _check(spec: ModelSpec, block: Any, shape: tuple[int, ...]) -> None:
    found = dtype_name(block.dtype)
    if shape != spec.shape or found != spec.block_dtype:
        raise TensorMismatchError(
            f"model {spec.name!r} has blocks of {spec.block_dtype}{list(spec.shape)}, got {found}{list(shape)}",
            asked=f"{found}{list(shape)}",
        )
