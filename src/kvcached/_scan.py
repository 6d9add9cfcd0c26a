"""Compiled scans over the blocks of an extent, and slot arithmetic. Arrays as in ``_hot.py``.

These run when memory is given back, not when blocks are taken; ``slots`` runs at every ``extend``.
"""

from __future__ import annotations

from kvcached._hot import (
    _BLK,
    _EXT,
    _I,
    _META,
    _V,
    _VEC,
    CACHED,
    M_BB,
    M_LRU_OLD,
    M_PB,
    NEXT,
    STATE,
    USED,
    X_FIRST,
    X_PAGES,
    _jit,
    span,
)  # fmt: skip


@_jit(_I(_I, _VEC, _BLK, _EXT, _META))
def live_runs(e, out, blk, ext, meta):
    """Runs of pages of extent ``e`` under blocks that are not free, as (first, count) pairs.

    Returns the number of pairs; ``out`` must hold ``2 * pages``.
    """
    bb, pb = meta[M_BB], meta[M_PB]
    start, stop = ext[e, X_FIRST], ext[e, X_FIRST] + ext[e, X_PAGES]
    n, run_first, run_end = 0, -1, -1
    first, end = span(e, blk, ext, meta)
    for b in range(first, end):
        if blk[b, STATE] < USED:
            continue
        lo = max(start, (b * bb) // pb)
        hi = min(stop, ((b + 1) * bb - 1) // pb + 1)
        if lo <= run_end:
            run_end = max(run_end, hi)
            continue
        if run_first >= 0:
            out[2 * n], out[2 * n + 1] = run_first, run_end - run_first
            n += 1
        run_first, run_end = lo, hi
    if run_first >= 0:
        out[2 * n], out[2 * n + 1] = run_first, run_end - run_first
        n += 1
    return n


@_jit(_I(_I, _VEC, _BLK, _EXT, _META))
def cached_in(e, out, blk, ext, meta):
    """Write the cached blocks that touch extent ``e`` into ``out``; returns how many."""
    n = 0
    first, end = span(e, blk, ext, meta)
    for b in range(first, end):
        if blk[b, STATE] == CACHED:
            out[n] = b
            n += 1
    return n


@_jit(_I(_VEC, _BLK, _META))
def oldest(out, blk, meta):
    """Write the least recently used cached blocks into ``out``; returns how many there are."""
    b = meta[M_LRU_OLD]
    n = 0
    while b and n < out.shape[0]:
        out[n] = b
        n += 1
        b = blk[b, NEXT]
    return n


@_jit(_V(_VEC, _BLK, _VEC, _EXT, _META))
def last_use(out, blk, page, ext, meta):
    """Into ``out[extent]``: the place in LRU order of the newest cached block that touches it."""
    b, place = meta[M_LRU_OLD], 0
    while b:
        p = (b * meta[M_BB]) // meta[M_PB]
        last = ((b + 1) * meta[M_BB] - 1) // meta[M_PB]
        while p <= last:
            e = page[p]
            out[e] = place
            p = ext[e, X_FIRST] + ext[e, X_PAGES]
        b, place = blk[b, NEXT], place + 1


@_jit(_V(_VEC, _I, _I, _VEC))
def slots(table, first, block_size, out):
    """Slots of tokens ``first .. first + len(out)`` of the sequence with this block table."""
    for i in range(out.shape[0]):
        position = first + i
        out[i] = table[position // block_size] * block_size + position % block_size
