"""The kernels that write, move and merge, compiled ahead of time for sm_90."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from other_python import run_python

pytest.importorskip("triton")
pytest.importorskip("torch")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def compiled():
    return json.loads(run_python(str(Path(__file__).with_name("aot_moves.py")), timeout=110))


def test_they_need_no_stack_and_few_registers(compiled):
    assert len(compiled) == 30
    for name, needs in compiled.items():
        assert needs["stack"] == 0, (name, needs)
        assert needs["registers"] <= 64, (name, needs)  # eight programs of 4 warps on an SM
        assert needs["shared"] <= 4096, (name, needs)


def test_what_moves_bytes_moves_16_at_a_time(compiled):
    movers = [name for name in compiled if name.startswith(("copy", "compact", "gather rows"))]
    plain = ["append bf16 128", "append bf16 128 apart", "append bf16 80 apart", "append fp32 128"]
    for name in [*movers, *plain]:
        needs = compiled[name]
        assert needs["wide_loads"] == needs["wide_stores"] >= 4, (name, needs)
