"""Paged attention of many query tokens a sequence in Triton: prefill, chunked or mixed with decode.

A program takes a tile of query tokens of one sequence for one KV head, the query heads of which
are packed into the rows of the tile, and walks over the keys with the online softmax of
FlashAttention-2 (Dao, 2023) in base 2. Scores are masked only in the tiles that the diagonal, the
window or the end of the sequence cuts; the last tiles of a sequence, which see most, come first.
The block ids of a tile are loaded one step ahead, so that no copy of keys waits for them.

Where the tiles alone do not fill the GPU, keys are split, and a second launch merges the parts. In
a mixed batch a sequence with few query rows takes a tile of 16
rows in the same launch: its programs wait for memory while those of the prefill compute.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from kvcached.errors import InvalidInput
from kvcached.kernels._fit import HOPPER, Target, fit_tiles
from kvcached.kernels._launch import interpreted, target_of
from kvcached.kernels._prefill_parts import (
    EMPTY,
    LOG2_E,
    block_ids,
    chunks,
    launch,
    load_rows,
    lse_of,
    merge,
    places,
    put_partial,
    sequence_of,
    splits_of,
    store_rows,
    with_positive_scale,
    with_sink,
    workspace,
)
from kvcached.kernels._prefill_tma import prepare_tma, suits_tma
from kvcached.kernels._workspace import workspace_of
from kvcached.kernels.checks import UNBOUNDED

if TYPE_CHECKING:
    from kvcached.kernels._bound import Launch
    from kvcached.kernels._workspace import Memory
    from kvcached.kernels.checks import AttentionCall

MAX_SPLITS = 16
"""Parts of a sequence; each costs a float32 row of output to write and to read."""
MIN_SPLIT_TOKENS = 512
"""Below this a split costs more than it saves."""
FEW_KEYS = 2048
"""Up to so long sequences take tiles of 64 keys: the diagonal cuts a large part of them."""
MAX_DECODE_ROWS = 64
"""Query tokens x heads of a KV head up to which ``decode`` is at least as good."""
MAX_HEAD_DIM = 256
"""Of keys and of values; a wider tile does not fit a program's registers."""


@triton.jit
def _rescore(
    scores, distance, slope, scale, softcap, HAS_CAP: tl.constexpr, HAS_SLOPES: tl.constexpr
):
    """Scores with soft cap and slopes applied, in base-2 units."""
    scores = scores * scale
    if HAS_CAP:  # tanh(x) = 2 sigmoid(2x) - 1
        scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)
    scores = scores * LOG2_E
    if HAS_SLOPES:
        scores -= slope[:, None] * tl.abs(distance).to(tl.float32)
    return scores


@triton.jit
def _hide(scores, start, place, left, right, floor, stop, BN: tl.constexpr, WINDOW: tl.constexpr):
    """Scores of the keys that a query does not see become -inf."""
    column = tl.arange(0, BN)[None, :]
    seen = column <= (tl.minimum(place + right, stop - 1) - start)[:, None]
    if WINDOW:
        seen = seen & (column >= (tl.maximum(place - left, floor) - start)[:, None])
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def _attend_rows(
    Q, K_BASE, V_BASE, TABLE, SINKS, SLOPES, PARTIAL, STATE, OUT, LSE,
    seq, head, split, first_token, q_start, queries, length,
    scale, softcap, left, right, stride_table, kv_heads,
    stride_qt, stride_qh, stride_ot, stride_oh,
    stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    DA: tl.constexpr, DB: tl.constexpr, VA: tl.constexpr, VB: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, TOKENS: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_SIZE: tl.constexpr, PAGED: tl.constexpr,
    TWINS: tl.constexpr, WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr, HAS_SLOPES: tl.constexpr, HAS_CAP: tl.constexpr,
    UPCAST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of ``TOKENS`` tokens in ``BM`` rows."""
    PLAIN: tl.constexpr = not (HAS_CAP or HAS_SLOPES)
    offs_m, offs_n = tl.arange(0, BM), tl.arange(0, BN)
    token, query = first_token + offs_m // G, head * G + offs_m % G
    valid_m = (offs_m < TOKENS * G) & (token < queries)
    place = length - queries + token  # causal is aligned bottom-right
    row = (q_start + token).to(tl.int64)

    first_place = length - queries + first_token
    last_place = length - queries + tl.minimum(first_token + TOKENS, queries) - 1
    end = tl.minimum(length, last_place + right + 1)
    floor = 0
    if WINDOW:  # rows before the first query's may belong to nobody any more
        floor = tl.maximum(first_place - left, 0)
    begin = floor // BN * BN
    share = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), SPLITS), BN) * BN
    lo = begin + split * share
    hi = tl.minimum(lo + share, end)
    # Every row sees all keys of a tile between these two.
    clear_from = tl.maximum(last_place - left, 0) if WINDOW else 0
    clear_to = tl.minimum(hi, first_place + right + 1)

    table_row = TABLE + seq.to(tl.int64) * stride_table
    first_slot = 0
    if not PAGED:
        first_slot = tl.load(TABLE + seq)
    ids = block_ids(table_row, lo, hi, BN, BLOCK_SIZE, PAGED)
    q_row = row * stride_qt + query * stride_qh
    q = load_rows(Q, q_row, valid_m, 0, DA, D, UPCAST)
    q_rest = q
    if DB > 0:
        q_rest = load_rows(Q, q_row, valid_m, DA, DB, D, UPCAST)
    slope = scale
    if HAS_SLOPES:
        slope = tl.load(SLOPES + query, mask=valid_m, other=0.0) * LOG2_E
    factor = scale * LOG2_E if PLAIN else 1.0
    top = tl.full([BM], EMPTY, tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, VA], tl.float32)
    rest = tl.zeros([BM, max(VB, 1)], tl.float32)
    if (SPLITS == 1) | (lo < hi):  # else products would wait for one another; see ``mla_kernel``
        for start in tl.range(lo, hi, BN, num_stages=STAGES):
            pos = start + offs_n
            valid_n = (pos < hi) & (pos >= floor) if WINDOW else pos < hi
            block, slot = places(ids, first_slot, start, valid_n, BN, BLOCK_SIZE, PAGED)
            ids = block_ids(table_row, start + BN, hi, BN, BLOCK_SIZE, PAGED)
            k_row = block * stride_kb + slot * stride_ks + head * stride_kh
            k = load_rows(K_BASE, k_row, valid_n, 0, DA, D, UPCAST)
            scores = tl.dot(q, k.T, input_precision="ieee")
            if DB > 0:
                k = load_rows(K_BASE, k_row, valid_n, DA, DB, D, UPCAST)
                scores = tl.dot(q_rest, k.T, scores, input_precision="ieee")
            if not PLAIN:
                distance = pos[None, :] - place[:, None]
                scores = _rescore(scores, distance, slope, scale, softcap, HAS_CAP, HAS_SLOPES)
            if (start < clear_from) | (start + BN > clear_to):
                scores = _hide(scores, start, place, left, right, floor, hi, BN, WINDOW)
            new_top = tl.maximum(top, tl.max(scores, 1) * factor)
            weights = tl.exp2(scores * factor - new_top[:, None])
            fade = tl.exp2(top - new_top)
            total = total * fade + tl.sum(weights, 1)
            acc = acc * fade[:, None]
            top = new_top
            v_row = k_row
            if not TWINS:
                v_row = block * stride_vb + slot * stride_vs + head * stride_vh
            v = load_rows(V_BASE, v_row, valid_n, 0, VA, DV, UPCAST)
            weights = weights.to(v.dtype)
            acc = tl.dot(weights, v, acc, input_precision="ieee")
            if VB > 0:
                rest = rest * fade[:, None]
                v = load_rows(V_BASE, v_row, valid_n, VA, VB, DV, UPCAST)
                rest = tl.dot(weights, v, rest, input_precision="ieee")

    if SPLITS > 1:  # ``merge_kernel`` does the rest
        own = (row * (kv_heads * G) + query) * SPLITS + split
        put_partial(PARTIAL, STATE, own, valid_m, acc, top, total, 0, VA, VA + VB)
        if VB > 0:
            put_partial(PARTIAL, STATE, own, valid_m, rest, top, total, VA, VB, VA + VB)
    else:
        denominator = total
        if HAS_SINKS:
            sink = tl.load(SINKS + query, mask=valid_m, other=0.0)
            denominator = with_sink(total, top, sink)
        share_of = 1.0 / tl.where(total > 0, denominator, 1.0)
        out_row = row * stride_ot + query * stride_oh
        store_rows(OUT, out_row, valid_m, acc * share_of[:, None], 0, VA, DV)
        if VB > 0:
            store_rows(OUT, out_row, valid_m, rest * share_of[:, None], VA, VB, DV)
        tl.store(LSE + row * (kv_heads * G) + query, lse_of(top, total), mask=valid_m)


# What varies from step to step is not specialised, or a server would compile again and again.
@triton.jit(do_not_specialize=["batch", "max_q", "tiles", "stride_table"])
def prefill_kernel(
    Q, K: tl.int64, V: tl.int64, TABLE, LENS, Q_STARTS, SINKS, SLOPES,
    PARTIAL, STATE, OUT, LSE,
    scale, softcap, left, right, batch, max_q, tiles, stride_table, kv_heads,
    stride_qt, stride_qh, stride_ot, stride_oh,
    stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    DA: tl.constexpr, DB: tl.constexpr, VA: tl.constexpr, VB: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, TOKENS: tl.constexpr, FEW: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_SIZE: tl.constexpr, PAGED: tl.constexpr, VARLEN: tl.constexpr,
    TWINS: tl.constexpr, WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr, HAS_SLOPES: tl.constexpr, HAS_CAP: tl.constexpr,
    ALIGN: tl.constexpr, UPCAST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attention of one tile; see the module. Strides are elements, ``scale`` is natural, > 0.

    ``FEW`` is the number of query tokens up to which a sequence takes a tile of 16 rows, ``TWINS``
    says that the strides of K and V are equal, ``WINDOW`` that ``left`` is bounded.
    """
    tl.static_assert(BM >= TOKENS * G)
    tile, head, split = tiles - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if VARLEN:
        seq, first_token, q_start, queries = sequence_of(tile, Q_STARTS, batch, TOKENS)
    else:
        per_seq = tl.cdiv(max_q, TOKENS)
        seq, first_token = tile // per_seq, tile % per_seq * TOKENS
        q_start, queries = seq * max_q, max_q
    if first_token >= queries:
        return
    length = tl.load(LENS + seq)
    K_BASE = tl.multiple_of(K.to(tl.pointer_type(Q.dtype.element_ty)), ALIGN)
    V_BASE = tl.multiple_of(V.to(tl.pointer_type(Q.dtype.element_ty)), ALIGN)
    if FEW > 0:  # noqa: SIM102  (decided at compile time, the other at run time)
        if queries <= FEW:
            _attend_rows(
                Q, K_BASE, V_BASE, TABLE, SINKS, SLOPES, PARTIAL, STATE, OUT, LSE,
                seq, head, split, first_token, q_start, queries, length,
                scale, softcap, left, right, stride_table, kv_heads,
                stride_qt, stride_qh, stride_ot, stride_oh,
                stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
                G, D, DV, DA, DB, VA, VB, 16, BN, FEW, SPLITS, BLOCK_SIZE, PAGED, TWINS, WINDOW,
                HAS_SINKS, HAS_SLOPES, HAS_CAP, UPCAST, STAGES,
            )  # fmt: skip
            return
    _attend_rows(
        Q, K_BASE, V_BASE, TABLE, SINKS, SLOPES, PARTIAL, STATE, OUT, LSE,
        seq, head, split, first_token, q_start, queries, length,
        scale, softcap, left, right, stride_table, kv_heads,
        stride_qt, stride_qh, stride_ot, stride_oh,
        stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
        G, D, DV, DA, DB, VA, VB, BM, BN, TOKENS, SPLITS, BLOCK_SIZE, PAGED, TWINS, WINDOW,
        HAS_SINKS, HAS_SLOPES, HAS_CAP, UPCAST, STAGES,
    )  # fmt: skip


def tile_config(
    group: int, dim: int, dim_v: int, itemsize: int, *, varlen: bool, plain: bool = True,
    longest: int = 1 << 30, target: Target = HOPPER,
) -> dict[str, int]:  # fmt: skip
    """Compile-time sizes of ``prefill_kernel`` for a shape; the fastest of those tried on an H100.

    For another ``target`` those that fit its shared memory and, of the sizes compiled ahead of
    time, do not spill; none of them was measured.

    A tile of 128 rows gives each of 2 warpgroups the 64 rows of its matrix instructions. 128 keys
    fill the registers at 128 columns; slopes or a window would be too much then, and of ``longest``
    keys too many would be masked where that is little. Float32 products are exact and keep their
    operands in registers: small tiles.
    """
    (da, db), (va, vb) = chunks(dim), chunks(dim_v)
    if da > 128:  # halves need half as many addresses at a time
        da, db = da // 2, da // 2
    if va > 128 and not vb:
        va, vb = va // 2, va // 2
    wide = max(da + db, va + vb)
    rows, keys = (128, 64) if itemsize < 4 else (32, 16)
    many = itemsize < 4 and plain and longest > FEW_KEYS and target.warpgroups
    if many and 128 <= wide <= 192 and va <= 128 and not vb:
        keys = 128
    rows = max(rows, triton.next_power_of_2(group))
    stages = 3 if wide <= (192 if keys == 64 else 128) else 2
    if itemsize < 4 and target.by_warp:  # queries lie in registers there
        keys, stages = 64 if wide <= 64 else 32 if wide <= 192 else 16, 3
    sizes = {
        "G": group, "D": dim, "DV": dim_v, "DA": da, "DB": db, "VA": va, "VB": vb,
        "BM": rows, "BN": keys, "TOKENS": rows // group,
        "FEW": 16 // group if varlen else 0, "STAGES": stages if itemsize < 4 else 2,
    }  # fmt: skip
    return fit_tiles(sizes, target, {"STAGES": 2, "BN": 16}, row=(da + db + va + vb) * itemsize,
                     dim=da + db, itemsize=itemsize)  # fmt: skip


def warps_of(sizes: dict[str, int], itemsize: int, *, plain: bool, target: Target = HOPPER) -> int:
    """Warps of a program: one warpgroup of 64 columns leaves room for a second program."""
    narrow = sizes["DA"] + sizes["DB"] <= 64 and sizes["VA"] + sizes["VB"] <= 64
    narrow = narrow and not target.by_warp
    return 4 if narrow and plain and itemsize < 4 and sizes["BM"] <= 128 else 8


def suits_prefill(call: AttentionCall) -> bool:
    """Whether ``attend_prefill`` serves the call best: many rows, whose width it can hold."""
    kv = call.kv
    if call.q.dtype != kv.dtype or call.masks is not None:
        return False  # quantised caches and trees are the other kernel's
    rows = call.max_q * (call.q.shape[1] // kv.num_kv_heads)
    return rows > MAX_DECODE_ROWS and max(kv.head_dim, kv.head_dim_v) <= MAX_HEAD_DIM


def attend_prefill(
    call: AttentionCall, num_splits: int = 0, config: dict[str, int] | None = None,
    num_warps: int = 0,
) -> None:  # fmt: skip
    """Run a checked ``call`` in Triton; writes ``call.out`` and ``call.lse``. See ``prepare``."""
    for step in prepare(call, num_splits, config, num_warps):
        step()


def prepare(
    call: AttentionCall, num_splits: int = 0, config: dict[str, int] | None = None,
    num_warps: int = 0, memory: Memory = workspace_of,
) -> list[Launch]:  # fmt: skip
    """The launches of a checked ``call``: of one, and of another that merges parts if there are.

    ``config`` replaces entries of ``tile_config``, and ``num_warps`` what is best, for tuning. The
    ``memory`` for parts is by default that of the current stream.
    """
    kv, batch = call.kv, len(call.lens)
    if kv.dtype == torch.float64:
        raise InvalidInput("float64 attention runs on CPU tensors only", hint="Use float32.")
    if max(kv.head_dim, kv.head_dim_v) > MAX_HEAD_DIM:
        raise InvalidInput(f"prefill takes head dims of at most {MAX_HEAD_DIM}")
    if num_splits < 0:
        raise InvalidInput(f"num_splits is {num_splits}, but must be at least 0 (0: as needed)")
    if not call.q.shape[0]:
        return []
    if config is None and not num_warps and suits_tma(call, num_splits):
        return prepare_tma(call, memory)
    group, itemsize = call.q.shape[1] // kv.num_kv_heads, call.q.element_size()
    target = target_of(call.q.device)
    varlen = call.q_starts is not None
    plain = call.slopes is None and call.left >= UNBOUNDED
    sizes: dict[str, Any] = tile_config(
        group, kv.head_dim, kv.head_dim_v, itemsize, varlen=varlen, plain=plain,
        longest=call.longest, target=target,
    ) | (config or {})  # fmt: skip
    sizes["TOKENS"] = sizes["BM"] // group
    tokens = sizes["TOKENS"]
    tiles = call.q.shape[0] // tokens + batch if varlen else batch * triton.cdiv(call.max_q, tokens)
    splits = min(num_splits, MAX_SPLITS) or splits_of(
        call, tiles * kv.num_kv_heads, programs_per_sm=2, most=MAX_SPLITS, least=MIN_SPLIT_TOKENS
    )
    warps = num_warps or warps_of(sizes, itemsize, plain=plain, target=target)
    return _steps(call, sizes, tiles, splits, warps, memory)


def _steps(
    call: AttentionCall, sizes: dict[str, Any], tiles: int, splits: int, num_warps: int,
    memory: Memory,
) -> list[Launch]:  # fmt: skip
    kv, width = call.kv, sizes["VA"] + sizes["VB"]
    partial, state, _ = workspace(call, splits, width, 0, memory)
    q, scale = with_positive_scale(call)
    size, strides = _flat(call)
    constants = sizes | {
        "SPLITS": splits, "BLOCK_SIZE": size,
        "PAGED": call.table is not None, "TWINS": strides[:3] == strides[3:],
        "WINDOW": call.left < UNBOUNDED, "VARLEN": call.q_starts is not None,
        "HAS_SINKS": call.sinks is not None, "HAS_SLOPES": call.slopes is not None,
        "HAS_CAP": call.softcap > 0,
        "ALIGN": 16 if (kv.k_ptr | kv.v_ptr) % 16 == 0 else q.element_size(),
        "UPCAST": interpreted() and kv.dtype == torch.bfloat16,  # its bf16 arithmetic is wrong
    }  # fmt: skip
    steps = [launch(
        prefill_kernel, (tiles, kv.num_kv_heads, splits), call,
        (q, kv.k_ptr, kv.v_ptr, call.starts if call.table is None else call.table, call.lens,
         call.q_starts, call.sinks, call.slopes, partial, state, call.out, call.lse,
         scale, call.softcap, min(call.left, 1 << 30), min(call.right, 1 << 30),
         len(call.lens), call.max_q, tiles, 0 if call.table is None else call.table.stride(0),
         kv.num_kv_heads, *q.stride()[:2], *call.out.stride()[:2], *strides),
        constants, num_warps,
    )]  # fmt: skip
    if splits > 1:
        steps.append(merge(call, partial, state, splits, width))
    return steps


def _flat(call: AttentionCall) -> tuple[int, tuple[int, ...]]:
    """(block size, strides); slots one behind another need no blocks to be found."""
    kv = call.kv
    strides = (kv.block_stride, kv.slot_stride, kv.head_stride,
               kv.v_block_stride, kv.v_slot_stride, kv.v_head_stride)  # fmt: skip
    whole = (kv.block_stride, kv.v_block_stride) == (
        kv.block_size * kv.slot_stride, kv.block_size * kv.v_slot_stride,
    )  # fmt: skip
    if call.table is not None or not whole:
        return kv.block_size, strides
    return 1, (kv.slot_stride, 0, kv.head_stride, kv.v_slot_stride, 0, kv.v_head_stride)
