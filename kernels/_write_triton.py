"""Writing new keys and values to their slots on a GPU, in Triton; see ``append.py``.

Caches and scales go by integer addresses: their first block may be unmapped.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from kvcached.kernels._bound import Launch, launch_of
from kvcached.kernels._launch import TYPES, handle_of, interpreted
from kvcached.kernels.quant import LARGEST, require_hardware

WIDTH = 1024
"""Elements of a token that a program writes."""
FEW_TOKENS = 1024
"""Up to so many tokens each has a program of its own."""
APPEND_TYPES = dict.fromkeys(("KEY", "VALUE", "K", "V"), "i64") | {"SLOTS": "*i32"}
"""Of the arguments of ``append_kernel`` that are no constants."""
QUANT_TYPES = dict.fromkeys(("K", "V", "K_SCALE", "V_SCALE"), "i64") | {"SLOTS": "*i32"}
"""Of the arguments of ``append_quant_kernel``, without those of its rows."""
_BITS = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}
_STORED = {
    torch.float8_e4m3fn: tl.float8e4nv,
    torch.float8_e5m2: tl.float8e5,
    torch.int8: tl.int8,
    torch.uint8: tl.uint8,
}


@triton.jit
def _write_side(
    ROWS, CACHE, token, slot, valid, stride_t, stride_n, stride_b, stride_s, stride_h, heads,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr, ALIGN: tl.constexpr,
    ELEMENT: tl.constexpr,
):  # fmt: skip
    BASE = tl.multiple_of(CACHE.to(tl.pointer_type(ELEMENT)), ALIGN)
    SOURCE = tl.multiple_of(ROWS.to(tl.pointer_type(ELEMENT)), ALIGN)
    element = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    head, d = element // D, element % D
    inside = (head < heads)[None, :]
    frm = (token * stride_t)[:, None] + (head * stride_n + d)[None, :]
    rows = tl.load(SOURCE + frm, mask=inside & valid[:, None])
    to = (slot // BLOCK_SIZE * stride_b + slot % BLOCK_SIZE * stride_s)[:, None]
    tl.store(BASE + to + (head * stride_h + d)[None, :], rows, mask=inside & (slot >= 0)[:, None])


@triton.jit(do_not_specialize=["tokens"])
def append_kernel(
    KEY: tl.int64, VALUE: tl.int64, K: tl.int64, V: tl.int64, SLOTS, tokens,
    KT: tl.constexpr, KN: tl.constexpr, VT: tl.constexpr, VN: tl.constexpr,
    KB: tl.constexpr, KS: tl.constexpr, KH: tl.constexpr,
    VB: tl.constexpr, VS: tl.constexpr, VH: tl.constexpr, HEADS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, ALIGN: tl.constexpr, ELEMENT: tl.constexpr,
):  # fmt: skip
    """Write a piece of some tokens' keys and values to their slots; negative ones are skipped.

    Strides are constants: token and head of the rows; block, slot and head of the caches. The rows
    are read whether or not they are skipped: that load waits for nothing.
    """
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    valid = token < tokens
    slot = tl.load(SLOTS + token, mask=valid, other=-1).to(tl.int64)
    _write_side(KEY, K, token, slot, valid, KT, KN, KB, KS, KH, HEADS, D, WIDTH, BLOCK_SIZE,
                ALIGN, ELEMENT)  # fmt: skip
    _write_side(VALUE, V, token, slot, valid, VT, VN, VB, VS, VH, HEADS, DV, WIDTH, BLOCK_SIZE,
                ALIGN, ELEMENT)  # fmt: skip


@triton.jit
def _row_scale(largest, LIMIT: tl.constexpr):
    scale = tl.div_rn(largest, LIMIT + tl.zeros_like(largest))
    return tl.where(scale > 0, scale, 1.0)


@triton.jit
def _scaled(x, scale, LIMIT: tl.constexpr, WHOLE: tl.constexpr):
    """``x / scale`` within the limit; ``WHOLE``: rounded half to even, by adding 1.5 * 2**23."""
    x = tl.div_rn(x, scale[:, None] + tl.zeros_like(x))
    x = tl.minimum(tl.maximum(x, -LIMIT), LIMIT)
    if WHOLE:
        x = (x + 12582912.0) - 12582912.0
    return x


@triton.jit
def _quantise_side(
    ROWS, CACHE, SCALE, token, slot, stride_t, stride_n, stride_b, stride_s, stride_h,
    scale_b, scale_s, scale_h, heads,
    D: tl.constexpr, DP: tl.constexpr, HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    STORED: tl.constexpr, LIMIT: tl.constexpr, PER_ROW: tl.constexpr,
):  # fmt: skip
    """One token's rows; for int4 as two tiles, the halves of a row (see ``quant.py``)."""
    PACKED: tl.constexpr = tl.uint8 == STORED
    WHOLE: tl.constexpr = PACKED or tl.int8 == STORED
    HALF: tl.constexpr = D // 2 if PACKED else D
    head, d = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, DP)
    mask = (head < heads)[:, None] & (d < HALF)[None, :]
    frm = token * stride_t + (head * stride_n)[:, None] + d[None, :]
    x = tl.load(ROWS + frm, mask=mask, other=0.0).to(tl.float32)
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    S_BASE = SCALE.to(tl.pointer_type(tl.float32)) + block * scale_b + offset * scale_s
    if PACKED:
        y = tl.load(ROWS + frm + HALF, mask=mask, other=0.0).to(tl.float32)
    if PER_ROW:
        largest = tl.max(tl.abs(x), 1)
        if PACKED:
            largest = tl.maximum(largest, tl.max(tl.abs(y), 1))
        scale = _row_scale(largest, LIMIT)
        tl.store(S_BASE + head * scale_h, scale, mask=head < heads)
    else:
        scale = tl.load(S_BASE + head * scale_h, mask=head < heads, other=1.0)
    stored = _scaled(x, scale, LIMIT, WHOLE)
    if PACKED:
        low = stored.to(tl.int32) + 8
        high = _scaled(y, scale, LIMIT, WHOLE).to(tl.int32) + 8
        stored = low | (high << 4)
    to = block * stride_b + offset * stride_s + (head * stride_h)[:, None] + d[None, :]
    tl.store(CACHE.to(tl.pointer_type(STORED)) + to, stored.to(STORED), mask=mask)


@triton.jit
def append_quant_kernel(
    KEY, VALUE, K: tl.int64, V: tl.int64, K_SCALE: tl.int64, V_SCALE: tl.int64, SLOTS,
    stride_kt, stride_kn, stride_vt, stride_vn,
    stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    k_scale_b, k_scale_s, k_scale_h, v_scale_b, v_scale_s, v_scale_h, heads,
    D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, STORED: tl.constexpr, LIMIT: tl.constexpr, PER_ROW: tl.constexpr,
):  # fmt: skip
    """Quantise one token's keys and values of some heads; ``PER_ROW`` makes and writes scales."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(SLOTS + token).to(tl.int64)
    if slot < 0:
        return
    _quantise_side(KEY, K, K_SCALE, token, slot, stride_kt, stride_kn, stride_kb, stride_ks,
                   stride_kh, k_scale_b, k_scale_s, k_scale_h, heads, D, DP, HEADS, BLOCK_SIZE,
                   STORED, LIMIT, PER_ROW)  # fmt: skip
    _quantise_side(VALUE, V, V_SCALE, token, slot, stride_vt, stride_vn, stride_vb, stride_vs,
                   stride_vh, v_scale_b, v_scale_s, v_scale_h, heads, DV, DVP, HEADS, BLOCK_SIZE,
                   STORED, LIMIT, PER_ROW)  # fmt: skip


def append_config(
    itemsize: int, few: bool, dims: tuple[int, ...], rows: tuple[int, ...],
    caches: tuple[int, ...], align: int,
) -> dict[str, Any]:  # fmt: skip
    """Constants of ``append_kernel``; ``few`` tokens get a program each, for latency.

    ``dims`` are block size, heads, D and Dv, ``rows`` the strides of key and value by token and
    head, ``caches`` those of both caches by block, slot and head.
    """
    block_size, heads, dim, dim_v = dims
    apart = [rows[1], caches[2], rows[3], caches[5]]
    if apart == [dim, dim, dim_v, dim_v]:  # the heads lie side by side everywhere: one row
        heads, dim, dim_v = 1, heads * dim, heads * dim_v
    width = min(WIDTH, triton.next_power_of_2(heads * max(dim, dim_v)))
    names = ("KT", "KN", "VT", "VN", "KB", "KS", "KH", "VB", "VS", "VH")
    return dict(zip(names, rows + caches, strict=True)) | {
        "HEADS": heads, "D": dim, "DV": dim_v, "TOKENS": 1 if few else 2, "WIDTH": width,
        "BLOCK_SIZE": block_size, "ALIGN": align, "ELEMENT": _BITS[itemsize],
    }  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _prepared(device: Any, *shape: Any) -> tuple[Any, ...]:
    """(pieces, tokens of a program, constants, compiled handle) of a shape."""
    config = append_config(*shape)
    pieces = triton.cdiv(config["HEADS"] * max(config["D"], config["DV"]), config["WIDTH"])
    handle = None
    if not interpreted():
        handle = handle_of(append_kernel, APPEND_TYPES, config, num_warps=4, device=device)
    return pieces, config["TOKENS"], config, handle


def append_launches(
    key: torch.Tensor, value: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
    slots: torch.Tensor,
) -> list[Launch]:  # fmt: skip
    """The launch that writes checked rows of the caches' dtype to their slots, if there are any."""
    tokens = len(slots)
    if not tokens:
        return []
    aligned = (key.data_ptr() | value.data_ptr() | k_cache.data_ptr() | v_cache.data_ptr()) % 16
    pieces, together, config, handle = _prepared(
        key.device.index, key.element_size(), tokens <= FEW_TOKENS,
        (*k_cache.shape[1:], v_cache.shape[3]), key.stride()[:2] + value.stride()[:2],
        k_cache.stride()[:3] + v_cache.stride()[:3], key.element_size() if aligned else 16,
    )  # fmt: skip
    arguments = key, value, k_cache.data_ptr(), v_cache.data_ptr(), slots, tokens
    grid = -(-tokens // together), pieces
    return [Launch(append_kernel, grid, arguments, config, 4, APPEND_TYPES, handle)]


def quant_config(heads: int, dim: int, dim_v: int, dtype: torch.dtype) -> dict[str, Any]:
    """Compile-time sizes of ``append_quant_kernel``; ``dim`` counts elements, not bytes."""
    pack = 2 if dtype == torch.uint8 else 1
    padded, padded_v = (triton.next_power_of_2(n // pack) for n in (dim, dim_v))
    most = max(1, 2 * WIDTH // max(padded, padded_v))
    return {"D": dim, "DV": dim_v, "DP": padded, "DVP": padded_v,
            "HEADS": min(most, triton.next_power_of_2(heads)), "STORED": _STORED[dtype],
            "LIMIT": LARGEST[dtype]}  # fmt: skip


def append_quant_launches(
    key: torch.Tensor, value: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
    slots: torch.Tensor, k_scale: torch.Tensor, v_scale: torch.Tensor,
) -> list[Launch]:  # fmt: skip
    """The launch that quantises checked rows; scales of three dimensions are made by it."""
    if not len(slots):
        return []
    require_hardware(k_cache.dtype, k_cache.device)
    heads, per_row = k_cache.shape[2], k_scale.dim() == 3
    config = quant_config(heads, key.shape[2], value.shape[2], k_cache.dtype)
    steps = [step for scale in (k_scale, v_scale)
             for step in [0, 0, 0, *scale.stride()][-3:]]  # fmt: skip
    constants = config | {"BLOCK_SIZE": k_cache.shape[1], "PER_ROW": per_row}
    arguments = (
        key, value, *(x.data_ptr() for x in (k_cache, v_cache, k_scale, v_scale)), slots,
        *key.stride()[:2], *value.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3],
        *steps, heads,
    )  # fmt: skip
    types = QUANT_TYPES | {"KEY": f"*{TYPES[key.dtype]}", "VALUE": f"*{TYPES[value.dtype]}"}
    # Compiled for what is a multiple of 16: such rows are read and written by whole vectors.
    every = frozenset(append_quant_kernel.arg_names[: len(arguments)])
    grid = len(slots), triton.cdiv(heads, config["HEADS"])
    return [launch_of(append_quant_kernel, grid, arguments, constants, types, key.device, 4, every)]
