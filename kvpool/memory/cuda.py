"""The CUDA driver, asked by ctypes what it can do: nothing else of CUDA is used in this version.

Only what needs no context is asked, so that asking takes no memory on a GPU. (Has run against the driver 580.159, CUDA
13.0, of an H100, with the GPU visible and hidden.)
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

LIBRARY = "libcuda.so.1"

# Of CUresult and CUdevice_attribute (cuda.h).
_SUCCESS, _NO_DEVICE = 0, 100
_VIRTUAL_MEMORY_MANAGEMENT = 102
_POSIX_FILE_DESCRIPTORS = 103


@dataclass(frozen=True, slots=True)
class Driver:
    """What the driver says.

    ``version`` is the CUDA version it supports, None when the library cannot be loaded; ``error`` is why it cannot be
    used. ``unmappable`` and ``unshareable`` are the numbers of the GPUs without virtual memory management and without
    memory that is shared by descriptors; a pool needs both.
    """

    version: str | None = None
    gpus: int = 0
    unmappable: tuple[int, ...] = ()
    unshareable: tuple[int, ...] = ()
    error: str | None = None


def probe_driver(library: str = LIBRARY) -> Driver:
    """Ask the driver of this machine. Never raises: what fails is in :attr:`Driver.error`."""
    try:
        cuda = ctypes.CDLL(library)
    except OSError as failure:
        return Driver(error=str(failure))
    try:
        return _probe(cuda)
    except AttributeError as failure:  # a library of that name without the driver's functions
        return Driver(error=str(failure))


def _probe(cuda: ctypes.CDLL) -> Driver:
    version = ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(version))  # works before cuInit
    text = f"{version.value // 1000}.{version.value % 1000 // 10}"
    code = cuda.cuInit(0)
    if code == _NO_DEVICE:
        return Driver(text)
    if code != _SUCCESS:
        return Driver(text, error=f"cuInit: {_describe(cuda, code)}")
    count = ctypes.c_int()
    code = cuda.cuDeviceGetCount(ctypes.byref(count))
    if code != _SUCCESS:
        return Driver(text, error=f"cuDeviceGetCount: {_describe(cuda, code)}")
    gpus = range(count.value)
    lacks = {
        attribute: tuple(gpu for gpu in gpus if not _attribute(cuda, attribute, gpu))
        for attribute in (_VIRTUAL_MEMORY_MANAGEMENT, _POSIX_FILE_DESCRIPTORS)
    }
    return Driver(text, count.value, lacks[_VIRTUAL_MEMORY_MANAGEMENT], lacks[_POSIX_FILE_DESCRIPTORS])


def _attribute(cuda: ctypes.CDLL, attribute: int, gpu: int) -> int:
    """Return an attribute of a GPU; 0 where the driver does not know it."""
    device, value = ctypes.c_int(), ctypes.c_int()
    if cuda.cuDeviceGet(ctypes.byref(device), gpu) != _SUCCESS:
        return 0
    code = cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
    return value.value if code == _SUCCESS else 0


def _describe(cuda: ctypes.CDLL, code: int) -> str:
    text = ctypes.c_char_p()
    if cuda.cuGetErrorString(code, ctypes.byref(text)) != _SUCCESS or text.value is None:
        return f"error {code}"
    return f"{text.value.decode()} (error {code})"
