"""What a check found."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

OK, WARNING, FAILED = "ok", "warning", "failed"


@dataclass(frozen=True, slots=True)
class Finding:
    """One check's outcome at one place.

    ``result`` is ``ok``, ``warning`` (it works, but not well or not safely) or ``failed``. ``found`` and ``needed`` are
    text for people; ``mend`` is a command to type, or what to change, and empty when all is well.
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
