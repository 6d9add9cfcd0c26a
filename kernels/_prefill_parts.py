"""What the Triton kernels of prefill and of MLA share: tiles, block ids, splits, launches."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from kvcached.kernels._bound import Launch, launch_of
from kvcached.kernels._launch import TYPES
from kvcached.kernels.decode import multiprocessors

if TYPE_CHECKING:
    from kvcached.kernels._workspace import Memory
    from kvcached.kernels.checks import AttentionCall

LOG2_E = tl.constexpr(1.4426950408889634)
ALIGNED = frozenset({
    "Q", "K", "V", "KV", "TABLE", "LENS", "Q_STARTS", "PARTIAL", "STATE", "OUT", "LSE",
    "stride_qt", "stride_qh", "stride_ot", "stride_oh", "stride_block", "stride_slot",
    "stride_kb", "stride_ks", "stride_kh", "stride_vb", "stride_vs", "stride_vh",
})  # fmt: skip
"""Arguments that are often multiples of 16, of which the compiler makes wide accesses."""
EMPTY = tl.constexpr(-1.0e30)
"""The running maximum of nothing; not -inf, or what is empty would make NaN."""


@triton.jit
def sequence_of(tile, Q_STARTS, batch, TOKENS: tl.constexpr):
    """(sequence, its first token here, where its tokens start, how many) of a tile of a ragged q.

    Sequence i takes the tiles from ``Q_STARTS[i] // TOKENS + i`` on, which leaves it at least as
    many as it needs; so the host bounds the grid by ``T // TOKENS + B`` and knows no length.
    """
    seq = -1
    offs = tl.arange(0, 256)
    for first in range(0, batch, 256):
        valid = first + offs < batch
        starts = tl.load(Q_STARTS + first + offs, mask=valid, other=0)
        seq += tl.sum((valid & (starts // TOKENS + first + offs <= tile)).to(tl.int32), 0)
    start = tl.load(Q_STARTS + seq)
    queries = tl.load(Q_STARTS + seq + 1) - start
    return seq, (tile - start // TOKENS - seq) * TOKENS, start, queries


@triton.jit
def block_ids(
    ROW, at, stop, BN: tl.constexpr, BLOCK_SIZE: tl.constexpr, PAGED: tl.constexpr,
):  # fmt: skip
    """Ids of the blocks of positions ``at .. at + BN``; one id if they all lie in one block.

    ``at`` is a multiple of BN, which saves most of the divisions.
    """
    ids = 0
    if PAGED:
        if BLOCK_SIZE % BN == 0:
            ids = tl.load(ROW + at // BLOCK_SIZE, mask=at < stop, other=0)
        elif BN % BLOCK_SIZE == 0:
            offs = tl.arange(0, BN)
            ids = tl.load(
                ROW + at // BLOCK_SIZE + offs // BLOCK_SIZE, mask=at + offs < stop, other=0
            )
        else:
            pos = at + tl.arange(0, BN)
            ids = tl.load(ROW + pos // BLOCK_SIZE, mask=pos < stop, other=0)
    return ids


@triton.jit
def places(
    ids, first, at, valid, BN: tl.constexpr, BLOCK_SIZE: tl.constexpr, PAGED: tl.constexpr,
):  # fmt: skip
    """(block, slot in it) of positions ``at .. at + BN``; ``first`` is slot 0 if unpaged."""
    offs = tl.arange(0, BN)
    block, slot = ids, (at + offs) % BLOCK_SIZE
    if not PAGED:
        pos = tl.where(valid, first + at + offs, 0)
        block, slot = pos // BLOCK_SIZE, pos % BLOCK_SIZE
    elif BN % BLOCK_SIZE == 0:
        slot = offs % BLOCK_SIZE
    elif BLOCK_SIZE % BN == 0:
        slot = at % BLOCK_SIZE + offs
    return block.to(tl.int64), slot


@triton.jit
def load_rows(
    BASE, row, valid, FIRST: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Elements ``FIRST .. FIRST + SIZE`` of rows of ``DIM`` elements; 0 where there are none."""
    element = FIRST + tl.arange(0, SIZE)
    mask = valid[:, None]
    if FIRST + SIZE > DIM:
        mask = mask & (element < DIM)[None, :]
    tile = tl.load(BASE + row[:, None] + element[None, :], mask=mask, other=0.0)
    return tile.to(tl.float32) if UPCAST else tile


@triton.jit
def store_rows(BASE, row, valid, tile, FIRST: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr):
    """The counterpart of ``load_rows``."""
    element = FIRST + tl.arange(0, SIZE)
    mask = valid[:, None] & (element < DIM)[None, :]
    at = BASE + row[:, None] + element[None, :]
    tl.store(at, tile.to(BASE.dtype.element_ty), mask=mask)


@triton.jit
def put_partial(PARTIAL, STATE, own, valid, acc, top, total, FIRST: tl.constexpr,
                SIZE: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Store columns ``FIRST .. FIRST + SIZE`` of ``WIDTH`` of what one split has found."""
    at = PARTIAL + own[:, None] * WIDTH + FIRST + tl.arange(0, SIZE)[None, :]
    tl.store(at, acc, mask=valid[:, None])
    if FIRST == 0:
        tl.store(STATE + own * 2, top, mask=valid)
        tl.store(STATE + own * 2 + 1, total, mask=valid)


@triton.jit
def merge_partials(PARTIAL, STATE, own, valid, BM: tl.constexpr, SPLITS: tl.constexpr,
                   WIDTH: tl.constexpr):  # fmt: skip
    """(acc, top, total) of all splits of a tile, always merged in the same order."""
    columns = tl.arange(0, WIDTH)
    top = tl.full([BM], EMPTY, tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, WIDTH], tl.float32)
    for split in tl.range(0, SPLITS):
        # .cg: other programs wrote these, and the L1 cache is not coherent
        state = STATE + (own + split) * 2
        their_top = tl.load(state, mask=valid, other=0.0, cache_modifier=".cg")
        their_total = tl.load(state + 1, mask=valid, other=0.0, cache_modifier=".cg")
        at = PARTIAL + (own + split)[:, None] * WIDTH + columns[None, :]
        part = tl.load(at, mask=valid[:, None], other=0.0, cache_modifier=".cg")
        new_top = tl.maximum(top, their_top)
        fade, gain = tl.exp2(top - new_top), tl.exp2(their_top - new_top)
        acc = acc * fade[:, None] + part * gain[:, None]
        total = total * fade + their_total * gain
        top = new_top
    return acc, top, total


@triton.jit
def merge_kernel(
    PARTIAL, STATE, SINKS, OUT, LSE, heads, stride_ot, stride_oh,
    DV: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr, PADDED: tl.constexpr, AT_ONCE: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """Merge COLUMNS of the splits of one (token, head): many are too much for the last split."""
    token, head, piece = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    row = token * heads + head
    splits, columns = tl.arange(0, PADDED), piece * COLUMNS + tl.arange(0, COLUMNS)
    state = STATE + (row * SPLITS + splits) * 2
    tops = tl.load(state, mask=splits < SPLITS, other=EMPTY)
    totals = tl.load(state + 1, mask=splits < SPLITS, other=0.0)
    top = tl.max(tops, 0)
    total = tl.sum(tl.exp2(tops - top) * totals, 0)
    acc = tl.zeros([COLUMNS], tl.float32)
    for first in tl.static_range(0, SPLITS, AT_ONCE):
        split = first + tl.arange(0, AT_ONCE)
        tops = tl.load(STATE + (row * SPLITS + split) * 2, mask=split < SPLITS, other=EMPTY)
        at = PARTIAL + (row * SPLITS + split)[:, None] * WIDTH + columns[None, :]
        part = tl.load(at, mask=(split < SPLITS)[:, None] & (columns < DV)[None, :], other=0.0)
        acc += tl.sum(part * tl.exp2(tops - top)[:, None], 0)
    denominator = total
    if HAS_SINKS:
        denominator = with_sink(total, top, tl.load(SINKS + head))
    out = acc / tl.where(total > 0, denominator, 1.0)
    at = OUT + token * stride_ot + head * stride_oh + columns
    tl.store(at, out.to(OUT.dtype.element_ty), mask=columns < DV)
    if piece == 0:
        tl.store(LSE + row, lse_of(top, total))


@triton.jit
def with_sink(total, top, sink):
    """The softmax's denominator with a sink, which is not in the LSE."""
    return total + tl.exp2(tl.where(total > 0, sink * LOG2_E - top, 0.0))


@triton.jit
def lse_of(top, total):
    """Natural-log LSE from base-2 ``top`` and ``total``; -inf where no key was seen."""
    found = total > 0
    return tl.where(found, (top + tl.log2(tl.where(found, total, 1.0))) / LOG2_E, float("-inf"))


@functools.cache
def types_of(dtype: torch.dtype) -> dict[str, str]:
    """Triton's types of the arguments of these kernels that are no i32, for q's dtype."""
    floats = ("SINKS", "SLOPES", "KV_SCALE", "PARTIAL", "STATE", "LSE")
    return (
        {"Q": f"*{TYPES[dtype]}", "OUT": f"*{TYPES[dtype]}"}
        | dict.fromkeys(floats, "*fp32")
        | dict.fromkeys(("TABLE", "LENS", "Q_STARTS", "FINISHED"), "*i32")
        | dict.fromkeys(("K", "V", "KV"), "i64")
        | dict.fromkeys(("scale", "softcap"), "fp32")
    )


def launch(
    kernel: Any, grid: tuple[int, int, int], call: AttentionCall, arguments: tuple[Any, ...],
    constants: dict[str, Any], num_warps: int, **options: int,
) -> Launch:  # fmt: skip
    """The launch of a kernel with its arguments that are no constants, in order.

    Strides are arguments: as constants they cost registers, for tiles spill.
    """
    return launch_of(kernel, grid, arguments, constants, types_of(call.q.dtype), call.q.device,
                     num_warps, ALIGNED, **options)  # fmt: skip


def splits_of(
    call: AttentionCall, items: int, *, programs_per_sm: int, most: int, least: int
) -> int:
    """Parts of each sequence: enough to fill the GPU, each with ``least`` of the longest's tokens.

    A power of two, at most ``most``: few values, since each is a kernel of its own.
    """
    if call.q.device.type != "cuda":
        return 1
    programs = programs_per_sm * multiprocessors(call.q.device)
    wanted = min(most, programs // items, call.longest // least)
    return 1 << max(0, wanted.bit_length() - 1)


def with_positive_scale(call: AttentionCall) -> tuple[torch.Tensor, float]:
    """``q`` and a scale above 0 that give the same scores.

    They are scaled after their maximum is found, which a negative or zero scale would upset.
    """
    q, scale = (call.q, call.scale) if call.scale >= 0 else (-call.q, -call.scale)
    return q, max(scale, 1e-30)


def merge_config(dim_v: int, splits: int, width: int) -> dict[str, int]:
    """Compile-time sizes of ``merge_kernel``; few columns a program, so that many SMs take part."""
    padded = triton.next_power_of_2(splits)
    return {"DV": dim_v, "WIDTH": width, "COLUMNS": min(128, triton.next_power_of_2(dim_v)),
            "SPLITS": splits, "PADDED": padded, "AT_ONCE": min(32, padded)}  # fmt: skip


def merge(call: AttentionCall, partial: Any, state: Any, splits: int, width: int) -> Launch:
    """The launch of ``merge_kernel`` over ``call.out [T, Hq, Dv]``."""
    tokens, heads, dim_v = call.out.shape
    constants = merge_config(dim_v, splits, width) | {"HAS_SINKS": call.sinks is not None}
    return launch(
        merge_kernel, (tokens, heads, triton.cdiv(dim_v, constants["COLUMNS"])), call,
        (partial, state, call.sinks, call.out, call.lse, heads, *call.out.stride()[:2]), constants,
        num_warps=4,
    )  # fmt: skip


def workspace(
    call: AttentionCall, splits: int, width: int, items: int, memory: Memory
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Partial sums, (top, total) pairs and counters; see ``Workspace``."""
    if splits == 1:
        return None, None, None
    rows = call.lse.numel() * splits
    work = memory(items, rows * width, rows, call.q.device)
    return work.partial, work.state, work.finished


def chunks(dim: int) -> tuple[int, int]:
    """Two powers of two that cover ``dim`` columns with little to spare; the second may be 0.

    96 is 64 + 32 and 192 is 128 + 64, where one power of two would compute a third for nothing.
    """
    first = max(16, 1 << (dim.bit_length() - 1))
    return first, 0 if dim <= first else max(16, triton.next_power_of_2(dim - first))
