"""Decode for Hopper in Gluon: blocks come by TMA, and every SM gets equally many keys.

A program works on one KV head and on as many tiles of keys as every other one, from where the one
before it stops, through parts of sequences and whole ones (stream-K; LeanAttention, Sanovar et al.
2024). One warp produces: it reads the block table and starts a copy of every block into a ring in
shared memory, and does not stop between sequences. Four warps consume by FlashAttention's online
softmax. A sequence of which several programs have parts is merged, in a fixed order, by the one
that finishes last.

A copy takes rows of a block that the sequence owns; those behind its end are masked.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from kvcached.kernels._decode_copies import produce, told
from kvcached.kernels._mla_ends import wait_for_launch_in_front

EMPTY = gl.constexpr(-1.0e30)
LOG2_E = gl.constexpr(1.4426950408889634)
PRODUCER_REGISTERS = gl.constexpr(88)


@gluon.jit
def _queries(Q, note, strides, G: gl.constexpr, D: gl.constexpr, BM: gl.constexpr,
             ROWS: gl.constexpr):  # fmt: skip
    """A sequence's query ``[BM, D]``, again in the rows that pad the tile, if there is one."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [gl.num_warps(), 1], [1, 0])
    seq, head = told(note, 0), told(note, 1)
    row = gl.arange(0, BM, gl.SliceLayout(1, layout)) % ROWS
    column = gl.arange(0, D, gl.SliceLayout(0, layout))
    at = Q + seq.to(gl.int64) * strides[0] + ((head * G + row) * strides[1])[:, None]
    valid = (row < G) & (seq >= 0)
    return gl.load(at + column[None, :], mask=valid[:, None] & (column < D)[None, :], other=0.0)


@gluon.jit
def _attend(
    q, smem, bars, count, lo, hi, length, factor,
    BM: gl.constexpr, ROWS: gl.constexpr, D: gl.constexpr, BN: gl.constexpr,
    STAGES: gl.constexpr, SUMS: gl.constexpr,
):  # fmt: skip
    """(acc, top, total) of tiles [lo, hi) of a sequence, base 2; the count of tiles so far."""
    k_smem, v_smem, _notes = smem
    k_full, k_empty, v_full, v_empty = bars
    weighted: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    operand: gl.constexpr = gl.DotOperandLayout(1, SUMS, 2)
    of_row: gl.constexpr = gl.SliceLayout(1, SUMS)
    top = gl.full([BM], EMPTY, gl.float32, of_row)
    totals = gl.zeros([BM, BN], gl.float32, SUMS)  # added up at the end: that takes barriers
    acc = gl.zeros([BM, D], gl.float32, SUMS)
    for i in range(lo, hi):
        stage, phase = count % STAGES, count // STAGES & 1
        mbarrier.wait(k_full.index(stage), phase)
        keys = k_smem.index(stage).reshape([BN, D]).permute([1, 0]).load(operand)
        scores = mma_v2(q, keys, gl.zeros([BM, BN], gl.float32, SUMS)) * factor
        gl.thread_barrier()
        mbarrier.arrive(k_empty.index(stage), count=1)
        if (i + 1) * BN > length:
            pos = i * BN + gl.arange(0, BN, gl.SliceLayout(0, SUMS))
            scores = gl.where((pos < length)[None, :], scores, float("-inf"))
        new_top = gl.maximum(top, gl.max(scores, 1))
        weights = gl.exp2(scores - new_top[:, None])
        fade = gl.exp2(top - new_top)
        totals = totals * fade[:, None] + weights
        top = new_top
        # Rows that pad the tile take what rounding takes off the weights.
        rest = weights - weights.to(v_smem.dtype).to(gl.float32)
        weights = gl.where((gl.arange(0, BM, of_row) < ROWS)[:, None], weights, rest)
        rounded = gl.convert_layout(weights.to(v_smem.dtype), weighted)
        mbarrier.wait(v_full.index(stage), phase)
        values = v_smem.index(stage).reshape([BN, D]).load(operand)
        if (i + 1) * BN > length:
            row = i * BN + gl.arange(0, BN, gl.SliceLayout(1, operand))
            values = gl.where((row < length)[:, None], values, gl.zeros_like(values))
        acc = mma_v2(rounded, values, acc * fade[:, None])
        gl.thread_barrier()
        mbarrier.arrive(v_empty.index(stage), count=1)
        count += 1
    return acc, top, gl.sum(totals, 1), count


@gluon.jit
def _rows_of(acc, top, total, BM: gl.constexpr, ROWS: gl.constexpr, D: gl.constexpr,
             OUTPUT: gl.constexpr):  # fmt: skip
    """ROWS rows of BM: the sums of weights and of rests."""
    times: gl.constexpr = BM // ROWS
    row = gl.arange(0, BM, gl.SliceLayout(1, acc.type.layout))
    acc = gl.where((row < 2 * ROWS)[:, None], acc, 0.0)
    acc = gl.convert_layout(gl.sum(gl.reshape(acc, [times, ROWS, D]), 0), OUTPUT)
    top = gl.max(gl.reshape(top, [times, ROWS]), 0)
    total = gl.max(gl.reshape(total, [times, ROWS]), 0)
    of_row: gl.constexpr = gl.SliceLayout(1, OUTPUT)
    return acc, gl.convert_layout(top, of_row), gl.convert_layout(total, of_row)


@gluon.jit
def _write(acc, top, total, OUT, LSE, SINKS, seq, head, strides, KV_HEADS: gl.constexpr,
           G: gl.constexpr, D: gl.constexpr, ROWS: gl.constexpr,
           HAS_SINKS: gl.constexpr, OUTPUT: gl.constexpr):  # fmt: skip
    """Divide by the sum, write the output and the LSE."""
    row = gl.arange(0, ROWS, gl.SliceLayout(1, OUTPUT))
    column = gl.arange(0, D, gl.SliceLayout(0, OUTPUT))
    query, valid, token = head * G + row, row < G, seq.to(gl.int64)
    found = total > 0
    denominator = total
    if HAS_SINKS:  # in the denominator only, not in the LSE
        sink = gl.load(SINKS + query, mask=valid, other=0.0) * LOG2_E
        denominator = total + gl.exp2(gl.where(found, sink - top, 0.0))
    out = acc / gl.where(found, denominator, 1.0)[:, None]
    at = OUT + token * strides[0] + (query * strides[1])[:, None] + column[None, :]
    gl.store(at, out.to(OUT.dtype.element_ty), mask=valid[:, None] & (column < D)[None, :])
    lse = (top + gl.log2(gl.where(found, total, 1.0))) / LOG2_E
    lse = gl.where(found, lse, float("-inf"))
    gl.store(LSE + token * (KV_HEADS * G) + query, lse, mask=valid)


@gluon.jit
def _merged(PARTIAL, STATE, parts, ROWS: gl.constexpr, D: gl.constexpr, GROUP: gl.constexpr,
            OUTPUT: gl.constexpr):  # fmt: skip
    """(acc, top, total) over parts that lie one after another, GROUP of them read at a time."""
    cube: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 1, 32], [gl.num_warps(), 1, 1], [2, 1, 0])
    plane: gl.constexpr = gl.SliceLayout(2, cube)
    of_row: gl.constexpr = gl.SliceLayout(1, plane)
    row, part = gl.arange(0, ROWS, of_row), gl.arange(0, GROUP, gl.SliceLayout(0, plane))
    column = gl.arange(0, D, gl.SliceLayout(0, gl.SliceLayout(1, cube)))
    top = gl.full([ROWS], EMPTY, gl.float32, of_row)
    total = gl.zeros([ROWS], gl.float32, of_row)
    acc = gl.zeros([ROWS, D], gl.float32, gl.SliceLayout(1, cube))
    for at in range(0, parts, GROUP):
        there = (at + part < parts)[None, :] & (row >= 0)[:, None]
        own = (at + part)[None, :] * ROWS + row[:, None]
        tops = gl.load(STATE + own * 2, mask=there, other=EMPTY, cache_modifier=".cg")
        totals = gl.load(STATE + own * 2 + 1, mask=there, other=0.0, cache_modifier=".cg")
        place = gl.expand_dims(own * D, 2)
        columns = gl.expand_dims(gl.expand_dims(column, 0), 1)
        accs = gl.load(PARTIAL + place + columns,
                       mask=gl.expand_dims(there, 2) & (columns < D), other=0.0,
                       cache_modifier=".cg")  # fmt: skip
        new_top = gl.maximum(top, gl.max(tops, 1))
        fade, gain = gl.exp2(top - new_top), gl.exp2(tops - new_top[:, None])
        total = total * fade + gl.sum(totals * gain, 1)
        faded = gl.expand_dims(gl.convert_layout(fade, gl.SliceLayout(1, acc.type.layout)), 1)
        acc = acc * faded + gl.sum(accs * gl.expand_dims(gain, 2), 1)
        top = new_top
    row_layout: gl.constexpr = gl.SliceLayout(1, OUTPUT)
    return (gl.convert_layout(acc, OUTPUT), gl.convert_layout(top, row_layout),
            gl.convert_layout(total, row_layout))  # fmt: skip


@gluon.jit
def _finish(acc, top, total, PARTIAL, STATE, FINISHED, OUT, LSE, SINKS, part, parts, slot, seq,
            head, strides, KV_HEADS: gl.constexpr, G: gl.constexpr,
            D: gl.constexpr, ROWS: gl.constexpr, GROUP: gl.constexpr, HAS_SINKS: gl.constexpr,
            OUTPUT: gl.constexpr):  # fmt: skip
    """Store a part; the last one of its sequence to get here merges them all."""
    PARTIAL = gl.multiple_of(PARTIAL + (slot - part).to(gl.int64) * (ROWS * D), 16)
    STATE += (slot - part).to(gl.int64) * (ROWS * 2)
    row = part * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, OUTPUT))
    column = gl.arange(0, D, gl.SliceLayout(0, OUTPUT))
    gl.store(PARTIAL + row[:, None] * D + column[None, :], acc)
    gl.store(STATE + row * 2, top)
    gl.store(STATE + row * 2 + 1, total)
    gl.thread_barrier()  # all of these stores come before the count
    counter = FINISHED + seq * KV_HEADS + head
    if gl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == parts - 1:
        gl.store(counter, 0)  # ready for the next launch
        whole, its_top, its_total = _merged(PARTIAL, STATE, parts, ROWS, D, GROUP, OUTPUT)
        _write(whole, its_top, its_total, OUT, LSE, SINKS, seq, head, strides, KV_HEADS,
               G, D, ROWS, HAS_SINKS, OUTPUT)  # fmt: skip


@gluon.jit
def _consume(
    Q, SINKS, PARTIAL, STATE, FINISHED, OUT, LSE, smem, bars, factor, q_strides, out_strides,
    KV_HEADS: gl.constexpr, G: gl.constexpr, D: gl.constexpr,
    BM: gl.constexpr, ROWS: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
    GROUP: gl.constexpr, HAS_SINKS: gl.constexpr,
):  # fmt: skip
    """Attention of the tiles that come, part by part."""
    warps: gl.constexpr = gl.num_warps()
    sums: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, warps], [16, 8])
    output: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [warps, 1], [1, 0])
    notes, k_full = smem[2], bars[0]
    count = 0
    mbarrier.wait(k_full.index(0), 0)
    note = notes.index(0)
    q = _queries(Q, note, q_strides, G, D, BM, ROWS)
    seq = told(note, 0)
    while seq >= 0:
        head, lo, hi, length = told(note, 1), told(note, 2), told(note, 3), told(note, 4)
        part, parts, slot = told(note, 5), told(note, 6), told(note, 7)
        acc, top, total, count = _attend(
            gl.convert_layout(q, gl.DotOperandLayout(0, sums, 2)), smem, bars, count, lo, hi,
            length, factor, BM, ROWS, D, BN, STAGES, sums,
        )  # fmt: skip
        mbarrier.wait(k_full.index(count % STAGES), count // STAGES & 1)
        note = notes.index(count % STAGES)
        q = _queries(Q, note, q_strides, G, D, BM, ROWS)  # during what is left to do
        acc, top, total = _rows_of(acc, top, total, BM, ROWS, D, output)
        if parts > 1:
            _finish(acc, top, total, PARTIAL, STATE, FINISHED, OUT, LSE, SINKS, part, parts, slot,
                    seq, head, out_strides, KV_HEADS, G, D, ROWS, GROUP, HAS_SINKS,
                    output)  # fmt: skip
        else:
            _write(acc, top, total, OUT, LSE, SINKS, seq, head, out_strides, KV_HEADS, G,
                   D, ROWS, HAS_SINKS, output)  # fmt: skip
        seq = told(note, 0)


# What varies from step to step is not specialised, or a server would compile again and again.
@gluon.jit(do_not_specialize=["batch", "stride_table"])
def decode_tma_kernel(
    Q, K_MAP, V_MAP, TABLE, LENS, SINKS, PARTIAL, STATE, FINISHED, OUT, LSE, scale, batch,
    stride_table, stride_qt, stride_qh, stride_ot, stride_oh, stride_kh, stride_vh,
    B: gl.constexpr, KV_HEADS: gl.constexpr, G: gl.constexpr, D: gl.constexpr,
    BM: gl.constexpr, ROWS: gl.constexpr, BN: gl.constexpr, PAGE: gl.constexpr,
    BOX: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, HAS_SINKS: gl.constexpr,
):  # fmt: skip
    """One query token of each of ``batch <= B`` sequences. Strides are in elements.

    ``K_MAP`` and ``V_MAP`` describe ``[blocks, PAGE, columns]`` with boxes ``[1, BOX, 64]``, column
    ``head * stride_kh`` being the head's first. There are at least ``KV_HEADS`` programs.
    """
    dtype: gl.constexpr = Q.dtype.element_ty
    ring: gl.constexpr = gl.NVMMASharedLayout(128, 16, 3)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, BN // BOX, BOX, D], ring)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, BN // BOX, BOX, D], ring)
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=1)
        mbarrier.init(v_empty.index(stage), count=1)
    fence_async_shared()
    wait_for_launch_in_front()
    note: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    notes = gl.allocate_shared_memory(gl.int32, [STAGES, 8], note)
    smem, bars = (k_smem, v_smem, notes), (k_full, k_empty, v_full, v_empty)
    gl.warp_specialize(
        [
            (_consume, (Q, SINKS, PARTIAL, STATE, FINISHED, OUT, LSE, smem, bars, scale * LOG2_E,
                        (stride_qt, stride_qh), (stride_ot, stride_oh), KV_HEADS, G,
                        D, BM, ROWS, BN, STAGES, GROUP, HAS_SINKS)),
            (produce, (K_MAP, V_MAP, TABLE, LENS, smem, bars, batch, stride_table, stride_kh,
                       stride_vh, B, KV_HEADS, D, BN, PAGE, BOX, STAGES)),
        ],
        [1],
        [PRODUCER_REGISTERS],
    )  # fmt: skip
