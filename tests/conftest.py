"""Fixtures for all tests."""

import os
from pathlib import Path

import pytest

# A test runner tells its workers the width of its terminal; what a command prints must not depend on that.
os.environ.pop("COLUMNS", None)


@pytest.fixture(scope="session")
def traces() -> Path:
    """Folder of the published request traces; tests that need them are skipped where they are not."""
    beside_checkout = Path(__file__).resolve().parents[2] / "shared" / "traces"
    folder = Path(os.environ.get("KVPOOL_TRACES") or beside_checkout)
    if not folder.is_dir():
        pytest.skip(f"no traces in {folder}: set KVPOOL_TRACES to the folder that holds them")
    return folder
