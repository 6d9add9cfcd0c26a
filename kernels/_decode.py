"""The Triton code of split-KV attention; ``decode.py`` launches it and tells how it works."""

from __future__ import annotations

import triton
import triton.language as tl

from kvcached.kernels._parts import finish, finish_together, write
from kvcached.kernels._tiles import block_ids, fetch_ahead, first_scale, load_q, places, tile
from kvcached.kernels._widen import from_bytes, from_nibble_pairs, from_nibbles, from_pairs


@triton.jit
def _scored(
    scores, factor, softcap, slope, pos, place, valid_n, length, queries, masks, left, right,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, TREE: tl.constexpr, HAS_SLOPES: tl.constexpr,
    HAS_CAP: tl.constexpr,
):  # fmt: skip
    """Products as scores in base 2; -inf for keys that a query does not see."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    if HAS_CAP:  # tanh(x) = 2 sigmoid(2x) - 1
        scores = softcap * LOG2_E * (2 * tl.sigmoid(scores * (2 * factor / softcap)) - 1)
    else:
        scores *= factor * LOG2_E
    if HAS_SLOPES:
        scores -= slope[:, None] * tl.abs(pos[None, :] - place[:, None]).to(tl.float32)
    seen = valid_n[None, :]
    if LEFT:
        seen = seen & (pos[None, :] - place[:, None] >= -left)
    if RIGHT:
        seen = seen & (pos[None, :] - place[:, None] <= right)
    if TREE:
        nth = pos - (length - queries)  # which query token the key is of; negative: before them
        bit = (masks[:, None] >> tl.maximum(nth, 0).to(tl.int64)[None, :]) & 1
        seen = seen & ((nth < 0)[None, :] | (bit != 0))
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def span(length, queries, first, tokens, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Keys [floor, end) that query tokens ``first .. first + tokens`` of a sequence see."""
    floor, end = length * 0, length
    if LEFT:
        floor = tl.maximum(length - queries + first - left, 0)
    if RIGHT:
        last = tl.minimum(first + tokens, queries) - 1
        end = tl.minimum(length, length - queries + last + right + 1)
    return floor, end


@triton.jit
def _share(floor, end, part, divisor, least, BN: tl.constexpr, SPLIT: tl.constexpr):
    """(first key, end, parts) of part ``part``, of equal parts of [floor, end)."""
    begin = floor // BN * BN
    keys = tl.maximum(end - begin, 0)
    lo, hi, parts = begin, end, part + 1
    if SPLIT:
        share = tl.cdiv(tl.maximum(tl.cdiv(keys, divisor), least), BN) * BN
        lo = begin + part * share
        hi = tl.minimum(lo + share, end)
        parts = tl.maximum(tl.cdiv(keys, share), 1)
    return lo, hi, parts


# What varies from step to step is not specialised, or a server would compile again and again.
@triton.jit(do_not_specialize=["max_q", "q_tiles", "divisor", "least", "stride_table", "columns"])
def attend_kernel(
    Q, K: tl.int64, V: tl.int64, TABLE, LENS, Q_STARTS, MASKS, SINKS, SLOPES, K_SCALE, V_SCALE,
    WORK, PARTIAL, STATE, FINISHED, OUT, LSE,
    scale, softcap, left, right, max_q, q_tiles, divisor, least, stride_table, columns,
    stride_qt: tl.constexpr, stride_qh: tl.constexpr, stride_ot: tl.constexpr,
    stride_oh: tl.constexpr, stride_kb: tl.constexpr, stride_ks: tl.constexpr,
    stride_kh: tl.constexpr, stride_vb: tl.constexpr, stride_vs: tl.constexpr,
    stride_vh: tl.constexpr, stride_kcb: tl.constexpr, stride_kcs: tl.constexpr,
    stride_kch: tl.constexpr, stride_vcb: tl.constexpr, stride_vcs: tl.constexpr,
    stride_vch: tl.constexpr,
    KV_HEADS: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    DP: tl.constexpr, DVP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, PAGED: tl.constexpr, VARLEN: tl.constexpr, SPLIT: tl.constexpr,
    PLANNED: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, TREE: tl.constexpr,
    HAS_SINKS: tl.constexpr, HAS_SLOPES: tl.constexpr, HAS_CAP: tl.constexpr,
    KIND: tl.constexpr, STORED: tl.constexpr, COMPUTE: tl.constexpr,
    K_SCALES: tl.constexpr, V_SCALES: tl.constexpr, ALIGN: tl.constexpr, ALIGN_Q: tl.constexpr,
    ALIGN_OUT: tl.constexpr, EXACT: tl.constexpr, RESTS: tl.constexpr, EARLY: tl.constexpr,
    CLUSTER: tl.constexpr,
):  # fmt: skip
    """Attention of one tile over one part of its keys. Strides are in elements."""
    INT4: tl.constexpr = KIND == "int4"
    HALVES: tl.constexpr = 2 if KIND == "int4" else 1
    WIDTH: tl.constexpr = DVP * 2 if STORED.primitive_bitwidth == 8 else DVP
    HELD: tl.constexpr = ROWS if RESTS else BM
    tl.static_assert(BM >= TOKENS * G)
    item, part = tl.program_id(0), tl.program_id(1)
    if CLUSTER:
        item, part = item // CLUSTER, item % CLUSTER
    head, nth = item % KV_HEADS, item // KV_HEADS
    if EARLY:
        # Memory may be touched only when the kernel in front has ended. The next one may take its
        # places now: it waits here too, or is one that the driver starts at this one's end.
        if not PLANNED:
            most = tl.num_programs(1)
            if CLUSTER:
                most = CLUSTER
            fetch_ahead(TABLE, LENS, Q, nth // q_tiles, head, part, most, max_q, stride_table,
                        columns, stride_qt, stride_qh, G, PAGED, VARLEN)  # fmt: skip
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if PLANNED:
        entry = WORK + nth * 8
        seq, lo, hi = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
        ids_to = hi
        part, parts = tl.load(entry + 3), tl.load(entry + 4)
        first_part = head * (tl.num_programs(0) // KV_HEADS) + nth - part
        first_token = 0
        if seq < 0:
            return
        counter = seq * KV_HEADS + head
    else:
        seq, first_token = nth // q_tiles, nth % q_tiles * TOKENS
        counter = item
    if VARLEN:
        q_start = tl.load(Q_STARTS + seq)
        queries = tl.load(Q_STARTS + seq + 1) - q_start
    else:
        q_start, queries = seq * max_q, max_q
    if first_token >= queries:
        return
    length = tl.load(LENS + seq)
    # Rows before the first query's window may belong to nobody any more.
    floor, end = span(length, queries, first_token, TOKENS, left, right, LEFT, RIGHT)
    if not PLANNED:
        lo, hi, parts = _share(floor, end, part, divisor, least, BN, SPLIT)
        ids_to = hi
        if CLUSTER:
            first_part = item * CLUSTER  # those without keys merge too
            if not LEFT:  # as it is, but known before the length: so block ids come sooner
                lo, ids_to = part * BN, columns * BLOCK_SIZE
        else:
            first_part = item * tl.num_programs(1)
            if part >= parts:
                return
            if not SPLIT and not LEFT:  # so block ids come with the length
                ids_to = columns * BLOCK_SIZE
    acc, top, total = _attend_part(
        Q, K, V, TABLE, MASKS, SLOPES, K_SCALE, V_SCALE, scale, softcap, left, right,
        seq, head, first_token, q_start, queries, length, floor, lo, hi, stride_table,
        ids_to, stride_qt, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs,
        stride_vh, stride_kcb, stride_kcs, stride_kch, stride_vcb, stride_vcs, stride_vch,
        G, D, DV, DP, DVP, BM, BN, ROWS, TOKENS, STAGES, BLOCK_SIZE, PAGED, LEFT, RIGHT, TREE,
        HAS_SLOPES, HAS_CAP, KIND, STORED, COMPUTE, K_SCALES, V_SCALES, ALIGN, ALIGN_Q, INT4, EXACT,
        RESTS,
    )  # fmt: skip
    if CLUSTER:
        finish_together(acc, top, total, part, parts, first_part, head, first_token, queries,
                q_start, PARTIAL, STATE, OUT, LSE, SINKS, HELD, ROWS, CLUSTER, TOKENS, G, DV,
                WIDTH, stride_ot, stride_oh, KV_HEADS, HAS_SINKS, HALVES, ALIGN_OUT)  # fmt: skip
    elif SPLIT and parts > 1:
        finish(acc, top, total, part, parts, first_part, counter, head, first_token, queries,
                q_start, PARTIAL, STATE, FINISHED, OUT, LSE, SINKS, HELD, ROWS, GROUP, TOKENS, G,
                DV, WIDTH, stride_ot, stride_oh, KV_HEADS, HAS_SINKS, HALVES,
                ALIGN_OUT)  # fmt: skip
    else:
        write(
            acc, top, total, tl.arange(0, HELD), tl.arange(0, WIDTH), head, first_token, queries,
            q_start, OUT, LSE, SINKS, TOKENS, G, DV, WIDTH, stride_ot, stride_oh, KV_HEADS,
            HAS_SINKS, HALVES, ALIGN_OUT,
        )  # fmt: skip


@triton.jit
def _products(q, q_high, k, KIND: tl.constexpr, COMPUTE: tl.constexpr, ASM: tl.constexpr):
    """Of queries, of int4 the halves of their rows, with keys."""
    if KIND == "int4":
        low, high = from_nibbles(k, COMPUTE, ASM)
        scores = tl.dot(q, low.T, input_precision="ieee")
        scores = tl.dot(q_high, high.T, scores, input_precision="ieee")
    else:
        scores = tl.dot(q, from_bytes(k, KIND, COMPUTE, ASM).T, input_precision="ieee")
    return scores


@triton.jit
def _add_nibbles(
    weights, v, fade, acc, acc_odd, acc_high, acc_high_odd, COMPUTE: tl.constexpr, ASM: tl.constexpr
):
    """Weighted int4 values added: even and odd dims of the low and of the high half."""
    even, odd, high, high_odd = from_nibble_pairs(v, COMPUTE, ASM)
    acc = tl.dot(weights, even, acc, input_precision="ieee")
    acc_odd = tl.dot(weights, odd, acc_odd, input_precision="ieee")
    acc_high = tl.dot(weights, high, acc_high * fade[:, None], input_precision="ieee")
    high_odd = tl.dot(weights, high_odd, acc_high_odd * fade[:, None], input_precision="ieee")
    return acc, acc_odd, acc_high, high_odd


@triton.jit
def _joined(acc, acc_high, HALVES: tl.constexpr):
    """The halves of rows one behind the other, or even and odd dims by turns."""
    both = tl.join(acc, acc_high)
    if HALVES:
        both = both.permute(0, 2, 1)
    return tl.reshape(both, [acc.shape[0], 2 * acc.shape[1]])


@triton.jit
def _masks_and_slopes(
    MASKS, SLOPES, token, row, query, valid, BM: tl.constexpr, TREE: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
):  # fmt: skip
    """Of a tile's rows, slopes in base 2; anything where there are none."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    masks, slope = token, tl.zeros([BM], tl.float32)
    if TREE:
        masks = tl.load(MASKS + row, mask=valid, other=0)
    if HAS_SLOPES:
        slope = tl.load(SLOPES + query, mask=valid, other=0.0) * LOG2_E
    return masks, slope


# Tensor cores take 16 rows at least. Of those that pad a tile, the first ROWS are the same queries
# again: their weights are what rounding took off, so that sums are as of exact weights.
@triton.jit
def _or_rests(weights, offs_m, ROWS: tl.constexpr, COMPUTE: tl.constexpr):
    """Weights in 16 bits in the first ROWS rows, in others what that takes off them."""
    if tl.bfloat16 == COMPUTE:  # cut off: faster than rounding, and the rest makes up for it
        short = (weights.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    else:
        short = weights.to(COMPUTE).to(tl.float32)
    return tl.where((offs_m < ROWS)[:, None], short, weights - short)


@triton.jit
def _add_values(
    weights, v, acc, offs_m, ROWS: tl.constexpr, COMPUTE: tl.constexpr, RESTS: tl.constexpr
):
    """Weighted values added that are stored in 16 or 32 bits."""
    if tl.float32 == COMPUTE:
        v = v.to(tl.float32)
    if RESTS:
        weights = _or_rests(weights, offs_m, ROWS, COMPUTE)
    return tl.dot(weights.to(COMPUTE), v, acc, input_precision="ieee")


@triton.jit
def _rows_of(
    offs_m, first_token, head, queries, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    G: tl.constexpr, RESTS: tl.constexpr,
):  # fmt: skip
    """(token, query head, whether there is one) of each row of a tile."""
    same = offs_m % ROWS if RESTS else offs_m
    token, query = first_token + same // G, head * G + same % G
    return token, query, (same < TOKENS * G) & (token < queries)


@triton.jit
def _with_rests(
    acc, top, total, offs_m, BM: tl.constexpr, ROWS: tl.constexpr, VP: tl.constexpr
):  # fmt: skip
    """ROWS rows of BM: the sums of weights and of rests, one of the equal tops and totals."""
    times: tl.constexpr = BM // ROWS
    acc = tl.where((offs_m < 2 * ROWS)[:, None], acc, 0.0)
    acc = tl.sum(tl.reshape(acc, [times, ROWS, VP]), 0)
    top = tl.max(tl.reshape(top, [times, ROWS]), 0)
    total = tl.max(tl.reshape(total, [times, ROWS]), 0)
    return acc, top, total


@triton.jit
def _attend_part(
    Q, K, V, TABLE, MASKS, SLOPES, K_SCALE, V_SCALE, scale, softcap, left, right,
    seq, head, first_token, q_start, queries, length, floor, lo, hi, stride_table, ids_to,
    stride_qt: tl.constexpr, stride_qh: tl.constexpr, stride_kb: tl.constexpr,
    stride_ks: tl.constexpr, stride_kh: tl.constexpr, stride_vb: tl.constexpr,
    stride_vs: tl.constexpr, stride_vh: tl.constexpr, stride_kcb: tl.constexpr,
    stride_kcs: tl.constexpr, stride_kch: tl.constexpr, stride_vcb: tl.constexpr,
    stride_vcs: tl.constexpr, stride_vch: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    PAGED: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, TREE: tl.constexpr,
    HAS_SLOPES: tl.constexpr, HAS_CAP: tl.constexpr, KIND: tl.constexpr, STORED: tl.constexpr,
    COMPUTE: tl.constexpr, K_SCALES: tl.constexpr, V_SCALES: tl.constexpr, ALIGN: tl.constexpr,
    ALIGN_Q: tl.constexpr, INT4: tl.constexpr, EXACT: tl.constexpr, RESTS: tl.constexpr,
):  # fmt: skip
    """(acc, top, total) of the tile over keys [lo, hi): FlashAttention's online softmax, base 2.

    They have BM rows, ROWS with RESTS. K_SCALES, V_SCALES: 0 none, 1 the head's, 2 each row's.
    """
    # The interpreter has no assembler, and computes in float32.
    ASM: tl.constexpr = tl.float16 == COMPUTE and not EXACT
    DS: tl.constexpr = D // 2 if INT4 else D  # stored elements of a row
    # Bytes of V cannot be transposed on their way to the tensor cores, pairs of them can: so V is
    # read as 16 bits, and the even and the odd dims are two products, for int4 of each half.
    PAIRS: tl.constexpr = STORED.primitive_bitwidth == 8
    V_TYPE: tl.constexpr = tl.int16 if PAIRS else STORED
    PER: tl.constexpr = 2 if PAIRS else 1
    DVS: tl.constexpr = (DV + 3) // 4 if INT4 else DV // PER
    VP: tl.constexpr = DVP // 2 if INT4 else DVP
    offs_m, offs_n = tl.arange(0, BM), tl.arange(0, BN)
    offs_d, offs_v = tl.arange(0, DP), tl.arange(0, VP)
    token, query, valid_m = _rows_of(offs_m, first_token, head, queries, ROWS, TOKENS, G, RESTS)
    place = length - queries + token  # causal is aligned bottom-right
    row = (q_start + token).to(tl.int64)
    Q_BASE = tl.multiple_of(Q + q_start.to(tl.int64) * stride_qt, ALIGN_Q)  # an argument forgets it
    q_at = Q_BASE + token[:, None] * stride_qt + query[:, None] * stride_qh
    q = load_q(q_at, offs_d, valid_m, DS, DP, COMPUTE)
    q_high = load_q(q_at + DS, offs_d, valid_m, DS, DP, COMPUTE) if INT4 else q
    K_BASE = tl.multiple_of(K.to(tl.pointer_type(STORED)), ALIGN) + head * stride_kh
    V_BASE = tl.multiple_of(V.to(tl.pointer_type(V_TYPE)), ALIGN) + head * (stride_vh // PER)
    factor = scale
    if K_SCALES == 1:
        factor *= tl.load(K_SCALE + head * stride_kch)
    masks, slope = _masks_and_slopes(
        MASKS, SLOPES, token, row, query, valid_m, BM, TREE, HAS_SLOPES
    )
    base = 0
    if PAGED:
        TABLE += seq.to(tl.int64) * stride_table
    else:
        base = tl.load(TABLE + seq)
    ids = block_ids(TABLE, lo, ids_to, floor, offs_n, BN, BLOCK_SIZE, PAGED, LEFT)
    unit = 1.0
    if V_SCALES == 2:  # weights are multiplied by scales over this one, so 16 bits hold them
        unit = first_scale(
            V_SCALE + head * stride_vch, ids, lo, hi, floor, base, offs_n, stride_vcb, stride_vcs,
            BN, BLOCK_SIZE, PAGED,
        )  # fmt: skip
    # Sums of each column of a tile, added up in the end: warps need not wait for one another.
    LATE: tl.constexpr = BM <= 32 and not PAIRS
    HELD_ROWS: tl.constexpr = BN <= 64 or BM <= 16
    top = tl.full([BM], -1.0e30, tl.float32)  # not -inf: an empty part must not make NaN
    total = tl.zeros([BM, BN], tl.float32) if LATE else tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, VP], tl.float32)
    if PAIRS:
        acc_odd = tl.zeros([BM, VP], tl.float32)
    if INT4:
        acc_high, acc_high_odd = tl.zeros([BM, VP], tl.float32), tl.zeros([BM, VP], tl.float32)
    for start in tl.range(lo, hi, BN, num_stages=STAGES):
        pos = start + offs_n
        valid_n = pos < hi
        if LEFT:
            valid_n = valid_n & (pos >= floor)
        block, slot = places(ids, start, base, offs_n, BN, BLOCK_SIZE, PAGED)
        # A load of ids that this tile's loads wait for would halve the depth of the pipeline.
        ids = block_ids(TABLE, start + BN, hi, floor, offs_n, BN, BLOCK_SIZE, PAGED, LEFT)
        k = tile(K_BASE, block * stride_kb, slot * stride_ks, offs_d, valid_n, DS, DP, HELD_ROWS)
        scores = _products(q, q_high, k, KIND, COMPUTE, ASM)
        if K_SCALES == 2:
            at = K_SCALE + head * stride_kch + block * stride_kcb + slot * stride_kcs
            scores *= tl.load(at, mask=valid_n, other=0.0)[None, :]
        scores = _scored(
            scores, factor, softcap, slope, pos, place, valid_n, length, queries, masks, left,
            right, LEFT, RIGHT, TREE, HAS_SLOPES, HAS_CAP,
        )  # fmt: skip
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        fade = tl.exp2(top - new_top)
        total = total * fade[:, None] + weights if LATE else total * fade + tl.sum(weights, 1)
        acc = acc * fade[:, None]
        if PAIRS:
            acc_odd = acc_odd * fade[:, None]
        top = new_top
        v_block, v_slot = block * (stride_vb // PER), slot * (stride_vs // PER)
        v = tile(V_BASE, v_block, v_slot, offs_v, valid_n, DVS, VP, HELD_ROWS)
        if V_SCALES == 2:
            at = V_SCALE + head * stride_vch + block * stride_vcb + slot * stride_vcs
            weights *= (tl.load(at, mask=valid_n, other=0.0) / unit)[None, :]
        if INT4:
            acc, acc_odd, acc_high, acc_high_odd = _add_nibbles(
                weights.to(COMPUTE), v, fade, acc, acc_odd, acc_high, acc_high_odd, COMPUTE, ASM
            )
        elif PAIRS:
            even, odd = from_pairs(v, KIND, COMPUTE, ASM)
            acc = tl.dot(weights.to(COMPUTE), even, acc, input_precision="ieee")
            acc_odd = tl.dot(weights.to(COMPUTE), odd, acc_odd, input_precision="ieee")
        else:
            acc = _add_values(weights, v, acc, offs_m, ROWS, COMPUTE, RESTS)
    if LATE:
        total = tl.sum(total, 1)
    if V_SCALES == 1:
        unit = tl.load(V_SCALE + head * stride_vch)
    if PAIRS:
        acc = _joined(acc * unit, acc_odd * unit, False)
    if INT4:
        acc = _joined(acc, _joined(acc_high * unit, acc_high_odd * unit, False), True)
    if RESTS:
        acc, top, total = _with_rests(acc, top, total, offs_m, BM, ROWS, VP)
    return acc, top, total
