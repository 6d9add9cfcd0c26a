"""The Triton kernels without a GPU: in the interpreter, and compiled ahead of time for sm_90.

Both need a Python of their own, since Triton decides at its import whether it interprets.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from other_python import ROOT, run_python

pytest.importorskip("triton")
pytest.importorskip("torch")
pytestmark = pytest.mark.slow

SHARED_LIMIT = 232_448
"""Bytes of shared memory that one thread block may have on sm_90."""


@pytest.mark.timeout(400)
def test_the_laws_of_the_kernels_hold_in_the_interpreter():
    laws = sorted(str(path) for path in (ROOT / "tests/property").glob("test_kernels_*.py")
                  if path.stem not in {"test_kernels_prefill", "test_kernels_mla"})  # fmt: skip
    said = run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", *laws,
                      timeout=380, TRITON_INTERPRET="1")  # fmt: skip
    assert " passed" in said


@pytest.fixture(scope="module")
def compiled():
    return json.loads(run_python(str(Path(__file__).with_name("aot_report.py")), timeout=280))


@pytest.mark.timeout(300)
def test_every_kernel_compiles_for_sm_90_without_spills(compiled):
    assert len(compiled) == 52
    for name, needs in compiled.items():
        assert needs["stack"] == 0, (name, needs)
        assert needs["shared"] <= SHARED_LIMIT, (name, needs)


@pytest.mark.timeout(300)
def test_keys_and_values_are_copied_ahead_in_16_byte_pieces(compiled):
    for name, needs in compiled.items():
        if name.startswith("attend"):
            assert needs["wide_copies"] > 0, (name, needs)
            assert needs["shared"] >= needs["tiles_ahead"], (name, needs)


@pytest.mark.timeout(300)
def test_early_kernels_wait_and_those_of_clusters_meet(compiled):
    words = {name: set(name.split()) for name in compiled}
    early = {name for name, needs in compiled.items() if needs["early"]}
    assert early == {name for name, said in words.items() if said & {"early", "cluster"}}
    together = {name for name, needs in compiled.items() if needs["cluster"]}
    assert together == {name for name, said in words.items() if "cluster" in said}
    assert early > together
    assert together
