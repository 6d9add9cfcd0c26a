"""Compiled loops over the blocks of an extent, and slot arithmetic. Arrays as in ``_hot.py``.

These run when what is backed changes, not when blocks are taken; only ``slots`` runs at every
``extend``.
"""

from __future__ import annotations

from kvcached._hot import (
    _ARRAYS,
    _BLK,
    _EXT,
    _I,
    _META,
    _V,
    _VEC,
    CACHED,
    FREE,
    KEEP,
    M_BB,
    M_FREE,
    M_LRU_OLD,
    M_PB,
    M_SPARE,
    M_USED,
    NEXT,
    PREV,
    QUARANTINED,
    REFS,
    STAMP,
    STATE,
    UNBACKED,
    USED,
    X_BLOCKS,
    X_CACHED,
    X_FIRST,
    X_FREE,
    X_HEAD,
    X_LEVEL,
    X_PAGES,
    X_QUARANTINED,
    X_USED,
    _claims,
    _drop_free,
    _is_backed,
    _jit,
    _level_remove,
    _link_free,
    _push_free,
    _relevel,
    alloc,
    span,
)  # fmt: skip


@_jit(_I(_BLK, _META))
def touched_pages(blk, meta):
    """How many pages have a byte of a block in use or in quarantine, in address order each once."""
    bb, pb = meta[M_BB], meta[M_PB]
    count, end = 0, 0
    for b in range(blk.shape[0]):
        if blk[b, STATE] == USED or blk[b, STATE] == QUARANTINED:
            low = max(end, b * bb // pb)
            end = (b * bb + bb - 1) // pb + 1
            count += max(0, end - low)
    return count


@_jit(_V(_VEC, _EXT))
def spare(out, ext):
    """Write the ids of the extents without any claim into ``out``, as many as there are."""
    n = 0
    for e in range(1, ext.shape[0]):
        if ext[e, X_PAGES] > 0 and _claims(e, ext) == 0 and n < out.shape[0]:
            out[n] = e
            n += 1


@_jit(_I(_I, _VEC, _BLK, _EXT, _META))
def live_runs(e, out, blk, ext, meta):
    """Runs of pages of extent ``e`` under blocks in use or in quarantine, as (first, count) pairs.

    Returns the number of pairs; ``out`` must hold ``2 * pages``.
    """
    bb, pb = meta[M_BB], meta[M_PB]
    start, stop = ext[e, X_FIRST], ext[e, X_FIRST] + ext[e, X_PAGES]
    n, run_first, run_end = 0, -1, -1
    first, end = span(e, blk, ext, meta)
    for b in range(first, end):
        if blk[b, STATE] != USED and blk[b, STATE] != QUARANTINED:
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


@_jit(_V(_I, _I, _I, *_ARRAYS))
def attach(e, first_page, num_pages, blk, page, ext, meta):
    """Back pages by extent ``e``: count the claims on it, make newly complete blocks free."""
    for row in range(ext.shape[1]):
        ext[e, row] = 0
    ext[e, X_FIRST], ext[e, X_PAGES] = first_page, num_pages
    for p in range(first_page, first_page + num_pages):
        page[p] = e
    first, end = span(e, blk, ext, meta)
    ext[e, X_BLOCKS] = max(1, end - first)
    for b in range(first, end):
        if blk[b, STATE] >= USED:
            ext[e, blk[b, STATE]] += 1  # the counters are numbered like the states
    if ext[e, X_USED] + ext[e, X_CACHED] + ext[e, X_QUARANTINED] == 0:
        meta[M_SPARE] += 1
    bb, low, high = meta[M_BB], first_page * meta[M_PB], (first_page + num_pages) * meta[M_PB]
    for b in range(end - 1, first - 1, -1):  # pushed last, taken first: low ids first
        if b == 0 or blk[b, STATE] != UNBACKED:
            continue
        if b * bb >= low and (b + 1) * bb <= high:
            _link_free(b, e, blk, ext, meta)
        elif _is_backed(b, page, meta):
            _push_free(b, blk, page, ext, meta)
    _relevel(e, ext, meta)


@_jit(_I(_I, _I, _I, *_ARRAYS))
def attach_used(e, first_page, num_pages, blk, page, ext, meta):
    """``attach`` of an extent that is one block, and ``alloc`` of that: its id."""
    b = first_page * meta[M_PB] // meta[M_BB]
    for row in range(ext.shape[1]):
        ext[e, row] = 0
    ext[e, X_FIRST], ext[e, X_PAGES] = first_page, num_pages
    ext[e, X_BLOCKS] = ext[e, X_USED] = 1
    for p in range(first_page, first_page + num_pages):
        page[p] = e
    blk[b, NEXT], blk[b, PREV] = 0, 0
    blk[b, STATE], blk[b, REFS], blk[b, KEEP], blk[b, STAMP] = USED, 1, 0, 0
    meta[M_USED] += 1
    return b


@_jit(_I(_VEC, _I, _I, _I, *_ARRAYS))
def attach_and_alloc(out, e, first_page, num_pages, blk, page, ext, meta):
    """``attach``, then ``alloc``: what growth by one extent does, in one call from Python."""
    attach(e, first_page, num_pages, blk, page, ext, meta)
    return alloc(out, blk, page, ext, meta)


@_jit(_V(_I, *_ARRAYS))
def detach(e, blk, page, ext, meta):
    """Take extent ``e`` away: its pages are backed no more, free blocks on them cannot be used.

    Blocks in use, cached or quarantined keep their state: a split re-attaches their pages.
    """
    first_page, num_pages = ext[e, X_FIRST], ext[e, X_PAGES]
    first, end = span(e, blk, ext, meta)
    low = first_page * meta[M_PB]
    for b in range(first, end):
        if blk[b, STATE] == FREE:
            if b * meta[M_BB] < low:  # at home in the extent before; the others' list goes whole
                _drop_free(b, blk, page, ext, meta)
            blk[b, STATE] = UNBACKED
    meta[M_FREE] -= ext[e, X_FREE]
    ext[e, X_FREE] = ext[e, X_HEAD] = 0
    if ext[e, X_USED] + ext[e, X_CACHED] + ext[e, X_QUARANTINED] == 0:
        meta[M_SPARE] -= 1
    if ext[e, X_LEVEL]:
        _level_remove(e, ext, meta)
    for p in range(first_page, first_page + num_pages):
        page[p] = 0
    ext[e, X_PAGES] = 0
