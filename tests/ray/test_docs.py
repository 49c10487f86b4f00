"""The Python code in the README and the documentation runs as it stands there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import ray

TOP = Path(__file__).parents[2]
BLOCKS = [
    (path.name, code)
    for path in (TOP / "README.md", *sorted((TOP / "docs").glob("*.md")))
    for code in re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
]


@pytest.mark.parametrize(
    "code", [code for _, code in BLOCKS], ids=[f"{name}-{n}" for n, (name, _) in enumerate(BLOCKS)]
)
def test_the_code_of_the_documentation_runs(code, tmp_path, local_ray):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("KVPOOL_")}
    # Named, since Ray itself would take any cluster of this machine, and others may end while this runs.
    environment = clean | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_there_is_code_to_run():
    blocks = Counter(name for name, _ in BLOCKS)
    assert blocks["README.md"] >= 3
    assert blocks["administration.md"] >= 4
