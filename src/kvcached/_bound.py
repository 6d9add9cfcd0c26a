"""The hottest functions with a pool's arrays by their addresses, of ``_hot.py`` and ``_scan.py``.

To take over an array from Python costs Numba more than a short loop in it; there are four. So their
addresses and lengths lie in a record, and a call gets the record's address alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numba as nb
import numpy as np
from numba import types
from numba.extending import intrinsic

from kvcached._calls import _call, _create, _getter, _put
from kvcached._hot import (
    _I,
    _VEC,
    BLK_WIDTH,
    EXT_WIDTH,
    M_BB,
    M_PB,
    META_SIZE,
    OK,
    _jit,
    alloc,
    free,
)
from kvcached._scan import attach, attach_and_alloc, attach_used

if TYPE_CHECKING:
    from numpy.typing import NDArray

_COMPILED = not nb.config.DISABLE_JIT

# A journal of growth, 64 bits each (``bump.py`` writes it up). ``DONE``: calls of the growth under
# way that succeeded, but for the last, access to all. ``COUNT``: rows that are full, and ``PAGE``
# the page after theirs. A row: id of an extent, first page, number of pages, the driver's handle.
DONE, COUNT, PAGE, BASE, PAGE_BYTES, DRIVER, ROWS = range(7)
ROW_WIDTH = 4
GONE = -2  # the driver is not to be called any more


def record_of(
    blk: NDArray[np.int32], page: NDArray[np.int32], ext: NDArray[np.int32], meta: NDArray[np.int64]
) -> tuple[Any, Any]:
    """What must live as long as the functions below are called, and their ``where``."""
    if not _COMPILED:
        return (blk, page, ext, meta), (blk, page, ext, meta)
    addresses = [array.ctypes.data for array in (blk, page, ext, meta)]
    record = np.array([*addresses, len(blk), len(page), len(ext)], np.int64)
    return (record, blk, page, ext, meta), record.ctypes.data


_word = _getter(_I)


def _pointer_to(kind):
    """An intrinsic that makes an address a pointer."""

    @intrinsic
    def pointer(_, address):
        def codegen(context, builder, signature, values):
            return builder.inttoptr(values[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(address), codegen

    return pointer


_int32_at, _int64_at = _pointer_to(types.int32), _pointer_to(types.int64)

if _COMPILED:

    @nb.njit(inline="always")
    def _arrays(where):
        """The arrays that ``record_of`` was told of."""
        blk = nb.carray(_int32_at(_word(where, 0)), (_word(where, 4), BLK_WIDTH))
        page = nb.carray(_int32_at(_word(where, 1)), (_word(where, 5),))
        ext = nb.carray(_int32_at(_word(where, 2)), (_word(where, 6), EXT_WIDTH))
        return blk, page, ext, nb.carray(_int64_at(_word(where, 3)), (META_SIZE,))

else:

    def _arrays(where):
        return where


@_jit(_I(_I, _VEC))
def alloc_at(where, out):
    """``alloc`` into ``out``."""
    blk, page, ext, meta = _arrays(where)
    return alloc(out, blk, page, ext, meta)


@_jit(_I(_I, _VEC, _I, _I))
def free_at(where, ids, stamp, fence):
    """``free``."""
    blk, page, ext, meta = _arrays(where)
    return free(ids, stamp, fence, blk, page, ext, meta)


@_jit(_I(_I, _VEC, _I, _I, _I))
def attach_and_alloc_at(where, out, e, first_page, num_pages):
    """``attach_and_alloc``."""
    blk, page, ext, meta = _arrays(where)
    return attach_and_alloc(out, e, first_page, num_pages, blk, page, ext, meta)


@_jit(_I(_I, _I, _I, _I), nogil=True)
def _back_rows(driver, journal, pages, most):
    """Make and map a handle of at most ``most`` pages for each row, and give access to all."""
    base, page_bytes = _word(journal, BASE), _word(journal, PAGE_BYTES)
    first, row, done = _word(journal, PAGE), _word(journal, COUNT), 0
    address, nbytes = base + first * page_bytes, pages * page_bytes
    while pages > 0:
        at, count = ROWS + ROW_WIDTH * row, min(pages, most)
        _put(journal, at + 1, first)
        _put(journal, at + 2, count)
        status, handle = _create(_word(driver, 1), count * page_bytes, _word(driver, 4))
        if status:
            return status
        _put(journal, at + 3, nb.int64(handle))
        _put(journal, DONE, done + 1)
        place = base + first * page_bytes
        status = _call(_word(driver, 2), (place, count * page_bytes, 0, nb.int64(handle), 0))
        if status:
            return status
        done += 2
        _put(journal, DONE, done)
        row, first, pages = row + 1, first + count, pages - count
    return _call(_word(driver, 3), (address, nbytes, _word(driver, 5), 1))


@_jit(_I(_I, _I, _I, _I, _VEC), nogil=True)
def grow_at(where, journal, pages, most, out):
    """Back the next ``pages``, attach them and ``alloc`` into ``out``: growth, in one call.

    The status of the driver call that failed, ``GONE``, or what ``alloc`` returns.
    """
    driver = _word(journal, DRIVER)
    if _word(driver, 0) == 0:
        return GONE
    status = _back_rows(driver, journal, pages, most)
    if status:
        return status
    row, stop = _word(journal, COUNT), _word(journal, COUNT) + _word(journal, DONE) // 2
    _put(journal, COUNT, stop)
    _put(journal, PAGE, _word(journal, PAGE) + pages)
    _put(journal, DONE, 0)
    blk, page, ext, meta = _arrays(where)
    if len(out) == 1 and pages * meta[M_PB] == meta[M_BB]:  # one block, and no other is free
        at = ROWS + ROW_WIDTH * row
        ident, first = _word(journal, at), _word(journal, at + 1)
        out[0] = attach_used(ident, first, pages, blk, page, ext, meta)
        return OK
    for at in range(ROWS + ROW_WIDTH * row, ROWS + ROW_WIDTH * stop, ROW_WIDTH):
        ident, first, count = _word(journal, at), _word(journal, at + 1), _word(journal, at + 2)
        attach(ident, first, count, blk, page, ext, meta)
    return alloc(out, blk, page, ext, meta)
