"""The bench of the transformers engine runs on a tiny model, and ours says the same tokens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_it_runs_and_the_tokens_are_those_of_sdpa(tmp_path):
    places = os.pathsep.join(str(ROOT / folder) for folder in ("src", "bench"))
    env = os.environ | {"OUT": str(tmp_path), "PYTHONPATH": places}
    done = subprocess.run(
        [sys.executable, "bench/gpu_transformers.py", "--dry", "--repeats", "2"], cwd=ROOT, env=env,
        timeout=110, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    rows = json.loads((tmp_path / "transformers.json").read_text())["rows"]
    assert len(rows) == 12
    assert rows[-1]["value"] == 100.0
    for row in rows[:-1]:
        assert row["value"] > 0 or row["unit"] == "s", "the first use may be no longer"
        assert row["peers"].keys() == {"sdpa"}
