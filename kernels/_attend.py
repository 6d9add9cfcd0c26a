"""Attention over a paged cache on CPU: the compiled part. ``cpu.py`` prepares the ``TASK``.

A work item is (sequence, KV head, tile of query tokens). All query heads of the KV head share the
widened K and V tiles. The softmax is the online one of FlashAttention (Dao et al. 2022) in base 2.
Items are taken from a shared counter, so any number of threads may run the same task.

Only rows that some query token of the item sees are read: with a window, those before it are not.
"""

from __future__ import annotations

import math

import numpy as np
from numba import carray, cfunc, from_dtype, njit, types

from kvcached.kernels._simd import (
    LANES,
    add_1,
    add_4,
    dot_1x8,
    dot_4x2,
    fetch_add,
    narrow,
    pointer,
    row_exp2,
    row_max,
    widen,
)

KV_TILE = 64
"""Cache rows that are widened at a time."""
Q_TILE_ROWS = 64
"""Query rows (tokens x heads of one KV head) of an item; more if one token has more heads."""
E4M3, E5M2, INT8, INT4 = range(4)
"""What a quantised cache stores, in ``TASK.stored``."""
LOG2_E = math.log2(math.e)
LN_2 = math.log(2)

_ADDRESSES = (
    "counter", "q", "k", "v", "out", "lse", "table", "starts", "lens", "q_starts",
    "item_seq", "item_token", "sinks", "slopes", "masks", "k_scale", "v_scale",
)  # fmt: skip
_INTEGERS = (
    "items", "kv_heads", "group", "dim", "dim_v", "block_size", "item_tokens", "left", "right",
    "q_token", "q_head", "out_token", "out_head", "table_row",
    "k_block", "k_slot", "k_head", "v_block", "v_slot", "v_head",
    "k_scale_block", "k_scale_slot", "k_scale_head",
    "v_scale_block", "v_scale_slot", "v_scale_head", "stored",
)  # fmt: skip
TASK = np.dtype(
    [(name, np.int64) for name in _ADDRESSES + _INTEGERS]
    + [(name, np.float64) for name in ("scale", "softcap")]
)
"""One call. Addresses are bytes (0: absent); strides are elements of the dtype."""


@njit
def _padded(count, step):
    return (count + step - 1) // step * step


@njit
def _int32(address, index):
    return np.int64(carray(pointer(address, np.int32(0)), index + 1)[index])


@njit
def _int64(address, index):
    return carray(pointer(address, np.int64(0)), index + 1)[index]


@njit
def _float32(address, index):
    return carray(pointer(address, np.float32(0)), index + 1)[index]


@njit
def _block_of(task, seq, pos):
    """(block, offset in it) of position ``pos`` of sequence ``seq``."""
    if task.table != 0:
        block = _int32(task.table, seq * task.table_row + pos // task.block_size)
        return block, pos % task.block_size
    slot = _int32(task.starts, seq) + pos
    return slot // task.block_size, slot % task.block_size


@njit
def _load_row(row, address, dim, like):
    source = carray(pointer(address, like), dim)
    for d in range(dim):
        row[d] = widen(source[d])


@njit
def load_stored(row, address, dim, kind, scale):
    """Widen a quantised row; ``kind`` is ``task.stored``. Loops of one kind become vectors.

    float8_e5m2 is the upper half of a float16. float8_e4m3fn has a bit of exponent less, and no
    infinities: moved into a float16 it lacks a factor of 2**8, and its NaN is a number.
    """
    half = dim // 2
    source = carray(pointer(address, np.uint8(0)), half if kind == INT4 else dim)
    if kind == INT4:
        for d in range(half):
            row[d] = (np.int32(source[d] & 15) - 8) * scale
            row[half + d] = (np.int32(source[d] >> 4) - 8) * scale
    elif kind == INT8:
        for d in range(dim):
            row[d] = np.int8(source[d]) * scale
    elif kind == E5M2:
        for d in range(dim):
            row[d] = widen(np.int16(np.int32(source[d]) << 8)) * scale
    else:
        for d in range(dim):
            byte = np.int32(source[d])
            number = widen(np.int16((byte & 128) << 8 | (byte & 127) << 7)) * np.float32(256)
            row[d] = np.float32(np.nan) if byte & 127 == 127 else number * scale


@njit
def _load_tile(
    tile, task, seq, first, count, base, strides, dim, like, itemsize, scales, stored
):  # fmt: skip
    """Widen rows ``first .. first + count`` to ``tile``; zero the rows up to whole vectors."""
    block_stride, slot_stride, column = strides
    done = 0
    while done < count:
        block, offset = _block_of(task, seq, first + done)
        run = min(task.block_size - offset, count - done)
        at = base + (block * block_stride + offset * slot_stride + column) * itemsize
        scale_base, scale_block, scale_slot, scale_column = scales
        for slot in range(offset, offset + run):
            if stored is None:  # known to the compiler
                _load_row(tile[done], at, dim, like)
            else:
                place = block * scale_block + slot * scale_slot + scale_column
                load_stored(tile[done], at, dim, task.stored, _float32(scale_base + 4 * place, 0))
            at += slot_stride * itemsize
            done += 1
    tile[count : _padded(count, LANES)] = 0  # 0 x a stale NaN would be NaN


@njit
def _load_queries(tile, task, first_row, head, tokens, scale, like, itemsize):
    group = task.group
    for r in range(tokens * group):
        token, query = first_row + r // group, head * group + r % group
        at = task.q + (token * task.q_token + query * task.q_head) * itemsize
        _load_row(tile[r], at, task.dim, like)
        for d in range(task.dim):
            tile[r, d] *= scale
    tile[tokens * group : _padded(tokens * group, 4)] = 0


@njit
def _dot(q, k, scores, rows, columns, zero):
    """Scores = q @ k.T for whole vectors of columns; the depth is the padded head dim."""
    depth, width = q.shape[1], scores.shape[1]
    qa, ka, sa, size = q.ctypes.data, k.ctypes.data, scores.ctypes.data, scores.itemsize
    if rows == 1:
        for j in range(0, columns, LANES):
            at = ka + j * depth * size
            dot_1x8(zero, qa, depth, at, depth, depth, sa + j * size, width)
        return
    for i in range(0, rows, 4):
        for j in range(0, columns, 2):
            at = sa + (i * width + j) * size
            dot_4x2(
                zero, qa + i * depth * size, depth, ka + j * depth * size, depth, depth, at, width
            )


@njit
def _add(scores, v, acc, rows, columns, zero):
    """Add scores @ v to acc."""
    dim, width = acc.shape[1], scores.shape[1]
    sa, va, oa, size = scores.ctypes.data, v.ctypes.data, acc.ctypes.data, acc.itemsize
    step = 1 if rows == 1 else 4
    for d in range(0, dim, 2 * LANES):
        for i in range(0, rows, step):
            p, o = sa + i * width * size, oa + (i * dim + d) * size
            if rows == 1:
                add_1(zero, p, width, va + d * size, dim, columns, o, dim)
            else:
                add_4(zero, p, width, va + d * size, dim, columns, o, dim)


@njit
def _bias_row(row, task, head, lo, hi, first, pos, zero):
    """Soft cap and ALiBi on scores ``lo .. hi`` of one row; these come in natural units."""
    like = type(zero)
    if task.softcap > 0:
        cap = task.softcap
        for j in range(lo, hi):
            row[j] = like(cap * math.tanh(row[j] / cap) * LOG2_E)
    if task.slopes != 0:
        slope = _float32(task.slopes, head) * LOG2_E
        for j in range(lo, hi):
            row[j] -= like(slope * abs(pos - first - j))


@njit
def _hide(row, mask, lo, hi, drafts):
    """Hide the scores ``lo .. hi`` of the query tokens that ``mask`` leaves out.

    Column ``drafts`` is that of the sequence's first query token; those before it stay.
    """
    for j in range(max(lo, drafts), hi):
        if (mask >> (j - drafts)) & 1 == 0:
            row[j] = -np.inf


@njit
def _softmax_row(row, acc, top, total, lo, hi, columns, zero):
    """Online softmax step; returns the row's new (top, total). ``row`` becomes the weights."""
    row[:lo] = -np.inf
    row[hi:columns] = -np.inf
    at = row.ctypes.data
    new_top = max(top, row_max(zero, at, columns))
    if new_top == -np.inf:  # nothing seen yet
        row[:columns] = 0
        return top, total
    added = row_exp2(zero, at, columns, new_top)
    if new_top > top:
        fade = type(zero)(2.0 ** (top - new_top))
        total *= fade
        for d in range(acc.size):
            acc[d] *= fade
    return new_top, total + added


@njit
def _softmax(scores, acc, top, total, task, head, first, count, pos, tokens, length, tree, zero):
    """Mask, bias and normalise a tile of scores; ``pos`` is the first query's position.

    ``tree``: the index of the first query's mask, and the position of its sequence's first query.
    """
    columns = _padded(count, LANES)
    for r in range(tokens * task.group):
        here = pos + r // task.group
        hi = max(0, min(length, here + task.right + 1) - first)
        lo = max(0, here - task.left - first)
        lo, hi = min(lo, count), min(hi, count)
        row = scores[r]
        if task.softcap > 0 or task.slopes != 0:
            _bias_row(row, task, head * task.group + r % task.group, lo, hi, first, here, zero)
        if task.masks != 0:
            _hide(row, _int64(task.masks, tree[0] + r // task.group), lo, hi, tree[1] - first)
        state = _softmax_row(row, acc[r], top[r], total[r], lo, max(lo, hi), columns, zero)
        top[r], total[r] = state
    for r in range(tokens * task.group, _padded(tokens * task.group, 4)):
        scores[r, :columns] = 0


@njit
def _write(acc, top, total, task, first_row, head, tokens, like, itemsize, zero):
    group = task.group
    for r in range(tokens * group):
        token, query = first_row + r // group, head * group + r % group
        weight = total[r]
        if task.sinks != 0 and weight > 0:  # in the denominator only, not in the LSE
            weight += type(zero)(2.0 ** (_float32(task.sinks, query) * LOG2_E - top[r]))
        at = task.out + (token * task.out_token + query * task.out_head) * itemsize
        out = carray(pointer(at, like), task.dim_v)
        seen = total[r] != 0
        for d in range(task.dim_v):
            out[d] = narrow(acc[r, d] / weight if seen else zero, like)
        lse = carray(pointer(task.lse, np.float32(0)), (token + 1) * task.kv_heads * group)
        value = (top[r] + math.log2(total[r])) * LN_2 if seen else -np.inf
        lse[token * task.kv_heads * group + query] = np.float32(value)


@njit
def _attend(task, item, head, scratch, like, itemsize, zero, stored, kv_itemsize):
    q, k, v, scores, acc, top, total = scratch
    seq = _int32(task.item_seq, item)
    token = _int32(task.item_token, item)
    start = _int32(task.q_starts, seq)
    queries = _int32(task.q_starts, seq + 1) - start
    tokens = min(task.item_tokens, queries - token)
    length = _int32(task.lens, seq)
    pos = length - queries + token  # causal is aligned bottom-right
    rows = tokens * task.group
    top[:rows], total[:rows], acc[:rows] = -np.inf, 0, 0
    scale = type(zero)(task.scale if task.softcap > 0 else task.scale * LOG2_E)
    _load_queries(q, task, start + token, head, tokens, scale, like, itemsize)
    first = max(0, pos - task.left)
    end = min(length, pos + tokens + task.right)
    k_strides = (task.k_block, task.k_slot, head * task.k_head)
    v_strides = (task.v_block, task.v_slot, head * task.v_head)
    k_scales = (task.k_scale, task.k_scale_block, task.k_scale_slot, head * task.k_scale_head)
    v_scales = (task.v_scale, task.v_scale_block, task.v_scale_slot, head * task.v_scale_head)
    while first < end:
        count = min(KV_TILE, end - first)
        _load_tile(k, task, seq, first, count, task.k, k_strides, task.dim, like, kv_itemsize,
                   k_scales, stored)  # fmt: skip
        _dot(q, k, scores, rows, _padded(count, LANES), zero)
        _softmax(scores, acc, top, total, task, head, first, count, pos, tokens, length,
                 (start + token, pos - token), zero)  # fmt: skip
        _load_tile(v, task, seq, first, count, task.v, v_strides, task.dim_v, like, kv_itemsize,
                   v_scales, stored)  # fmt: skip
        _add(scores, v, acc, rows, count, zero)
        first += count
    _write(acc, top, total, task, start + token, head, tokens, like, itemsize, zero)


@njit
def _scratch(task, kind):
    rows = _padded(task.item_tokens * task.group, 4)
    dim, dim_v = _padded(task.dim, 2 * LANES), _padded(task.dim_v, 2 * LANES)
    return (
        np.zeros((rows, dim), kind),
        np.zeros((KV_TILE, dim), kind),
        np.zeros((KV_TILE, dim_v), kind),
        np.zeros((rows, KV_TILE), kind),
        np.zeros((rows, dim_v), kind),
        np.zeros(rows, kind),
        np.zeros(rows, kind),
    )


def attention_worker(storage, quantised):
    """The C function (TASK*) -> void for queries of a storage type; compiled once, cached on disk.

    Keys and values are of the same type, or quantised: bytes with scales.

    It takes items until none is left; threads that share the task share its counter.
    """
    like = storage(0)
    kind = np.float64 if storage is np.float64 else np.float32
    zero = kind(0)
    itemsize = np.dtype(storage).itemsize
    stored, kv_itemsize = (np.uint8(0), 1) if quantised else (None, itemsize)

    @cfunc(types.void(types.CPointer(from_dtype(TASK))), cache=True)
    def work(tasks):
        task = carray(tasks, 1)[0]
        scratch = _scratch(task, kind)
        while True:
            index = fetch_add(task.counter)
            if index >= task.items:
                break
            item, head = index // task.kv_heads, index % task.kv_heads
            _attend(task, item, head, scratch, like, itemsize, zero, stored, kv_itemsize)

    return work
