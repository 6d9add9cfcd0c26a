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

_I, _HANDLE, _PLACES = nb.int64, nb.uint64, nb.int64[:, ::1]
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


@compiled(types.Tuple((_I, _I, _HANDLE))(_I, _I, _I, _I, _I, _I, _I), nogil=True)
def back_one(create, map_, access, prop, rights, address, nbytes):
    """``(status, calls that have succeeded before, handle)``."""
    status, handle = _create(create, nbytes, prop)
    if status:
        return status, 0, handle
    status = _call(map_, (address, nbytes, 0, handle, 0))
    if status:
        return status, 1, handle
    return _call(access, (address, nbytes, rights, 1)), 2, handle


@compiled(types.UniTuple(_I, 3)(_I, _I, _I, _I, _I, _PLACES, _PLACES, _HANDLE[::1]), nogil=True)
def back_many(create, map_, access, prop, rights, places, runs, handles):
    """``(status, calls that have succeeded before, handles created)``.

    ``places`` and ``runs``, which get their access in one call, are (address, bytes).
    """
    count = places.shape[0]
    for i in range(count):
        address, nbytes = places[i]
        status, handles[i] = _create(create, nbytes, prop)
        if status:
            return status, 2 * i, i
        status = _call(map_, (address, nbytes, 0, handles[i], 0))
        if status:
            return status, 2 * i + 1, i + 1
    for i in range(runs.shape[0]):
        address, nbytes = runs[i]
        status = _call(access, (address, nbytes, rights, 1))
        if status:
            return status, 2 * count + i, count
    return 0, 2 * count + runs.shape[0], count
