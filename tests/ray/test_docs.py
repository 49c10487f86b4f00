"""The Python code in the documentation runs as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = sorted((Path(__file__).parents[2] / "docs").glob("*.md"))
BLOCKS = [
    (path.name, code)
    for path in DOCS
    for code in re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
]


@pytest.mark.ray
@pytest.mark.parametrize(
    "code", [code for _, code in BLOCKS], ids=[f"{name}-{n}" for n, (name, _) in enumerate(BLOCKS)]
)
def test_the_code_of_the_documentation_runs(code, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_there_is_code_to_run():
    assert sum(name == "administration.md" for name, _ in BLOCKS) >= 4
