"""Where an owner may listen: a short path, in a folder of this user alone, that no other server has."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import stat
import time
from pathlib import Path

from kvpool.errors import ConfigError

MAX_PATH_BYTES = 107
"""Longest path of a Unix socket (``sun_path``)."""

_STARTING_S = 5.0
"""How long a server may take from making its folder, or socket, until it listens, seconds: far more than it does."""


def check_length(path: Path) -> None:
    """Refuse a path that is too long for a Unix socket.

    Raises
    ------
    ConfigError
        If it is longer than 107 bytes.
    """
    if len(os.fsencode(path)) > MAX_PATH_BYTES:
        raise ConfigError(f"the socket path {path} is longer than {MAX_PATH_BYTES} bytes: use a shorter folder")


def prepare_folder(folder: Path) -> None:
    """Make the folder, with mode 0700, unless it is there.

    Raises
    ------
    ConfigError
        If it cannot be made, or is open to others.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError as failure:
        raise ConfigError(
            f"cannot make the folder {folder} of the page socket: {failure.strerror}; name another by socket_dir"
        ) from failure
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise ConfigError(f"the folder {folder} of the page socket must be ours alone: chmod 0700, or name another")


def clear(path: Path) -> None:
    """Remove a socket that an owner left behind when it was killed.

    Raises
    ------
    ConfigError
        If another server listens there.
    """
    if is_left_behind(path):
        path.unlink()
    elif is_served(path):
        raise ConfigError(f"another server listens at {path}: give each device its own socket")


def clear_abandoned(folder: Path) -> None:
    """Remove the private folders of earlier pools of the same name whose devices were all killed.

    They lie beside ``folder`` and are named like it, but for the epoch at the end. A folder in which anybody listens
    keeps that socket; one that is not this user's, or was changed within the last seconds, is left alone.

    Parameters
    ----------
    folder
        The private folder of a pool: ``kvpool-NAME-EPOCH``.
    """
    name = folder.name.rpartition("-")[0]
    of_this_name = re.compile(re.escape(name) + "-[0-9a-f]+")
    with contextlib.suppress(OSError):  # others may clear, too
        for other in folder.parent.iterdir():
            if other != folder and of_this_name.fullmatch(other.name):
                _clear_abandoned(other)


def _clear_abandoned(folder: Path) -> None:
    with contextlib.suppress(OSError):  # it went meanwhile, or something else is in it
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            return
        if time.time() - found.st_mtime < _STARTING_S:  # another cluster's, in which somebody is about to listen
            return
        for path in folder.glob("*.sock"):
            if is_left_behind(path):
                path.unlink()
        folder.rmdir()


def is_left_behind(path: Path) -> bool:
    """Return whether a socket lies there that nobody listens at."""
    return _connect(path) == errno.ECONNREFUSED


def is_served(path: Path) -> bool:
    """Return whether something is there, and not left behind."""
    return _connect(path) not in (errno.ECONNREFUSED, errno.ENOENT)


def _connect(path: Path) -> int:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK) as attempt:
        return attempt.connect_ex(str(path))
