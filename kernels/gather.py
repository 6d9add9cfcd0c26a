"""``gather_kv``: the rows of sequences one after another, as they are stored or as they count."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import carray, njit

from kvcached.errors import InvalidInput
from kvcached.kernels._attend import load_stored
from kvcached.kernels._simd import narrow, pointer
from kvcached.kernels.append import check_scale
from kvcached.kernels.checks import index_tensor
from kvcached.kernels.cpu import KINDS, STORAGE, scale_steps
from kvcached.kernels.move import check_range, check_rows, current, move_rows
from kvcached.kernels.quant import INT4
from kvcached.kernels.view import KVView

WIDE = (torch.float32, torch.float16, torch.bfloat16)
"""What quantised rows may be gathered as."""


def gather_kv(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: Any,
    cu_seqlens_k: Any,
    out_k: torch.Tensor,
    out_v: torch.Tensor,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Copy the rows of all sequences one after another, or what they mean.

    Parameters
    ----------
    k_cache, v_cache:
        ``[num_blocks, block_size, Hkv, D]``, ``[..., Dv]`` of any dtype of a cache.
    page_table:
        int32 ``[B, n]``, the block ids.
    cu_seqlens_k:
        int32 ``[B + 1]``, where each sequence starts in the output; T is its last entry.
    out_k, out_v:
        ``[T, Hkv, D]``, ``[T, Hkv, Dv]`` of the caches' dtype, which then are copied bit by bit;
        with scales float32, float16 or bfloat16 with last stride 1 (int4: of twice the width).
    k_descale, v_descale:
        float32 scales of a quantised cache, ``()``, ``[Hkv]`` or ``[num_blocks, block_size, Hkv]``
        (int4: only these): what is stored times its scale, in float32, is rounded to the output.

    Returns ``out_k`` and ``out_v``. On a GPU table and starts are not read back: rows of the output
    behind the last entry are left as they were. Raises ``InvalidInput``.
    """
    kv = KVView.from_tensors(k_cache, v_cache)
    table = index_tensor("page_table", page_table, 2, kv.device)
    starts = index_tensor("cu_seqlens_k", cu_seqlens_k, 1, kv.device)
    if len(starts) != len(table) + 1:
        raise InvalidInput(f"cu_seqlens_k must rise from 0 and have {len(table) + 1} entries")
    on_cpu = kv.device.type == "cpu"  # lengths and ids by value
    slots = _slots(table.numpy(), starts.numpy().astype(np.int64), kv) if on_cpu else None
    rows = len(out_k) if slots is None else len(slots)
    sides = ("k", out_k, k_cache, k_descale), ("v", out_v, v_cache, v_descale)
    for name, out, cache, scale in sides:
        if k_descale is None and v_descale is None:
            check_rows(f"out_{name}", out, rows, cache)
        else:
            _check_wide(name, out, rows, cache, scale)
    if _on_gpu(k_cache):
        _gather_on_gpu(sides, table, starts)
        return out_k, out_v
    for _, out, cache, scale in sides:
        if scale is None:
            move_rows(out, np.arange(rows), cache, slots)
        else:
            _widen_on_cpu(out, cache, slots, scale)
    return out_k, out_v


def _gather_on_gpu(sides: Any, table: torch.Tensor, starts: torch.Tensor) -> None:
    from kvcached.kernels._gather_triton import gather_rows, gather_wide

    (_, out_k, k_cache, k_scale), (_, out_v, v_cache, v_scale) = sides
    with current(table.device):
        if k_scale is None:
            gather_rows(k_cache, v_cache, table, starts, out_k, out_v)
        else:
            gather_wide(k_cache, v_cache, k_scale, v_scale, table, starts, out_k, out_v)


def _on_gpu(tensor: torch.Tensor) -> bool:
    """Whether Triton gathers it; the tests of its interpreter say yes for CPU tensors."""
    return bool(tensor.is_cuda)


def _check_wide(
    name: str, out: torch.Tensor, rows: int, cache: torch.Tensor, scale: torch.Tensor | None
) -> None:
    """``out`` must have room for what the rows of a quantised cache mean."""
    if not cache.dtype.itemsize == 1:
        raise InvalidInput(
            f"{name}_descale is given, but the cache is {cache.dtype}", hint="Leave it out."
        )
    check_scale(f"{name}_descale", scale, cache)
    shape = (rows, cache.shape[2], cache.shape[3] * (2 if cache.dtype == INT4 else 1))
    fits = tuple(out.shape) == shape and out.device == cache.device and out.dtype in WIDE
    if not fits or (out.stride(-1) != 1 and shape[2] > 1):
        raise InvalidInput(
            f"out_{name} must be {shape} float32, float16 or bfloat16 on {cache.device} with last "
            f"stride 1, not {tuple(out.shape)} {out.dtype} on {out.device} with strides "
            f"{out.stride()}"
        )


def _slots(table: Any, starts: Any, kv: KVView) -> Any:
    """The slots of all rows of all sequences, one after another, checked."""
    counts, size = np.diff(starts), kv.block_size
    if (counts < 0).any() or starts[0] != 0:
        raise InvalidInput(f"cu_seqlens_k must rise from 0 and have {len(table) + 1} entries")
    if len(counts) and counts.max() > table.shape[1] * size:
        raise InvalidInput(
            f"page_table has {table.shape[1]} columns of {size} tokens, too few for {counts.max()}"
        )
    seqs = np.repeat(np.arange(len(counts)), counts)
    pos = np.arange(len(seqs)) - starts[seqs]
    blocks = table[seqs, pos // size].astype(np.int64)
    check_range("page_table", blocks, kv.num_blocks)
    return blocks * size + pos % size


def _widen_on_cpu(out: torch.Tensor, cache: torch.Tensor, slots: Any, scale: torch.Tensor) -> None:
    """Rows of a cache at ``slots``, times their scales, to the rows of ``out``."""
    _widen_rows(
        slots, (cache.data_ptr(), cache.shape[1], *cache.stride()[:3]),
        (scale.data_ptr(), *scale_steps(scale)), (out.data_ptr(), *out.stride()[:2]),
        tuple(out.shape[1:]), KINDS[cache.dtype], STORAGE[out.dtype](0), out.element_size(),
    )  # fmt: skip


@njit(cache=True, nogil=True)
def _widen_rows(slots, cache, scale, out, shape, kind, like, itemsize):
    """Addresses in bytes, strides in elements, of which a cache has one a byte."""
    base, block_size, block_stride, slot_stride, head_stride = cache
    scale_base, scale_block, scale_slot, scale_head = scale
    to, row_stride, to_head = out
    heads, dim = shape
    wide = np.empty(dim, np.float32)
    for i in range(len(slots)):
        block, offset = slots[i] // block_size, slots[i] % block_size
        for head in range(heads):
            frm = base + block * block_stride + offset * slot_stride + head * head_stride
            place = block * scale_block + offset * scale_slot + head * scale_head
            factor = carray(pointer(scale_base + 4 * place, np.float32(0)), 1)[0]
            load_stored(wide, frm, dim, kind, factor)
            row = carray(pointer(to + (i * row_stride + head * to_head) * itemsize, like), dim)
            for d in range(dim):
                row[d] = narrow(wide[d], like)
