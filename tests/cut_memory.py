"""Host memory whose calls are cut short, so that what they were a part of ends between two of its steps."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from hashlib import shake_128
from typing import NamedTuple

from kvpool.errors import BackendError
from kvpool.memory.backend import Access, Copy
from kvpool.memory.host import HostBackend


class Killed(BaseException):
    """The owner's process ends here: nothing of it runs any more."""


class Interrupted(BaseException):
    """What KeyboardInterrupt is: an exception that no call of the memory is known to raise."""


class Cut(NamedTuple):
    """Which call is cut short, and how."""

    #: Calls that are carried out before it.
    after: int
    #: BackendError: it and all that follow are refused, as when memory has run out. Else it alone raises this.
    error: type[BaseException]
    #: How much of its bytes a copy writes before it ends.
    share: float = 0.0
    #: Whether the memory goes on refusing after the operation.
    lasts: bool = False


class CutMemory(HostBackend):
    """Memory of which a test says how far it goes. Without a :class:`Cut` it is as ever."""

    def __init__(self, budget_bytes: int) -> None:
        super().__init__(budget_bytes)
        self.budget_bytes = budget_bytes
        self.cut: Cut | None = None
        #: Calls since the cut was set.
        self.calls = 0

    @property
    def created_bytes(self) -> int:
        """Pages that this process has created and not given back, as the memory counts them."""
        return self._created_bytes

    def _take_step(self) -> bool:
        """Count a call; returns whether it is the one to be cut short."""
        if self.cut is None:
            return False
        self.calls += 1
        if self.cut.error is BackendError:
            return self.calls > self.cut.after
        return self.calls == self.cut.after + 1

    def _step(self) -> None:
        if self._take_step():
            raise self._error()

    def _error(self) -> BaseException:
        assert self.cut is not None
        return BackendError("no more", errno=12) if self.cut.error is BackendError else self.cut.error()

    def create(self, size_bytes: int) -> int:
        self._step()
        return super().create(size_bytes)

    def map(self, address: int, handle: int) -> None:
        self._step()
        super().map(address, handle)

    def remap(self, address: int, handle: int, source: int) -> None:
        self._step()
        super().remap(address, handle, source)

    def set_access(self, address: int, size_bytes: int, access: Access) -> None:
        self._step()
        super().set_access(address, size_bytes, access)

    def unmap(self, address: int, size_bytes: int) -> None:
        self._step_back()
        super().unmap(address, size_bytes)

    def release(self, handle: int) -> None:
        self._step_back()
        super().release(handle)

    def _step_back(self) -> None:
        """Count a call that gives something back: the system takes that always, but the process may end before it."""
        if self.cut is not None and self.cut.error is Killed:
            self._step()

    def copy(self, copies: Iterable[Copy]) -> None:
        for destination, source, size_bytes in copies:
            assert abs(destination - source) >= size_bytes, "what is copied does not overlap"
            if self._take_step():
                assert self.cut is not None
                super().copy([(destination, source, int(size_bytes * self.cut.share))])
                raise self._error()
            super().copy([(destination, source, size_bytes)])

    def zero(self, address: int, size_bytes: int) -> None:
        if self._take_step():
            assert self.cut is not None
            super().zero(address, int(size_bytes * self.cut.share))
            raise self._error()
        super().zero(address, size_bytes)


def filled(seed: int, tenant: str, size_bytes: int) -> bytes:
    """Return the bytes of a cache: its own, and such as only its tenant has (zero is everybody's)."""
    begin = seed * 2654435761 % len(_STREAM)
    bits = _STREAM[begin : begin + size_bytes]
    while len(bits) < size_bytes:
        bits += _STREAM[: size_bytes - len(bits)]
    return bits.translate(_OF_TENANT[tenant])


def foreign(content: bytes, tenant: str) -> bytes:
    """Return what of some bytes could not have been left by the tenant."""
    return content.translate(None, b"\0" + _OF_TENANT[tenant])


def read(address: int, size_bytes: int) -> bytes:
    """Return bytes of this process's memory."""
    return ctypes.string_at(address, size_bytes)


def write(address: int, content: bytes) -> None:
    """Write bytes to this process's memory."""
    ctypes.memmove(address, content, len(content))


#: 128 values each: one byte tells whose it is.
_OF_TENANT = {"a": bytes(range(1, 129)) * 2, "b": bytes(range(129, 256)) * 2 + bytes([129, 130])}
_STREAM = shake_128(b"kvpool").digest(65_521)
