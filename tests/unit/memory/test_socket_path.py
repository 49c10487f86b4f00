"""What owners that were killed leave behind, and who clears it away."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from kvpool.memory.socket_path import clear_abandoned


@pytest.fixture
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Folders]:
    with ExitStack() as open_ones:
        yield Folders(tmp_path_factory.mktemp("s"), open_ones)


class Folders:
    """Private folders of pools, side by side."""

    def __init__(self, top: Path, open_ones: ExitStack) -> None:
        self._top = top
        self._open = open_ones

    def add(self, name: str, *numbers: int, age_s: float = 60.0, living: bool = False) -> Path:
        """Make a folder, and sockets in it, that long ago."""
        folder = self._top / name
        folder.mkdir(mode=0o700)
        for number in numbers:
            path = folder / f"{number}.sock"
            server = self._open.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            server.bind(str(path))
            if living:
                server.listen(1)
            else:
                server.close()
        now = folder.stat().st_mtime
        os.utime(folder, (now - age_s, now - age_s))
        return folder


def test_what_killed_devices_of_the_same_name_left_is_cleared(folders: Folders) -> None:
    own, left, empty = folders.add("kvpool-p-19a", 0), folders.add("kvpool-p-18f", 0, 1), folders.add("kvpool-p-17")
    clear_abandoned(own)
    assert own.exists()
    assert not left.exists()
    assert not empty.exists()
    clear_abandoned(own)


def test_what_is_served_or_another_pools_stays(folders: Folders, tmp_path: Path) -> None:
    own = folders.add("kvpool-p-19a")
    other = folders.add("kvpool-p-2-18f", 0)
    living = folders.add("kvpool-p-18f", 0, living=True)
    bound = folders.add("kvpool-p-19b", 0, age_s=0.0)  # and about to listen
    made = folders.add("kvpool-p-19d", age_s=0.0)
    more = folders.add("kvpool-p-19c", 0)
    (more / "note").touch()
    os.utime(more, (1, 1))
    aside = folders.add("aside", 0)
    (own.parent / "kvpool-p-16").symlink_to(aside)
    clear_abandoned(own)
    assert all((folder / "0.sock").exists() for folder in (other, living, bound, aside))
    assert made.exists()
    assert [path.name for path in more.iterdir()] == ["note"]
