"""Prefill for Hopper in Gluon: keys and values come by TMA, warps have separate tasks.

A program takes tile after tile of 64 rows (query tokens x heads of a KV head) for each warpgroup
that computes. One warpgroup produces: it takes tiles from the queue of all programs, reads the
block table and starts a copy of every block (``cp.async.bulk.tensor``) into a ring in shared
memory. The others consume: while the tensor cores multiply the weights of one tile of keys by its
values, and the scores of the next are being made, the rest of the warpgroup is in the softmax of
FlashAttention-3 (Shah et al., 2024), section 3.2.

A copy takes a block whole, which the sequence owns; of the last tile, which has rows that belong
to nobody, the producer copies the sequence's rows only and puts zeros behind them.

Gluon is Triton's language of explicit layouts. It has no interpreter, and its names change with
Triton's version: ``_prefill_tma`` knows where this kernel is the one to use.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kvcached.kernels._prefill_copies import FIELDS, ROWS, load_q, produce, told

LOG2_E = gl.constexpr(1.4426950408889634)
EMPTY = gl.constexpr(-1.0e30)
"""The running maximum of nothing; not -inf, or what is empty would make NaN."""


@gluon.jit
def _start_scores(
    smem, stage, layout: gl.constexpr, BN: gl.constexpr, DA: gl.constexpr, DB: gl.constexpr
):
    """Start the product of this warpgroup's queries and a tile of keys."""
    q_smem, q_rest, k_smem, k_rest = smem[0], smem[1], smem[2], smem[3]
    scores = gl.zeros([ROWS, BN], gl.float32, layout)
    keys = k_smem.index(stage).reshape([BN, DA]).permute([1, 0])
    scores = warpgroup_mma(q_smem, keys, scores, use_acc=False, is_async=True)
    if DB > 0:
        keys = k_rest.index(stage).reshape([BN, DB]).permute([1, 0])
        scores = warpgroup_mma(q_rest, keys, scores, is_async=True)
    return scores


@gluon.jit
def _hide(scores, start, place, right, end, layout: gl.constexpr, BN: gl.constexpr):
    """Scores of the keys that a query does not see become -inf."""
    column = start + gl.arange(0, BN, gl.SliceLayout(0, layout))
    seen = column[None, :] <= gl.minimum(place + right, end - 1)[:, None]
    return gl.where(seen, scores, float("-inf"))


@gluon.jit
def _soften(scores, top, total, factor):
    """(weights, running maximum, running sum, what the sums so far fade by)."""
    new_top = gl.maximum(top, gl.max(scores, 1) * factor)
    weights = gl.exp2(scores * factor - new_top[:, None])
    fade = gl.exp2(top - new_top)
    return weights, new_top, total * fade + gl.sum(weights, 1), fade


@gluon.jit
def _step(
    smem, bars, count, weights, acc, top, total, factor, start, place, right, end,
    MASK: gl.constexpr, BN: gl.constexpr, DA: gl.constexpr, DB: gl.constexpr,
    DV: gl.constexpr, STAGES: gl.constexpr,
    s_layout: gl.constexpr, o_layout: gl.constexpr,
):  # fmt: skip
    """The softmax of tile ``count`` while the weights of the one before meet its values."""
    v_smem = smem[4]
    k_full, k_empty, v_full, v_empty = bars
    stage, phase = count % STAGES, count // STAGES & 1
    last, last_phase = (count - 1) % STAGES, (count - 1) // STAGES & 1
    mbarrier.wait(k_full.index(stage), phase)
    scores = _start_scores(smem, stage, s_layout, BN, DA, DB)
    mbarrier.wait(v_full.index(last), last_phase)
    acc = warpgroup_mma(weights, v_smem.index(last).reshape([BN, DV]), acc, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    mbarrier.arrive(k_empty.index(stage), count=1)
    if MASK:
        scores = _hide(scores, start, place, right, end, s_layout, BN)
    new, top, total, fade = _soften(scores, top, total, factor)
    acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])
    mbarrier.arrive(v_empty.index(last), count=1)
    acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, o_layout))[:, None]
    new = gl.convert_layout(new.to(v_smem.dtype), gl.DotOperandLayout(0, o_layout, 2))
    return new, acc, top, total


@gluon.jit
def _store(
    OUT, LSE, SINKS, tile, kv_heads, strides, acc, top, total, GROUP: gl.constexpr,
    G: gl.constexpr, DV: gl.constexpr, TOKENS: gl.constexpr, HAS_SINKS: gl.constexpr,
    s_layout: gl.constexpr, o_layout: gl.constexpr,
):  # fmt: skip
    """Divide by the sum, write this warpgroup's rows of the output and the LSE."""
    head, first, q_start, queries = tile[:4]
    stride_t, stride_h = strides
    rows = GROUP * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, s_layout))
    token, query = first + rows // G, head * G + rows % G
    valid = (rows < TOKENS * G) & (token < queries)
    found = total > 0
    denominator = total
    if HAS_SINKS:
        sink = gl.load(SINKS + query, mask=valid, other=0.0)
        denominator += gl.exp2(gl.where(found, sink * LOG2_E - top, 0.0))
    share = 1.0 / gl.where(found, denominator, 1.0)
    lse = gl.where(found, (top + gl.log2(gl.where(found, total, 1.0))) / LOG2_E, float("-inf"))
    gl.store(LSE + (q_start + token).to(gl.int64) * (kv_heads * G) + query, lse, mask=valid)
    acc = acc * gl.convert_layout(share, gl.SliceLayout(1, o_layout))[:, None]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DV, DV // 8], [4, 1], [1, 0])
    rows = GROUP * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    token, query = first + rows // G, head * G + rows % G
    valid = (rows < TOKENS * G) & (token < queries)
    at = (q_start + token).to(gl.int64) * stride_t + query * stride_h
    columns = gl.arange(0, DV, gl.SliceLayout(0, layout))
    gl.store(OUT + at[:, None] + columns[None, :],
             gl.convert_layout(acc.to(OUT.dtype.element_ty), layout),
             mask=gl.expand_dims(valid, 1))  # fmt: skip


@gluon.jit
def _wait_for_q():
    """Until the queries that this warpgroup copies are there."""
    async_copy.wait_group(0)
    fence_async_shared()  # matrix instructions read what ordinary stores wrote
    gl.thread_barrier()


@gluon.jit
def _begin(
    smem, bars, count, place, factor, right, end, BN: gl.constexpr, DA: gl.constexpr,
    DB: gl.constexpr, STAGES: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """(weights, running maximum, running sum) of the first keys of a tile, whose queries come."""
    k_full, k_empty = bars[0], bars[1]
    stage, phase = count % STAGES, count // STAGES & 1
    _wait_for_q()
    mbarrier.wait(k_full.index(stage), phase)
    scores = _start_scores(smem, stage, layout, BN, DA, DB)
    scores = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(k_empty.index(stage), count=1)
    scores = _hide(scores, 0, place, right, end, layout, BN)
    top = gl.full([ROWS], EMPTY, gl.float32, gl.SliceLayout(1, layout))
    total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, layout))
    weights, top, total, _fade = _soften(scores, top, total, factor)
    return weights, top, total


@gluon.jit
def _end(smem, bars, count, weights, acc, BN: gl.constexpr, DV: gl.constexpr,
         STAGES: gl.constexpr):  # fmt: skip
    """The last product of a tile."""
    v_smem, v_full, v_empty = smem[4], bars[2], bars[3]
    last, last_phase = (count - 1) % STAGES, (count - 1) // STAGES & 1
    mbarrier.wait(v_full.index(last), last_phase)
    acc = warpgroup_mma(weights, v_smem.index(last).reshape([BN, DV]), acc, is_async=True)
    acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])
    mbarrier.arrive(v_empty.index(last), count=1)
    return acc


@gluon.jit
def _pass(bars, count, end, BN: gl.constexpr, STAGES: gl.constexpr):
    """Let the keys of a tile up to ``end`` pass; returns the ``count`` behind them."""
    k_full, k_empty, v_full, v_empty = bars
    for _start in range(BN, end, BN):
        stage, phase = count % STAGES, count // STAGES & 1
        last, last_phase = (count - 1) % STAGES, (count - 1) // STAGES & 1
        mbarrier.wait(k_full.index(stage), phase)
        mbarrier.arrive(k_empty.index(stage), count=1)
        mbarrier.wait(v_full.index(last), last_phase)
        mbarrier.arrive(v_empty.index(last), count=1)
        count += 1
    return count


@gluon.jit
def _consume(
    given,
    GROUP: gl.constexpr, G: gl.constexpr, DA: gl.constexpr, DB: gl.constexpr,
    DV: gl.constexpr, BN: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr,
    MIXED: gl.constexpr, HAS_SINKS: gl.constexpr,
):  # fmt: skip
    """Rows ``64 GROUP .. 64 GROUP + 64`` of all items of this program."""
    Q, OUT, LSE, SINKS, smem, bars, notes, work, q_strides, out_strides, factor = given
    right, kv_heads = work[2], work[7]
    all_q, all_q_rest, k_smem, k_rest, v_smem = smem
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    mine = (all_q.index(GROUP), all_q_rest.index(GROUP), k_smem, k_rest, v_smem)
    there, tile = told(0, notes)
    load_q(Q, mine, tile, q_strides, GROUP, G, DA, DB, TOKENS)
    count, turn = 0, 0
    while there:
        first, queries, length, end = tile[1], tile[3], tile[4], tile[5]
        place = length - queries + first + (GROUP * ROWS + gl.arange(0, ROWS, row_layout)) // G
        new, top, total = _begin(mine, bars, count, place, factor, right, end, BN, DA, DB, STAGES,
                                 s_layout)  # fmt: skip
        weights = gl.convert_layout(new.to(v_smem.dtype), gl.DotOperandLayout(0, o_layout, 2))
        count += 1
        acc = gl.zeros([ROWS, DV], gl.float32, o_layout)
        # Every row sees all keys of the tiles before this position.
        clear = gl.maximum(gl.minimum(end, length - queries + first + right + 1), 0) // BN * BN
        busy = end
        if MIXED and GROUP > 0:  # of a tile that decodes there may be no rows for this warpgroup
            rows = gl.minimum(queries - first, TOKENS) * G
            busy = gl.where(rows > GROUP * ROWS, end, 0)
            clear = gl.minimum(clear, busy)
            count = _pass(bars, count, end - busy, BN, STAGES)
        for start in range(BN, clear, BN):
            weights, acc, top, total = _step(
                mine, bars, count, weights, acc, top, total, factor, start, place, right, end,
                False, BN, DA, DB, DV, STAGES, s_layout, o_layout,
            )  # fmt: skip
            count += 1
        turn += 1
        there, coming = told(turn, notes)
        for start in range(gl.maximum(clear, BN), busy, BN):
            weights, acc, top, total = _step(
                mine, bars, count, weights, acc, top, total, factor, start, place, right, end,
                True, BN, DA, DB, DV, STAGES, s_layout, o_layout,
            )  # fmt: skip
            count += 1
        # The queries were read for the last time: the next ones come during what is left.
        load_q(Q, mine, coming, q_strides, GROUP, G, DA, DB, TOKENS)
        acc = _end(mine, bars, count, weights, acc, BN, DV, STAGES)
        _store(OUT, LSE, SINKS, tile, kv_heads, out_strides, acc, top, total, GROUP, G, DV,
               TOKENS, HAS_SINKS, s_layout, o_layout)  # fmt: skip
        tile = coming


@gluon.jit
def _barriers(NUMBER: gl.constexpr, ARRIVALS: gl.constexpr):
    """So many barriers, each of which so many arrivals complete."""
    barriers = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUMBER):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


# What varies from step to step is not specialised, or a server would compile again and again.
@gluon.jit(do_not_specialize=["batch", "max_q", "tiles", "items", "beside", "stride_table"])
def prefill_tma_kernel(
    Q, K_MAP, K_REST_MAP, V_MAP, K: gl.int64, V: gl.int64,
    TABLE, LENS, Q_STARTS, SINKS, QUEUE, OUT, LSE,
    scale, right, batch, max_q, tiles, items, beside, stride_table, kv_heads,
    stride_qt, stride_qh, stride_ot, stride_oh,
    stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    G: gl.constexpr, DA: gl.constexpr, DB: gl.constexpr, DV: gl.constexpr, BN: gl.constexpr,
    PAGE: gl.constexpr, BOX: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr,
    VARLEN: gl.constexpr, MIXED: gl.constexpr, HAS_SINKS: gl.constexpr,
    CONSUMERS: gl.constexpr, REGISTERS: gl.constexpr, FEW: gl.constexpr,
):  # fmt: skip
    """Attention over paged keys; see the module. Strides are elements, ``scale`` is natural, > 0.

    ``K_MAP`` and ``V_MAP`` describe ``[blocks, PAGE, columns]`` with boxes ``[1, BOX, 64]``, column
    ``head * stride_kh`` being the head's first; ``K_REST_MAP`` is ``K_MAP`` once more, since Triton
    knows a map by what it copies. ``items`` is ``tiles * kv_heads``; any number of programs shares
    them out by ``QUEUE``, two int32 that are 0 before and after. ``MIXED`` says that sequences that
    decode are among them. Of ``CONSUMERS`` warpgroups each has ``REGISTERS`` a thread, the producer
    ``FEW``.
    """
    dtype: gl.constexpr = Q.dtype.element_ty
    ring: gl.constexpr = gl.NVMMASharedLayout(128, 16, 3)
    flat: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    q_smem = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS, DA], flat)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, BN // BOX, BOX, DA], ring)
    q_rest, k_rest = q_smem, k_smem
    if DB > 0:
        q_rest = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS, DB], flat)
        k_rest = gl.allocate_shared_memory(dtype, [STAGES, BN // BOX, BOX, DB], ring)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, BN // BOX, BOX, DV], ring)
    k_full, k_empty = _barriers(STAGES, 2 if DB > 0 else 1), _barriers(STAGES, CONSUMERS)
    v_full, v_empty = _barriers(STAGES, 1), _barriers(STAGES, CONSUMERS)
    board = gl.allocate_shared_memory(
        gl.int32, [2 * FIELDS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    noted, read = _barriers(2, 1), _barriers(2, CONSUMERS)
    fence_async_shared()
    notes = (board, noted, read, QUEUE)
    smem, bars = (q_smem, q_rest, k_smem, k_rest, v_smem), (k_full, k_empty, v_full, v_empty)
    work = (LENS, Q_STARTS, right, batch, max_q, tiles, items, kv_heads, beside)
    given = (Q, OUT, LSE, SINKS, smem, bars, notes, work, (stride_qt, stride_qh),
             (stride_ot, stride_oh), scale * LOG2_E)  # fmt: skip
    load = (K_MAP, K_REST_MAP, V_MAP, gl.multiple_of(K.to(gl.pointer_type(dtype)), 16),
            gl.multiple_of(V.to(gl.pointer_type(dtype)), 16), smem, bars, notes, TABLE, work,
            stride_table, (stride_kb, stride_ks, stride_kh),
            (stride_vb, stride_vs, stride_vh))  # fmt: skip
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (given, 0, G, DA, DB, DV, BN, TOKENS, STAGES, MIXED, HAS_SINKS)),
                (_consume, (given, 1, G, DA, DB, DV, BN, TOKENS, STAGES, MIXED, HAS_SINKS)),
                (produce, (load, DA, DB, DV, BN, PAGE, BOX, TOKENS, STAGES, VARLEN, MIXED)),
            ],
            [4, 4],
            [REGISTERS, FEW],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (given, 0, G, DA, DB, DV, BN, TOKENS, STAGES, MIXED, HAS_SINKS)),
                (_consume, (given, 1, G, DA, DB, DV, BN, TOKENS, STAGES, MIXED, HAS_SINKS)),
                (_consume, (given, 2, G, DA, DB, DV, BN, TOKENS, STAGES, MIXED, HAS_SINKS)),
                (produce, (load, DA, DB, DV, BN, PAGE, BOX, TOKENS, STAGES, VARLEN, MIXED)),
            ],
            [4, 4, 4],
            [REGISTERS, REGISTERS, FEW],
        )  # fmt: skip
