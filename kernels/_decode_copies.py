"""The producer of ``_decode_gluon``: which tiles a program works on, and their copies by TMA."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma


@gluon.jit
def _plus(a, b):
    return a + b


@gluon.jit
def _tiles(length, BN: gl.constexpr):
    """Tiles of a sequence; one without any key is simpler than none."""
    return gl.maximum(gl.cdiv(length, BN), 1)


@gluon.jit
def _sequence_at(tile, batched):
    """(sequence of a tile, its first tile), counted through the batch."""
    offs, _lens, behind, batch = batched
    past = (offs < batch) & (behind <= tile)
    return gl.sum(gl.where(past, 1, 0), 0), gl.max(gl.where(past, behind, 0), 0)


@gluon.jit
def _length_of(seq, batched):
    """Its length; 0 behind the last."""
    return gl.sum(gl.where(batched[0] == seq, batched[1], 0), 0)


@gluon.jit
def _note_of(seq, head, at, stop, before, tiles, length, batch, whole, ranges):
    """What ``told`` tells of tiles ``at .. stop`` of a sequence that begins at ``before``."""
    # Range r has the tiles from r * whole // ranges on.
    earliest = ((before + 1) * ranges - 1) // whole
    parts = ((before + tiles) * ranges - 1) // whole - earliest + 1
    part = ((at + 1) * ranges - 1) // whole
    # A sequence's parts lie together: a place for each part and one more after each sequence.
    slot = head * (ranges + batch) + part + seq
    return seq, head, at - before, stop - before, length, part - earliest, parts, slot


@gluon.jit
def _tell(place, note):
    """Say what the tiles to come are: see ``told``."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    for field in gl.static_range(len(note)):
        place.slice(field, 1).store(gl.full([1], note[field], gl.int32, layout))
    gl.thread_barrier()  # before a barrier of the ring is told so


@gluon.jit
def told(place, FIELD: gl.constexpr):
    """0 sequence (-1: no more), 1 head, 2 first tile, 3 end, 4 length, 5 part, 6 parts, 7 slot."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.max(place.slice(FIELD, 1).load(layout), 0)


@gluon.jit
def _box_at(start, p: gl.constexpr, length, BOX: gl.constexpr):
    """The position of a box of a tile; of boxes behind the end, that of the last one before it."""
    return gl.minimum(start + p * BOX, gl.maximum(length - 1, 0) // BOX * BOX)


@gluon.jit
def _ids_of(row, start, length, BN: gl.constexpr, BOX: gl.constexpr, PAGE: gl.constexpr):
    """Block ids of the boxes of a tile."""
    some = length > 0
    ids = (gl.load(row + _box_at(start, 0, length, BOX) // PAGE, mask=some, other=0),)
    for p in gl.static_range(1, BN // BOX):
        at = _box_at(start, p, length, BOX)
        ids = ids + (gl.load(row + at // PAGE, mask=some, other=0),)  # type: ignore[assignment]  # noqa: RUF005
    return ids


@gluon.jit
def _copy(MAP, smem, full, ids, start, length, column, BN: gl.constexpr, D: gl.constexpr,
          PAGE: gl.constexpr, BOX: gl.constexpr):  # fmt: skip
    """Start to copy the boxes of a tile; ``full`` is told so."""
    if length > 0:
        mbarrier.expect(full, BN * D * 2)
        for p in gl.static_range(BN // BOX):
            place = [ids[p], _box_at(start, p, length, BOX) % PAGE, column]
            tma.async_copy_global_to_shared(MAP, place, full, smem.slice(p, 1, dim=0))
    else:
        mbarrier.arrive(full, count=1)


@gluon.jit
def produce(
    K_MAP, V_MAP, TABLE, LENS, smem, bars, batch, stride_table, stride_kh, stride_vh,
    B: gl.constexpr, KV_HEADS: gl.constexpr, D: gl.constexpr, BN: gl.constexpr,
    PAGE: gl.constexpr, BOX: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fill the ring with the tiles of this program: a range of those of its head."""
    k_smem, v_smem, notes = smem
    k_full, k_empty, v_full, v_empty = bars
    offs = gl.arange(0, B, gl.BlockedLayout([1], [32], [1], [0]))
    lens = gl.load(LENS + offs, mask=offs < batch, other=0)
    behind = gl.where(offs < batch, _tiles(lens, BN), 0)
    whole = gl.sum(behind, 0)
    if B > 1:
        behind = gl.associative_scan(behind, 0, _plus)
    ranges = gl.minimum(gl.num_programs(0) // KV_HEADS, whole)  # each has a tile
    head, nth = gl.program_id(0) % KV_HEADS, gl.program_id(0) // KV_HEADS
    at = gl.minimum(nth, ranges) * whole // ranges
    end = gl.minimum(nth + 1, ranges) * whole // ranges
    past = (offs < batch) & (behind <= at)
    seq, before = gl.sum(gl.where(past, 1, 0), 0), gl.max(gl.where(past, behind, 0), 0)
    length = gl.sum(gl.where(offs == seq, lens, 0), 0)
    row = TABLE + seq.to(gl.int64) * stride_table
    ids = _ids_of(row, (at - before) * BN, length, BN, BOX, PAGE)
    count, fresh = 0, True
    while at < end:
        stage, phase = count % STAGES, count // STAGES & 1
        start, tiles = (at - before) * BN, _tiles(length, BN)
        stop = gl.minimum(before + tiles, end)
        mbarrier.wait(k_empty.index(stage), phase ^ 1)
        if fresh:
            note = _note_of(seq, head, at, stop, before, tiles, length, batch, whole, ranges)
            _tell(notes.index(stage), note)
        _copy(K_MAP, k_smem.index(stage), k_full.index(stage), ids, start, length,
              head * stride_kh, BN, D, PAGE, BOX)  # fmt: skip
        mbarrier.wait(v_empty.index(stage), phase ^ 1)
        _copy(V_MAP, v_smem.index(stage), v_full.index(stage), ids, start, length,
              head * stride_vh, BN, D, PAGE, BOX)  # fmt: skip
        count, at = count + 1, at + 1
        fresh = at >= stop
        if fresh:
            seq, before = seq + 1, before + tiles
            length = gl.sum(gl.where(offs == seq, lens, 0), 0)
            row = TABLE + seq.to(gl.int64) * stride_table
        # The next ids are on their way while this program waits for a place.
        ids = _ids_of(row, (at - before) * BN, length, BN, BOX, PAGE)
    stage, phase = count % STAGES, count // STAGES & 1
    mbarrier.wait(k_empty.index(stage), phase ^ 1)
    _tell(notes.index(stage), (-1,))
    mbarrier.arrive(k_full.index(stage), count=1)
