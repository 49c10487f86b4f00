"""What a kind of memory must be able to do: the seam between kvpool and an operating system or driver.

The rules are those of the CUDA driver's virtual memory API, and every backend keeps them (one conformance suite,
``tests/unit/memory/test_backend_conformance.py``, runs against each):

- physical memory comes in *pages* of one size, a multiple of :meth:`Backend.granularity`;
- addresses and memory are two things: :meth:`Backend.reserve` costs no memory, :meth:`Backend.create` no addresses;
- a mapping is of one whole page at a page boundary; only whole pages are unmapped;
- a mapped page can be touched only after :meth:`Backend.set_access`;
- a page that is released while mapped, here or in another process, lives on until it is unmapped everywhere;
- a forked child inherits no mapping, and every method raises :class:`kvpool.errors.ForkedHandleError` there;
- misuse (a page over a mapped one, part of a page, an address off the boundary, a handle released twice) raises
  :class:`kvpool.errors.InvalidRequestError` or :class:`kvpool.errors.DoubleReleaseError` and changes nothing.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import NamedTuple, Protocol

#: Destination and source, addresses of this process, and bytes. The two do not overlap.
Copy = tuple[int, int, int]


class Access(enum.IntEnum):
    """What a process may do with a mapped range."""

    NONE = 0
    READ = 1
    READ_WRITE = 3


class MemoryInfo(NamedTuple):
    """Physical memory of a device, bytes."""

    free_bytes: int
    total_bytes: int


class Backend(Protocol):
    """Memory of one device, as seen from one process (its owner's or a client's).

    Page handles are small integers that mean something only to the backend that gave them out.
    Operations the system refuses raise :class:`kvpool.errors.BackendError` and change nothing.
    """

    name: str

    def granularity(self) -> int:
        """Smallest page size, bytes; page sizes are multiples of it."""
        ...

    def mem_info(self) -> MemoryInfo:
        """Memory this process could still create pages from, and the total."""
        ...

    def probe(self, *, pages: int, mapped_pages: int, page_size_bytes: int) -> None:
        """Check at the start that the limits of this process allow what is planned.

        Parameters
        ----------
        pages
            Pages that this process will create: their memory, and one open handle each (0 for a client, which
            closes a page's descriptor once it is mapped; those in flight are always counted).
        mapped_pages
            Pages that it will have mapped at a time, all views counted.
        page_size_bytes
            Size of a page.

        Raises
        ------
        SystemLimitError
            If they do not; says which limit, its value, the needed one and how to raise it.
        """
        ...

    def reserve(self, size_bytes: int, page_size_bytes: int) -> int:
        """Reserve addresses (aligned to the page size), no memory. Returns the first address."""
        ...

    def unreserve(self, address: int) -> None:
        """Give reserved addresses back. Nothing may be mapped in them."""
        ...

    def create(self, size_bytes: int) -> int:
        """Create one page of zeroed physical memory, charged to this process. Returns its handle."""
        ...

    def release(self, handle: int) -> None:
        """Give up this process's hold on a page. Its mappings keep it alive."""
        ...

    def map(self, address: int, handle: int) -> None:
        """Map a whole page at an unmapped page boundary of a reserved range, without access."""
        ...

    def remap(self, address: int, handle: int, source: int) -> None:
        """Map a page that is mapped at ``source`` also at ``address``, with the access that it has there.

        For a page that moves, and is to be unmapped at ``source`` then: what the system set up when its memory was
        touched there goes to the new address.
        """
        ...

    def set_access(self, address: int, size_bytes: int, access: Access) -> None:
        """Set the access of one contiguous run of mapped pages (in one call for the whole run: it is a slow one)."""
        ...

    def unmap(self, address: int, size_bytes: int) -> None:
        """Unmap one contiguous run of mapped pages. The addresses stay reserved."""
        ...

    def show_zeros(self, address: int, size_bytes: int) -> None:
        """Let whole pages of a reserved range read as zeros wherever, and whenever, nothing is mapped at them.

        Writing there is a fault (on a GPU it is lost). Mapping and unmapping go on as before, and at no moment between
        is a read a fault.
        """
        ...

    def hide_zeros(self, address: int, size_bytes: int) -> None:
        """End :meth:`show_zeros` of the same addresses."""
        ...

    def export(self, handle: int) -> int:
        """Return a new file descriptor for a page, to be sent to another process. The caller closes it."""
        ...

    def import_(self, descriptor: int, size_bytes: int) -> int:
        """Take a descriptor made by :meth:`export` in another process; closes it in any case. Returns a handle."""
        ...

    def copy(self, copies: Iterable[Copy]) -> None:
        """Copy bytes between accessible addresses of this device, in this order; all complete when it returns.

        One copy may read what one before it has written, or write where one before it has read. Each is taken from the
        iterable when those before it need nothing more to become complete: so if this raises, whatever it is, all that
        were taken but the last are complete, and the last may be in part.

        Raises
        ------
        BackendError
            If one is refused.
        """
        ...

    def zero(self, address: int, size_bytes: int) -> None:
        """Set bytes at writable addresses of this device to zero; complete when it returns."""
        ...

    def close(self) -> None:
        """Unmap, unreserve and release all that is left. Idempotent."""
        ...
