"""The kernels that write, move and merge, compiled ahead of time for sm_90."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytest.importorskip("torch")
pytestmark = pytest.mark.slow
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def compiled():
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, HERE / "aot_moves.py"], env=env, timeout=110,
                          check=False, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_they_need_no_stack_and_few_registers(compiled):
    assert len(compiled) == 22
    for name, needs in compiled.items():
        assert needs["stack"] == 0, (name, needs)
        assert needs["registers"] <= 64, (name, needs)  # eight programs of 4 warps on an SM
        assert needs["shared"] <= 4096, (name, needs)


def test_what_moves_bytes_moves_16_at_a_time(compiled):
    movers = [name for name in compiled if name.startswith(("copy", "compact", "gather"))]
    plain = ["append bf16 128", "append bf16 128 apart", "append bf16 80 apart", "append fp32 128"]
    for name in [*movers, *plain]:
        needs = compiled[name]
        assert needs["wide_loads"] == needs["wide_stores"] >= 4, (name, needs)
