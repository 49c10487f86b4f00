"""Files and folders that a command is to write: whether it can is found out before it does anything."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from kvpool.errors import InvalidRequestError

STANDARD_OUTPUT = "-"


def check_file(_context: click.Context, _option: click.Parameter, destination: str | None) -> str | None:
    """Refuse a file that cannot be written, as the callback of an option. What is there stays as it is.

    Raises
    ------
    InvalidRequestError
        If it cannot be written.
    """
    if destination is not None and destination != STANDARD_OUTPUT:
        try:
            _probe_file(Path(destination))
        except OSError as error:
            raise InvalidRequestError(
                f"cannot write JSON to {destination}: {error.strerror}; name a file in a folder that exists, or - for "
                "standard output",
                asked=destination,
            ) from error
    return destination


def check_folder(*names: str) -> Callable[[click.Context, click.Parameter, Path | None], Path | None]:
    """Return the callback of an option that refuses a folder in which files of these names cannot be written.

    It need not exist, nor is it made. The callback raises :class:`~kvpool.errors.InvalidRequestError`.
    """

    def check(_context: click.Context, _option: click.Parameter, folder: Path | None) -> Path | None:
        if folder is not None:
            try:
                _probe_folder(folder, names)
            except OSError as error:
                raise InvalidRequestError(
                    f"--out {folder}: cannot write there ({error.strerror})", asked=str(folder)
                ) from error
        return folder

    return check


@contextmanager
def writing(destination: str | Path) -> Iterator[None]:
    """Tell an OSError of the block as what it is by now: no refusal, for what the command was to do is done."""
    try:
        yield
    except OSError as error:
        raise click.ClickException(f"all is done, but {destination} cannot be written: {error.strerror}") from error


def _probe_file(path: Path) -> None:
    """Raise OSError unless the file can be written."""
    if path.exists() and not path.is_file() and not path.is_dir():
        # A pipe, perhaps: opening it would wait for who reads, and closing it would tell them that all is read.
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return
    there = path.exists()
    real = path if there else Path(os.path.realpath(path))  # of a link, the file that is still to be made
    os.close(os.open(real, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666))
    if not there:
        real.unlink()


def _probe_folder(folder: Path, names: tuple[str, ...]) -> None:
    """Raise OSError unless files of these names can be written in a folder, which is made for them if need be."""
    if folder.exists():
        for name in names:
            _probe_file(folder / name)
        return
    above = next(each for each in folder.absolute().parents if each.exists())
    TemporaryDirectory(dir=above, prefix=".kvpool-").cleanup()
