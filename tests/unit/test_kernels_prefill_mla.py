"""The kernels of prefill and MLA without a GPU: in the interpreter, and compiled for sm_90."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from other_python import run_python

pytest.importorskip("triton")
pytest.importorskip("torch")
pytestmark = pytest.mark.slow

SHARED_LIMIT = 232_448
"""Bytes of shared memory that one thread block may have on sm_90."""


@pytest.mark.timeout(400)
@pytest.mark.parametrize("kernel", ["prefill", "mla"])
def test_the_laws_of_the_kernel_hold_in_the_interpreter(kernel):
    said = run_python("-m", "pytest", "-q", "-p", "no:cacheprovider",
                      f"tests/property/test_kernels_{kernel}.py",
                      timeout=380, TRITON_INTERPRET="1")  # fmt: skip
    assert " passed" in said
    assert "skipped" not in said


@pytest.fixture(scope="module")
def compiled():
    return json.loads(run_python(str(Path(__file__).with_name("aot_prefill_mla.py")), timeout=280))


OVER_BYTES = ("mla e4m3", "mla e5m2", "mla int8")
SPILLED = {16: 8, 32: 0, 64: 80}
"""Bytes a thread at most, by rows of a tile: of 16 not in the loop over keys, of 64 in it too. The
tiles that spill none took 10 % (16 heads) and 35 % (64 and 128 heads) longer on an H100."""


@pytest.mark.timeout(300)
def test_every_kernel_compiles_for_sm_90_without_spills(compiled):
    assert len(compiled) == 46
    for name, needs in compiled.items():
        most = SPILLED[needs["rows"]] if name.startswith(OVER_BYTES) else 0
        assert needs["stack"] <= most, (name, needs)
        assert needs["shared"] <= SHARED_LIMIT, (name, needs)


def test_keys_and_values_are_copied_ahead_in_16_byte_pieces(compiled):
    for name, needs in compiled.items():
        if needs["buffered"]:
            assert needs["wide_copies"] > 0, (name, needs)
            assert needs["shared"] >= needs["buffered"], (name, needs)


def test_64_rows_and_more_of_16_bits_take_the_products_of_warpgroups(compiled):
    wide = {name: needs for name, needs in compiled.items()
            if needs["rows"] >= 64 and needs["itemsize"] == 2 and needs["buffered"]}  # fmt: skip
    assert len(wide) == 35
    for name, needs in wide.items():
        assert needs["warpgroup_products"] >= 8, (name, needs)
        assert not needs["serialized"], f"{name}: each product waits for the one before it"
