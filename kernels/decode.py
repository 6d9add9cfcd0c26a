"""Paged attention and cache writes in Triton, with their launchers.

One launch: a program takes (tile of query tokens of one sequence, KV head, split of the keys). The
query heads of a KV head and the tokens of the tile are packed into the rows of the tile, so one
read of K and V serves them all. Splits store their partial results; the last one to finish, found
by a counter that it also resets, merges them in a fixed order (FlashDecoding, Dao et al. 2023, in
one launch). So the result does not depend on timing, and a captured CUDA graph can be replayed.

K and V come as integer addresses: Triton asks the driver about pointer objects and refuses an
address that is not mapped, and the base of an elastic cache may be just that. Rows are masked by
length, so memory that no sequence owns is never read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from kvcached.errors import InvalidInput

if TYPE_CHECKING:
    from kvcached.kernels.checks import AttentionCall
    from kvcached.kernels.view import KVView

MAX_ROWS = 64
"""Rows (query tokens x heads of one KV head) of a tile, unless one token has more; of 4-byte
elements half as many, since a tile of them has twice the registers."""
MAX_SPLITS = 32
"""The last split merges them all alone, so there is a bound."""
MIN_SPLIT_TOKENS = 256
"""Below this a split costs more than it saves."""


@triton.jit
def _block_rows(
    TABLE, pos, valid, seq, stride_table, BLOCK_SIZE: tl.constexpr, PAGED: tl.constexpr
):
    """(block ids as int64, offsets in them) of positions ``pos`` of one sequence."""
    if PAGED:
        block = tl.load(TABLE + seq * stride_table + pos // BLOCK_SIZE, mask=valid, other=0)
        return block.to(tl.int64), pos % BLOCK_SIZE
    slot = tl.load(TABLE + seq) + pos
    return (slot // BLOCK_SIZE).to(tl.int64), slot % BLOCK_SIZE


# What varies from step to step is not specialised, or a server would compile again and again.
@triton.jit(do_not_specialize=["max_q", "q_tiles", "stride_table"])
def attend_kernel(
    Q, K: tl.int64, V: tl.int64, TABLE, LENS, Q_STARTS, SINKS, SLOPES,
    PARTIAL, STATE, FINISHED, OUT, LSE,
    scale, softcap, left, right, max_q, q_tiles, kv_heads,
    stride_qt, stride_qh, stride_ot, stride_oh, stride_table,
    stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, TOKENS: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, PAGED: tl.constexpr, VARLEN: tl.constexpr,
    HAS_SINKS: tl.constexpr, HAS_SLOPES: tl.constexpr, HAS_CAP: tl.constexpr,
    ALIGN: tl.constexpr, UPCAST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attention of one tile; see the module. Strides are elements, ``scale`` is natural."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    tl.static_assert(BM >= TOKENS * G)
    tile, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    seq, first_token = tile // q_tiles, tile % q_tiles * TOKENS
    if VARLEN:
        q_start = tl.load(Q_STARTS + seq)
        queries = tl.load(Q_STARTS + seq + 1) - q_start
    else:
        q_start, queries = seq * max_q, max_q
    if first_token >= queries:
        return
    length = tl.load(LENS + seq)
    offs_m, offs_n = tl.arange(0, BM), tl.arange(0, BN)
    offs_d, offs_v = tl.arange(0, DP), tl.arange(0, DVP)
    token, query = first_token + offs_m // G, head * G + offs_m % G
    valid_m = (offs_m < TOKENS * G) & (token < queries)
    place = length - queries + token  # causal is aligned bottom-right
    row = (q_start + token).to(tl.int64)

    last = tl.minimum(first_token + TOKENS, queries) - 1
    end = tl.minimum(length, length - queries + last + right + 1)
    begin = tl.maximum(length - queries + first_token - left, 0) // BN * BN
    share = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), SPLITS), BN) * BN
    lo = begin + split * share
    hi = tl.minimum(lo + share, end)
    # Rows before the first query's window may belong to nobody any more.
    floor = tl.maximum(length - queries + first_token - left, 0)

    q_at = Q + row[:, None] * stride_qt + query[:, None] * stride_qh + offs_d[None, :]
    q = tl.load(q_at, mask=valid_m[:, None] & (offs_d < D)[None, :], other=0.0)
    K_BASE = tl.multiple_of(K.to(tl.pointer_type(Q.dtype.element_ty)), ALIGN)
    V_BASE = tl.multiple_of(V.to(tl.pointer_type(Q.dtype.element_ty)), ALIGN)
    if UPCAST:
        q = q.to(tl.float32)
    if HAS_SLOPES:
        slope = tl.load(SLOPES + query, mask=valid_m, other=0.0) * LOG2_E
    top = tl.full([BM], -1.0e30, tl.float32)  # not -inf: an empty split must not make NaN
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DVP], tl.float32)
    for start in tl.range(lo, hi, BN, num_stages=STAGES):
        pos = start + offs_n
        valid_n = (pos < hi) & (pos >= floor)
        block, slot = _block_rows(TABLE, pos, valid_n, seq, stride_table, BLOCK_SIZE, PAGED)
        k_row = block * stride_kb + slot * stride_ks + head * stride_kh
        v_row = block * stride_vb + slot * stride_vs + head * stride_vh
        valid_k = valid_n[None, :] & (offs_d < D)[:, None]
        k = tl.load(K_BASE + k_row[None, :] + offs_d[:, None], mask=valid_k, other=0.0)
        if UPCAST:
            k = k.to(tl.float32)
        scores = tl.dot(q, k, input_precision="ieee") * scale
        if HAS_CAP:  # tanh(x) = 2 sigmoid(2x) - 1
            scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)
        scores = scores * LOG2_E
        distance = pos[None, :] - place[:, None]
        if HAS_SLOPES:
            scores -= slope[:, None] * tl.abs(distance).to(tl.float32)
        seen = valid_n[None, :] & (distance <= right) & (distance >= -left)
        scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        fade = tl.exp2(top - new_top)
        total = total * fade + tl.sum(weights, 1)
        acc = acc * fade[:, None]
        top = new_top
        valid_v = valid_n[:, None] & (offs_v < DV)[None, :]
        v = tl.load(V_BASE + v_row[:, None] + offs_v[None, :], mask=valid_v, other=0.0)
        if UPCAST:
            v = v.to(tl.float32)
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")

    item = (tile * kv_heads + head).to(tl.int64)
    if SPLITS > 1:
        own = (item * SPLITS + split) * BM + offs_m
        tl.store(PARTIAL + own[:, None] * DVP + offs_v[None, :], acc)
        tl.store(STATE + own * 2, top)
        tl.store(STATE + own * 2 + 1, total)
        tl.debug_barrier()  # all of this program's stores come before its count
        finished = tl.atomic_add(FINISHED + item, 1, sem="acq_rel", scope="gpu")
        if finished != SPLITS - 1:
            return
        top = tl.full([BM], -1.0e30, tl.float32)
        total = tl.zeros([BM], tl.float32)
        acc = tl.zeros([BM, DVP], tl.float32)
        for other in tl.range(0, SPLITS):
            theirs = (item * SPLITS + other) * BM + offs_m
            their_top = tl.load(STATE + theirs * 2, cache_modifier=".cg")
            their_total = tl.load(STATE + theirs * 2 + 1, cache_modifier=".cg")
            part = tl.load(PARTIAL + theirs[:, None] * DVP + offs_v[None, :], cache_modifier=".cg")
            new_top = tl.maximum(top, their_top)
            fade, gain = tl.exp2(top - new_top), tl.exp2(their_top - new_top)
            total = total * fade + their_total * gain
            acc = acc * fade[:, None] + part * gain[:, None]
            top = new_top
        tl.store(FINISHED + item, 0)  # ready for the next launch

    denominator = total
    if HAS_SINKS:  # in the denominator only, not in the LSE
        sink = tl.load(SINKS + query, mask=valid_m, other=0.0) * LOG2_E
        denominator = total + tl.exp2(tl.where(total > 0, sink - top, 0.0))
    out = acc / tl.where(total > 0, denominator, 1.0)[:, None]
    out_at = OUT + row[:, None] * stride_ot + query[:, None] * stride_oh + offs_v[None, :]
    valid_o = valid_m[:, None] & (offs_v < DV)[None, :]
    tl.store(out_at, out.to(OUT.dtype.element_ty), mask=valid_o)
    lse = tl.where(
        total > 0, (top + tl.log2(tl.where(total > 0, total, 1.0))) / LOG2_E, float("-inf")
    )
    tl.store(LSE + row * (kv_heads * G) + query, lse, mask=valid_m)


@triton.jit
def append_kernel(
    KEY, VALUE, K: tl.int64, V: tl.int64, SLOTS,
    stride_kt, stride_kn, stride_vt, stride_vn,
    stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh, kv_heads,
    D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Write a piece of one token's key and value to its slot; a negative slot is skipped."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(SLOTS + token)
    if slot < 0:
        return
    block, offset = (slot // BLOCK_SIZE).to(tl.int64), slot % BLOCK_SIZE
    K_BASE = K.to(tl.pointer_type(KEY.dtype.element_ty)) + block * stride_kb + offset * stride_ks
    V_BASE = V.to(tl.pointer_type(KEY.dtype.element_ty)) + block * stride_vb + offset * stride_vs
    element = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    head, d = element // D, element % D
    key = tl.load(KEY + token * stride_kt + head * stride_kn + d, mask=head < kv_heads)
    tl.store(K_BASE + head * stride_kh + d, key, mask=head < kv_heads)
    head, d = element // DV, element % DV
    value = tl.load(VALUE + token * stride_vt + head * stride_vn + d, mask=head < kv_heads)
    tl.store(V_BASE + head * stride_vh + d, value, mask=head < kv_heads)


def interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU (``TRITON_INTERPRET=1`` before its import)."""
    return not isinstance(attend_kernel, triton.JITFunction)


def tile_config(group: int, dim: int, dim_v: int, max_q: int, itemsize: int) -> dict[str, int]:
    """Compile-time sizes of ``attend_kernel`` for a shape.

    One K and V tile pair in flight is 2 * BN * DP * itemsize bytes of shared memory; with a table
    load in the loop (STAGES - 1) // 2 are in flight.
    """
    most = MAX_ROWS if itemsize < 4 else MAX_ROWS // 2
    tokens = max(1, min(max_q, most // group))
    rows = max(16, triton.next_power_of_2(tokens * group))
    dim_padded = triton.next_power_of_2(dim)
    wide = max(dim_padded, triton.next_power_of_2(dim_v)) * itemsize
    return {
        "G": group, "D": dim, "DV": dim_v,
        "DP": max(16, dim_padded), "DVP": max(16, triton.next_power_of_2(dim_v)),
        "BM": rows, "TOKENS": rows // group,  # full tiles: one kernel for many ``max_q``
        "BN": 64 if wide <= 512 else 32, "STAGES": 5 if wide <= 512 else 3,
    }  # fmt: skip


def num_warps(config: dict[str, int], itemsize: int) -> int:
    """Warps of a program: more where products are exact, which keeps their operands in registers.

    With 4 warps a tile of 32 rows or 128 columns of float32 may spill by kilobytes a thread.
    """
    return 8 if itemsize == 4 and (config["BM"] > 16 or config["DP"] > 64) else 4


def attend_triton(call: AttentionCall, num_splits: int = 0) -> None:
    """Run a checked ``call`` in Triton; writes ``call.out`` and ``call.lse``."""
    kv, batch = call.kv, len(call.lens)
    if kv.dtype == torch.float64:
        raise InvalidInput("float64 attention runs on CPU tensors only", hint="Use float32.")
    if not call.q.shape[0]:
        return
    group = call.q.shape[1] // kv.num_kv_heads
    itemsize = call.q.element_size()
    config = tile_config(group, kv.head_dim, kv.head_dim_v, call.max_q, itemsize)
    tiles = triton.cdiv(call.max_q, config["TOKENS"])
    items = batch * tiles * kv.num_kv_heads
    splits = num_splits or _splits(items, _longest(call), call.q.device)
    if not 1 <= splits <= MAX_SPLITS:
        raise InvalidInput(f"num_splits is {num_splits}, but at most {MAX_SPLITS} can be merged")
    partial, state, finished = _workspace(items, splits, config, call.q.device)
    absent = call.lens
    attend_kernel[batch * tiles, kv.num_kv_heads, splits](
        call.q, kv.k_ptr, kv.v_ptr, call.starts if call.table is None else call.table, call.lens,
        _or(call.q_starts, absent), _or(call.sinks, absent), _or(call.slopes, absent),
        partial, state, finished, call.out, call.lse,
        call.scale, call.softcap, min(call.left, 1 << 30), min(call.right, 1 << 30),
        call.max_q, tiles, kv.num_kv_heads,
        *call.q.stride()[:2], *call.out.stride()[:2],
        0 if call.table is None else call.table.stride(0),
        kv.block_stride, kv.slot_stride, kv.head_stride,
        kv.v_block_stride, kv.v_slot_stride, kv.v_head_stride,
        **config, SPLITS=splits, BLOCK_SIZE=kv.block_size, PAGED=call.table is not None,
        VARLEN=call.q_starts is not None, HAS_SINKS=call.sinks is not None,
        HAS_SLOPES=call.slopes is not None, HAS_CAP=call.softcap > 0,
        ALIGN=16 if (kv.k_ptr | kv.v_ptr) % 16 == 0 else itemsize,
        UPCAST=interpreted() and kv.dtype == torch.bfloat16,  # its bf16 arithmetic is wrong
        num_warps=num_warps(config, itemsize),
    )  # fmt: skip


def append_triton(key: torch.Tensor, value: torch.Tensor, kv: KVView, slots: torch.Tensor) -> None:
    """Write checked rows to their slots in Triton; see ``append.reshape_and_cache``."""
    if not len(slots):
        return
    width = 1024
    pieces = triton.cdiv(kv.num_kv_heads * max(kv.head_dim, kv.head_dim_v), width)
    append_kernel[len(slots), pieces](
        key, value, kv.k_ptr, kv.v_ptr, slots, *key.stride()[:2], *value.stride()[:2],
        kv.block_stride, kv.slot_stride, kv.head_stride,
        kv.v_block_stride, kv.v_slot_stride, kv.v_head_stride, kv.num_kv_heads,
        D=kv.head_dim, DV=kv.head_dim_v, WIDTH=width, BLOCK_SIZE=kv.block_size,
    )  # fmt: skip


def _or(tensor: torch.Tensor | None, absent: torch.Tensor) -> torch.Tensor:
    """A pointer is needed even for what the kernel does not read."""
    return absent if tensor is None else tensor


def _longest(call: AttentionCall) -> int:
    """An upper bound of the lengths that needs no look at the device."""
    kv = call.kv
    blocks = kv.num_blocks if call.table is None else call.table.shape[1]
    return blocks * kv.block_size


def _splits(items: int, longest: int, device: torch.device) -> int:
    """Enough programs for two waves, each with at least ``MIN_SPLIT_TOKENS`` of the longest."""
    if device.type != "cuda":
        return 1
    programs = 2 * torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(MAX_SPLITS, int(programs) // items, longest // MIN_SPLIT_TOKENS))


def _workspace(
    items: int, splits: int, config: dict[str, int], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Partial sums, (top, total) pairs and counters; the counters start, and end, at zero."""
    rows = items * splits * config["BM"] if splits > 1 else 1
    partial = torch.empty(rows * config["DVP"], dtype=torch.float32, device=device)
    state = torch.empty(rows * 2, dtype=torch.float32, device=device)
    return partial, state, torch.zeros(items, dtype=torch.int32, device=device)
