"""What every unit test must leave behind: nothing."""

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _no_page_left() -> Iterator[None]:
    """A test that does not close its memory would fail another one, which looks for pages in this process."""
    before = page_descriptors()
    yield
    assert page_descriptors() <= before, "this test left pages open"


def page_descriptors() -> set[str]:
    """Open descriptors of pages in this process."""
    found = set()
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            if "kvpool-page" in os.readlink(f"/proc/self/fd/{descriptor}"):
                found.add(descriptor)
        except OSError:  # that of the listing itself
            continue
    return found
