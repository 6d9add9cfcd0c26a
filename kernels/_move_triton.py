"""Moving blocks on a GPU: one Triton kernel each for copies and compaction.

Bases are integers, since the first block of an elastic cache may be unmapped. Blocks that no id
names are not touched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from kvcached.kernels._launch import run

WIDTH = 2048
"""Units that a program moves: 8 KiB where addresses are aligned to 4 bytes or more."""
ENTRIES = 256
"""Entries of a block table that a program rewrites: few, or they would need more registers."""
MOVE_TYPES = dict.fromkeys(("DST", "SRC", "A", "B"), "i64") | dict.fromkeys(
    ("TO", "FROM", "SOURCES", "TARGETS", "TABLE"), "*i32"
)
"""Triton's types of the arguments of these kernels that do not follow from their values."""
_UNITS = {16: (tl.int32, 4), 4: (tl.int32, 4), 2: (tl.int16, 2), 1: (tl.int8, 1)}


@triton.jit
def _copy_piece(
    DST, SRC, to, frm, at, total, to_outer, to_inner, from_outer, from_inner,
    UNIT: tl.constexpr, GROUP: tl.constexpr, ALIGN: tl.constexpr,
    RUN: tl.constexpr, INNER: tl.constexpr, NESTED: tl.constexpr,
):  # fmt: skip
    """Copy units ``at`` of an entry of ``total`` groups: runs of ``RUN`` units, ``INNER`` in a row.

    Sizes and strides count groups of ``GROUP`` units, so that the compiler sees their alignment.
    """
    D_BASE = tl.multiple_of(DST.to(tl.pointer_type(UNIT)), ALIGN)
    S_BASE = tl.multiple_of(SRC.to(tl.pointer_type(UNIT)), ALIGN)
    inside = at < total * GROUP
    if NESTED:
        run, unit = at // RUN, at % RUN
        outer, inner = run // INNER, run % INNER
        to = to + (outer * to_outer + inner * to_inner) * GROUP + unit
        frm = frm + (outer * from_outer + inner * from_inner) * GROUP + unit
    else:
        to, frm = to + at, frm + at
    tl.store(D_BASE + to, tl.load(S_BASE + frm, mask=inside), mask=inside)


@triton.jit(do_not_specialize=["pieces"])
def copy_kernel(
    DST: tl.int64, SRC: tl.int64, TO, FROM, pieces, total,
    to_stride, from_stride, to_outer, to_inner, from_outer, from_inner,
    UNIT: tl.constexpr, GROUP: tl.constexpr, ALIGN: tl.constexpr, RUN: tl.constexpr,
    INNER: tl.constexpr, NESTED: tl.constexpr, BY_TO: tl.constexpr, BY_FROM: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """One piece of entry i: DST[TO[i]] = SRC[FROM[i]], or i itself where there are no ids."""
    entry = tl.program_id(0) // pieces
    at = tl.program_id(0) % pieces * WIDTH + tl.arange(0, WIDTH)
    to = tl.load(TO + entry) if BY_TO else entry
    frm = tl.load(FROM + entry) if BY_FROM else entry
    _copy_piece(
        DST, SRC, to.to(tl.int64) * to_stride * GROUP, frm.to(tl.int64) * from_stride * GROUP,
        at, total, to_outer, to_inner, from_outer, from_inner,
        UNIT, GROUP, ALIGN, RUN, INNER, NESTED,
    )  # fmt: skip


@triton.jit
def _renamed(ids, valid, SOURCES, TARGETS, moves, steps):
    """``ids`` with each that is in the sorted ``SOURCES`` replaced by its target."""
    low = tl.zeros_like(ids)
    for step in tl.range(0, steps):
        probe = low + (1 << (steps - 1 - step))
        known = valid & (probe < moves)
        source = tl.load(SOURCES + probe, mask=known, other=0)
        low = tl.where(known & (source <= ids), probe, low)
    found = valid & (tl.load(SOURCES + low, mask=valid, other=0) == ids)
    return found, tl.load(TARGETS + low, mask=found, other=0)


@triton.jit(do_not_specialize=["moves", "steps", "pieces", "table_rows", "table_columns"])
def compact_kernel(
    A: tl.int64, B: tl.int64, SOURCES, TARGETS, TABLE, moves, steps, pieces,
    a_total, a_stride, a_outer, a_inner, b_total, b_stride, b_outer, b_inner,
    table_rows, table_columns, table_stride,
    UNIT: tl.constexpr, GROUP: tl.constexpr, ALIGN: tl.constexpr,
    A_RUN: tl.constexpr, A_INNER: tl.constexpr, A_NESTED: tl.constexpr,
    B_RUN: tl.constexpr, B_INNER: tl.constexpr, B_NESTED: tl.constexpr,
    TWO: tl.constexpr, WIDTH: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Copy the moved blocks of one or two pools; the programs behind those rewrite the table."""
    program = tl.program_id(0)
    copies = moves * pieces
    if program < copies:
        entry = program // pieces
        at = program % pieces * WIDTH + tl.arange(0, WIDTH)
        to = tl.load(TARGETS + entry).to(tl.int64) * GROUP
        frm = tl.load(SOURCES + entry).to(tl.int64) * GROUP
        _copy_piece(A, A, to * a_stride, frm * a_stride, at, a_total, a_outer, a_inner, a_outer,
                    a_inner, UNIT, GROUP, ALIGN, A_RUN, A_INNER, A_NESTED)  # fmt: skip
        if TWO:
            _copy_piece(B, B, to * b_stride, frm * b_stride, at, b_total, b_outer, b_inner,
                        b_outer, b_inner, UNIT, GROUP, ALIGN, B_RUN, B_INNER,
                        B_NESTED)  # fmt: skip
    else:
        place = (program - copies) * ENTRIES + tl.arange(0, ENTRIES)
        valid = place < table_rows * table_columns
        row, column = (place // table_columns).to(tl.int64), place % table_columns
        named = TABLE + row * table_stride + column
        ids = tl.load(named, mask=valid, other=0)
        found, target = _renamed(ids, valid, SOURCES, TARGETS, moves, steps)
        tl.store(named, target, mask=found)


@dataclass(frozen=True, slots=True)
class Shape:
    """An entry as runs of bytes: ``outer`` x ``inner`` runs, each contiguous on both sides."""

    run: int
    inner: int
    outer: int
    to: tuple[int, int]
    frm: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Of the whole entry."""
        return self.run * self.inner * self.outer


_NOTHING = Shape(16, 1, 1, (0, 0), (0, 0))


def entry_shapes(
    shape: Any, to: Any, frm: Any, itemsize: int
) -> tuple[Shape, list[tuple[int, int]]]:
    """What one launch moves of an entry, and the byte offsets at which to launch.

    ``shape`` and the strides (elements) are those of one entry. Dimensions that are contiguous on
    both sides join; a launch takes two more, and those beyond are looped over.
    """
    run, rest = itemsize, list[list[int]]()  # [size, to, from], innermost first
    for size, *steps in zip(reversed(shape), reversed(to), reversed(frm), strict=True):
        step = [stride * itemsize for stride in steps]
        if size == 1:
            continue
        if not rest and step == [run, run]:
            run *= size
        elif rest and step == [rest[-1][0] * rest[-1][1], rest[-1][0] * rest[-1][2]]:
            rest[-1][0] *= size
        else:
            rest.append([size, *step])
    near = [*rest[:2], [1, 0, 0], [1, 0, 0]][:2]
    places = [(0, 0)]
    for size, a, b in rest[2:]:
        places = [(x + i * a, y + i * b) for x, y in places for i in range(size)]
    (inner, to_inner, from_inner), (outer, to_outer, from_outer) = near
    return Shape(run, inner, outer, (to_outer, to_inner), (from_outer, from_inner)), places


def _alignment(*numbers: int) -> int:
    """The widest unit that divides all addresses, strides and runs."""
    together = 0
    for number in numbers:
        together |= number
    return next(align for align in _UNITS if together % align == 0)


def _settings(align: int) -> dict[str, Any]:
    unit, nbytes = _UNITS[align]
    return {"UNIT": unit, "GROUP": align // nbytes, "ALIGN": align, "WIDTH": WIDTH}


def copy_entries(
    dst: torch.Tensor, to: torch.Tensor | None, src: torch.Tensor, frm: torch.Tensor | None
) -> None:
    """dst[to[i]] = src[frm[i]] for device tensors of ids; ``None`` counts from 0.

    A side may be pinned host memory, whose addresses a GPU may use.
    """
    count = len(to) if to is not None else len(frm) if frm is not None else len(dst)
    size = dst.element_size()
    form, places = entry_shapes(dst.shape[1:], dst.stride()[1:], src.stride()[1:], size)
    if not count or not form.nbytes:
        return
    strides = (dst.stride(0) * size, src.stride(0) * size, *form.to, *form.frm)
    absent = frm if to is None else to
    for to_at, from_at in places:
        bases = dst.data_ptr() + to_at, src.data_ptr() + from_at
        align = _alignment(*bases, *strides, form.run)
        unit = _UNITS[align][1]
        pieces = triton.cdiv(form.nbytes // unit, WIDTH)
        numbers = (pieces, form.nbytes // align, *(stride // align for stride in strides))
        constants = _settings(align) | {
            "RUN": form.run // unit, "INNER": form.inner, "NESTED": form.inner * form.outer > 1,
            "BY_TO": to is not None, "BY_FROM": frm is not None,
        }  # fmt: skip
        run(copy_kernel, (count * pieces,),
            (*bases, absent if to is None else to, absent if frm is None else frm, *numbers),
            constants, MOVE_TYPES, dst.device if dst.is_cuda else src.device)  # fmt: skip


def compact(
    pools: list[torch.Tensor],
    sources: torch.Tensor,
    targets: torch.Tensor,
    table: torch.Tensor | None,
) -> None:
    """Copy blocks ``sources`` (sorted) to ``targets`` in one or two pools, and rename in a table.

    One launch, unless an entry of a pool has more than two strided dimensions.
    """
    sizes = [pool.element_size() for pool in pools]
    steps = [pool.stride()[1:] for pool in pools]
    found = [entry_shapes(pool.shape[1:], step, step, size)
             for pool, step, size in zip(pools, steps, sizes, strict=True)]  # fmt: skip
    if any(len(places) > 1 for _, places in found):
        for pool in pools:
            copy_entries(pool, targets, pool, sources)
        found = []
    forms = [form for form, _ in found]
    bases = [pool.data_ptr() for pool in pools]
    strides = [pool.stride(0) * size for pool, size in zip(pools, sizes, strict=True)]
    align = _alignment(*bases, *strides, *(n for form in forms for n in (form.run, *form.to)))
    unit, moves = _UNITS[align][1], len(sources)
    pieces = max((triton.cdiv(form.nbytes // unit, WIDTH) for form in forms), default=0)
    bounds = [(form.nbytes // align, stride // align, *(step // align for step in form.to))
              for form, stride in zip(forms, strides[: len(forms)], strict=True)]  # fmt: skip
    a, b = (forms[0], forms[-1]) if forms else (_NOTHING, _NOTHING)
    rows, columns, stride = (0, 1, 0) if table is None else (*table.shape, table.stride(0))
    programs = moves * pieces + triton.cdiv(rows * columns, ENTRIES)
    if not programs or not moves:
        return
    constants = _settings(align) | {
        "A_RUN": a.run // unit, "A_INNER": a.inner, "A_NESTED": a.inner * a.outer > 1,
        "B_RUN": b.run // unit, "B_INNER": b.inner, "B_NESTED": b.inner * b.outer > 1,
        "TWO": len(pools) > 1, "ENTRIES": ENTRIES,
    }  # fmt: skip
    run(compact_kernel, (programs,),
        (bases[0], bases[-1], sources, targets, sources if table is None else table,
         moves, moves.bit_length(), pieces, *(bounds[0] if bounds else (0, 0, 0, 0)),
         *(bounds[-1] if bounds else (0, 0, 0, 0)), rows, columns, stride),
        constants, MOVE_TYPES, sources.device)  # fmt: skip
