"""Tensors over mapped memory, without a copy, by DLPack.

DLPack and not ``torch.frombuffer`` (which does not keep a mapping alive) or ``__cuda_array_interface__`` (no
bfloat16). The memory stays the caller's, who is told once the last tensor or view over it is gone.

A torch tensor over a read-only view does not know that it is one: a write through it is a fault (SIGSEGV). numpy
arrays over such a view are marked read-only.
"""

from __future__ import annotations

import atexit
import ctypes
import itertools
import logging
import math
import operator
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from kvpool.errors import TensorMismatchError
from kvpool.memory.backend import Access

if TYPE_CHECKING:
    import numpy
    import torch

CPU = (1, 0)  # kDLCPU, number 0

_INT, _UINT, _FLOAT, _BFLOAT, _COMPLEX, _BOOL = 0, 1, 2, 4, 5, 6  # DLDataTypeCode
_FLAG_READ_ONLY = 1
_VERSION = (1, 0)

_log = logging.getLogger(__name__)


class DType(NamedTuple):
    """A dtype in DLPack's terms, and numpy's name for it (none: numpy does not have it)."""

    code: int
    bits: int
    numpy: str | None


DTYPES: dict[str, DType] = {
    "bool": DType(_BOOL, 8, "|b1"),
    "bfloat16": DType(_BFLOAT, 16, None),
    "float8_e4m3fn": DType(10, 8, None),
    "float8_e5m2": DType(12, 8, None),
    **{f"float{bits}": DType(_FLOAT, bits, f"<f{bits // 8}") for bits in (16, 32, 64)},
    **{f"complex{bits}": DType(_COMPLEX, bits, f"<c{bits // 8}") for bits in (64, 128)},
    **{f"int{bits}": DType(_INT, bits, f"<i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": DType(_UINT, bits, f"<u{bits // 8}") for bits in (8, 16, 32, 64)},
}


class _Tensor(ctypes.Structure):
    """``DLTensor``."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    """``DLManagedTensor``."""

    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


class _ManagedVersioned(ctypes.Structure):
    """``DLManagedTensorVersioned``."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


# What a consumer holds: the structure, its shape and strides, and the source (whose end tells that all are gone).
_exports: dict[int, tuple[_Managed | _ManagedVersioned, Any, MappedTensorSource]] = {}
_numbers = itertools.count(1)


class MappedTensorSource:
    """Mapped memory with a shape and a dtype, which torch, numpy and others take as it is.

    Parameters
    ----------
    address
        Of the first element, accessible for as long as ``on_released`` was not called.
    shape
        C-contiguous.
    dtype
        A key of :data:`DTYPES`, or a torch or numpy dtype.
    access
        Of the view that the address lies in.
    on_released
        Called exactly once, from whichever thread, when this object and all tensors, arrays and views over it are
        gone; not when the interpreter ends before. It must be short, and what it raises is logged.
    device
        DLPack's device type and number.

    Raises
    ------
    TensorMismatchError
        For an unknown dtype or a negative dimension.
    """

    __slots__ = ("_on_released", "access", "address", "device", "dtype", "shape")

    def __init__(
        self,
        address: int,
        shape: Sequence[int],
        dtype: object,
        access: Access,
        on_released: Callable[[], None],
        device: tuple[int, int] = CPU,
    ) -> None:
        self.address = address
        self.shape = tuple(shape)
        self.dtype = dtype_name(dtype)
        self.access = access
        self.device = device
        if self.shape and min(self.shape) < 0:
            raise TensorMismatchError(f"a shape has no negative dimensions: {self.shape}", shape=self.shape)
        # Last: a source that was refused releases nothing.
        self._on_released = on_released

    def __del__(self) -> None:
        on_released = getattr(self, "_on_released", None)
        # At the end of the interpreter half of it is gone already; the owner sees the end of the process.
        if on_released is None or sys.is_finalizing():
            return
        try:
            on_released()
        except Exception:  # noqa: BLE001 - it runs wherever the last view dies, where nobody can handle it
            _log.exception("releasing mapped memory at %#x failed", self.address)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(
        self,
        *,
        stream: object = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> object:
        if copy or (dl_device is not None and tuple(dl_device) != self.device):
            raise BufferError("mapped memory is exported in place only: clone the tensor instead")
        ndim = len(self.shape)
        # Shape, then strides (in elements).
        extents = (ctypes.c_int64 * (2 * ndim))(*self.shape)
        stride = 1
        for axis in range(ndim - 1, -1, -1):
            extents[ndim + axis] = stride
            stride *= self.shape[axis]
        first = ctypes.addressof(extents)
        code, bits, _ = DTYPES[self.dtype]
        tensor = _Tensor(self.address, *self.device, ndim, code, bits, 1, first, first + 8 * ndim, 0)
        number = next(_numbers)
        managed: _Managed | _ManagedVersioned
        if max_version is not None and max_version[0] >= _VERSION[0]:
            flags = _FLAG_READ_ONLY if self.access is not Access.READ_WRITE else 0
            managed, name = _ManagedVersioned(*_VERSION, number, _DELETER, flags, tensor), _NAME_VERSIONED
        else:
            managed, name = _Managed(tensor, number, _DELETER_UNVERSIONED), _NAME
        _exports[number] = (managed, extents, self)
        return _capsule_new(ctypes.addressof(managed), name, _CAPSULE_DESTRUCTOR)

    @property
    def __array_interface__(self) -> dict[str, Any]:
        typestr = DTYPES[self.dtype].numpy
        if typestr is None:
            raise AttributeError(f"numpy has no dtype {self.dtype}")
        return {
            "version": 3,
            "shape": self.shape,
            "typestr": typestr,
            "data": (self.address, self.access is not Access.READ_WRITE),
        }


def as_torch(source: MappedTensorSource) -> torch.Tensor:
    """Return a torch tensor over the memory of ``source``."""
    import torch

    tensor: torch.Tensor = torch.utils.dlpack.from_dlpack(source)
    return tensor


def as_numpy(source: MappedTensorSource) -> numpy.ndarray[Any, Any]:
    """Return a numpy array over the memory of ``source``, read-only over a read-only view.

    Raises
    ------
    TensorMismatchError
        If numpy does not have the dtype.
    """
    import numpy

    if DTYPES[source.dtype].numpy is None:
        raise TensorMismatchError(f"numpy has no dtype {source.dtype}: take a torch tensor", dtype=source.dtype)
    return numpy.asarray(source)


def dtype_name(dtype: object) -> str:
    """Return the name (a key of :data:`DTYPES`) of a dtype that is given by name, by torch or by numpy.

    Raises
    ------
    TensorMismatchError
        If it is none of them.
    """
    name = dtype.__name__ if isinstance(dtype, type) else str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise TensorMismatchError(f"unknown dtype {dtype!r}: one of {', '.join(sorted(DTYPES))}", dtype=name)
    return name


def check_shape(shape: object) -> tuple[int, ...]:
    """Return the dimensions of a tensor over memory, given as numpy takes them: one number, or several.

    Raises
    ------
    TensorMismatchError
        If they are no whole numbers of at least 1.
    """
    try:
        dimensions = tuple(map(operator.index, shape)) if isinstance(shape, Iterable) else (operator.index(shape),)  # type: ignore[arg-type]
    except TypeError:
        raise TensorMismatchError(
            f"a shape is whole numbers, such as (16, 128) or 16, not {shape!r}", shape=repr(shape)
        ) from None
    if dimensions and min(dimensions) < 1:
        raise TensorMismatchError(
            f"a tensor over memory has dimensions of at least 1, no negative or open ones: {dimensions}",
            shape=dimensions,
        )
    return dimensions


def tensor_bytes(shape: Sequence[int], dtype: object) -> int:
    """Return the size in bytes of a tensor of that shape and dtype."""
    return math.prod(shape) * DTYPES[dtype_name(dtype)].bits // 8


def _delete_versioned(managed: int) -> None:
    _exports.pop(_ManagedVersioned.from_address(managed).context, None)


def _delete(managed: int) -> None:
    _exports.pop(_Managed.from_address(managed).context, None)


def _destroy_capsule(capsule: int) -> None:
    """Release what nobody took: a consumer renames the capsule."""
    if _capsule_is_valid(capsule, _NAME_VERSIONED):
        _delete_versioned(_capsule_pointer(capsule, _NAME_VERSIONED))
    elif _capsule_is_valid(capsule, _NAME):
        _delete(_capsule_pointer(capsule, _NAME))


@atexit.register
def _abandon_exports() -> None:
    """Leave the tensors that outlive the interpreter alone: their deleter would call into a dead one."""
    for export in list(_exports.values()):
        export[0].deleter = None
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(export))


_NAME, _NAME_VERSIONED = b"dltensor", b"dltensor_versioned"
# Consumers call deleters from any thread, without the interpreter lock (CFUNCTYPE takes it); capsules die under it.
_deleters = [ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function) for function in (_delete_versioned, _delete)]
_DELETER, _DELETER_UNVERSIONED = (ctypes.cast(function, ctypes.c_void_p).value for function in _deleters)
# The dying capsule goes by address: as an object it would be brought to life and die again.
_CAPSULE_DESTRUCTOR = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(_destroy_capsule)
_capsule_new = ctypes.pythonapi.PyCapsule_New
_capsule_new.restype = ctypes.py_object
_capsule_new.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_capsule_is_valid = ctypes.pythonapi.PyCapsule_IsValid
_capsule_is_valid.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
