"""The merge of parts of latent attention that warpgroups left in 16 bits."""

from __future__ import annotations

import triton
import triton.language as tl

from kvcached.kernels._prefill_parts import LOG2_E


@triton.jit
def column_of(place):
    """The column of an element of a row of 32; a thread has 8 columns, which it wrote in a row."""
    return place // 32 * 32 + place // 2 % 4 * 8 + place // 8 % 4 * 2 + place % 2


@triton.jit
def mla_merge_kernel(
    PARTIAL, STATE, OUT, LSE, rows, heads, stride_ot, stride_oh,
    DV: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """COLUMNS of the output of ROWS (token, head) from the normalised outputs of their splits.

    Of each split there is its base-2 LSE, in float32, and DV float16 to be multiplied by 2 to the
    power of an int16, one for each half of the columns.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * COLUMNS
    place = first + tl.arange(0, COLUMNS)
    own = row[:, None] * SPLITS + tl.arange(0, SPLITS)[None, :]
    valid = row < rows
    base = tl.multiple_of(PARTIAL.to(tl.pointer_type(tl.float16)), 16)
    at = base + own[:, :, None] * DV + place[None, None, :]
    parts = tl.load(at, mask=valid[:, None, None], other=0.0)
    lse = tl.load(STATE + own * 2, mask=valid[:, None], other=0.0)
    at = STATE.to(tl.pointer_type(tl.int16)) + own * 4 + 2 + first // (DV // 2)
    power = tl.load(at, mask=valid[:, None], other=0).to(tl.float32)
    top = tl.max(lse, 1)
    weights = tl.exp2(lse - top[:, None])
    total = tl.sum(weights, 1)
    gain = weights * tl.exp2(power)
    out = tl.sum(parts.to(tl.float32) * gain[:, :, None], 1) / total[:, None]
    at = OUT + row // heads * stride_ot + row % heads * stride_oh
    at = at[:, None] + column_of(place)[None, :]
    tl.store(at, out.to(OUT.dtype.element_ty), mask=valid[:, None])
    if first == 0:
        whole = tl.where(top > -1.0e29, (top + tl.log2(total)) / LOG2_E, float("-inf"))
        tl.store(LSE + row, whole, mask=valid)
