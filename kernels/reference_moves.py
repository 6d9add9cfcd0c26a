"""Twins of what writes, gathers and moves rows and blocks: see ``reference``, which has them too.

One row or block after another, to be read. What is stored is stored in the cache's dtype, so only
what is gathered to be used is float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kvcached.kernels.quant import INT4, dequantize, quantize, row_scales

_STORED = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
    "int8": torch.int8,
    "int4": INT4,
}


def rows_at(
    cache: torch.Tensor, slots: torch.Tensor, scale: torch.Tensor | None = None
) -> torch.Tensor:
    """The rows in ``slots [n]``: ``[n, Hkv, D]`` float64; with a ``scale``, what they mean."""
    places = slots.long() // cache.shape[1], slots.long() % cache.shape[1]
    rows = cache[places]
    if scale is None:
        return rows.double()
    return dequantize(rows, scale[places] if scale.dim() == 3 else scale, torch.float64)


def slots_of(blocks: torch.Tensor, length: int, block_size: int) -> torch.Tensor:
    """The slots of the first ``length`` tokens of the sequence in ``blocks``."""
    pos = torch.arange(length, device=blocks.device)
    return blocks.long()[pos // block_size] * block_size + pos % block_size


def rows_of(
    cache: torch.Tensor, blocks: torch.Tensor, length: int, scale: torch.Tensor | None = None
) -> torch.Tensor:
    """The first ``length`` rows of the sequence in ``blocks``: ``[length, Hkv, D]`` float64.

    With a ``scale`` as in ``quant.py``: what they mean.
    """
    return rows_at(cache, slots_of(blocks, length, cache.shape[1]), scale)


def reshape_and_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_cache_dtype: str = "auto",
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """Twin of ``kernels.reshape_and_cache``; writes the caches, and scales that go by row."""
    for rows, cache, scale in ((key, k_cache, k_scale), (value, v_cache, v_scale)):
        stored = _STORED.get(kv_cache_dtype, cache.dtype)
        for row, slot in zip(rows, slot_mapping.tolist(), strict=True):
            block, offset = divmod(slot, cache.shape[1])
            if slot < 0:
                continue
            if scale is None:
                cache[block, offset] = row
                continue
            own = scale
            if scale.dim() == 3:
                own = scale[block, offset] = row_scales(row, stored)
            cache.view(stored)[block, offset] = quantize(row, own, stored)


def concat_and_cache_mla(
    kv_c: torch.Tensor,
    k_pe: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_cache_dtype: str = "auto",
    scale: torch.Tensor | None = None,
) -> None:
    """Twin of ``kernels.concat_and_cache_mla``: a row is a latent, and behind it a rotary key."""
    stored = _STORED.get(kv_cache_dtype, kv_cache.dtype)
    for latent, rotary, slot in zip(kv_c, k_pe, slot_mapping.tolist(), strict=True):
        block, offset = divmod(slot, kv_cache.shape[1])
        row = torch.cat([latent, rotary])
        if slot < 0:
            continue
        if scale is not None:
            row = quantize(row[None], scale.reshape(()), stored)[0]
        kv_cache.view(stored)[block, offset] = row


def gather_kv(
    k_cache: torch.Tensor, v_cache: torch.Tensor, page_table: torch.Tensor, cu_seqlens_k: Any,
    k_descale: torch.Tensor | None = None, v_descale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Twin of ``kernels.gather_kv``; returns new float64 tensors."""
    lengths = torch.as_tensor(cu_seqlens_k).diff().tolist()
    rows = [
        torch.cat([rows_of(cache, page_table[i], n, scale) for i, n in enumerate(lengths)])
        for cache, scale in ((k_cache, k_descale), (v_cache, v_descale))
    ]
    return rows[0], rows[1]


def gather_pages(pool: torch.Tensor, page_ids: torch.Tensor) -> torch.Tensor:
    """Twin of ``kernels.gather_pages``; returns a new tensor of the pool's dtype."""
    out = torch.empty(len(page_ids), *pool.shape[1:], dtype=pool.dtype, device=pool.device)
    for i, block in enumerate(page_ids.tolist()):
        out[i] = pool[block]
    return out


def scatter_pages(src: torch.Tensor, page_ids: torch.Tensor, pool: torch.Tensor) -> None:
    """Twin of ``kernels.scatter_pages``."""
    for i, block in enumerate(page_ids.tolist()):
        pool[block] = src[i]


def copy_pages(pool: torch.Tensor, src_ids: torch.Tensor, dst_ids: torch.Tensor) -> None:
    """Twin of ``kernels.copy_pages``: all sources are read before any is written."""
    scatter_pages(gather_pages(pool, src_ids), dst_ids, pool)


def swap_pages(
    src: torch.Tensor, dst: torch.Tensor, src_ids: torch.Tensor, dst_ids: torch.Tensor
) -> None:
    """Twin of ``kernels.swap_pages``, for pools on one device or two."""
    for source, target in zip(src_ids.tolist(), dst_ids.tolist(), strict=True):
        dst[target] = src[source].to(dst.device)


def compact_pages(
    kv: torch.Tensor | Sequence[torch.Tensor],
    moves: torch.Tensor,
    page_tables: torch.Tensor | None = None,
) -> None:
    """Twin of ``kernels.compact_pages``."""
    renamed: dict[int, int] = dict(moves.tolist())
    for pool in [kv] if isinstance(kv, torch.Tensor) else kv:
        for source, target in renamed.items():
            pool[target] = pool[source]
    if page_tables is not None:
        for row in page_tables:
            for column, block in enumerate(row.tolist()):
                row[column] = renamed.get(block, block)
