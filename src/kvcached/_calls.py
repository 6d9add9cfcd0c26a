"""Compiled calls of a C library's functions, here the CUDA driver's, by their addresses.

Sizes, flags, handles and pointers are all 64 bits wide in the driver's ABI. What is called runs
without the GIL. ``memory/native.py`` says what for.
"""

from __future__ import annotations

import numba as nb
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kvcached._compile import compiled

_I, _VEC, _HANDLE, _TABLE = nb.int64, nb.int64[::1], nb.uint64, nb.uint64[:, ::1]
_WORD = ir.IntType(64)


def _function(builder, address, *arguments):
    """A pointer to a function that returns a status, from its address."""
    return builder.inttoptr(address, ir.FunctionType(ir.IntType(32), arguments).as_pointer())


@intrinsic
def _call(_, function, arguments):
    """The status of the function at an address, called with a tuple of ``int64``."""
    count = len(arguments)

    def codegen(context, builder, signature, values):
        pointer = _function(builder, values[0], *[_WORD] * count)
        status = builder.call(pointer, cgutils.unpack_tuple(builder, values[1], count))
        return builder.sext(status, _WORD)

    return types.int64(types.int64, arguments), codegen


@intrinsic
def _create(_, function, nbytes, prop):
    """``(status, handle)`` of ``cuMemCreate``."""

    def codegen(context, builder, signature, values):
        slot = cgutils.alloca_once_value(builder, ir.Constant(_WORD, 0))
        pointer = _function(builder, values[0], slot.type, _WORD, _WORD, _WORD)
        status = builder.call(pointer, [slot, values[1], values[2], ir.Constant(_WORD, 0)])
        results = [builder.sext(status, _WORD), builder.load(slot)]
        return context.make_tuple(builder, signature.return_type, results)

    return types.Tuple((_I, _HANDLE))(function, nbytes, prop), codegen


def _getter(kind):
    """An intrinsic: number ``index`` of the 64-bit ``kind`` at address ``record``."""

    @intrinsic
    def get(_, record, index):
        def codegen(context, builder, signature, values):
            pointer = builder.inttoptr(values[0], _WORD.as_pointer())
            return builder.load(builder.gep(pointer, [values[1]]), align=8)

        return kind(record, types.int64), codegen

    return get


_get = _getter(_HANDLE)


@intrinsic
def _put(_, record, index, value):
    """Store 64 bits as number ``index`` of those at address ``record``."""

    def codegen(context, builder, signature, values):
        pointer = builder.inttoptr(values[0], _WORD.as_pointer())
        builder.store(values[2], builder.gep(pointer, [values[1]]), align=8)
        return context.get_dummy_value()

    return types.void(record, types.int64, value), codegen


@compiled(_I(_I, _I, _I, _I, _I, _I, _I, _I), nogil=True)
def back_one(create, map_, access, prop, rights, address, nbytes, record):
    """The status of the call that failed, or 0.

    At ``record`` lie the number of calls that succeeded and the handle, whatever interrupts the
    caller.
    """
    status, handle = _create(create, nbytes, prop)
    if status:
        return status
    _put(record, 1, handle)
    _put(record, 0, 1)
    status = _call(map_, (address, nbytes, 0, handle, 0))
    if status:
        return status
    _put(record, 0, 2)
    status = _call(access, (address, nbytes, rights, 1))
    if status:
        return status
    _put(record, 0, 3)
    return 0


@compiled(_I(_I, _I, _I, _I, _I, _TABLE, _TABLE, _VEC), nogil=True)
def back_many(create, map_, access, prop, rights, places, runs, record):
    """As ``back_one``, for many: ``places`` are (address, bytes, 0); their handles go there, too.

    ``runs``, which get their access in one call, are (address, bytes).
    """
    for i in range(places.shape[0]):
        address, nbytes = places[i, 0], places[i, 1]
        status, places[i, 2] = _create(create, nbytes, prop)
        if status:
            return status
        record[0] += 1
        status = _call(map_, (address, nbytes, 0, places[i, 2], 0))
        if status:
            return status
        record[0] += 1
    for i in range(runs.shape[0]):
        status = _call(access, (runs[i, 0], runs[i, 1], rights, 1))
        if status:
            return status
        record[0] += 1
    return 0


@compiled(_I(_I, _I, _I, _I), nogil=True)
def unback(unmap, release, count, record):
    """Unmap and release, both in order; what ``release`` fails for and after it stays unmapped.

    At ``record`` lie the numbers of those unmapped and released, which are counted here, and then
    (address, bytes, handle) of each; neighbours are unmapped in one call. Returns the status of the
    first call that failed, or 0.
    """
    first, unmapped = 0, 0
    while unmapped < count:
        i, address, nbytes = unmapped, _get(record, 3 * unmapped + 2), nb.uint64(0)
        while i < count and _get(record, 3 * i + 2) == address + nbytes:
            nbytes += _get(record, 3 * i + 3)
            i += 1
        first = _call(unmap, (address, nbytes))
        if first:
            break
        unmapped = i
        _put(record, 0, unmapped)
    for i in range(unmapped):
        status = _call(release, (_get(record, 3 * i + 4),))
        if status:
            return status
        _put(record, 1, i + 1)
    return first
