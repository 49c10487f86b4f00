"""Fixtures for all tests."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# A test runner tells its workers the width of its terminal; what a command prints must not depend on that.
os.environ.pop("COLUMNS", None)

# No time limit for an example or for making one, which a busy machine would exceed; the same examples in each run.
# (By itself Hypothesis does so only where CI is set. Other examples: --hypothesis-profile=default.)
settings.load_profile("ci")


@pytest.fixture(scope="session")
def traces() -> Path:
    """Folder of the published request traces; tests that need them are skipped where they are not."""
    beside_checkout = Path(__file__).resolve().parents[2] / "shared" / "traces"
    folder = Path(os.environ.get("KVPOOL_TRACES") or beside_checkout)
    if not folder.is_dir():
        pytest.skip(f"no traces in {folder}: set KVPOOL_TRACES to the folder that holds them")
    return folder
