"""Absorbed latent attention in Triton over latents stored in bytes: fp8 or int8.

A tile of bytes cannot be transposed on its way to the tensor cores, as values must be, but pairs of
them can. So a latent is read once, as 16-bit pairs, and its even and its odd elements are operands
of their own: the scores are the sum of two products, and the output has two halves.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvcached.kernels._mla_kernels import finish, share_of
from kvcached.kernels._prefill_parts import EMPTY, block_ids, load_rows, lse_of, places
from kvcached.kernels._widen import from_pairs


@triton.jit
def _load_queries(Q, row, valid, FIRST: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr,
                 COMPUTE: tl.constexpr):  # fmt: skip
    """The even and the odd elements ``FIRST .. FIRST + SIZE`` of queries of ``DIM``."""
    q = load_rows(Q, row, valid, FIRST, SIZE, DIM, False).to(COMPUTE)
    return tl.split(tl.reshape(q, [q.shape[0], SIZE // 2, 2]))


@triton.jit
def _finish_halves(
    acc, acc_odd, top, total, split, row, head, valid, PARTIAL, STATE, OUT, LSE,
    stride_ot, stride_oh, H: tl.constexpr, DV: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """``finish`` for even and odd columns apart, of a split that does not merge."""
    even = 2 * tl.arange(0, DV // 2)[None, :]
    if SPLITS > 1:
        own = (row * H + head) * SPLITS + split
        at = PARTIAL + own[:, None] * DV + even
        tl.store(at, acc, mask=valid[:, None])
        tl.store(at + 1, acc_odd, mask=valid[:, None])
        tl.store(STATE + own * 2, top, mask=valid)
        tl.store(STATE + own * 2 + 1, total, mask=valid)
    else:
        share = 1.0 / tl.where(total > 0, total, 1.0)
        at = OUT + (row * stride_ot + head * stride_oh)[:, None] + even
        tl.store(at, (acc * share[:, None]).to(OUT.dtype.element_ty), mask=valid[:, None])
        tl.store(at + 1, (acc_odd * share[:, None]).to(OUT.dtype.element_ty), mask=valid[:, None])
        tl.store(LSE + row * H + head, lse_of(top, total), mask=valid)


# What varies from step to step is not specialised, or a server would compile again and again.
@triton.jit(do_not_specialize=["max_q", "stride_table"])
def mla_bytes_kernel(
    Q, KV: tl.int64, KV_SCALE, TABLE, LENS, PARTIAL, STATE, FINISHED, OUT, LSE,
    scale, right, max_q, stride_table,
    stride_qt, stride_qh, stride_ot, stride_oh, stride_block, stride_slot,
    H: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DR: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, SPLITS: tl.constexpr, FUSED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, ALIGN: tl.constexpr, KIND: tl.constexpr, COMPUTE: tl.constexpr,
    EXACT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """``mla_kernel`` over elements of ``KIND`` that are multiplied by one scale for all.

    ``stride_block`` and ``stride_slot`` are of pairs; DR elements cover those behind the first DV.
    """
    ASM: tl.constexpr = tl.float16 == COMPUTE and not EXACT  # the interpreter has no assembler
    item, split = tl.program_id(0), tl.program_id(1)
    seq, first_row, length, lo, hi, clear_to = share_of(
        LENS, item, split, right, max_q, H, BM, BN, SPLITS
    )
    offs_m, offs_n = tl.arange(0, BM), tl.arange(0, BN)
    token, head = (first_row + offs_m) // H, (first_row + offs_m) % H
    valid_m = token < max_q
    place = length - max_q + token  # causal is aligned bottom-right
    row = (seq * max_q + token).to(tl.int64)

    unit = tl.load(KV_SCALE)
    factor = scale * unit
    q_row = row * stride_qt + head * stride_qh
    q, q_odd = _load_queries(Q, q_row, valid_m, 0, DV, D, COMPUTE)
    q_rest, q_rest_odd = q, q_odd
    if DR > 0:
        q_rest, q_rest_odd = _load_queries(Q, q_row, valid_m, DV, DR, D, COMPUTE)
    BASE = tl.multiple_of(KV.to(tl.pointer_type(tl.int16)), ALIGN)
    table_row = TABLE + seq.to(tl.int64) * stride_table
    top = tl.full([BM], EMPTY, tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc, acc_odd = tl.zeros([BM, DV // 2], tl.float32), tl.zeros([BM, DV // 2], tl.float32)
    ids = block_ids(table_row, lo, hi, BN, BLOCK_SIZE, True)
    if lo < hi:  # else products would wait for one another; see ``mla_kernel``
        for start in tl.range(lo, hi, BN, num_stages=STAGES):
            valid_n = start + offs_n < hi
            block, slot = places(ids, 0, start, valid_n, BN, BLOCK_SIZE, True)
            kv_row = block * stride_block + slot * stride_slot
            ids = block_ids(table_row, start + BN, hi, BN, BLOCK_SIZE, True)
            pairs = load_rows(BASE, kv_row, valid_n, 0, DV // 2, D // 2, False)
            kv, kv_odd = from_pairs(pairs, KIND, COMPUTE, ASM)
            # Sums of scaled products, as chained ones would be made by both warpgroups alike.
            scores = tl.dot(q, kv.T, input_precision="ieee") * factor
            scores += tl.dot(q_odd, kv_odd.T, input_precision="ieee") * factor
            if DR > 0:
                pairs = load_rows(BASE, kv_row, valid_n, DV // 2, DR // 2, D // 2, False)
                rest, rest_odd = from_pairs(pairs, KIND, COMPUTE, ASM)
                scores += tl.dot(q_rest, rest.T, input_precision="ieee") * factor
                scores += tl.dot(q_rest_odd, rest_odd.T, input_precision="ieee") * factor
            if start + BN > clear_to:
                seen = offs_n[None, :] <= (tl.minimum(place + right, hi - 1) - start)[:, None]
                scores = tl.where(seen, scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            weights = tl.exp2(scores - new_top[:, None])
            fade = tl.exp2(top - new_top)
            total = total * fade + tl.sum(weights, 1)
            weights = weights.to(COMPUTE)
            acc, acc_odd = acc * fade[:, None], acc_odd * fade[:, None]
            top = new_top
            acc = tl.dot(weights, kv, acc, input_precision="ieee")
            acc_odd = tl.dot(weights, kv_odd, acc_odd, input_precision="ieee")

    acc, acc_odd = acc * unit, acc_odd * unit
    if BM >= 64:  # joined they would not fit the registers
        tl.static_assert(not FUSED or SPLITS == 1)
        _finish_halves(acc, acc_odd, top, total, split, row, head, valid_m, PARTIAL, STATE, OUT,
                       LSE, stride_ot, stride_oh, H, DV, SPLITS)  # fmt: skip
        return
    acc = tl.reshape(tl.join(acc, acc_odd), [BM, DV])
    finish(acc, top, total, item, split, row, head, valid_m, PARTIAL, STATE, FINISHED, OUT, LSE,
           stride_ot, stride_oh, H, BM, DV, SPLITS, FUSED)  # fmt: skip
