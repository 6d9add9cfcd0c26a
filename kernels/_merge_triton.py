"""Merging attention results by their log-sum-exp, in Triton; see ``merge.py``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

MOST = 4
"""Results that one launch merges."""
TILE = 2048
"""Elements of a program's tile."""


@triton.jit
def _add(OUT, LSE, row, d, valid, seen, top, total, acc, D: tl.constexpr):
    """One more result: the online softmax of FlashAttention over whole parts."""
    lse = tl.load(LSE + row, mask=valid, other=float("-inf"))
    part = tl.load(OUT + (row * D)[:, None] + d[None, :], mask=seen, other=0.0).to(tl.float32)
    new = tl.maximum(top, lse)
    fade, gain = tl.exp(top - new), tl.exp(lse - new)
    # What an empty part holds must not matter, not even a NaN.
    part = tl.where((gain > 0)[:, None], part, 0.0)
    return new, total * fade + gain, acc * fade[:, None] + part * gain[:, None]


@triton.jit
def merge_kernel(
    A, LSE_A, B, LSE_B, C, LSE_C, E, LSE_E, SINKS, OUT, LSE, rows, heads,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """Merge ``PARTS`` contiguous results ``[rows, D]``, ``rows`` = tokens x heads."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, DP)
    valid = row < rows
    seen = valid[:, None] & (d < D)[None, :]
    top = tl.full([ROWS], -1.0e30, tl.float32)  # not -inf: nothing yet must not make NaN
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DP], tl.float32)
    top, total, acc = _add(A, LSE_A, row, d, valid, seen, top, total, acc, D)
    if PARTS > 1:
        top, total, acc = _add(B, LSE_B, row, d, valid, seen, top, total, acc, D)
    if PARTS > 2:
        top, total, acc = _add(C, LSE_C, row, d, valid, seen, top, total, acc, D)
    if PARTS > 3:
        top, total, acc = _add(E, LSE_E, row, d, valid, seen, top, total, acc, D)
    some = total > 0
    lse = tl.where(some, top + tl.log(tl.where(some, total, 1.0)), float("-inf"))
    tl.store(LSE + row, lse, mask=valid)
    if HAS_SINKS:  # in the denominator only, not in the LSE
        sink = tl.load(SINKS + row % heads, mask=valid, other=0.0)
        total += tl.exp(tl.where(some, sink - top, 0.0))
    out = acc / tl.where(some, total, 1.0)[:, None]
    tl.store(OUT + (row * D)[:, None] + d[None, :], out.to(OUT.dtype.element_ty), mask=seen)


def merge_config(dim: int) -> dict[str, int]:
    """Compile-time sizes of ``merge_kernel``."""
    padded = triton.next_power_of_2(dim)
    return {"D": dim, "DP": padded, "ROWS": max(1, TILE // padded)}


def merge_triton(
    outs: Sequence[torch.Tensor],
    lses: Sequence[torch.Tensor],
    sinks: torch.Tensor | None,
    out: torch.Tensor,
) -> torch.Tensor:
    """Merge checked results to contiguous ``out``; returns the LSE. More than ``MOST`` by turns."""
    outs = [part.contiguous() for part in outs]
    lses = [lse.float().contiguous() for lse in lses]
    while len(outs) > MOST:
        first = torch.empty_like(out, dtype=torch.float32)
        lse = merge_triton(outs[:MOST], lses[:MOST], None, first)
        outs, lses = [first, *outs[MOST:]], [lse, *lses[MOST:]]
    lse, dim = torch.empty_like(lses[0]), out.shape[-1]
    rows, config = lse.numel(), merge_config(dim)
    if rows:
        sides = [x for pair in zip(outs, lses, strict=True) for x in pair]
        padding = sides[:2] * (MOST - len(outs))  # a pointer is needed for what is not read too
        merge_kernel[(triton.cdiv(rows, config["ROWS"]),)](
            *sides, *padding, lses[0] if sinks is None else sinks, out, lse, rows,
            out.shape[-2] if out.dim() > 1 else 1, **config, PARTS=len(outs),
            HAS_SINKS=sinks is not None,
        )  # fmt: skip
    return lse
