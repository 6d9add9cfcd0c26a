"""Tiles of queries, keys and values of a cache, and of their scales, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def block_ids(
    TABLE, start, hi, floor, offs_n, BN: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    PAGED: tl.constexpr, LEFT: tl.constexpr,
):  # fmt: skip
    """Block ids of the tile at ``start``: one if a block holds whole tiles, else one a row.

    ``TABLE`` is at the sequence's row; only ids of rows in [floor, hi) are read.
    """
    if not PAGED:
        ids = start
    elif BLOCK_SIZE % BN == 0:
        ids = tl.load(TABLE + start // BLOCK_SIZE, mask=start < hi, other=0)
    else:
        pos = start + offs_n
        valid = pos < hi
        if LEFT:
            valid = valid & (pos >= floor)
        ids = tl.load(TABLE + pos // BLOCK_SIZE, mask=valid, other=0)
    return ids


@triton.jit
def places(
    ids, start, base, offs_n, BN: tl.constexpr, BLOCK_SIZE: tl.constexpr, PAGED: tl.constexpr
):
    """(block as int64, offset in it) of each row of the tile at ``start``."""
    if not PAGED:
        block, slot = (base + start + offs_n) // BLOCK_SIZE, (base + start + offs_n) % BLOCK_SIZE
    elif BLOCK_SIZE % BN == 0:
        block, slot = ids, start % BLOCK_SIZE + offs_n
    else:
        block, slot = ids, (start + offs_n) % BLOCK_SIZE
    return block.to(tl.int64), slot


@triton.jit
def tile(BASE, rows, offs, valid, D: tl.constexpr, DP: tl.constexpr):
    """Rows of K or V, ``[BN, DP]``; what is not valid is 0 and not read."""
    mask = valid[:, None]
    if D != DP:
        mask = mask & (offs < D)[None, :]
    return tl.load(BASE + rows[:, None] + offs[None, :], mask=mask, other=0)


@triton.jit
def first_scale(
    V_SCALE, ids, lo, hi, floor, base, offs_n, stride_vcb: tl.constexpr, stride_vcs: tl.constexpr,
    BN: tl.constexpr, BLOCK_SIZE: tl.constexpr, PAGED: tl.constexpr,
):  # fmt: skip
    """The largest scale of the tile at ``lo``, or 1."""
    block, slot = places(ids, lo, base, offs_n, BN, BLOCK_SIZE, PAGED)
    here = lo + offs_n
    at = V_SCALE + block * stride_vcb + slot * stride_vcs
    largest = tl.max(tl.load(at, mask=(here < hi) & (here >= floor), other=0.0), 0)
    return tl.where(largest > 0, largest, 1.0)


@triton.jit
def load_q(at, offs_d, valid, D: tl.constexpr, DP: tl.constexpr, COMPUTE: tl.constexpr):
    mask = valid[:, None]
    if D != DP:
        mask = mask & (offs_d < D)[None, :]
    return tl.load(at + offs_d[None, :], mask=mask, other=0.0).to(COMPUTE)
