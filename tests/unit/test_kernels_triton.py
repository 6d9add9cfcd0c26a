"""The Triton kernels without a GPU: in the interpreter, and compiled ahead of time for sm_90.

Both need a Python of their own, since Triton decides at its import whether it interprets.
"""

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

ROOT = Path(__file__).parents[2]
SHARED_LIMIT = 232_448
"""Bytes of shared memory that one thread block may have on sm_90."""


def _python(*args, timeout, **env):
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *args], cwd=ROOT, env=clean | env, timeout=timeout, check=False,
        capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.timeout(400)
def test_the_laws_of_the_kernels_hold_in_the_interpreter():
    laws = sorted(str(path) for path in (ROOT / "tests/property").glob("test_kernels_*.py")
                  if path.stem not in {"test_kernels_prefill", "test_kernels_mla"})  # fmt: skip
    done = _python("-m", "pytest", "-q", "-p", "no:cacheprovider", *laws,
                   timeout=380, TRITON_INTERPRET="1")  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.fixture(scope="module")
def compiled():
    done = _python(str(Path(__file__).with_name("aot_report.py")), timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.timeout(300)
def test_every_kernel_compiles_for_sm_90_without_spills(compiled):
    assert len(compiled) == 45
    for name, needs in compiled.items():
        assert needs["stack"] == 0, (name, needs)
        assert needs["shared"] <= SHARED_LIMIT, (name, needs)


@pytest.mark.timeout(300)
def test_keys_and_values_are_copied_ahead_in_16_byte_pieces(compiled):
    for name, needs in compiled.items():
        if name.startswith("attend"):
            assert needs["wide_copies"] > 0, (name, needs)
            assert needs["shared"] >= needs["tiles_ahead"], (name, needs)
