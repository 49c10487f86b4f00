"""Fixtures for all tests."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# A test runner tells its workers the width of its terminal; what a command prints must not depend on that.
os.environ.pop("COLUMNS", None)

# No time limit for an example or for making one, which a busy machine would exceed; the same examples in each run.
# (By itself Hypothesis does so only where CI is set. Other examples: --hypothesis-profile=default.)
settings.load_profile("ci")


class _Kept(logging.Handler):
    """Keeps the text of records."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.texts: list[str] = []
        self.setFormatter(logging.Formatter())

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(self.format(record))


@pytest.fixture(autouse=True)
def device_bugs() -> Iterator[list[str]]:
    """What a device's store here logs as a bug: it goes on, but the test fails (unless it takes that out)."""
    kept = _Kept()
    logger = logging.getLogger("kvpool.device.store")
    logger.addHandler(kept)
    yield kept.texts
    logger.removeHandler(kept)
    assert not kept.texts, kept.texts[0]


@pytest.fixture(scope="session")
def traces() -> Path:
    """Folder of the published request traces; tests that need them are skipped where they are not."""
    beside_checkout = Path(__file__).resolve().parents[2] / "shared" / "traces"
    folder = Path(os.environ.get("KVPOOL_TRACES") or beside_checkout)
    if not folder.is_dir():
        pytest.skip(f"no traces in {folder}: set KVPOOL_TRACES to the folder that holds them")
    return folder
