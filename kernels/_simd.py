"""Vector building blocks of the CPU kernels: Numba intrinsics that emit LLVM vector code.

Numba compiles loops well, but it cannot be told to keep a tile of sums in registers, it has no
vectorised ``exp`` without Intel's library, and it knows neither bfloat16 nor float16. These few
intrinsics fill the gaps. They take raw addresses (int64) and work on vectors of ``LANES``
elements, which LLVM splits to whatever the machine has.

Storage types stand for dtypes: ``uint16`` for bfloat16, ``int16`` for float16, and float32 and
float64 for themselves. Sums are kept in float32, and in float64 for float64.

Numba's disk cache looks at the file of the compiled function only: after a change here, touch
``_attend.py``, ``append.py`` and ``move.py``.
"""

from __future__ import annotations

import math

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 8
_I16, _I32, _I64 = (ir.IntType(n) for n in (16, 32, 64))


@intrinsic
def pointer(_context, address, like):
    """``address`` as a pointer to elements of the type of ``like``, for ``numba.carray``."""

    def emit(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(like)(types.int64, like), emit


@intrinsic
def fetch_add(_context, address):
    """Add 1 to the int64 at ``address`` atomically; returns the value before."""

    def emit(_, builder, _signature, args):
        place = builder.inttoptr(args[0], _I64.as_pointer())
        return builder.atomic_rmw("add", place, ir.Constant(_I64, 1), "seq_cst")

    return types.int64(types.int64), emit


@intrinsic
def move_bytes(_context, dst, src, nbytes):
    """``memmove`` between addresses."""

    def emit(_, builder, _signature, args):
        byte = ir.IntType(8).as_pointer()
        dst, src = (builder.inttoptr(arg, byte) for arg in args[:2])
        move = builder.module.declare_intrinsic("llvm.memmove", [byte, byte, _I64])
        builder.call(move, [dst, src, args[2], ir.Constant(ir.IntType(1), 0)])
        return ir.Constant(_I32, 0)

    return types.int32(types.int64, types.int64, types.int64), emit


@intrinsic
def widen(_context, value):
    """The number that a stored element stands for: float32, or float64 for float64."""

    def emit(_, builder, signature, args):
        (x,), stored = args, signature.args[0]
        if stored == types.int16:
            return builder.fpext(builder.bitcast(x, ir.HalfType()), ir.FloatType())
        if stored == types.uint16:
            high = builder.shl(builder.zext(x, _I32), ir.Constant(_I32, 16))
            return builder.bitcast(high, ir.FloatType())
        return x

    return (value if isinstance(value, types.Float) else types.float32)(value), emit


def _bfloat16_bits(builder, x):
    """Upper half of a float32, rounded to nearest even; a NaN stays one."""
    bits = builder.bitcast(x, _I32)
    upper = builder.lshr(bits, ir.Constant(_I32, 16))
    odd = builder.and_(upper, ir.Constant(_I32, 1))
    bias = builder.add(odd, ir.Constant(_I32, 0x7FFF))
    rounded = builder.lshr(builder.add(bits, bias), ir.Constant(_I32, 16))
    quiet = builder.or_(upper, ir.Constant(_I32, 0x40))
    chosen = builder.select(builder.fcmp_unordered("uno", x, x), quiet, rounded)
    return builder.trunc(chosen, _I16)


@intrinsic
def narrow(_context, value, like):
    """``value`` as a stored element of the type of ``like``, rounded to nearest even."""

    def emit(_, builder, signature, args):
        stored = signature.return_type
        if stored == types.int16:
            return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), _I16)
        if stored == types.uint16:
            return _bfloat16_bits(builder, args[0])
        return args[0]

    return like(value, like), emit


class _Vectors:
    """Emits vector operations for one element type into one builder."""

    def __init__(self, builder, element):
        self.builder, self.element = builder, element
        self.type = ir.VectorType(element, LANES)
        self.nbytes = 8 if element == ir.DoubleType() else 4

    def at(self, address, elements, kind=None):
        """Pointer to vectors (or ``kind``) at ``address`` plus that many elements."""
        step = self.builder.mul(elements, ir.Constant(_I64, self.nbytes))
        place = self.builder.add(address, step)
        return self.builder.inttoptr(place, (kind or self.type).as_pointer())

    def load(self, address, elements):
        return self.builder.load(self.at(address, elements), align=self.nbytes)

    def store(self, value, address, elements):
        self.builder.store(value, self.at(address, elements), align=self.nbytes)

    def spread(self, scalar):
        """All lanes equal to ``scalar``."""
        first = ir.Constant(_I32, 0)
        one = self.builder.insert_element(ir.Constant(self.type, ir.Undefined), scalar, first)
        lanes = ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES)
        return self.builder.shuffle_vector(one, ir.Constant(self.type, ir.Undefined), lanes)

    def constant(self, value):
        return ir.Constant(self.type, [value] * LANES)

    def variable(self, value):
        return cgutils.alloca_once_value(self.builder, value)

    def multiply_add(self, a, b, c):
        """``a * b + c``, which LLVM may fuse."""
        product = self.builder.fmul(a, b, flags=("contract",))
        return self.builder.fadd(product, c, flags=("contract",))

    def larger(self, a, b):
        """Lane-wise maximum; keeps ``a`` where ``b`` is NaN."""
        return self.builder.select(self.builder.fcmp_ordered("olt", a, b), b, a)

    def fold(self, vector, combine):
        """One scalar from all lanes."""
        width, undefined = LANES, ir.Constant(self.type, ir.Undefined)
        while width > 1:
            width //= 2
            order = [(i + width) % LANES for i in range(LANES)]
            lanes = ir.Constant(ir.VectorType(_I32, LANES), order)
            vector = combine(vector, self.builder.shuffle_vector(vector, undefined, lanes))
        return self.builder.extract_element(vector, ir.Constant(_I32, 0))

    def fold_each(self, vectors):
        """``LANES`` vectors to one, whose lane i is the sum of vector i."""
        order = range(2 * LANES)
        even, odd = (ir.Constant(ir.VectorType(_I32, LANES), list(order[i::2])) for i in (0, 1))
        while len(vectors) > 1:
            pairs = zip(vectors[::2], vectors[1::2], strict=True)
            vectors = [
                self.builder.fadd(
                    self.builder.shuffle_vector(a, b, even), self.builder.shuffle_vector(a, b, odd)
                )
                for a, b in pairs
            ]
        return vectors[0]

    def exp2(self, x):
        """2**x to one unit in the last place; 0 below the normal numbers; NaN stays NaN.

        x = n + r with |r| <= 1/2: the Taylor series of 2**r, and n added to the exponent.
        """
        double = self.nbytes == 8
        degree, mantissa, least = (13, 52, -1022.0) if double else (6, 23, -126.0)
        whole = ir.VectorType(_I64 if double else _I32, LANES)
        b, magic = self.builder, self.constant(1.5 * 2**mantissa)
        shifted = b.fadd(x, magic)  # adding 1.5 * 2**mantissa rounds x to an integer
        r = b.fsub(x, b.fsub(shifted, magic))
        series = [math.log(2) ** k / math.factorial(k) for k in range(degree, -1, -1)]
        power = self.constant(series[0])
        for factor in series[1:]:
            power = self.multiply_add(power, r, self.constant(factor))
        places = ir.Constant(whole, [mantissa] * LANES)
        exponent = b.shl(b.bitcast(shifted, whole), places)  # magic's own bits are shifted out
        scaled = b.bitcast(b.add(b.bitcast(power, whole), exponent), self.type)
        small = b.fcmp_ordered("olt", x, self.constant(least))
        scaled = b.select(small, self.constant(0.0), scaled)
        return b.select(b.fcmp_unordered("uno", x, x), x, scaled)


def _steps(builder, count, step=LANES):
    return cgutils.for_range_slice(
        builder, ir.Constant(_I64, 0), count, ir.Constant(_I64, step), intp=_I64, inc=True
    )


def _dot_block(rows, columns):
    """Intrinsic: ``rows`` x ``columns`` dot products (together ``LANES``) of float rows."""

    @intrinsic
    def dot_block(_context, like, a, lda, b, ldb, depth, out, ldo):
        """out[i, j] = a[i, :depth] . b[j, :depth]; leading dimensions in elements."""

        def emit(context, builder, signature, args):
            v = _Vectors(builder, context.get_value_type(signature.args[0]))
            _, a, lda, b, ldb, depth, out, ldo = args
            sums = [v.variable(v.constant(0.0)) for _ in range(LANES)]
            with _steps(builder, depth) as (at, _step):
                left = [v.load(a, _row(builder, i, lda, at)) for i in range(rows)]
                right = [v.load(b, _row(builder, j, ldb, at)) for j in range(columns)]
                for i, place in enumerate(sums):
                    x, y = left[i // columns], right[i % columns]
                    builder.store(v.multiply_add(x, y, builder.load(place)), place)
            total = v.fold_each([builder.load(place) for place in sums])
            for i in range(LANES):
                lane = builder.extract_element(total, ir.Constant(_I32, i))
                at = _row(builder, i // columns, ldo, ir.Constant(_I64, i % columns))
                builder.store(lane, v.at(out, at, v.element))
            return ir.Constant(_I32, 0)

        return types.int32(like, *[types.int64] * 7), emit

    return dot_block


def _row(builder, index, stride, offset):
    return builder.add(builder.mul(stride, ir.Constant(_I64, index)), offset)


dot_4x2, dot_1x8 = _dot_block(4, 2), _dot_block(1, 8)


def _add_block(rows):
    """Intrinsic: ``rows`` x 2 vectors of ``out += p @ v``."""

    @intrinsic
    def add_block(_context, like, p, ldp, v, ldv, depth, out, ldo):
        """out[i, :2*LANES] += sum over j < depth of p[i, j] * v[j, :2*LANES]."""

        def emit(context, builder, signature, args):
            vec = _Vectors(builder, context.get_value_type(signature.args[0]))
            _, p, ldp, v, ldv, depth, out, ldo = args
            places = [
                (i, half, _row(builder, i, ldo, ir.Constant(_I64, half * LANES)))
                for i in range(rows)
                for half in (0, 1)
            ]
            sums = [vec.variable(vec.load(out, at)) for _, _, at in places]
            with _steps(builder, depth, 1) as (j, _step):
                row = builder.mul(j, ldv)
                halves = [
                    vec.load(v, builder.add(row, ir.Constant(_I64, h * LANES))) for h in (0, 1)
                ]
                weights = [
                    vec.spread(builder.load(vec.at(p, _row(builder, i, ldp, j), vec.element)))
                    for i in range(rows)
                ]
                for (i, half, _), place in zip(places, sums, strict=True):
                    total = vec.multiply_add(weights[i], halves[half], builder.load(place))
                    builder.store(total, place)
            for (_, _, at), place in zip(places, sums, strict=True):
                vec.store(builder.load(place), out, at)
            return ir.Constant(_I32, 0)

        return types.int32(like, *[types.int64] * 7), emit

    return add_block


add_4, add_1 = _add_block(4), _add_block(1)


@intrinsic
def row_max(_context, like, row, count):
    """Maximum of ``count`` elements (a multiple of ``LANES``); NaN is passed over."""

    def emit(context, builder, signature, args):
        v = _Vectors(builder, context.get_value_type(signature.args[0]))
        best = v.variable(v.constant(-math.inf))
        with _steps(builder, args[2]) as (at, _step):
            builder.store(v.larger(builder.load(best), v.load(args[1], at)), best)
        return v.fold(builder.load(best), v.larger)

    return like(like, types.int64, types.int64), emit


@intrinsic
def row_exp2(_context, like, row, count, shift):
    """row[i] = 2**(row[i] - shift) in place; returns the sum. Multiple of ``LANES``."""

    def emit(context, builder, signature, args):
        v = _Vectors(builder, context.get_value_type(signature.args[0]))
        _, row, count, shift = args
        total, shifts = v.variable(v.constant(0.0)), v.spread(shift)
        with _steps(builder, count) as (at, _step):
            power = v.exp2(builder.fsub(v.load(row, at), shifts))
            v.store(power, row, at)
            builder.store(builder.fadd(builder.load(total), power), total)
        return v.fold(builder.load(total), builder.fadd)

    return like(like, types.int64, types.int64, like), emit
