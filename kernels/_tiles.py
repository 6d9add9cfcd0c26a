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

    ``TABLE`` is at the sequence's row; only ids of rows in [floor, hi) are read. Tiles begin at
    multiples of BN: so where they hold whole blocks, a row is in the same one of each.
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
        if BN % BLOCK_SIZE == 0:
            nth = start // BLOCK_SIZE + offs_n // BLOCK_SIZE
        else:
            nth = pos // BLOCK_SIZE
        ids = tl.load(TABLE + nth, mask=valid, other=0)
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
    elif BN % BLOCK_SIZE == 0:  # the same in every tile, so computed once
        block, slot = ids, offs_n % BLOCK_SIZE
    else:
        block, slot = ids, (start + offs_n) % BLOCK_SIZE
    return block.to(tl.int64), slot


@triton.jit
def tile(
    BASE, blocks, slots, offs, valid, D: tl.constexpr, DP: tl.constexpr, HELD: tl.constexpr
):  # fmt: skip
    """Rows of K or V, ``[BN, DP]``; what is not valid is 0 and not read.

    A row lies at ``blocks + slots`` from BASE. With HELD the addresses within a block stay in
    registers, if slots are the same in every tile: fewer instructions, two registers for each row
    that a thread copies.
    """
    mask = valid[:, None]
    if D != DP:
        mask = mask & (offs < D)[None, :]
    if HELD:
        at = BASE + slots[:, None] + offs[None, :] + blocks[:, None]
    else:
        at = BASE + (blocks + slots)[:, None] + offs[None, :]
    return tl.load(at, mask=mask, other=0)


@triton.jit
def fetch_ahead(
    TABLE, LENS, Q, seq, head, part, parts, max_q, stride_table, columns,
    stride_qt: tl.constexpr, stride_qh: tl.constexpr, G: tl.constexpr, PAGED: tl.constexpr,
    VARLEN: tl.constexpr,
):  # fmt: skip
    """What a part reads first, fetched into the L2 cache, where it may still be written.

    That is its share of the block ids, if the sequence is as long as the table is wide: up to 2048
    of them; its length and its queries.
    """
    LINE: tl.constexpr = 32  # ids of 4 bytes
    if PAGED:
        if columns > 0:
            share = tl.cdiv(columns, parts)
            nth = part * share + tl.minimum(tl.arange(0, 64) * LINE, share)
            row = TABLE + seq.to(tl.int64) * stride_table
            _fetch(row + tl.minimum(nth, columns - 1))
    else:
        _fetch(TABLE + seq + tl.arange(0, 1))
    _fetch(LENS + seq + tl.arange(0, 1))
    if not VARLEN:
        token = (seq * max_q).to(tl.int64)
        _fetch(Q + token * stride_qt + (head * G + tl.arange(0, 16) % G) * stride_qh)


@triton.jit
def _fetch(at):
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at.to(tl.int64, bitcast=True)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


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
