"""How the warpgroups of ``_mla_gluon`` end: sums of one split or of all, normalised and written."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

EMPTY = gl.constexpr(-1.0e30)
LOG2_E = gl.constexpr(1.4426950408889634)
BM = gl.constexpr(64)
"""Rows of queries, which are the rows of a matrix instruction of a warpgroup."""
BN = gl.constexpr(64)
"""Rows of latents of a tile."""
HALF = gl.constexpr(256)
"""Columns of the output of a warpgroup."""
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16]))
PLACES = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [8, 0], [0, 32], [0, 64], [0, 128]],
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 256],
    )
)
"""Where elements in the layout of sums lie in memory, eight of a thread together."""


@gluon.jit
def wait_for_launch_in_front():
    """Memory may be touched only when the kernel in front has ended; the next may begin to wait."""
    gl.inline_asm_elementwise("griddepcontrol.wait; griddepcontrol.launch_dependents; // $0",
                              "=r", [], dtype=gl.int32, is_pure=False, pack=1)  # fmt: skip


@gluon.jit
def _halves(x):
    """The left and the right half of the columns, in registers."""
    rows: gl.constexpr = x.shape[0]
    columns: gl.constexpr = x.shape[1] // 2
    return x.reshape([rows, 2, columns]).permute(0, 2, 1).split()


@gluon.jit
def query_of(row, RESTS: gl.constexpr):
    """Which (token, head) a row of a tile is of, counted through them.

    With RESTS a tile of 64 rows has 32 of them at most. Each then has two rows that a thread holds
    both sums of: in one its weights are rounded, in the other are what rounding took off.
    """
    return row // 16 * 8 + row % 8 if RESTS else row


@gluon.jit
def with_rests(acc, RESTS: gl.constexpr):
    """Sums of weights and of rests together, in both of their rows."""
    if RESTS:
        acc = acc.reshape([BM // 16, 2, 8, HALF])
        both = gl.convert_layout(gl.expand_dims(gl.sum(acc, 1), 1), acc.type.layout)
        acc = gl.zeros_like(acc) + both
        acc = gl.convert_layout(acc.reshape([BM, HALF]), SUMS)
    return acc


@gluon.jit
def _rows(place, H: gl.constexpr, LAYOUT: gl.constexpr):
    """(row of the batch's tokens, head, valid) of the rows of a tile."""
    seq, first_row, max_q, rests = place[0], place[1], place[2], place[6]
    row = gl.arange(0, BM, gl.SliceLayout(1, LAYOUT))
    offs = first_row + query_of(row, rests)
    token, head = offs // H, offs % H
    valid = token < max_q
    if rests:
        valid = valid & (row % 16 < 8)
    return (seq * max_q + token).to(gl.int64), head, valid


@gluon.jit
def _put_partial(acc, place, PARTIAL, FIRST: gl.constexpr, H: gl.constexpr, SPLITS: gl.constexpr):
    """Write a half of the sums of one split."""
    row, head, valid = _rows(place, H, SUMS)
    own = ((row * H + head) * SPLITS + place[3]) * (2 * HALF)
    columns = FIRST + gl.arange(0, HALF, gl.SliceLayout(0, SUMS))
    gl.store(PARTIAL + own[:, None] + columns[None, :], acc, mask=valid[:, None])


@gluon.jit
def _put_part(acc, gain, place, PARTIAL, STATE, SIDE: gl.constexpr, H: gl.constexpr,
              SPLITS: gl.constexpr):  # fmt: skip
    """Write a half of the output of one of many splits, in 16 bits, as ``mla_merge_kernel`` has it.

    float16 has three more bits than bfloat16, and a power of two for each row makes it fit. What a
    thread has lies together, so that it writes 16 bytes at once.
    """
    out = acc * gain[:, None]
    most = gl.max(gl.maximum(out, -out), 1)
    power = gl.minimum((most.to(gl.int32, bitcast=True) >> 23) - 126, 126)
    out = (out * gl.exp2(-power.to(gl.float32))[:, None]).to(gl.float16)
    out = out.reshape([BM, 8, 4, 4, 2]).permute(0, 1, 3, 2, 4).reshape([BM, HALF])
    out = gl.convert_layout(out, PLACES, assert_trivial=True)
    row, head, valid = _rows(place, H, PLACES)
    own = ((row * H + head) * SPLITS + place[3]) * (2 * HALF)
    columns = SIDE * HALF + gl.arange(0, HALF, gl.SliceLayout(0, PLACES))
    base = gl.multiple_of(PARTIAL.to(gl.pointer_type(gl.float16)), 16)
    at = base + own[:, None] + columns[None, :]
    gl.store(at, out, mask=valid[:, None])
    row, head, valid = _rows(place, H, SUMS)
    own = (row * H + head) * SPLITS + place[3]
    at = STATE.to(gl.pointer_type(gl.int16)) + own * 4 + 2 + SIDE
    gl.store(at, power.to(gl.int16), mask=valid)


@gluon.jit
def _put(acc, gain, place, OUT, FIRST: gl.constexpr, H: gl.constexpr):
    """Write a half of the output, each row times ``gain``."""
    row, head, valid = _rows(place, H, SUMS)
    at = row * place[4] + head * place[5]
    columns = FIRST + gl.arange(0, HALF, gl.SliceLayout(0, SUMS))
    out = (acc * gain[:, None]).to(OUT.dtype.element_ty)
    gl.store(OUT + at[:, None] + columns[None, :], out, mask=valid[:, None])


@gluon.jit
def _put_quarter(acc, gain, their_gain, place, OUT, PARTIAL, FIRST: gl.constexpr, H: gl.constexpr):
    """Write columns of the output, from those of this split and of the other, in their order."""
    layout: gl.constexpr = acc.type.layout
    row, head, valid = _rows(place, H, layout)
    gain = gl.convert_layout(gain, gl.SliceLayout(1, layout))[:, None]
    their_gain = gl.convert_layout(their_gain, gl.SliceLayout(1, layout))[:, None]
    columns = FIRST + gl.arange(0, acc.shape[1], gl.SliceLayout(0, layout))
    other = ((row * H + head) * 2 + 1 - place[3]) * (2 * HALF)
    theirs = gl.load(PARTIAL + other[:, None] + columns[None, :], mask=valid[:, None], other=0.0,
                     cache_modifier=".cg")  # fmt: skip
    first = place[3] == 0  # which of them adds up makes no difference to the result
    sums = gl.where(first, acc, theirs) * gl.where(first, gain, their_gain)
    sums += gl.where(first, theirs, acc) * gl.where(first, their_gain, gain)
    at = row * place[4] + head * place[5]
    gl.store(OUT + at[:, None] + columns[None, :], sums.to(OUT.dtype.element_ty),
             mask=valid[:, None])  # fmt: skip


@gluon.jit
def _put_pair(acc, gain, their_gain, place, OUT, PARTIAL, FIRST: gl.constexpr, H: gl.constexpr):
    """``_put_quarter`` for a half of the output, in pieces, for the registers."""
    left, right = _halves(acc)
    a, b = _halves(left)
    _put_quarter(a, gain, their_gain, place, OUT, PARTIAL, FIRST, H)
    _put_quarter(b, gain, their_gain, place, OUT, PARTIAL, FIRST + 64, H)
    a, b = _halves(right)
    _put_quarter(a, gain, their_gain, place, OUT, PARTIAL, FIRST + 128, H)
    _put_quarter(b, gain, their_gain, place, OUT, PARTIAL, FIRST + 192, H)


@gluon.jit
def _put_lse(top, total, place, LSE, H: gl.constexpr):
    row, head, valid = _rows(place, H, SCORES)
    found = total > 0
    lse = (top + gl.log2(gl.where(found, total, 1.0))) / LOG2_E
    gl.store(LSE + row * H + head, gl.where(found, lse, float("-inf")), mask=valid)


@gluon.jit
def _put_lse_of_split(top, total, place, STATE, H: gl.constexpr, SPLITS: gl.constexpr):
    row, head, valid = _rows(place, H, SCORES)
    lse = gl.where(total > 0, top + gl.log2(gl.where(total > 0, total, 1.0)), EMPTY)
    gl.store(STATE + ((row * H + head) * SPLITS + place[3]) * 2, lse, mask=valid)


@gluon.jit
def _put_state(top, total, place, STATE, H: gl.constexpr, SPLITS: gl.constexpr):
    row, head, valid = _rows(place, H, SCORES)
    state = STATE + ((row * H + head) * SPLITS + place[3]) * 2
    gl.store(state, top, mask=valid)
    gl.store(state + 1, total, mask=valid)


@gluon.jit
def tell(gain, gain_at, made):
    """Hand a number for each row to the other warpgroup."""
    gain_at.store(gain)
    gl.thread_barrier()
    mbarrier.arrive(made)


@gluon.jit
def finish_left(acc, count, top, total, place, OUT, LSE, PARTIAL, STATE, COUNT, shared,
                 H: gl.constexpr, SPLITS: gl.constexpr, PAIR: gl.constexpr):  # fmt: skip
    """What the first warpgroup does with its sums: ``place`` says whose they are."""
    acc = with_rests(acc, place[6])
    fade_at, their_at, made = shared
    if PAIR:
        # The first of two splits leaves its sums to the second, which waits for the two halves.
        if count == 0:
            tell(gl.full_like(total, -1.0), fade_at, made)
            _put_partial(acc, place, PARTIAL, 0, H, 2)
            _put_state(top, total, place, STATE, H, 2)
            gl.thread_barrier()
            gl.atomic_add(COUNT, 1, sem="acq_rel", scope="gpu")
        else:
            while count < 4:
                count = gl.atomic_add(COUNT, 0, sem="acq_rel", scope="gpu")
            gl.thread_barrier()
            gl.store(COUNT, 0)  # ready for the next launch
            row, head, valid = _rows(place, H, SCORES)
            state = STATE + ((row * H + head) * 2 + 1 - place[3]) * 2
            their_top = gl.load(state, mask=valid, other=EMPTY, cache_modifier=".cg")
            their_total = gl.load(state + 1, mask=valid, other=0.0, cache_modifier=".cg")
            new_top = gl.maximum(top, their_top)
            gain, their_gain = gl.exp2(top - new_top), gl.exp2(their_top - new_top)
            first = place[3] == 0
            sums = gl.where(first, total, their_total) * gl.where(first, gain, their_gain)
            sums += gl.where(first, their_total, total) * gl.where(first, their_gain, gain)
            whole = 1.0 / gl.where(sums > 0, sums, 1.0)
            their_at.store(their_gain * whole)
            tell(gain * whole, fade_at, made)
            _put_lse(new_top, sums, place, LSE, H)
            _put_pair(acc, gain * whole, their_gain * whole, place, OUT, PARTIAL, 0, H)
    else:
        gain = 1.0 / gl.where(total > 0, total, 1.0)
        tell(gain, fade_at, made)
        if SPLITS > 1:
            _put_lse_of_split(top, total, place, STATE, H, SPLITS)
            gain = gl.convert_layout(gain, gl.SliceLayout(1, SUMS))
            _put_part(acc, gain, place, PARTIAL, STATE, 0, H, SPLITS)
        else:
            _put_lse(top, total, place, LSE, H)
            _put(acc, gl.convert_layout(gain, gl.SliceLayout(1, SUMS)), place, OUT, 0, H)


@gluon.jit
def finish_right(acc, place, OUT, PARTIAL, STATE, COUNT, shared,
                  H: gl.constexpr, SPLITS: gl.constexpr, PAIR: gl.constexpr):  # fmt: skip
    """The same of the second warpgroup, which was told what to do by the first."""
    acc = with_rests(acc, place[6])
    fade_at, their_at, _made = shared
    gain = fade_at.load(gl.SliceLayout(1, SUMS))
    if PAIR:
        if gl.max(gain, 0) < 0:
            _put_partial(acc, place, PARTIAL, HALF, H, 2)
            gl.thread_barrier()
            gl.atomic_add(COUNT, 1, sem="acq_rel", scope="gpu")
        else:
            their_gain = their_at.load(gl.SliceLayout(1, SUMS))
            _put_pair(acc, gain, their_gain, place, OUT, PARTIAL, HALF, H)
    elif SPLITS > 1:
        _put_part(acc, gain, place, PARTIAL, STATE, 1, H, SPLITS)
    else:
        _put(acc, gain, place, OUT, HALF, H)
