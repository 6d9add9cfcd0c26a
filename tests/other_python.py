"""A Python of its own: Triton decides at its import whether it interprets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_python(*args, timeout, **env):
    """What it prints, with ``tests`` on its path. Fails if it does."""
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    places = [str(ROOT / "tests"), *filter(None, [clean.get("PYTHONPATH")])]
    clean["PYTHONPATH"] = os.pathsep.join(places)
    done = subprocess.run(
        [sys.executable, *args], cwd=ROOT, env=clean | env, timeout=timeout, check=False,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    return done.stdout
