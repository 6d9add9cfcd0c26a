"""Laws of quantised storage (property 12 of the kernels' list) and of its packing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from paged import few

from kvcached.errors import InvalidInput
from kvcached.kernels.quant import INT4, LARGEST, dequantize, quantize, row_scales

DTYPES = st.sampled_from(list(LARGEST))
STEP = {torch.float8_e4m3fn: 2**-4, torch.float8_e5m2: 2**-3}
"""Half the distance of neighbours, as a share of the value."""


@few(60)
@given(dtype=DTYPES, seed=st.integers(0, 2**20), spread=st.sampled_from([1e-3, 1.0, 40.0]),
       scales=st.sampled_from(["tensor", "head", "row"]))  # fmt: skip
def test_12_what_is_stored_is_the_nearest_that_can_be(dtype, seed, spread, scales):
    generator = torch.Generator().manual_seed(seed)
    x = spread * torch.randn(5, 3, 16, generator=generator)
    x[0, 0] = 0
    by_row = row_scales(x, dtype)
    scale = {"tensor": by_row.amax(), "head": by_row.amax(0), "row": by_row}[scales]
    if dtype == INT4 and scales != "row":
        with pytest.raises(InvalidInput, match="int4 needs"):
            quantize(x, scale, dtype)
        return
    stored = quantize(x, scale, dtype)
    assert stored.dtype == dtype
    assert stored.shape == (*x.shape[:2], 8 if dtype == INT4 else 16)
    error = (dequantize(stored, scale, torch.float64) - x).abs()
    wide = scale.double() if scale.dim() == 0 else scale.double()[..., None]
    step = wide * 0.5 if dtype not in STEP else x.abs() * STEP[dtype] + wide * 2**-9
    assert bool((error <= step * (1 + 1e-5)).all())


def test_int4_has_the_halves_of_a_row_in_the_nibbles_of_its_bytes():
    x = torch.tensor([-7.0, 0.0, 3.0, 7.0, 1.0, -2.0])[None, None]
    stored = quantize(x, torch.ones(1, 1), INT4)
    assert stored.tolist() == [[[1 | 15 << 4, 8 | 9 << 4, 11 | 6 << 4]]]
    assert torch.equal(dequantize(stored, torch.ones(1, 1)), x)


def test_what_fits_nothing_is_refused():
    x = torch.zeros(2, 3, 4)
    with pytest.raises(InvalidInput, match="fits no rows"):
        quantize(x, torch.ones(4), torch.int8)
    with pytest.raises(InvalidInput, match="stores no quantised cache"):
        dequantize(x, torch.ones(()))
