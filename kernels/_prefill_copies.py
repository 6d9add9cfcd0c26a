"""The producer of ``_prefill_gluon``: which tiles a program takes, and their copies.

Programs take items (a tile of query tokens and a KV head) from a queue, a counter in memory. The
producer of a program tells its consumers by way of shared memory.

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
FIELDS = gl.constexpr(7)
"""Of what the producer tells the consumers of a tile."""
ROWS = gl.constexpr(64)
"""Rows of a warpgroup, those of its matrix instructions."""


@gluon.jit
def _item_at(taken, items, MIXED: gl.constexpr):
    """The item that is the next when ``taken`` are; ``items`` if there is none.

    Of a mixed batch they are taken from both ends in turn, so that some programs compute while
    others wait for memory: sequences that decode lie before a prompt or behind, in every head.
    """
    item = taken
    if MIXED:
        item = gl.where(taken % 2 == 1, items - 1 - taken // 2, taken // 2)
    return gl.where(taken < items, item, items)


@gluon.jit
def _tile_of(item, work, TOKENS: gl.constexpr, VARLEN: gl.constexpr):
    """(head, first token, where its sequence's start, how many, length, end of keys, sequence).

    So many heads as are ``beside`` each other are walked over at the same time, longest tiles
    first: their keys stay in the L2 cache. Of a ragged q, sequence i takes the tiles from
    ``Q_STARTS[i] // TOKENS + i`` on (``prefill``).
    """
    LENS, Q_STARTS, right, batch, max_q, tiles, items, kv_heads, beside = work
    item = gl.minimum(item, items - 1)
    if VARLEN:
        many = beside * tiles
        first_head = item // many * beside
        inside, heads = item % many, gl.minimum(beside, kv_heads - first_head)
        head, tile = first_head + inside % heads, tiles - 1 - inside // heads
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
    else:
        each = tiles // batch
        many = beside * each
        first_head = item // many * beside
        inside, heads = item % many, gl.minimum(beside, kv_heads * batch - first_head)
        head = first_head + inside % heads
        seq, head = head // kv_heads, head % kv_heads
        first = (each - 1 - inside // heads) * TOKENS
        q_start, queries = seq * max_q, max_q
    length = gl.load(LENS + seq)
    last_place = length - queries + gl.minimum(first + TOKENS, queries) - 1
    end = gl.maximum(gl.minimum(length, last_place + right + 1), 0)
    return head, first, q_start, queries, length, end, seq


@gluon.jit
def _post(turn, there, tile, notes):
    """Tell the consumers of this program's ``turn``-th tile, or that it has so many only."""
    board, noted, read = notes[:3]
    slot = turn % 2
    none = gl.full([1], 0, gl.int32, gl.BlockedLayout([1], [32], [4], [0]))
    mbarrier.wait(read.index(slot), (turn // 2 & 1) ^ 1)
    board.index(slot * FIELDS).store(none + gl.where(there, 1, 0))
    for field in gl.static_range(1, FIELDS):
        board.index(slot * FIELDS + field).store(none + tile[field - 1])
    gl.thread_barrier()
    mbarrier.arrive(noted.index(slot), count=1)


@gluon.jit
def _read(board, at):
    return gl.max(board.index(at).load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def told(turn, notes):
    """(whether there is a ``turn``-th tile of this program, the tile); see ``_tile_of``."""
    board, noted, read = notes[:3]
    slot = turn % 2
    mbarrier.wait(noted.index(slot), turn // 2 & 1)
    at = slot * FIELDS
    there = _read(board, at) > 0
    tile = (_read(board, at + 1), _read(board, at + 2), _read(board, at + 3), _read(board, at + 4),
            _read(board, at + 5), _read(board, at + 6))  # fmt: skip
    gl.thread_barrier()
    mbarrier.arrive(read.index(slot), count=1)
    return there, tile


@gluon.jit
def _next_item(queue, items, MIXED: gl.constexpr):
    return _item_at(gl.num_programs(0) + gl.atomic_add(queue, 1, sem="relaxed"), items, MIXED)


@gluon.jit
def _take(item, turn, notes, work, TOKENS: gl.constexpr, VARLEN: gl.constexpr,
          MIXED: gl.constexpr):  # fmt: skip
    """(whether there is a tile, the tile) of ``item``, or of the next that has query tokens.

    The consumers are told that it is the ``turn``-th.
    """
    queue, items = notes[3], work[6]
    tile = _tile_of(item, work, TOKENS, VARLEN)
    if VARLEN:
        while (item < items) & (tile[1] >= tile[3]):
            item = _next_item(queue, items, MIXED)
            tile = _tile_of(item, work, TOKENS, VARLEN)
    _post(turn, item < items, tile, notes)
    return item < items, tile


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
    given, DA: gl.constexpr, DB: gl.constexpr, DV: gl.constexpr, BN: gl.constexpr,
    PAGE: gl.constexpr, BOX: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr,
    VARLEN: gl.constexpr, MIXED: gl.constexpr,
):  # fmt: skip
    """Take items, and fill the ring with their keys and values."""
    K_MAP, K_REST_MAP, V_MAP, K_BASE, V_BASE, smem, bars, notes, TABLE, work = given[:10]
    stride_table, k_strides, v_strides = given[10], given[11], given[12]
    k_smem, k_rest, v_smem = smem[2], smem[3], smem[4]
    k_full, k_empty, v_full, v_empty = bars
    queue = notes[3]
    count, turn = 0, 0
    item = _item_at(gl.program_id(0), work[6], MIXED)
    there, tile = _take(item, turn, notes, work, TOKENS, VARLEN, MIXED)
    while there:
        head, length, end = tile[0], tile[4], gl.maximum(tile[5], 1)
        row = TABLE + tile[6].to(gl.int64) * stride_table
        ids = _ids_of(row, 0, length, BN, BOX, PAGE)
        turn += 1
        item = _next_item(queue, work[6], MIXED)
        there, tile = _take(item, turn, notes, work, TOKENS, VARLEN, MIXED)
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
    # All programs have taken their last item when the last one is here: the queue begins anew.
    if gl.atomic_add(queue + 1, 1) == gl.num_programs(0) - 1:
        gl.store(queue, 0)
        gl.store(queue + 1, 0)


@gluon.jit
def _copy_q(
    Q, q_smem, tile, strides, GROUP: gl.constexpr, G: gl.constexpr, FIRST: gl.constexpr,
    D: gl.constexpr, TOKENS: gl.constexpr,
):  # fmt: skip
    head, first, q_start, queries = tile[:4]
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
