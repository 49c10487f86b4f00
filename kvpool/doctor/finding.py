"""What a check found."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass
from typing import Any

OK, WARNING, FAILED = "ok", "warning", "failed"


def command(*words: object) -> str:
    """Return a command for the text of ``mend``, quoted as a shell wants it."""
    return f"`{shlex.join(str(word) for word in words)}`"


@dataclass(frozen=True, slots=True)
class Finding:
    """One check's outcome at one place.

    ``result`` is ``ok``, ``warning`` (it works, but not well or not safely) or ``failed``. ``found`` and ``needed`` are
    text for people; ``mend`` says what to change, with commands to type between backquotes, as a shell takes them, and
    is empty when all is well.
    """

    check: str
    where: str
    result: str
    found: str
    needed: str = ""
    mend: str = ""

    def to_row(self) -> dict[str, Any]:
        """Return built-in types."""
        return asdict(self)
