"""The producer of ``_prefill_gluon``: which tiles a program works on, and their copies.

Keys and values come by TMA, a box a block; of the last tile of a sequence, which has rows that
belong to nobody, only the sequence's own are copied, by ordinary asynchronous copies.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

CHUNK = gl.constexpr(16)
"""Rows that a warpgroup copies at a time without TMA."""
ROWS = gl.constexpr(64)
"""Rows of a warpgroup, those of its matrix instructions."""


@gluon.jit
def item_at(turn, items):
    """The ``turn``-th item of this program; every other turn backwards, so that sums come out even.

    Items come in the order of their length, so the first program would get the longest each time.
    """
    step, program = gl.num_programs(0), gl.program_id(0)
    base = turn * step
    back = (turn % 2 == 1) & (base + step <= items)
    return base + gl.where(back, step - 1 - program, program)


@gluon.jit
def tile_of(item, work, TOKENS: gl.constexpr, VARLEN: gl.constexpr):
    """(head, sequence, its first token here, its tokens' start and number, length, end of keys).

    Of a ragged q, sequence i takes the tiles from ``Q_STARTS[i] // TOKENS + i`` on (``prefill``).
    """
    LENS, Q_STARTS, right, batch, max_q, tiles, items, kv_heads = work
    item = gl.minimum(item, items - 1)
    head, tile = item % kv_heads, tiles - 1 - item // kv_heads
    if VARLEN:
        seq = 0
        stop = batch
        while seq + 1 < stop:
            middle = (seq + stop) // 2
            if gl.load(Q_STARTS + middle) // TOKENS + middle <= tile:
                seq = middle
            else:
                stop = middle
        q_start = gl.load(Q_STARTS + seq)
        queries = gl.load(Q_STARTS + seq + 1) - q_start
        first = (tile - q_start // TOKENS - seq) * TOKENS
    else:  # tiles of all sequences that see equally much lie side by side
        seq, first = tile % batch, tile // batch * TOKENS
        q_start, queries = seq * max_q, max_q
    length = gl.load(LENS + seq)
    last_place = length - queries + gl.minimum(first + TOKENS, queries) - 1
    end = gl.maximum(gl.minimum(length, last_place + right + 1), 0)
    return head, seq, first, q_start, queries, length, gl.where(first < queries, end, 0)


@gluon.jit
def _ids_of(row, start, length, BN: gl.constexpr, BOX: gl.constexpr, PAGE: gl.constexpr):
    """Block ids of the boxes of a tile; 0 behind the end, where the table says nothing."""
    ids = (gl.load(row + start // PAGE, mask=start < length, other=0),)
    for p in gl.static_range(1, BN // BOX):
        at = start + p * BOX
        ids = ids + (gl.load(row + at // PAGE, mask=at < length, other=0),)  # type: ignore[assignment]  # noqa: RUF005
    return ids


@gluon.jit
def _load_tile(
    MAP, BASE, smem, full, ids, row, start, length, head, strides,
    BN: gl.constexpr, FIRST: gl.constexpr, D: gl.constexpr, PAGE: gl.constexpr,
    BOX: gl.constexpr,
):  # fmt: skip
    """Columns ``FIRST .. FIRST + D`` of rows ``start .. start + BN`` of keys or values.

    They go to ``smem [BN // BOX, BOX, D]``; ``full`` is told so.
    """
    stride_block, stride_slot, stride_head = strides
    column = head * stride_head + FIRST
    if start + BN <= length:
        mbarrier.expect(full, BN * D * 2)
        for p in gl.static_range(BN // BOX):
            place = [ids[p], (start + p * BOX) % PAGE, column]
            tma.async_copy_global_to_shared(MAP, place, full, smem.slice(p, 1, dim=0))
    else:
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
        rows = gl.arange(0, CHUNK, gl.SliceLayout(1, layout))
        columns = gl.arange(0, D, gl.SliceLayout(0, layout))
        flat = smem.reshape([BN, D])
        for c in gl.static_range(BN // CHUNK):
            pos = start + c * CHUNK + rows
            valid = pos < length
            block = gl.load(row + pos // PAGE, mask=valid, other=0).to(gl.int64)
            at = block * stride_block + pos % PAGE * stride_slot + column
            async_copy.async_copy_global_to_shared(
                flat.slice(c * CHUNK, CHUNK, dim=0), BASE + at[:, None] + columns[None, :],
                mask=gl.expand_dims(valid, 1),
            )  # fmt: skip
        async_copy.commit_group()
        async_copy.wait_group(0)
        fence_async_shared()  # matrix instructions read what ordinary stores wrote
        gl.thread_barrier()
        mbarrier.arrive(full, count=1)


@gluon.jit
def produce(
    K_MAP, K_REST_MAP, V_MAP, K_BASE, V_BASE, smem, bars, TABLE, work, stride_table, k_strides,
    v_strides, DA: gl.constexpr, DB: gl.constexpr, DV: gl.constexpr, BN: gl.constexpr,
    PAGE: gl.constexpr, BOX: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr,
    VARLEN: gl.constexpr,
):  # fmt: skip
    """Fill the ring with the keys and values of all items of this program."""
    k_smem, k_rest, v_smem = smem[2], smem[3], smem[4]
    k_full, k_empty, v_full, v_empty = bars
    items = work[6]
    count, turn = 0, 0
    item = item_at(0, items)
    while item < items:
        tile = tile_of(item, work, TOKENS, VARLEN)
        head, seq, length, end = tile[0], tile[1], tile[5], tile[6]
        row = TABLE + seq.to(gl.int64) * stride_table
        ids = _ids_of(row, 0, length, BN, BOX, PAGE)
        for start in range(0, end, BN):
            stage, phase = count % STAGES, count // STAGES & 1
            now = ids  # the next are on their way while this tile waits for its place
            ids = _ids_of(row, start + BN, length, BN, BOX, PAGE)
            mbarrier.wait(k_empty.index(stage), phase ^ 1)
            _load_tile(K_MAP, K_BASE, k_smem.index(stage), k_full.index(stage), now, row, start,
                       length, head, k_strides, BN, 0, DA, PAGE, BOX)  # fmt: skip
            if DB > 0:
                _load_tile(K_REST_MAP, K_BASE, k_rest.index(stage), k_full.index(stage), now, row,
                           start, length, head, k_strides, BN, DA, DB, PAGE, BOX)  # fmt: skip
            mbarrier.wait(v_empty.index(stage), phase ^ 1)
            _load_tile(V_MAP, V_BASE, v_smem.index(stage), v_full.index(stage), now, row, start,
                       length, head, v_strides, BN, 0, DV, PAGE, BOX)  # fmt: skip
            count += 1
        turn += 1
        item = item_at(turn, items)


@gluon.jit
def _copy_q(
    Q, q_smem, tile, strides, GROUP: gl.constexpr, G: gl.constexpr, FIRST: gl.constexpr,
    D: gl.constexpr, TOKENS: gl.constexpr,
):  # fmt: skip
    head, first, q_start, queries = tile[0], tile[2], tile[3], tile[4]
    stride_t, stride_h = strides
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    rows = GROUP * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    columns = FIRST + gl.arange(0, D, gl.SliceLayout(0, layout))
    token = first + rows // G
    valid = (rows < TOKENS * G) & (token < queries)
    at = (q_start + token).to(gl.int64) * stride_t + (head * G + rows % G) * stride_h
    async_copy.async_copy_global_to_shared(
        q_smem, Q + at[:, None] + columns[None, :], mask=gl.expand_dims(valid, 1)
    )


@gluon.jit
def load_q(
    Q, smem, tile, strides, GROUP: gl.constexpr, G: gl.constexpr, DA: gl.constexpr,
    DB: gl.constexpr, TOKENS: gl.constexpr,
):  # fmt: skip
    """Start to copy this warpgroup's rows of a tile; zeros where there are none."""
    _copy_q(Q, smem[0], tile, strides, GROUP, G, 0, DA, TOKENS)
    if DB > 0:
        _copy_q(Q, smem[1], tile, strides, GROUP, G, DA, DB, TOKENS)
    async_copy.commit_group()
