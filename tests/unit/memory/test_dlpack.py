"""Tensors over mapped memory: no copy, and exactly one word when the last of them is gone."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import kvpool
from kvpool.errors import TensorMismatchError
from kvpool.memory.backend import Access
from kvpool.memory.dlpack import DTYPES, MappedTensorSource, as_numpy, as_torch, dtype_name, tensor_bytes
from kvpool.memory.host import HostBackend

torch = pytest.importorskip("torch")

PAGE = 65536


@pytest.fixture
def address() -> Iterator[int]:
    """Address of a mapped page."""
    backend = HostBackend()
    address = backend.reserve(PAGE, PAGE)
    backend.map(address, backend.create(PAGE))
    backend.set_access(address, PAGE, Access.READ_WRITE)
    yield address
    backend.close()


class Releases:
    """Counts."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        self.count += 1


@pytest.fixture
def released() -> Releases:
    return Releases()


@pytest.mark.parametrize("name", DTYPES)
def test_torch_sees_the_memory(address: int, released: Releases, name: str) -> None:
    tensor = as_torch(MappedTensorSource(address, (4, 3, 2), name, Access.READ_WRITE, released))
    assert tensor.dtype is getattr(torch, name)
    assert (tensor.shape, tensor.stride(), tensor.data_ptr()) == ((4, 3, 2), (6, 2, 1), address)
    assert tensor.device.type == "cpu"
    assert tensor.nbytes == tensor_bytes((4, 3, 2), name)
    ctypes.memset(address, 1, PAGE)
    expected = torch.full((tensor.nbytes,), 1, dtype=torch.uint8).view(tensor.dtype).reshape(4, 3, 2)
    assert torch.equal(tensor.view(torch.uint8), expected.view(torch.uint8))
    tensor.view(torch.uint8).fill_(3)
    assert ctypes.string_at(address, tensor.nbytes + 1) == b"\3" * tensor.nbytes + b"\1"
    del tensor
    assert released.count == 1


@pytest.mark.parametrize("name", [name for name, dtype in DTYPES.items() if dtype.numpy])
def test_numpy_sees_the_memory(address: int, released: Releases, name: str) -> None:
    array = as_numpy(MappedTensorSource(address, (2, 3), name, Access.READ_WRITE, released))
    assert (array.dtype.name, array.shape, array.ctypes.data) == (name, (2, 3), address)
    array.view(np.uint8)[:] = 1
    assert ctypes.string_at(address, array.nbytes) == b"\1" * array.nbytes
    view = array[1:, ::2]
    del array
    assert released.count == 0
    del view
    assert released.count == 1


def test_numpy_array_over_a_read_only_view_is_read_only(address: int, released: Releases) -> None:
    source = MappedTensorSource(address, (3,), "float32", Access.READ, released)
    for array in (as_numpy(source), np.from_dlpack(source)):
        assert not array.flags.writeable
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (2, 1, 3)])
def test_any_shape(address: int, released: Releases, shape: tuple[int, ...]) -> None:
    source = MappedTensorSource(address, shape, "int32", Access.READ_WRITE, released)
    assert tuple(as_torch(source).shape) == as_numpy(source).shape == shape
    assert as_torch(source).is_contiguous()


def test_views_and_reshapes_keep_the_memory(address: int, released: Releases) -> None:
    tensor = as_torch(MappedTensorSource(address, (16, 8), "bfloat16", Access.READ_WRITE, released))
    view = tensor[3:5].view(torch.uint8).t()
    storage = view.untyped_storage()
    del tensor
    assert released.count == 0
    del view
    assert released.count == 0
    del storage
    assert released.count == 1


def test_several_tensors_of_one_source_are_one_release(address: int, released: Releases) -> None:
    source = MappedTensorSource(address, (4,), "float32", Access.READ_WRITE, released)
    tensors = [as_torch(source), torch.from_dlpack(source), as_numpy(source), np.from_dlpack(source)]
    del source
    while tensors:
        assert released.count == 0
        tensors.pop()
    assert released.count == 1


def test_capsule_that_nobody_takes_releases(address: int, released: Releases) -> None:
    source = MappedTensorSource(address, (4,), "float32", Access.READ_WRITE, released)
    capsules = [source.__dlpack__(), source.__dlpack__(max_version=(1, 0))]
    del source
    assert released.count == 0
    del capsules
    assert released.count == 1


def test_capsule_of_the_older_form_is_taken(address: int, released: Releases) -> None:
    source = MappedTensorSource(address, (4,), "bfloat16", Access.READ_WRITE, released)
    tensor = torch.utils.dlpack.from_dlpack(source.__dlpack__())
    del source
    assert tensor.data_ptr() == address
    assert released.count == 0
    del tensor
    assert released.count == 1


def test_copies_and_other_devices_are_refused(address: int, released: Releases) -> None:
    source = MappedTensorSource(address, (4,), "bfloat16", Access.READ_WRITE, released)
    assert source.__dlpack_device__() == (1, 0)
    with pytest.raises(BufferError):
        source.__dlpack__(copy=True)
    with pytest.raises(BufferError):
        source.__dlpack__(dl_device=(2, 0))


def test_last_view_may_die_in_another_thread(address: int) -> None:
    threads: list[threading.Thread] = []
    where: list[threading.Thread] = []
    tensor = [
        as_torch(
            MappedTensorSource(address, (4,), "uint8", Access.READ, lambda: where.append(threading.current_thread()))
        )
    ]
    threads.append(threading.Thread(target=tensor.clear))
    threads[0].start()
    threads[0].join()
    assert where == threads


def test_error_while_releasing_is_logged(address: int, caplog: pytest.LogCaptureFixture) -> None:
    def fails() -> None:
        raise RuntimeError("the caller's mistake")

    tensor = as_torch(MappedTensorSource(address, (4,), "uint8", Access.READ, fails))
    with caplog.at_level(logging.ERROR):
        del tensor
    assert "the caller's mistake" in caplog.text


def test_tensor_in_a_reference_cycle_is_released(address: int, released: Releases) -> None:
    cycle: list[object] = [as_torch(MappedTensorSource(address, (4,), "uint8", Access.READ, released))]
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert released.count == 1


def test_bad_dtype_or_shape_releases_nothing(address: int, released: Releases) -> None:
    for dtype, shape in (("float7", (4,)), (torch.quint8, (4,)), (None, (4,)), (object(), (4,)), ("uint8", (-1,))):
        with pytest.raises(TensorMismatchError):
            MappedTensorSource(address, shape, dtype, Access.READ, released)
    with pytest.raises(TensorMismatchError, match="torch"):
        as_numpy(MappedTensorSource(address, (4,), "bfloat16", Access.READ, Releases()))
    gc.collect()
    assert released.count == 0


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        ("bfloat16", "bfloat16"),
        (torch.float16, "float16"),
        (np.float32, "float32"),
        (np.dtype("int8"), "int8"),
        (bool, "bool"),
    ],
)
def test_dtypes_are_known_by_name_torch_and_numpy(dtype: object, name: str) -> None:
    assert dtype_name(dtype) == name


def test_module_does_without_torch_and_its_tensors_outlive_the_interpreter() -> None:
    script = """
import atexit, ctypes, sys, threading
from kvpool.memory import dlpack
from kvpool.memory.backend import Access
assert "torch" not in sys.modules and "numpy" not in sys.modules
import torch
memory = ctypes.create_string_buffer(1024)
def make():
    address = ctypes.addressof(memory)
    return dlpack.as_torch(dlpack.MappedTensorSource(address, (8,), "uint8", Access.READ, lambda: 1 / 0))
kept = make()
sys.kept = make()
torch.kept = [make()]
torch.kept.append(torch.kept)
class Late:
    def __init__(self): self.tensor = make()
    def __del__(self): del self.tensor
late = Late()
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(kvpool.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
