"""PageTable over real host memory: moves, zombies, exact undo."""

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator

import pytest

from kvpool.errors import BackendError, ConfigError, InvalidSizeError, StaleCacheError, UnknownCacheError
from kvpool.memory.backend import Access
from kvpool.memory.host import HostBackend
from kvpool.memory.pages import PageTable

PAGE = 65536


class FailingBackend(HostBackend):
    """Host memory whose ``operation`` is refused once, after ``after`` more calls of it."""

    operation = ""
    after = 0
    creates = 0

    def _refuse(self, operation: str) -> None:
        if operation == self.operation:
            self.after -= 1
            if self.after < 0:
                self.operation = ""
                raise BackendError("refused by the test", errno=errno.ENOMEM)

    def create(self, size_bytes: int) -> int:
        self._refuse("create")
        self.creates += 1
        return super().create(size_bytes)

    def map(self, address: int, handle: int) -> None:
        self._refuse("map")
        super().map(address, handle)

    def remap(self, address: int, handle: int, source: int) -> None:
        self._refuse("remap")
        super().remap(address, handle, source)

    def set_access(self, address: int, size_bytes: int, access: Access) -> None:
        self._refuse("set_access")
        super().set_access(address, size_bytes, access)


@pytest.fixture
def backend() -> Iterator[FailingBackend]:
    backend = FailingBackend(budget_bytes=64 * PAGE)
    yield backend
    assert backend.mem_info().free_bytes == 64 * PAGE  # whatever happened, nothing is left
    backend.close()


@pytest.fixture
def table(backend: FailingBackend) -> Iterator[PageTable]:
    table = PageTable(backend, capacity_pages=8, page_size_bytes=PAGE, arena_pages=32)
    yield table
    table.check()
    table.close()
    table.close()


def states(table: PageTable) -> tuple[int, int, int, int]:
    table.check()
    return table.in_use_pages, table.warm_pages, table.zombie_pages, table.free_pages


def read(table: PageTable, index: int) -> bytes:
    return ctypes.string_at(table.address + index * PAGE, PAGE)


def fill(table: PageTable, index: int, byte: int) -> None:
    ctypes.memset(table.address + index * PAGE, byte, PAGE)


def test_a_page_goes_round_all_states(table: PageTable) -> None:
    assert states(table) == (0, 0, 0, 8)
    taken = table.map("a", 4, table.create("a", 3))
    assert [index for index, _ in taken.refs] == [4, 5, 6]
    assert states(table) == (3, 0, 0, 5)
    assert read(table, 5) == bytes(PAGE)
    table.rest(taken.pages)
    assert states(table) == (0, 3, 0, 5)
    table.wake(taken.pages)
    os.close(table.export("client", "a", 5, taken.refs[1][1]))
    table.release(taken.pages)
    assert states(table) == (0, 0, 1, 7)
    table.dropped("client", [taken.refs[1][1]])
    assert states(table) == (0, 0, 0, 8)


def test_serials_ascend_and_are_never_used_again(table: PageTable) -> None:
    seen: list[int] = []
    for _ in range(3):
        taken = table.map("a", 0, table.create("a", 4))
        seen += [serial for _, serial in taken.refs]
        table.release(taken.pages)
    assert seen == sorted(set(seen))


def test_a_moved_page_keeps_bytes_serial_and_holders(table: PageTable) -> None:
    taken = table.map("a", 0, table.create("a", 4))
    for index in range(4):
        fill(table, index, index + 1)
    descriptor = table.export("client", "a", 2, taken.refs[2][1])
    with mmap.mmap(descriptor, PAGE) as view:
        os.close(descriptor)
        table.rest(taken.pages)
        # Pages that lie apart, and a fresh one, go to one new run.
        moved = table.map("a", 10, [taken.pages[0], taken.pages[2], *table.create("a", 1)])
        assert [read(table, index)[0] for index in (10, 11, 12)] == [1, 3, 0]
        assert moved.refs[:2] == ((10, taken.refs[0][1]), (11, taken.refs[2][1]))
        assert moved.held
        assert states(table) == (3, 2, 0, 3)
        fill(table, 11, 9)
        assert view[:] == b"\x09" * PAGE  # the client maps the same page as before
    for index, serial in (taken.refs[0], taken.refs[2]):
        with pytest.raises(StaleCacheError):
            table.export("client", "a", index, serial)


def test_no_byte_crosses_from_tenant_to_tenant(table: PageTable) -> None:
    mine = table.map("a", 0, table.create("a", 8))
    for index in range(8):
        fill(table, index, 0xAB)
    table.rest(mine.pages)
    table.release(mine.pages)
    table.map("b", 0, table.create("b", 8))
    assert all(read(table, index) == bytes(PAGE) for index in range(8))


def test_a_zombie_is_gone_only_when_its_last_holder_is(table: PageTable) -> None:
    taken = table.map("a", 0, table.create("a", 2))
    (_, first), (_, second) = taken.refs
    views = []
    for client in ("one", "two"):
        descriptor = table.export(client, "a", 0, first)
        views.append(mmap.mmap(descriptor, PAGE))
        os.close(descriptor)
    os.close(table.export("two", "a", 1, second))
    fill(table, 0, 7)
    table.release(taken.pages)
    assert states(table) == (0, 0, 2, 6)
    assert table.take_drops() == {"one": [first], "two": [first, second]}
    assert table.take_drops() == {}
    assert views[0][:] == b"\x07" * PAGE  # what a client maps stays as it is
    table.dropped("one", [first])
    assert states(table) == (0, 0, 2, 6)
    table.dropped("one", [first])  # said twice
    table.holder_gone("two")
    assert states(table) == (0, 0, 0, 8)
    for view in views:
        view.close()


def test_drops_of_a_client_that_is_gone_are_not_asked_for(table: PageTable) -> None:
    taken = table.map("a", 0, table.create("a", 1))
    os.close(table.export("client", "a", *taken.refs[0]))
    table.release(taken.pages)
    table.holder_gone("client")
    table.holder_gone("client")
    assert table.take_drops() == {}


def test_warm_pages_that_clients_map_are_counted_by_tenant(table: PageTable) -> None:
    taken = table.map("a", 0, table.create("a", 3))
    for ref in taken.refs[:2]:
        os.close(table.export("client", "a", *ref))
    assert table.warm_held_pages == {}
    table.rest(taken.pages)
    assert table.warm_held_pages == {"a": 2}
    table.dropped("client", [taken.refs[0][1]])
    assert table.warm_held_pages == {"a": 1}
    table.wake(taken.pages)
    assert table.warm_held_pages == {}
    table.check()
    table.holder_gone("client")


def test_only_a_page_in_use_of_that_tenant_is_exported(table: PageTable) -> None:
    mine = table.map("a", 0, table.create("a", 2))
    ((_, serial), (_, resting)) = mine.refs
    table.rest(mine.pages[1:])
    for tenant, index, number, error in [
        ("b", 0, serial, UnknownCacheError),  # another tenant's
        ("a", 0, 99, UnknownCacheError),  # never existed
        ("a", 0, 0, UnknownCacheError),
        ("a", 1, resting, StaleCacheError),  # nothing lives in it
        ("a", 0, resting, StaleCacheError),  # lies elsewhere
        ("a", 5, serial, StaleCacheError),
    ]:
        with pytest.raises(error):
            table.export("client", tenant, index, number)
    table.release(mine.pages)
    with pytest.raises(StaleCacheError):
        table.export("client", "a", 0, serial)
    assert states(table) == (0, 0, 0, 8)  # no refused export made a holder


def test_a_drop_of_a_page_that_never_was_changes_nothing(table: PageTable) -> None:
    taken = table.map("a", 0, table.create("a", 1))
    serial = taken.refs[0][1]
    os.close(table.export("client", "a", 0, serial))
    with pytest.raises(UnknownCacheError, match="never existed"):
        table.dropped("client", [serial, 99])
    assert taken.held
    table.holder_gone("client")


@pytest.mark.parametrize("after", [0, 1, 2])
def test_creating_is_all_or_nothing(table: PageTable, backend: FailingBackend, after: int) -> None:
    backend.operation, backend.after = "create", after
    with pytest.raises(BackendError, match="refused by the test"):
        table.create("a", 3)
    assert states(table) == (0, 0, 0, 8)
    assert backend.mem_info().free_bytes == 64 * PAGE


@pytest.mark.parametrize(("operation", "after"), [("remap", 0), ("remap", 1), ("map", 0), ("set_access", 0)])
def test_a_mapping_that_fails_half_way_leaves_nothing(
    table: PageTable, backend: FailingBackend, operation: str, after: int
) -> None:
    warm = table.map("a", 0, table.create("a", 2))
    os.close(table.export("client", "a", *warm.refs[0]))
    table.rest(warm.pages)
    fresh = table.create("a", 1)
    backend.operation, backend.after = operation, after
    with pytest.raises(BackendError, match="refused by the test"):
        table.map("a", 8, [*warm.pages, *fresh])
    assert states(table) == (0, 0, 1, 7)  # the page that a client maps is a zombie, the others are free
    assert table.take_drops() == {"client": [warm.refs[0][1]]}
    table.holder_gone("client")
    taken = table.map("a", 8, table.create("a", 8))  # the addresses are free again, and so is the memory
    assert len(taken.pages) == 8


@pytest.mark.parametrize("after", [0, 1, 2])
def test_relocating_is_all_or_nothing(table: PageTable, backend: FailingBackend, after: int) -> None:
    lying = [table.map("a", index, table.create("a", 1)).pages[0] for index in (1, 3, 4)]
    for page in lying:
        fill(table, page.index, page.index)
    backend.operation, backend.after = "remap", after
    with pytest.raises(BackendError, match="refused by the test"):
        table.relocate(lying, 8)
    assert [read(table, index) for index in (1, 3, 4)] == [bytes([index]) * PAGE for index in (1, 3, 4)]
    moved = table.relocate(lying, 8)
    assert [index for index, _ in moved.refs] == [8, 9, 10]
    assert [read(table, index) for index in (8, 9, 10)] == [bytes([index]) * PAGE for index in (1, 3, 4)]


def test_sizes_that_cannot_be() -> None:
    backend = HostBackend()
    for page_bytes in (0, 100, -PAGE):
        with pytest.raises(ConfigError, match="multiple of"):
            PageTable(backend, 1, page_bytes, 1)
    for capacity, arena in ((0, 1), (2, 1)):
        with pytest.raises(InvalidSizeError):
            PageTable(backend, capacity, PAGE, arena)
    backend.close()
