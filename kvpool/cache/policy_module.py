"""The module of a policy of one's own: imported, once more where its file has changed, and the line in it that failed.

Importing once more makes a module object of its own: functions of the one before keep their globals, so a policy that
decides is not changed under its own feet, and a file that fails half-way leaves nothing of it behind.
"""

from __future__ import annotations

import sys
from importlib import import_module, invalidate_caches
from importlib.util import find_spec
from pathlib import Path
from traceback import walk_tb
from types import ModuleType

_Version = tuple[int, int] | None
"""Of a file: when it was changed (nanoseconds) and its bytes; None where there is none."""

_imported: dict[str, _Version] = {}


def import_own(name: str) -> ModuleType:
    """Import a module, though it may be there already; if that fails, what was there stays.

    Raises whatever its code raises.
    """
    before = sys.modules.pop(name, None)
    try:
        invalidate_caches()
        spec = find_spec(name)
        # Before it is read: what is written while it is imported (with torch, a second or two) counts as a change.
        version = _version(spec.origin if spec is not None else None)
        module = import_module(name)
    except BaseException:
        if before is not None:
            sys.modules[name] = before
        raise
    _imported[name] = version
    return module


def has_changed(name: str) -> bool:
    """Return whether the file of a module that is imported differs from what was imported, or may do so.

    It may if other code imported it. kvpool's own modules, and the program itself, stay as they are.
    """
    module = sys.modules.get(name)
    if module is None or name.partition(".")[0] in ("kvpool", "__main__"):
        return False
    return name not in _imported or _version(getattr(module, "__file__", None)) != _imported[name]


def was_imported(name: str) -> bool:
    """Return whether it was :func:`import_own` that imported a module."""
    return name in _imported


def innermost_line(error: BaseException, module: str) -> str:
    """Return `` (FILE:LINE)``, the innermost line of a module from which an error came; empty if there is none.

    A policy may be of code of other modules, too: where there is only that and kvpool's, it is the line there.
    """
    line = others = ""
    for frame, number in walk_tb(error.__traceback__):
        name = frame.f_globals.get("__name__", "")
        if name == module:
            line = f" ({frame.f_code.co_filename}:{number})"
        elif name.partition(".")[0] not in ("kvpool", "importlib", "_frozen_importlib", "_frozen_importlib_external"):
            others = f" ({frame.f_code.co_filename}:{number})"
    return line or others


def defined_at(function: object) -> str:
    """Return `` (FILE:LINE)``, where a function was defined; empty if it does not tell."""
    code = getattr(function, "__code__", None)
    return f" ({code.co_filename}:{code.co_firstlineno})" if code is not None else ""


def _version(file: str | None) -> _Version:
    try:
        status = Path(file or "").stat()
    except OSError:  # in an archive, built in, or gone
        return None
    return status.st_mtime_ns, status.st_size
