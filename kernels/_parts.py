"""The end of split-KV attention in Triton: merge the parts of a tile, normalise, write."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _merged(PARTIAL, STATE, parts, ROWS: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr):
    """(acc, top, total) over the ``parts`` at PARTIAL and STATE, GROUP of them read at a time.

    Warps share the rows out, since Triton gives them the first dimension first: so a sum over
    parts is made within each thread.
    """
    offs_r, offs_v, offs_p = tl.arange(0, ROWS), tl.arange(0, WIDTH), tl.arange(0, GROUP)
    top = tl.full([ROWS], -1.0e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    for at in tl.range(0, parts, GROUP):
        there = (at + offs_p < parts)[None, :]
        row = (at + offs_p)[None, :] * ROWS + offs_r[:, None]
        tops = tl.load(STATE + row * 2, mask=there, other=-1.0e30, cache_modifier=".cg")
        totals = tl.load(STATE + row * 2 + 1, mask=there, other=0.0, cache_modifier=".cg")
        acc_at = PARTIAL + row[:, :, None] * WIDTH + offs_v[None, None, :]
        accs = tl.load(acc_at, mask=there[:, :, None], other=0.0, cache_modifier=".cg")
        new_top = tl.maximum(top, tl.max(tops, 1))
        fade, gain = tl.exp2(top - new_top), tl.exp2(tops - new_top[:, None])
        total = total * fade + tl.sum(totals * gain, 1)
        acc = acc * fade[:, None] + tl.sum(accs * gain[:, :, None], 1)
        top = new_top
    return acc, top, total


@triton.jit
def write(
    acc, top, total, offs_m, offs_v, head, first_token, queries, q_start, OUT, LSE, SINKS,
    TOKENS: tl.constexpr, G: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr,
    stride_ot: tl.constexpr, stride_oh: tl.constexpr, KV_HEADS: tl.constexpr,
    HAS_SINKS: tl.constexpr, HALVES: tl.constexpr, ALIGN_OUT: tl.constexpr,
):  # fmt: skip
    """Normalise rows and write them; ``acc`` has columns ``offs_v`` of both halves side by side."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    token, query = first_token + offs_m // G, head * G + offs_m % G
    valid = (offs_m < TOKENS * G) & (token < queries)
    row = (q_start + token).to(tl.int64)
    denominator = total
    if HAS_SINKS:  # in the denominator only, not in the LSE
        sink = tl.load(SINKS + query, mask=valid, other=0.0) * LOG2_E
        denominator = total + tl.exp2(tl.where(total > 0, sink - top, 0.0))
    out = acc / tl.where(total > 0, denominator, 1.0)[:, None]
    half = offs_v % (WIDTH // HALVES)
    dim = offs_v // (WIDTH // HALVES) * (DV // HALVES) + half
    base = tl.multiple_of(OUT + q_start.to(tl.int64) * stride_ot, ALIGN_OUT)
    at = base + token[:, None] * stride_ot + query[:, None] * stride_oh + dim[None, :]
    mask = valid[:, None] & (half < DV // HALVES)[None, :]
    tl.store(at, out.to(OUT.dtype.element_ty), mask=mask)
    log = tl.log2(tl.where(total > 0, total, 1.0))
    lse = tl.where(total > 0, (top + log) / LOG2_E, float("-inf"))
    tl.store(LSE + row * (KV_HEADS * G) + query, lse, mask=valid)


@triton.jit
def _store(
    acc, top, total, part, first_part, PARTIAL, STATE,
    BM: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Store a part; where the parts of its tile lie."""
    offs_m, offs_v, first = tl.arange(0, BM), tl.arange(0, WIDTH), first_part.to(tl.int64)
    # Said of an argument, it would be forgotten, and each thread would store 4 bytes at a time.
    PARTIAL = tl.multiple_of(PARTIAL + first * (ROWS * WIDTH), 16)
    STATE += first * (ROWS * 2)
    own, real = part * ROWS + offs_m, offs_m < ROWS
    tl.store(PARTIAL + own[:, None] * WIDTH + offs_v[None, :], acc, mask=real[:, None])
    tl.store(STATE + own * 2, top, mask=real)
    tl.store(STATE + own * 2 + 1, total, mask=real)
    return PARTIAL, STATE


@triton.jit
def finish(
    acc, top, total, part, parts, first_part, counter, head, first_token, queries, q_start,
    PARTIAL, STATE, FINISHED, OUT, LSE, SINKS,
    BM: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr,
    G: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, stride_ot: tl.constexpr,
    stride_oh: tl.constexpr, KV_HEADS: tl.constexpr, HAS_SINKS: tl.constexpr,
    HALVES: tl.constexpr, ALIGN_OUT: tl.constexpr,
):  # fmt: skip
    """Store a part; the last one of its tile to get here merges them all."""
    PARTIAL, STATE = _store(acc, top, total, part, first_part, PARTIAL, STATE, BM, ROWS, WIDTH)
    tl.debug_barrier()  # all of this program's stores come before its count
    finished = tl.atomic_add(FINISHED + counter, 1, sem="acq_rel", scope="gpu")
    if finished == parts - 1:
        tl.store(FINISHED + counter, 0)  # ready for the next launch
        whole, its_top, its_total = _merged(PARTIAL, STATE, parts, ROWS, WIDTH, GROUP)
        write(
            whole, its_top, its_total, tl.arange(0, ROWS), tl.arange(0, WIDTH), head, first_token,
            queries, q_start, OUT, LSE, SINKS, TOKENS, G, DV, WIDTH, stride_ot, stride_oh, KV_HEADS,
            HAS_SINKS, HALVES, ALIGN_OUT,
        )  # fmt: skip


@triton.jit
def finish_together(
    acc, top, total, part, parts, first_part, head, first_token, queries, q_start,
    PARTIAL, STATE, OUT, LSE, SINKS,
    BM: tl.constexpr, ROWS: tl.constexpr, CLUSTER: tl.constexpr, TOKENS: tl.constexpr,
    G: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, stride_ot: tl.constexpr,
    stride_oh: tl.constexpr, KV_HEADS: tl.constexpr, HAS_SINKS: tl.constexpr,
    HALVES: tl.constexpr, ALIGN_OUT: tl.constexpr,
):  # fmt: skip
    """Store a part; when all of the cluster have, each merges its share of the columns."""
    PARTIAL, STATE = _store(acc, top, total, part, first_part, PARTIAL, STATE, BM, ROWS, WIDTH)
    tl.inline_asm_elementwise(
        "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned; // $0",
        "=r", [], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    offs_r, offs_p = tl.arange(0, ROWS), tl.arange(0, CLUSTER)
    mine = part * (WIDTH // CLUSTER) + tl.arange(0, WIDTH // CLUSTER)
    row = offs_p[None, :] * ROWS + offs_r[:, None]
    tops = tl.load(STATE + row * 2, cache_modifier=".cg")
    totals = tl.load(STATE + row * 2 + 1, cache_modifier=".cg")
    accs = tl.load(
        PARTIAL + row[:, :, None] * WIDTH + mine[None, None, :], cache_modifier=".cg"
    )  # fmt: skip
    its_top = tl.max(tops, 1)
    gain = tl.exp2(tops - its_top[:, None])
    write(
        tl.sum(accs * gain[:, :, None], 1), its_top, tl.sum(totals * gain, 1), offs_r, mine, head,
        first_token, queries, q_start, OUT, LSE, SINKS, TOKENS, G, DV, WIDTH, stride_ot, stride_oh,
        KV_HEADS, HAS_SINKS, HALVES, ALIGN_OUT,
    )  # fmt: skip
