"""The hottest functions with a pool's arrays by their addresses, of ``_hot.py`` and ``_scan.py``.

To take over an array from Python costs Numba more than a short loop in it; there are four. So their
addresses and lengths lie in a record, and a call gets the record's address alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numba as nb
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kvcached._calls import _put, back_one
from kvcached._hot import _I, _VEC, BLK_WIDTH, EXT_WIDTH, META_SIZE, _jit, alloc, free
from kvcached._scan import attach_and_alloc

if TYPE_CHECKING:
    from numpy.typing import NDArray

_COMPILED = not nb.config.DISABLE_JIT
_WORD = ir.IntType(64)

# A journal of growth, 64 bits each (``bump.py`` writes it up). ``DONE`` and ``HANDLE``: driver
# calls that succeeded for the handle that is being made, and that handle. ``COUNT``: how many rows
# are full; each has the id of an extent and its handle. ``FIRST``: page of the first row's extent.
DONE, HANDLE, COUNT, FIRST, PAGES, BASE, PAGE_BYTES, DRIVER, ROWS = range(9)
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


@intrinsic
def _word(_, record, index):
    """Number ``index`` of the ``int64`` at address ``record``."""

    def codegen(context, builder, signature, values):
        pointer = builder.inttoptr(values[0], _WORD.as_pointer())
        return builder.load(builder.gep(pointer, [values[1]]), align=8)

    return types.int64(record, types.int64), codegen


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


@_jit(_I(_I, _I, _VEC), nogil=True)
def grow_at(where, journal, out):
    """Back the next row's extent, attach it and ``alloc`` into ``out``: growth, in one call.

    The status of the driver call that failed, ``GONE``, or 0.
    """
    driver, row = _word(journal, DRIVER), _word(journal, COUNT)
    if _word(driver, 0) == 0:
        return GONE
    pages, page_bytes = _word(journal, PAGES), _word(journal, PAGE_BYTES)
    first = _word(journal, FIRST) + row * pages
    status = back_one(
        _word(driver, 1), _word(driver, 2), _word(driver, 3), _word(driver, 4), _word(driver, 5),
        _word(journal, BASE) + first * page_bytes, pages * page_bytes, journal,
    )  # fmt: skip
    if status:
        return status
    _put(journal, ROWS + 2 * row + 1, nb.uint64(_word(journal, HANDLE)))
    _put(journal, COUNT, nb.uint64(row + 1))
    _put(journal, DONE, nb.uint64(0))
    blk, page, ext, meta = _arrays(where)
    return attach_and_alloc(out, _word(journal, ROWS + 2 * row), first, pages, blk, page, ext, meta)
