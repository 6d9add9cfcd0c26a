"""Absorbed latent attention on Hopper in Gluon: two warpgroups share 64 rows of queries.

FlashMLA (DeepSeek 2025) keeps 64 rows of an output of 512 columns in the registers of two
warpgroups. Here the first makes all scores and the weights, and the left half of the output; the
second, which gets the weights through shared memory, makes the right half; a third copies latent
rows ahead, each once for both products. So products of one run beside the softmax of the other.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kvcached.kernels._mla_ends import (
    BM,
    BN,
    EMPTY,
    HALF,
    SCORES,
    SUMS,
    finish_left,
    finish_right,
    query_of,
    wait_for_launch_in_front,
)

REST = gl.constexpr(64)
"""Columns of a tile: two halves of the value, and the rotary rest of the key."""
STAGES = gl.constexpr(2)
GROUP = gl.constexpr(16)
"""Rows that are copied at a time: a quarter of a tile, with as many rows as a small block."""
WIDE = gl.constexpr(gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0]))
NARROW = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
"""How four warps copy 256 and 64 columns, 16 bytes a thread."""


@gluon.jit
def _copy(BASE, rows, valid, FIRST: gl.constexpr, SIZE: gl.constexpr, LAYOUT: gl.constexpr, to):
    """Start to copy columns ``FIRST .. FIRST + SIZE`` of rows; zeros where not valid."""
    columns = FIRST + gl.arange(0, SIZE, gl.SliceLayout(0, LAYOUT))
    at = BASE + rows[:, None] + columns[None, :]
    async_copy.async_copy_global_to_shared(to, at, mask=valid[:, None])


@gluon.jit
def _blocks_of(TABLE, start, hi, BLOCK_SIZE: gl.constexpr, LAYOUT: gl.constexpr):
    """Of positions ``start .. start + GROUP`` the blocks, or the one in which they all lie."""
    pos = start
    if BLOCK_SIZE % GROUP != 0:
        pos = start + gl.arange(0, GROUP, gl.SliceLayout(1, LAYOUT))
    return gl.load(TABLE + pos // BLOCK_SIZE, mask=pos < hi, other=0).to(gl.int64)


@gluon.jit
def _ids_of(TABLE, start, hi, BLOCK_SIZE: gl.constexpr):
    """``_blocks_of`` for columns that are copied in either way."""
    wide = _blocks_of(TABLE, start, hi, BLOCK_SIZE, WIDE)
    narrow = wide
    if BLOCK_SIZE % GROUP != 0:
        narrow = _blocks_of(TABLE, start, hi, BLOCK_SIZE, NARROW)
    return wide, narrow


@gluon.jit
def _rows_of(blocks, start, hi, strides, BLOCK_SIZE: gl.constexpr, LAYOUT: gl.constexpr):
    """(first element, valid) of the rows of ``GROUP`` positions from ``start`` on."""
    offs = gl.arange(0, GROUP, gl.SliceLayout(1, LAYOUT))
    slots = start % BLOCK_SIZE + offs if BLOCK_SIZE % GROUP == 0 else (start + offs) % BLOCK_SIZE
    return blocks * strides[0] + slots * strides[1], start + offs < hi


@gluon.jit
def _copy_group(BASE, ids, start, hi, strides, tile, GROUP_AT: gl.constexpr,
                BLOCK_SIZE: gl.constexpr):  # fmt: skip
    """Copy rows ``GROUP_AT .. + GROUP`` of a tile: whole ones, which lie together in memory."""
    left, right, rest = tile
    rows, valid = _rows_of(ids[0], start, hi, strides, BLOCK_SIZE, WIDE)
    _copy(BASE, rows, valid, 0, HALF, WIDE, left.slice(GROUP_AT, GROUP))
    _copy(BASE, rows, valid, HALF, HALF, WIDE, right.slice(GROUP_AT, GROUP))
    rows, valid = _rows_of(ids[1], start, hi, strides, BLOCK_SIZE, NARROW)
    _copy(BASE, rows, valid, 2 * HALF, REST, NARROW, rest.slice(GROUP_AT, GROUP))


@gluon.jit
def _load_latents(BASE, TABLE, lo, hi, tiles, strides, latents, BLOCK_SIZE: gl.constexpr):
    """A warpgroup's part: copies of tiles, each as soon as the one STAGES before is done with.

    Which blocks they are of is read before that.
    """
    left, right, rest, full, empty = latents
    for i in range(tiles):
        at, stage = lo + i * BN, i % STAGES
        a = _ids_of(TABLE, at, hi, BLOCK_SIZE)
        b, c, d = a, a, a
        if BLOCK_SIZE % BN != 0:
            b = _ids_of(TABLE, at + GROUP, hi, BLOCK_SIZE)
            c = _ids_of(TABLE, at + 2 * GROUP, hi, BLOCK_SIZE)
            d = _ids_of(TABLE, at + 3 * GROUP, hi, BLOCK_SIZE)
        tile = (left.index(stage), right.index(stage), rest.index(stage))
        mbarrier.wait(empty.index(stage), (i // STAGES & 1) ^ 1)
        _copy_group(BASE, a, at, hi, strides, tile, 0, BLOCK_SIZE)
        _copy_group(BASE, b, at + GROUP, hi, strides, tile, GROUP, BLOCK_SIZE)
        _copy_group(BASE, c, at + 2 * GROUP, hi, strides, tile, 2 * GROUP, BLOCK_SIZE)
        _copy_group(BASE, d, at + 3 * GROUP, hi, strides, tile, 3 * GROUP, BLOCK_SIZE)
        async_copy.mbarrier_arrive(full.index(stage), increment_count=False)


@gluon.jit
def _load_queries(Q, place, stride_qt, stride_qh, H: gl.constexpr, LAYOUT: gl.constexpr,
                  FIRST: gl.constexpr, SIZE: gl.constexpr, to):  # fmt: skip
    seq, first_row, max_q = place[0], place[1], place[2]
    offs = first_row + query_of(gl.arange(0, BM, gl.SliceLayout(1, LAYOUT)), place[6])
    token, head = offs // H, offs % H
    rows = (seq * max_q + token).to(gl.int64) * stride_qt + head * stride_qh
    _copy(Q, rows, token < max_q, FIRST, SIZE, LAYOUT, to)


@gluon.jit
def _scores(stage, q_left, q_right, q_rest, left, right, rest):
    """Products of queries and keys of a tile, on their way: three groups."""
    sums = gl.zeros([BM, BN], gl.float32, SCORES)
    sums = warpgroup_mma(q_left, left.index(stage).permute((1, 0)), sums, use_acc=False,
                         is_async=True)  # fmt: skip
    sums = warpgroup_mma(q_right, right.index(stage).permute((1, 0)), sums, is_async=True)
    return warpgroup_mma(q_rest, rest.index(stage).permute((1, 0)), sums, is_async=True)


@gluon.jit
def _weigh(scores, top, total, scale, start, clear_to, seen_to, turn, shared, RESTS: gl.constexpr):
    """Online softmax of a tile, base 2, handed to the other warpgroup; row r sees < seen_to[r].

    Returns what to multiply earlier sums with, and the new top and total.
    """
    weights_at, fade_at, made, used = shared
    scores = scores * scale
    if start + BN > clear_to:
        pos = start + gl.arange(0, BN, gl.SliceLayout(0, SCORES))
        scores = gl.where(pos[None, :] < seen_to[:, None], scores, float("-inf"))
    new_top = gl.maximum(top, gl.max(scores, 1))
    weights = gl.exp2(scores - new_top[:, None])
    fade = gl.exp2(top - new_top)
    mbarrier.wait(used, (turn & 1) ^ 1)
    rounded = weights.to(weights_at.dtype)
    if RESTS:
        first = gl.arange(0, BM, gl.SliceLayout(1, SCORES)) % 16 < 8
        rest = (weights - rounded.to(gl.float32)).to(weights_at.dtype)
        rounded = gl.where(first[:, None], rounded, rest)
    weights_at.store(rounded)
    fade_at.store(fade)
    fence_async_shared()
    gl.thread_barrier()
    mbarrier.arrive(made)
    total = total * fade + gl.sum(weights, 1)
    return gl.convert_layout(fade, gl.SliceLayout(1, SUMS))[:, None], new_top, total


@gluon.jit
def _left_half(
    Q, OUT, LSE, PARTIAL, STATE, COUNT, place, lo, hi, tiles, scale, right_of, length,
    stride_qt, stride_qh, queries, latents, shared,
    H: gl.constexpr, SPLITS: gl.constexpr, PAIR: gl.constexpr,
):  # fmt: skip
    """The first warpgroup's part: scores, weights, and columns 0 .. 256 of the output."""
    q_left, q_right, q_rest = queries
    left, right, rest, full, empty = latents
    weights_at, fade_at, their_at, made, used = shared
    handed = (weights_at, fade_at, made, used)
    first_row, max_q, rests = place[1], place[2], place[6]
    _load_queries(Q, place, stride_qt, stride_qh, H, WIDE, 0, HALF, q_left)
    _load_queries(Q, place, stride_qt, stride_qh, H, WIDE, HALF, HALF, q_right)
    _load_queries(Q, place, stride_qt, stride_qh, H, NARROW, 2 * HALF, REST, q_rest)
    async_copy.commit_group()
    async_copy.wait_group(0)
    fence_async_shared()
    gl.thread_barrier()

    offs = first_row + query_of(gl.arange(0, BM, gl.SliceLayout(1, SCORES)), rests)
    token = offs // H
    seen_to = gl.minimum(length - max_q + token + right_of + 1, hi)
    clear_to = gl.minimum(hi, length - max_q + first_row // H + right_of + 1)
    top = gl.full([BM], EMPTY, gl.float32, gl.SliceLayout(1, SCORES))
    total = gl.zeros([BM], gl.float32, gl.SliceLayout(1, SCORES))
    acc = gl.zeros([BM, HALF], gl.float32, SUMS)

    mbarrier.wait(full.index(0), 0)
    fence_async_shared()
    scores = warpgroup_mma_wait(0, [_scores(0, q_left, q_right, q_rest, left, right, rest)])
    for i in range(tiles - 1):
        stage, ahead = i % STAGES, (i + 1) % STAGES
        fade, top, total = _weigh(
            scores, top, total, scale, lo + i * BN, clear_to, seen_to, i, handed, rests
        )
        going = warpgroup_mma(weights_at, left.index(stage), acc * fade, is_async=True)
        mbarrier.wait(full.index(ahead), (i + 1) // STAGES & 1)
        fence_async_shared()
        coming = _scores(ahead, q_left, q_right, q_rest, left, right, rest)
        acc, coming = warpgroup_mma_wait(3, [going, coming])
        gl.thread_barrier()
        mbarrier.arrive(empty.index(stage))
        scores = warpgroup_mma_wait(0, [coming])
    last = tiles - 1
    fade, top, total = _weigh(
        scores, top, total, scale, lo + last * BN, clear_to, seen_to, last, handed, rests
    )
    going = warpgroup_mma(weights_at, left.index(last % STAGES), acc * fade, is_async=True)
    count = 0
    if PAIR:  # which of both splits leaves its sums to the other is settled meanwhile
        count = gl.atomic_add(COUNT, 1, sem="acq_rel", scope="gpu")
    acc = warpgroup_mma_wait(0, [going])
    mbarrier.wait(used, last & 1)
    finish_left(acc, count, top, total, place, OUT, LSE, PARTIAL, STATE, COUNT,
                (fade_at, their_at, made), H, SPLITS, PAIR)  # fmt: skip


@gluon.jit
def _right_half(
    OUT, PARTIAL, STATE, COUNT, place, tiles, latents, shared,
    H: gl.constexpr, SPLITS: gl.constexpr, PAIR: gl.constexpr,
):  # fmt: skip
    """The second warpgroup's part: columns 256 .. 512 of the output, from the weights."""
    right, full, empty = latents
    weights_at, fade_at, their_at, made, used = shared
    acc = gl.zeros([BM, HALF], gl.float32, SUMS)
    for i in range(tiles):
        stage = i % STAGES
        mbarrier.wait(full.index(stage), i // STAGES & 1)
        mbarrier.wait(made, i & 1)
        fence_async_shared()
        acc = acc * fade_at.load(gl.SliceLayout(1, SUMS))[:, None]
        acc = warpgroup_mma(weights_at, right.index(stage), acc, is_async=True)
        acc = warpgroup_mma_wait(0, [acc])
        gl.thread_barrier()
        mbarrier.arrive(used)
        mbarrier.arrive(empty.index(stage))
    mbarrier.wait(made, tiles & 1)
    finish_right(acc, place, OUT, PARTIAL, STATE, COUNT, (fade_at, their_at, made), H, SPLITS, PAIR)


@gluon.jit(do_not_specialize=["max_q", "stride_table"])
def mla_wide_kernel(
    Q, KV: gl.int64, TABLE, LENS, PARTIAL, STATE, FINISHED, OUT, LSE,
    scale, right, max_q, stride_table,
    stride_qt, stride_qh, stride_ot, stride_oh, stride_block, stride_slot,
    H: gl.constexpr, SPLITS: gl.constexpr, PAIR: gl.constexpr, BLOCK_SIZE: gl.constexpr,
    RESTS: gl.constexpr, ALIGN: gl.constexpr,
):  # fmt: skip
    """64 rows (token, head) of one sequence over one split of its keys, as ``mla_kernel`` has it.

    Rows of latents are 576 elements of 16 bits, their values the first 512. Four warps.
    """
    wait_for_launch_in_front()
    item, split = gl.program_id(0), gl.program_id(1)
    per_seq = gl.cdiv(max_q * H, BM)
    seq, first_row = item // per_seq, item % per_seq * BM
    length = gl.load(LENS + seq)
    last_place = length - max_q + gl.minimum((first_row + BM - 1) // H, max_q - 1)
    end = gl.maximum(gl.minimum(length, last_place + right + 1), 0)
    share = gl.cdiv(gl.cdiv(end, SPLITS), BN) * BN
    lo = split * share
    hi = gl.minimum(lo + share, end)
    tiles = gl.maximum(gl.cdiv(hi - lo, BN), 1)  # one without any key is simpler than none

    element: gl.constexpr = Q.dtype.element_ty
    BASE = gl.multiple_of(KV.to(gl.pointer_type(element)), ALIGN)
    half: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    q_left = gl.allocate_shared_memory(element, [BM, HALF], half)
    q_right = gl.allocate_shared_memory(element, [BM, HALF], half)
    q_rest = gl.allocate_shared_memory(element, [BM, REST], half)
    left_at = gl.allocate_shared_memory(element, [STAGES, BN, HALF], half)
    right_at = gl.allocate_shared_memory(element, [STAGES, BN, HALF], half)
    rest_at = gl.allocate_shared_memory(element, [STAGES, BN, REST], half)
    weights_at = gl.allocate_shared_memory(element, [BM, BN], half)
    fade_at = gl.allocate_shared_memory(gl.float32, [BM], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    their_at = gl.allocate_shared_memory(gl.float32, [BM], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    made = gl.allocate_shared_memory(gl.int64, [1], barrier)
    used = gl.allocate_shared_memory(gl.int64, [1], barrier)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=128)
        mbarrier.init(empty.index(stage), count=2)
    mbarrier.init(made, count=1)
    mbarrier.init(used, count=1)
    fence_async_shared()
    gl.thread_barrier()

    place = (seq, first_row, max_q, split, stride_ot, stride_oh, RESTS)
    queries = (q_left, q_right, q_rest)
    latents = (left_at, right_at, rest_at, full, empty)
    shared = (weights_at, fade_at, their_at, made, used)
    count = FINISHED + item
    table = TABLE + seq.to(gl.int64) * stride_table
    gl.warp_specialize(
        [
            (_left_half, (Q, OUT, LSE, PARTIAL, STATE, count, place, lo, hi, tiles, scale, right,
                          length, stride_qt, stride_qh, queries, latents, shared, H, SPLITS, PAIR)),
            (_right_half, (OUT, PARTIAL, STATE, count, place, tiles, (right_at, full, empty),
                           shared, H, SPLITS, PAIR)),
            (_load_latents, (BASE, table, lo, hi, tiles, (stride_block, stride_slot), latents,
                             BLOCK_SIZE)),
        ],
        [4, 4], [168, 96],
    )  # fmt: skip
