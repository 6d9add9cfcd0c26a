"""Gathering the rows of sequences on a GPU, in Triton: as they are stored, or what they mean.

Bases are integers, since the first block of an elastic cache may be unmapped.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from kvcached.kernels._launch import TYPES, interpreted, run
from kvcached.kernels._widen import from_bytes, from_nibbles
from kvcached.kernels.quant import INT4, require_hardware

GATHER_TYPES = dict.fromkeys(("K", "V", "K_SCALE", "V_SCALE"), "i64") | dict.fromkeys(
    ("TABLE", "STARTS"), "*i32"
)
"""Triton's types of the arguments of these kernels that do not follow from their values."""
TILE_BYTES = 4096
"""Of the keys, and of the values, that a program widens: of more, int4 takes 4 % longer."""


@triton.jit
def _sequence_of(row, STARTS, batch, steps):
    """The last sequence that starts at or before ``row``: the one that holds it."""
    low = tl.zeros_like(row)
    for step in tl.range(0, steps):
        probe = low + (1 << (steps - 1 - step))
        known = probe < batch
        start = tl.load(STARTS + probe, mask=known, other=0)
        low = tl.where(known & (start <= row), probe, low)
    return low


@triton.jit
def _place_of(row, rows, TABLE, STARTS, batch, steps, table_stride, BLOCK_SIZE: tl.constexpr):
    """(block, slot in it, whether there is such a row) of rows of the output."""
    seq = _sequence_of(row, STARTS, batch, steps)
    pos = row - tl.load(STARTS + seq)
    valid = (row < rows) & (row < tl.load(STARTS + batch))
    block = tl.load(
        TABLE + seq.to(tl.int64) * table_stride + pos // BLOCK_SIZE, mask=valid, other=0
    )
    return block.to(tl.int64), pos % BLOCK_SIZE, valid


@triton.jit(do_not_specialize=["rows", "batch", "steps", "table_stride"])
def gather_kernel(
    K: tl.int64, V: tl.int64, TABLE, STARTS, OUT_K, OUT_V, rows, batch, steps, heads,
    table_stride, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_okt, stride_okh, stride_ovt, stride_ovh,
    D: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """``ROWS`` rows of the output, each from its place in the cache. Bits only."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block, slot, valid = _place_of(row, rows, TABLE, STARTS, batch, steps, table_stride, BLOCK_SIZE)
    row = row.to(tl.int64)
    K_BASE = tl.multiple_of(K.to(tl.pointer_type(OUT_K.dtype.element_ty)), ALIGN)
    V_BASE = tl.multiple_of(V.to(tl.pointer_type(OUT_V.dtype.element_ty)), ALIGN)
    element = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    head, d = element // D, element % D
    inside = valid[:, None] & (head < heads)[None, :]
    frm = (block * stride_kb + slot * stride_ks)[:, None] + (head * stride_kh + d)[None, :]
    to = (row * stride_okt)[:, None] + (head * stride_okh + d)[None, :]
    tl.store(OUT_K + to, tl.load(K_BASE + frm, mask=inside), mask=inside)
    head, d = element // DV, element % DV
    inside = valid[:, None] & (head < heads)[None, :]
    frm = (block * stride_vb + slot * stride_vs)[:, None] + (head * stride_vh + d)[None, :]
    to = (row * stride_ovt)[:, None] + (head * stride_ovh + d)[None, :]
    tl.store(OUT_V + to, tl.load(V_BASE + frm, mask=inside), mask=inside)


@triton.jit
def _widen_side(
    CACHE, SCALE, OUT, block, slot, row, head, valid, stride_b, stride_s, stride_h,
    scale_b, scale_s, scale_h, stride_t, stride_n,
    D: tl.constexpr, DP: tl.constexpr, KIND: tl.constexpr, ALIGN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Some (row, head) pairs of the keys or of the values; of int4 as two tiles, the halves."""
    STORED: tl.constexpr = tl.uint8 if KIND == "int4" else tl.int8
    WIDTH: tl.constexpr = D // 2 if KIND == "int4" else D
    TYPE: tl.constexpr = OUT.dtype.element_ty
    d = tl.arange(0, DP)
    mask = valid[:, None] & (d < WIDTH)[None, :]
    BASE = tl.multiple_of(CACHE.to(tl.pointer_type(STORED)), ALIGN)
    frm = (block * stride_b + slot * stride_s + head * stride_h)[:, None] + d[None, :]
    stored = tl.load(BASE + frm, mask=mask, other=0)
    at = SCALE.to(tl.pointer_type(tl.float32)) + block * scale_b + slot * scale_s + head * scale_h
    scale = tl.load(at, mask=valid, other=0.0)[:, None]
    to = OUT + (row * stride_t + head * stride_n)[:, None] + d[None, :]
    if KIND == "int4":
        low, high = from_nibbles(stored, tl.float32, ASM)
        tl.store(to, (low.to(tl.float32) * scale).to(TYPE), mask=mask)
        tl.store(to + WIDTH, (high.to(tl.float32) * scale).to(TYPE), mask=mask)
    else:
        wide = from_bytes(stored, KIND, tl.float32, ASM).to(tl.float32)
        tl.store(to, (wide * scale).to(TYPE), mask=mask)


@triton.jit(do_not_specialize=["rows", "batch", "steps", "table_stride"])
def gather_wide_kernel(
    K: tl.int64, V: tl.int64, K_SCALE: tl.int64, V_SCALE: tl.int64, TABLE, STARTS, OUT_K, OUT_V,
    rows, batch, steps, table_stride, stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh, k_scale_b, k_scale_s, k_scale_h,
    v_scale_b, v_scale_s, v_scale_h, stride_okt, stride_okh, stride_ovt, stride_ovh,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, HEADS: tl.constexpr,
    PAIRS: tl.constexpr, BLOCK_SIZE: tl.constexpr, KIND: tl.constexpr, ALIGN: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """``PAIRS`` pairs of a row of the output and a head: what is stored, times its scale."""
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    row, head = pair // HEADS, pair % HEADS
    block, slot, valid = _place_of(row, rows, TABLE, STARTS, batch, steps, table_stride, BLOCK_SIZE)
    row = row.to(tl.int64)
    _widen_side(K, K_SCALE, OUT_K, block, slot, row, head, valid, stride_kb, stride_ks, stride_kh,
                k_scale_b, k_scale_s, k_scale_h, stride_okt, stride_okh, D, DP, KIND, ALIGN,
                ASM)  # fmt: skip
    _widen_side(V, V_SCALE, OUT_V, block, slot, row, head, valid, stride_vb, stride_vs, stride_vh,
                v_scale_b, v_scale_s, v_scale_h, stride_ovt, stride_ovh, DV, DVP, KIND, ALIGN,
                ASM)  # fmt: skip


def gather_rows(
    k_cache: torch.Tensor, v_cache: torch.Tensor, table: torch.Tensor, starts: torch.Tensor,
    out_k: torch.Tensor, out_v: torch.Tensor,
) -> None:  # fmt: skip
    """Copy the rows of all sequences to ``out_k``, ``out_v``; see ``gather.gather_kv``."""
    rows, (block_size, heads, dim), batch = len(out_k), k_cache.shape[1:], len(table)
    if not rows:
        return
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[k_cache.element_size()]
    tensors = [x.view(bits) for x in (k_cache, v_cache, out_k, out_v)]
    k_cache, v_cache, out_k, out_v = tensors
    size = k_cache.element_size()
    numbers = [x.data_ptr() for x in tensors]
    width = min(1024, triton.next_power_of_2(heads * max(dim, v_cache.shape[-1])))
    grid = triton.cdiv(rows, 4), triton.cdiv(heads * max(dim, v_cache.shape[-1]), width)
    constants = {
        "D": dim, "DV": v_cache.shape[-1], "ROWS": 4, "WIDTH": width, "BLOCK_SIZE": block_size,
        "ALIGN": 16 if (numbers[0] | numbers[1]) % 16 == 0 else size,
    }  # fmt: skip
    run(gather_kernel, grid,
        (numbers[0], numbers[1], table, starts, out_k, out_v, rows, batch, batch.bit_length(),
         heads, table.stride(0), *k_cache.stride()[:3], *v_cache.stride()[:3],
         *out_k.stride()[:2], *out_v.stride()[:2]),
        constants, GATHER_TYPES | dict.fromkeys(("OUT_K", "OUT_V"), f"*{TYPES[bits]}"),
        k_cache.device)  # fmt: skip


def wide_config(
    heads: int, dim: int, dim_v: int, dtype: torch.dtype, to: torch.dtype
) -> dict[str, Any]:
    """Compile-time sizes of ``gather_wide_kernel``; the dims count elements, not bytes."""
    pack = 2 if dtype == INT4 else 1
    padded, padded_v = (triton.next_power_of_2(n // pack) for n in (dim, dim_v))
    kind = "int4" if dtype == INT4 else str(dtype).removeprefix("torch.")
    return {"D": dim, "DV": dim_v, "DP": padded, "DVP": padded_v, "HEADS": heads,
            "PAIRS": max(1, TILE_BYTES // (max(padded, padded_v) * pack * to.itemsize)),
            "KIND": kind}  # fmt: skip


def gather_wide(
    k_cache: torch.Tensor, v_cache: torch.Tensor, k_scale: torch.Tensor, v_scale: torch.Tensor,
    table: torch.Tensor, starts: torch.Tensor, out_k: torch.Tensor, out_v: torch.Tensor,
) -> None:  # fmt: skip
    """What the rows of all sequences mean, to ``out_k``, ``out_v``; see ``gather.gather_kv``."""
    rows, heads, _ = out_k.shape
    if not rows:
        return
    require_hardware(k_cache.dtype, k_cache.device)
    bases = [x.data_ptr() for x in (k_cache, v_cache, k_scale, v_scale)]
    steps = [step for scale in (k_scale, v_scale)
             for step in [0, 0, 0, *scale.stride()][-3:]]  # fmt: skip
    constants = wide_config(heads, out_k.shape[2], out_v.shape[2], k_cache.dtype, out_k.dtype) | {
        "BLOCK_SIZE": k_cache.shape[1], "ALIGN": 16 if (bases[0] | bases[1]) % 16 == 0 else 1,
        "ASM": not interpreted(),
    }  # fmt: skip
    grid = (triton.cdiv(rows * heads, constants["PAIRS"]),)
    types = {"OUT_K": f"*{TYPES[out_k.dtype]}", "OUT_V": f"*{TYPES[out_v.dtype]}"}
    run(gather_wide_kernel, grid,
        (*bases, table, starts, out_k, out_v, rows, len(table), len(table).bit_length(),
         table.stride(0), *k_cache.stride()[:3], *v_cache.stride()[:3], *steps,
         *out_k.stride()[:2], *out_v.stride()[:2]),
        constants, GATHER_TYPES | types, k_cache.device)  # fmt: skip
