"""The hot loops of the block pool: ``@njit`` functions over plain integer arrays.

Eager signatures, cached on disk, imported at the first hot call. The tests run them in Python too.

Arrays (see ``BlockPool`` for who owns them):

``blk[num_blocks, 8]`` int32, half a cache line a block: ``NEXT``/``PREV`` link a free block into
    the list of its *home* extent (that of its first page), and a cached block into the LRU list; 0
    ends a list, since block 0 is never in one. ``STAMP``: time of last use of a cached block; of a
    block in use or quarantined the number of the newest fence that it waits for, or 0.
``page[num_pages]`` int32: id of the extent that backs a page, 0 if none.
``ext[capacity, 16]`` int32: ``X_*``; extent ids start at 1. ``meta`` int64: ``M_*``.

Free blocks are taken from the fullest extents first, so that the others run empty and can be
unmapped: extents with free blocks are linked by level of fullness (segregated fit).
"""

from __future__ import annotations

import numba as nb

from kvcached._compile import compiled

UNBACKED, FREE, USED, CACHED, QUARANTINED = 0, 1, 2, 3, 4
STATE, REFS, NEXT, PREV, KEEP, STAMP = 0, 1, 2, 3, 4, 5
X_FIRST, X_PAGES, X_USED, X_CACHED, X_QUARANTINED, X_FREE = 0, 1, USED, CACHED, QUARANTINED, 5
X_HEAD, X_LEVEL, X_NEXT, X_PREV, X_BLOCKS = 6, 7, 8, 9, 10
M_FREE, M_USED, M_CACHED, M_QUARANTINED, M_LRU_OLD, M_LRU_NEW, M_BB, M_PB = 0, 1, 2, 3, 4, 5, 6, 7
M_SPARE = 8  # extents without any claim on them
LEVELS, M_LEVEL = 16, 16  # meta[M_LEVEL + level]: first extent of the level
META_SIZE, BLK_WIDTH, EXT_WIDTH, OK, SHORT = M_LEVEL + LEVELS + 1, 8, 16, 0, -1

_BLK, _EXT, _VEC, _META = nb.int32[:, ::1], nb.int32[:, ::1], nb.int32[::1], nb.int64[::1]
_ARRAYS = (_BLK, _VEC, _EXT, _META)
_I, _V, _jit = nb.int64, nb.void, compiled


@_jit(_V(_I, _EXT, _META))
def _level_remove(e, ext, meta):
    level = ext[e, X_LEVEL]
    nxt, prv = ext[e, X_NEXT], ext[e, X_PREV]
    if prv:
        ext[prv, X_NEXT] = nxt
    else:
        meta[M_LEVEL + level] = nxt
    if nxt:
        ext[nxt, X_PREV] = prv
    ext[e, X_LEVEL] = 0


@_jit(_V(_I, _EXT, _META))
def _relevel(e, ext, meta):
    """Put extent ``e`` on the list of its fullness; off all lists if it has no free block."""
    live = ext[e, X_USED] + ext[e, X_QUARANTINED]
    level = 0
    if ext[e, X_FREE] > 0:
        level = 1
        if live > 0:
            level = min(LEVELS, 3 + (live * (LEVELS - 3)) // ext[e, X_BLOCKS])
        elif ext[e, X_CACHED] > 0:
            level = 2
    old = ext[e, X_LEVEL]
    if level == old:
        return
    if old:
        _level_remove(e, ext, meta)
    if level:
        head = meta[M_LEVEL + level]
        ext[e, X_LEVEL], ext[e, X_NEXT], ext[e, X_PREV] = level, head, 0
        if head:
            ext[head, X_PREV] = e
        meta[M_LEVEL + level] = e


@_jit(_I(_I, _EXT))
def _claims(e, ext):
    return ext[e, X_USED] + ext[e, X_CACHED] + ext[e, X_QUARANTINED]


@_jit(_V(_I, _I, _EXT, _META))
def _settle(e, claims_before, ext, meta):
    """Note whether extent ``e`` is spare, and how full, after its counters changed."""
    meta[M_SPARE] += int(_claims(e, ext) == 0) - int(claims_before == 0)
    _relevel(e, ext, meta)


@_jit(_V(_I, _I, _I, _I, _VEC, _EXT, _META))
def _count_from(p, b, row, delta, page, ext, meta):
    """Add ``delta`` to counter ``row`` of the extents that block ``b`` touches from page ``p``."""
    last = ((b + 1) * meta[M_BB] - 1) // meta[M_PB]
    while p <= last:
        e = page[p]
        before = _claims(e, ext)
        ext[e, row] += delta
        _settle(e, before, ext, meta)
        p = ext[e, X_FIRST] + ext[e, X_PAGES]


@_jit(_V(_I, _I, _I, *_ARRAYS))
def _count(b, row, delta, blk, page, ext, meta):
    """Add ``delta`` to counter ``row`` of every extent that block ``b`` touches."""
    _count_from((b * meta[M_BB]) // meta[M_PB], b, row, delta, page, ext, meta)


@_jit(_V(_I, _I, _BLK, _EXT, _META))
def _link_free(b, e, blk, ext, meta):
    """Make ``b`` the first free block of its home extent ``e``; the caller settles ``e``."""
    head = ext[e, X_HEAD]
    blk[b, STATE], blk[b, NEXT], blk[b, PREV] = FREE, head, 0
    if head:
        blk[head, PREV] = b
    ext[e, X_HEAD] = b
    ext[e, X_FREE] += 1
    meta[M_FREE] += 1


@_jit(_V(_I, *_ARRAYS))
def _push_free(b, blk, page, ext, meta):
    e = page[(b * meta[M_BB]) // meta[M_PB]]
    _link_free(b, e, blk, ext, meta)
    if ext[e, X_FREE] == 1:
        _relevel(e, ext, meta)


@_jit(_V(_I, *_ARRAYS))
def _drop_free(b, blk, page, ext, meta):
    """Unlink a free block from its home extent's list, wherever it stands."""
    e = page[(b * meta[M_BB]) // meta[M_PB]]
    nxt, prv = blk[b, NEXT], blk[b, PREV]
    if prv:
        blk[prv, NEXT] = nxt
    else:
        ext[e, X_HEAD] = nxt
    if nxt:
        blk[nxt, PREV] = prv
    ext[e, X_FREE] -= 1
    meta[M_FREE] -= 1
    if ext[e, X_FREE] == 0:
        _relevel(e, ext, meta)


@_jit(_V(_I, _I, _BLK, _META))
def _lru_push(b, stamp, blk, meta):
    newest = meta[M_LRU_NEW]
    blk[b, NEXT], blk[b, PREV], blk[b, STAMP] = 0, newest, stamp
    if newest:
        blk[newest, NEXT] = b
    else:
        meta[M_LRU_OLD] = b
    meta[M_LRU_NEW] = b


@_jit(_V(_I, _BLK, _META))
def _lru_remove(b, blk, meta):
    nxt, prv = blk[b, NEXT], blk[b, PREV]
    if prv:
        blk[prv, NEXT] = nxt
    else:
        meta[M_LRU_OLD] = nxt
    if nxt:
        blk[nxt, PREV] = prv
    else:
        meta[M_LRU_NEW] = prv


@_jit(_V(_I, _I, *_ARRAYS))
def _retire(b, stamp, blk, page, ext, meta):
    """A block without references: cached if a prefix names it, else free. Counters stay."""
    if blk[b, KEEP]:
        blk[b, STATE] = CACHED
        _lru_push(b, stamp, blk, meta)
        _count(b, X_CACHED, 1, blk, page, ext, meta)
        meta[M_CACHED] += 1
    else:
        _push_free(b, blk, page, ext, meta)


@_jit(_I(_VEC, *_ARRAYS))
def alloc(out, blk, page, ext, meta):
    """Fill ``out`` with free blocks, those of the fullest extents first, each with 1 reference.

    ``SHORT`` and no change if there are too few.
    """
    n = out.shape[0]
    if meta[M_FREE] < n:
        return SHORT
    got, level, bb, pb = 0, LEVELS, meta[M_BB], meta[M_PB]
    while got < n:
        e = meta[M_LEVEL + level]
        if e == 0:  # below the last level: a neighbour has risen past us, start over
            level = level - 1 if level > 1 else LEVELS
            continue
        before, first, end = _claims(e, ext), got, ext[e, X_FIRST] + ext[e, X_PAGES]
        b = ext[e, X_HEAD]
        while b and got < n:
            blk[b, STATE], blk[b, REFS], blk[b, KEEP], blk[b, STAMP] = USED, 1, 0, 0
            out[got] = b
            got += 1
            if (b + 1) * bb > end * pb:
                _count_from(end, b, X_USED, 1, page, ext, meta)
            b = blk[b, NEXT]
        ext[e, X_HEAD] = b
        if b:
            blk[b, PREV] = 0
        ext[e, X_FREE] -= got - first
        ext[e, X_USED] += got - first
        _settle(e, before, ext, meta)
        level = max(level, ext[e, X_LEVEL])
    meta[M_FREE] -= n
    meta[M_USED] += n
    return OK


@_jit(_I(_VEC, _BLK))
def share(ids, blk):
    """Add a reference to each block in use. Returns ``OK``, or ``~index`` of a bad id."""
    for i in range(ids.shape[0]):
        b = ids[i]
        if b <= 0 or b >= blk.shape[0] or blk[b, STATE] != USED:
            for j in range(i):
                blk[ids[j], REFS] -= 1
            return ~i
        blk[b, REFS] += 1
    return OK


@_jit(_I(_VEC, _BLK))
def _unshare(ids, blk):
    """Take a reference from each block. ``OK``, or ``~index`` of a bad id and no change."""
    for i in range(ids.shape[0]):
        b = ids[i]
        if b <= 0 or b >= blk.shape[0] or blk[b, STATE] != USED or blk[b, REFS] == 0:
            for j in range(i):
                blk[ids[j], REFS] += 1
            return ~i
        blk[b, REFS] -= 1
    return OK


@_jit(_V(_VEC, _I, _BLK))
def _stamp(ids, fence, blk):
    for i in range(ids.shape[0]):
        blk[ids[i], STAMP] = fence


@_jit(_V(_I, _I, _I, _I, _I, _EXT, _META))
def _end_of_extent(e, before, head, used, freed, ext, meta):
    """Write what ``free`` has counted for extent ``e``; ``before``: the claims on it till then."""
    ext[e, X_USED] -= used
    ext[e, X_FREE] += freed
    ext[e, X_HEAD] = head
    meta[M_FREE] += freed
    _settle(e, before, ext, meta)


@_jit(_I(_VEC, _I, _I, *_ARRAYS))
def free(ids, stamp, fence, blk, page, ext, meta):
    """Drop a reference of each block; what has none left becomes cached or free.

    With ``fence`` > 0 it becomes quarantined under that fence number instead; so it does later if
    others still hold it, whether they bring a fence or not. Blocks are retired in the order given.
    Returns ``OK``, or ``~index`` of a block that is not in use, and then changes nothing.
    """
    bad = _unshare(ids, blk)
    if bad:
        return bad
    bb, pb = meta[M_BB], meta[M_PB]
    if fence > 0:
        _stamp(ids, fence, blk)
    # What changes with every block of one extent is counted here, and written when it ends.
    e, low, high, before, head, used, freed, total = 0, 0, 0, 0, 0, 0, 0, 0
    for i in range(ids.shape[0]):
        b = ids[i]
        if blk[b, REFS] or blk[b, STATE] != USED:  # shared; or listed twice, and retired before
            continue
        start = b * bb
        if start < low or start >= high:  # another home extent than the block before
            if e:
                _end_of_extent(e, before, head, used, freed, ext, meta)
            e = page[start // pb]
            low, high = ext[e, X_FIRST] * pb, (ext[e, X_FIRST] + ext[e, X_PAGES]) * pb
            before, head, used, freed = _claims(e, ext), ext[e, X_HEAD], 0, 0
        state = QUARANTINED if blk[b, STAMP] else (CACHED if blk[b, KEEP] else FREE)
        blk[b, STATE] = state
        used += 1
        total += 1
        straddles = start + bb > high
        if straddles:
            _count_from(high // pb, b, X_USED, -1, page, ext, meta)
        if state == FREE:
            blk[b, NEXT], blk[b, PREV] = head, 0
            if head:
                blk[head, PREV] = b
            head = b
            freed += 1
            continue
        ext[e, state] += 1
        if straddles:
            _count_from(high // pb, b, state, 1, page, ext, meta)
        if state == CACHED:
            _lru_push(b, stamp, blk, meta)
            meta[M_CACHED] += 1
        else:
            meta[M_QUARANTINED] += 1
    if e:
        _end_of_extent(e, before, head, used, freed, ext, meta)
    meta[M_USED] -= total
    return OK


@_jit(_V(_VEC, _I, _I, *_ARRAYS))
def release_fence(ids, fence, stamp, blk, page, ext, meta):
    """Retire those of ``ids`` that still wait for ``fence`` (others were acquired meanwhile)."""
    for i in range(ids.shape[0]):
        b = ids[i]
        if blk[b, STAMP] != fence:
            continue
        if blk[b, STATE] == USED:
            blk[b, STAMP] = 0
        elif blk[b, STATE] == QUARANTINED:
            meta[M_QUARANTINED] -= 1
            _count(b, X_QUARANTINED, -1, blk, page, ext, meta)
            _retire(b, stamp, blk, page, ext, meta)


@_jit(_V(_VEC, *_ARRAYS))
def acquire(ids, blk, page, ext, meta):
    """Take a reference on blocks that a prefix names: in use, cached or quarantined."""
    for i in range(ids.shape[0]):
        b = ids[i]
        state = blk[b, STATE]
        if state == USED:
            blk[b, REFS] += 1
            continue
        if state == CACHED:
            _lru_remove(b, blk, meta)
            meta[M_CACHED] -= 1
            blk[b, STAMP] = 0
        else:
            meta[M_QUARANTINED] -= 1
        blk[b, STATE], blk[b, REFS] = USED, 1
        meta[M_USED] += 1
        _count(b, X_USED, 1, blk, page, ext, meta)
        _count(b, state, -1, blk, page, ext, meta)


@_jit(_V(_VEC, *_ARRAYS))
def evict(ids, blk, page, ext, meta):
    """Turn cached blocks into free ones."""
    for i in range(ids.shape[0]):
        b = ids[i]
        _lru_remove(b, blk, meta)
        meta[M_CACHED] -= 1
        blk[b, KEEP] = 0
        _count(b, X_CACHED, -1, blk, page, ext, meta)
        _push_free(b, blk, page, ext, meta)


@_jit(nb.boolean(_I, _VEC, _META))
def _is_backed(b, page, meta):
    p = (b * meta[M_BB]) // meta[M_PB]
    last = ((b + 1) * meta[M_BB] - 1) // meta[M_PB]
    for q in range(p, last + 1):
        if page[q] == 0:
            return False
    return True


@_jit(nb.types.UniTuple(_I, 2)(_I, _BLK, _EXT, _META))
def span(e, blk, ext, meta):
    """The blocks that touch extent ``e``, as a half-open range."""
    start = ext[e, X_FIRST] * meta[M_PB]
    stop = start + ext[e, X_PAGES] * meta[M_PB]
    return start // meta[M_BB], min(blk.shape[0], (stop + meta[M_BB] - 1) // meta[M_BB])
