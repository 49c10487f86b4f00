"""A sign of life for commands that take a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console


@contextmanager
def working(what: str) -> Iterator[None]:
    """Show a spinner on standard error while the block runs, if that is a terminal."""
    with Console(stderr=True).status(f"{what} …"):
        yield
