"""Absorbed multi-head latent attention in Triton: one latent row is key and value of all heads."""

from __future__ import annotations

import triton
import triton.language as tl

from kvcached.kernels._prefill_parts import (
    EMPTY,
    block_ids,
    load_rows,
    lse_of,
    merge_partials,
    places,
    put_partial,
    store_rows,
)


@triton.jit
def share_of(
    LENS, item, split, right, max_q, H: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """(sequence, first row in it, its length, first key, end, clear to) of a split of a tile.

    Before the last, every row sees every key.
    """
    per_seq = tl.cdiv(max_q * H, BM)
    seq, first_row = item // per_seq, item % per_seq * BM
    length = tl.load(LENS + seq)
    first_place = length - max_q + first_row // H
    last_place = length - max_q + tl.minimum((first_row + BM - 1) // H, max_q - 1)
    end = tl.maximum(tl.minimum(length, last_place + right + 1), 0)
    share = tl.cdiv(tl.cdiv(end, SPLITS), BN) * BN
    lo = split * share
    hi = tl.minimum(lo + share, end)
    return seq, first_row, length, lo, hi, tl.minimum(hi, first_place + right + 1)


@triton.jit
def finish(
    acc, top, total, item, split, row, head, valid_m, PARTIAL, STATE, FINISHED, OUT, LSE,
    stride_ot, stride_oh, H: tl.constexpr, BM: tl.constexpr, DV: tl.constexpr,
    SPLITS: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """Write what a split found, or with ``FUSED``, if it is the last to end, what all found."""
    if SPLITS > 1:
        own = (row * H + head) * SPLITS
        put_partial(PARTIAL, STATE, own + split, valid_m, acc, top, total, 0, DV, DV)
        if not FUSED:
            return
        tl.debug_barrier()  # all of this program's stores come before its count
        last = tl.atomic_add(FINISHED + item, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
        if last:
            acc, top, total = merge_partials(PARTIAL, STATE, own, valid_m, BM, SPLITS, DV)
            tl.store(FINISHED + item, 0)  # ready for the next launch
        valid_m = valid_m & last
    out = acc / tl.where(total > 0, total, 1.0)[:, None]
    store_rows(OUT, row * stride_ot + head * stride_oh, valid_m, out, 0, DV, DV)
    tl.store(LSE + row * H + head, lse_of(top, total), mask=valid_m)


# What varies from step to step is not specialised, or a server would compile again and again.
@triton.jit(do_not_specialize=["max_q", "stride_table"])
def mla_kernel(
    Q, KV: tl.int64, TABLE, LENS, PARTIAL, STATE, FINISHED, OUT, LSE,
    scale, right, max_q, stride_table,
    stride_qt, stride_qh, stride_ot, stride_oh, stride_block, stride_slot,
    H: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DR: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, SPLITS: tl.constexpr, FUSED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, ALIGN: tl.constexpr, UPCAST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """BM rows (token, head) of one sequence over one split of its keys; ``scale`` is base 2, > 0.

    The first DV elements of a latent row are the value, all D are the key; DR covers the rest.
    With ``FUSED`` the last split of a tile merges them, else ``merge_kernel`` does.
    """
    item, split = tl.program_id(0), tl.program_id(1)
    seq, first_row, length, lo, hi, clear_to = share_of(
        LENS, item, split, right, max_q, H, BM, BN, SPLITS
    )
    offs_m, offs_n = tl.arange(0, BM), tl.arange(0, BN)
    token, head = (first_row + offs_m) // H, (first_row + offs_m) % H
    valid_m = token < max_q
    place = length - max_q + token  # causal is aligned bottom-right
    row = (seq * max_q + token).to(tl.int64)

    q_row = row * stride_qt + head * stride_qh
    q = load_rows(Q, q_row, valid_m, 0, DV, D, UPCAST)
    q_rest = q
    if DR > 0:
        q_rest = load_rows(Q, q_row, valid_m, DV, DR, D, UPCAST)
    BASE = tl.multiple_of(KV.to(tl.pointer_type(Q.dtype.element_ty)), ALIGN)
    table_row = TABLE + seq.to(tl.int64) * stride_table
    top = tl.full([BM], EMPTY, tl.float32)
    total = tl.zeros([BM], tl.float32)
    LATE: tl.constexpr = BM >= 64  # columns are added up at the end: warpgroups share a row
    sums = tl.zeros([BM, BN if LATE else 1], tl.float32)
    acc = tl.zeros([BM, DV], tl.float32)
    ids = block_ids(table_row, lo, hi, BN, BLOCK_SIZE, True)
    # A loop that may run 0 times would set the accumulator beside products in flight, for which the
    # assembler makes each wait for the one before it; so the loop is entered only to be run.
    if lo < hi:
        for start in tl.range(lo, hi, BN, num_stages=STAGES):
            pos = start + offs_n
            valid_n = pos < hi
            block, slot = places(ids, 0, start, valid_n, BN, BLOCK_SIZE, True)
            kv_row = block * stride_block + slot * stride_slot
            ids = block_ids(table_row, start + BN, hi, BN, BLOCK_SIZE, True)
            kv = load_rows(BASE, kv_row, valid_n, 0, DV, D, UPCAST)
            # Sums of scaled products, as chained ones would be made by both warpgroups alike.
            scores = tl.dot(q, kv.T, input_precision="ieee") * scale
            if DR > 0:
                rest = load_rows(BASE, kv_row, valid_n, DV, DR, D, UPCAST)
                scores += tl.dot(q_rest, rest.T, input_precision="ieee") * scale
            if start + BN > clear_to:
                seen = offs_n[None, :] <= (tl.minimum(place + right, hi - 1) - start)[:, None]
                scores = tl.where(seen, scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            weights = tl.exp2(scores - new_top[:, None])
            fade = tl.exp2(top - new_top)
            if LATE:
                sums = sums * fade[:, None] + weights
            else:
                total = total * fade + tl.sum(weights, 1)
            acc = acc * fade[:, None]
            top = new_top
            acc = tl.dot(weights.to(kv.dtype), kv, acc, input_precision="ieee")

    if LATE:
        total = tl.sum(sums, 1)
    finish(acc, top, total, item, split, row, head, valid_m, PARTIAL, STATE, FINISHED, OUT, LSE,
           stride_ot, stride_oh, H, BM, DV, SPLITS, FUSED)  # fmt: skip
