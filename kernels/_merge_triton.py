"""Merging attention results by their log-sum-exp, in Triton; see ``merge.py``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from kvcached.kernels import _launch
from kvcached.kernels._launch import handle_of, interpreted

MOST = 4
"""Results that one launch merges."""
MERGE_TYPES = dict.fromkeys(("A", "B", "C", "E", "OUT"), "i64") | dict.fromkeys(
    ("LSE_A", "LSE_B", "LSE_C", "LSE_E", "SINKS", "LSE"), "*fp32"
)
"""Of the arguments of ``merge_kernel`` that are no constants or counts."""
_ELEMENTS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
TILE = 2048
"""Elements of a program's tile."""


@triton.jit
def _add(
    OUT, LSE, row, d, valid, seen, top, total, acc,
    D: tl.constexpr, ALIGN: tl.constexpr, ELEMENT: tl.constexpr,
):  # fmt: skip
    """One more result: the online softmax of FlashAttention over whole parts."""
    lse = tl.load(LSE + row, mask=valid, other=float("-inf"))
    BASE = tl.multiple_of(OUT.to(tl.pointer_type(ELEMENT)), ALIGN)
    part = tl.load(BASE + (row * D)[:, None] + d[None, :], mask=seen, other=0.0).to(tl.float32)
    new = tl.maximum(top, lse)
    fade, gain = tl.exp(top - new), tl.exp(lse - new)
    # What an empty part holds must not matter, not even a NaN.
    part = tl.where((gain > 0)[:, None], part, 0.0)
    return new, total * fade + gain, acc * fade[:, None] + part * gain[:, None]


@triton.jit(do_not_specialize=["rows", "heads"])
def merge_kernel(
    A: tl.int64, LSE_A, B: tl.int64, LSE_B, C: tl.int64, LSE_C, E: tl.int64, LSE_E,
    SINKS, OUT: tl.int64, LSE, rows, heads,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
    HAS_SINKS: tl.constexpr, ALIGN: tl.constexpr,
    FIRST: tl.constexpr, REST: tl.constexpr, RESULT: tl.constexpr,
):  # fmt: skip
    """Merge ``PARTS`` contiguous results ``[rows, D]``, ``rows`` = tokens x heads."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, DP)
    valid = row < rows
    seen = valid[:, None] & (d < D)[None, :]
    top = tl.full([ROWS], -1.0e30, tl.float32)  # not -inf: nothing yet must not make NaN
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DP], tl.float32)
    top, total, acc = _add(A, LSE_A, row, d, valid, seen, top, total, acc, D, ALIGN, FIRST)
    if PARTS > 1:
        top, total, acc = _add(B, LSE_B, row, d, valid, seen, top, total, acc, D, ALIGN, REST)
    if PARTS > 2:
        top, total, acc = _add(C, LSE_C, row, d, valid, seen, top, total, acc, D, ALIGN, REST)
    if PARTS > 3:
        top, total, acc = _add(E, LSE_E, row, d, valid, seen, top, total, acc, D, ALIGN, REST)
    some = total > 0
    lse = tl.where(some, top + tl.log(tl.where(some, total, 1.0)), float("-inf"))
    tl.store(LSE + row, lse, mask=valid)
    if HAS_SINKS:  # in the denominator only, not in the LSE
        sink = tl.load(SINKS + row % heads, mask=valid, other=0.0)
        total += tl.exp(tl.where(some, sink - top, 0.0))
    out = acc / tl.where(some, total, 1.0)[:, None]
    BASE = tl.multiple_of(OUT.to(tl.pointer_type(RESULT)), ALIGN)
    tl.store(BASE + (row * D)[:, None] + d[None, :], out.to(RESULT), mask=seen)


def merge_config(dim: int, parts: Sequence[torch.dtype], out: torch.dtype) -> dict[str, Any]:
    """Constants of ``merge_kernel``, but for sinks and alignment; all but the first are alike."""
    padded = triton.next_power_of_2(dim)
    return {"D": dim, "DP": padded, "ROWS": max(1, TILE // padded), "PARTS": len(parts),
            "FIRST": _ELEMENTS[parts[0]], "REST": _ELEMENTS[parts[-1]],
            "RESULT": _ELEMENTS[out]}  # fmt: skip


def merge_triton(
    outs: Sequence[torch.Tensor],
    lses: Sequence[torch.Tensor],
    sinks: torch.Tensor | None,
    out: torch.Tensor,
) -> torch.Tensor:
    """Merge checked results to contiguous ``out``; returns the LSE. More than ``MOST`` by turns."""
    kinds = {part.dtype for part in outs[1:]}
    outs = [(part if len(kinds) < 2 else part.float()).contiguous() for part in outs]
    lses = [lse.float().contiguous() for lse in lses]
    while len(outs) > MOST:
        first = torch.empty_like(out, dtype=torch.float32)
        lse = merge_triton(outs[:MOST], lses[:MOST], None, first)
        outs, lses = [first, *outs[MOST:]], [lse, *lses[MOST:]]
    lse, dim = torch.empty_like(lses[0]), out.shape[-1]
    rows, config = lse.numel(), merge_config(dim, [part.dtype for part in outs], out.dtype)
    if rows:
        sides = [x for pair in zip(outs, lses, strict=True) for x in pair]
        padding = sides[:2] * (MOST - len(outs))  # a pointer is needed for what is not read too
        tensors = [*sides, *padding, lses[0] if sinks is None else sinks, out, lse]
        numbers = rows, out.shape[-2] if out.dim() > 1 else 1
        wide = [*tensors[:8:2], out]
        aligned = not any(x.data_ptr() % 16 for x in wide)
        config |= {"HAS_SINKS": sinks is not None, "ALIGN": 16 if aligned else 2}
        programs = triton.cdiv(rows, config["ROWS"])
        if interpreted():
            given = [x.data_ptr() if i in {0, 2, 4, 6, 9} else x for i, x in enumerate(tensors)]
            merge_kernel[(programs,)](*given, *numbers, **config)
            return lse
        device = out.device.index
        handle = handle_of(merge_kernel, MERGE_TYPES, config, num_warps=4, device=device)
        handle((programs,), _launch.stream_of(device), *(x.data_ptr() for x in tensors), *numbers)
    return lse
