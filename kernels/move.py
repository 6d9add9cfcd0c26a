"""Moving cache rows and whole blocks: gather, scatter, copy. Bytes only, whatever the dtype.

``pool`` is any tensor whose first dimension is the block id: one layer's ``k_cache``
``[num_blocks, block_size, Hkv, D]``, or the records of a cross-layer cache
``[num_blocks, block_bytes]``. Blocks that are not named are never touched.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit

from kvcached.errors import InvalidInput
from kvcached.kernels._simd import move_bytes
from kvcached.kernels.checks import index_tensor
from kvcached.kernels.view import KVView


def gather_pages(pool: torch.Tensor, page_ids: Any, out: torch.Tensor) -> torch.Tensor:
    """out[i] = pool[page_ids[i]]; ``page_ids`` int32 ``[n]``, ``out [n, *pool.shape[1:]]``."""
    ids = _ids("page_ids", page_ids, pool)
    _check_pair("out", out, len(ids), pool)
    _move(out, _every(ids), pool, ids)
    return out


def scatter_pages(src: torch.Tensor, page_ids: Any, pool: torch.Tensor) -> None:
    """pool[page_ids[i]] = src[i]; ids must differ. Shapes as in ``gather_pages``."""
    ids = _ids("page_ids", page_ids, pool)
    _check_pair("src", src, len(ids), pool)
    check_distinct("page_ids", ids)
    _move(pool, ids, src, _every(ids))


def copy_pages(pool: torch.Tensor, src_ids: Any, dst_ids: Any) -> None:
    """pool[dst_ids[i]] = pool[src_ids[i]], as if at once: no destination may be a source."""
    sources, targets = _ids("src_ids", src_ids, pool), _ids("dst_ids", dst_ids, pool)
    if len(sources) != len(targets):
        raise InvalidInput(f"src_ids has {len(sources)} ids and dst_ids {len(targets)}")
    check_distinct("dst_ids", targets)
    both = np.intersect1d(sources, targets)
    if len(both):
        raise InvalidInput(f"block {both[0]} is both a source and a destination")
    _move(pool, targets, pool, sources)


def gather_kv(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: Any,
    cu_seqlens_k: Any,
    out_k: torch.Tensor,
    out_v: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Copy the rows of all sequences one after another: ``out_k [T, Hkv, D]``, ``out_v``.

    ``page_table`` int32 ``[B, n]`` holds the block ids, ``cu_seqlens_k`` int32 ``[B + 1]`` where
    each sequence starts in the output; T is its last entry.
    """
    kv = KVView.from_tensors(k_cache, v_cache)
    require_cpu("gather_kv", kv.device)
    table = index_tensor("page_table", page_table, 2, kv.device).numpy()
    starts = index_tensor("cu_seqlens_k", cu_seqlens_k, 1, kv.device).numpy().astype(np.int64)
    slots = _slots(table, starts, kv)
    for name, out, cache in (("out_k", out_k, k_cache), ("out_v", out_v, v_cache)):
        check_rows(name, out, len(slots), cache)
        move_rows(out, np.arange(len(slots)), cache, slots)
    return out_k, out_v


def _slots(table: Any, starts: Any, kv: KVView) -> Any:
    """The slots of all rows of all sequences, one after another, checked."""
    counts, size = np.diff(starts), kv.block_size
    if len(counts) != len(table) or (counts < 0).any() or (len(starts) and starts[0] != 0):
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


def move_rows(dst: torch.Tensor, to: Any, src: torch.Tensor, frm: Any) -> None:
    """Copy row ``frm[i]`` of ``src`` to row ``to[i]`` of ``dst``; one of the two is a cache.

    A cache ``[num_blocks, block_size, Hkv, D]`` counts rows as slots; the other is ``[T, Hkv, D]``.
    """
    to_offsets, from_offsets = _row_offsets(dst, to), _row_offsets(src, frm)
    inner = _runs(dst.shape[-2:], dst.stride()[-2:], src.stride()[-2:], dst.element_size())
    _copy(dst.data_ptr(), src.data_ptr(), to_offsets, from_offsets, *inner)


def _row_offsets(tensor: torch.Tensor, rows: Any) -> Any:
    rows, size = np.asarray(rows, np.int64), tensor.element_size()
    if tensor.dim() == 3:
        return rows * (tensor.stride(0) * size)
    blocks, offsets = np.divmod(rows, tensor.shape[1])
    return blocks * (tensor.stride(0) * size) + offsets * (tensor.stride(1) * size)


def _move(dst: torch.Tensor, to: Any, src: torch.Tensor, frm: Any) -> None:
    """Copy entries of the first dimension."""
    size = dst.element_size()
    inner = _runs(dst.shape[1:], dst.stride()[1:], src.stride()[1:], size)
    to_offsets, from_offsets = to * (dst.stride(0) * size), frm * (src.stride(0) * size)
    _copy(dst.data_ptr(), src.data_ptr(), to_offsets, from_offsets, *inner)


def _runs(shape: Any, to: Any, frm: Any, itemsize: int) -> tuple[Any, Any, int]:
    """Byte offsets (destination, source) of the longest runs that are contiguous in both."""
    run, dims = 1, len(shape)
    while dims and (shape[dims - 1] == 1 or to[dims - 1] == frm[dims - 1] == run):
        run *= shape[dims - 1]
        dims -= 1
    offsets = []
    for strides in (to, frm):
        total = np.zeros(1, np.int64)
        for length, stride in zip(shape[:dims], strides[:dims], strict=True):
            steps = np.arange(length, dtype=np.int64) * (stride * itemsize)
            total = (total[:, None] + steps[None, :]).reshape(-1)
        offsets.append(total)
    return offsets[0], offsets[1], run * itemsize


@njit(cache=True, nogil=True)
def _copy(dst, src, to, frm, inner_to, inner_from, nbytes):
    for i in range(len(to)):
        for j in range(len(inner_to)):
            move_bytes(dst + to[i] + inner_to[j], src + frm[i] + inner_from[j], nbytes)


def _every(ids: Any) -> Any:
    return np.arange(len(ids), dtype=np.int64)


def require_cpu(call: str, device: torch.device) -> None:
    """Refuse what has no GPU kernel yet."""
    if device.type != "cpu":
        raise InvalidInput(f"{call} has no kernel for {device} yet; it takes CPU tensors")


def check_rows(name: str, rows: torch.Tensor, count: int, cache: torch.Tensor) -> None:
    """``rows`` must be ``[count, Hkv, D]`` of the cache's dtype and device."""
    shape = (count, *cache.shape[2:])
    if tuple(rows.shape) != shape or (rows.dtype, rows.device) != (cache.dtype, cache.device):
        raise InvalidInput(
            f"{name} must be {shape} {cache.dtype} on {cache.device}, not {tuple(rows.shape)} "
            f"{rows.dtype} on {rows.device}"
        )


def check_range(name: str, ids: Any, count: int) -> None:
    """All of ``ids`` must lie in ``[0, count)``."""
    if len(ids) and (ids.min() < 0 or ids.max() >= count):
        bad = ids.min() if ids.min() < 0 else ids.max()
        raise InvalidInput(f"{name} holds {bad}, but ids go from 0 to {count - 1}")


def check_distinct(name: str, ids: Any) -> None:
    """No id may occur twice."""
    ordered = np.sort(ids)
    twice = np.flatnonzero(ordered[1:] == ordered[:-1])
    if len(twice):
        raise InvalidInput(f"{name} holds {ordered[twice[0]]} twice; each target is written once")


def _ids(name: str, ids: Any, pool: torch.Tensor) -> Any:
    require_cpu(f"moving blocks by {name}", pool.device)
    found = index_tensor(name, ids, 1, pool.device).numpy().astype(np.int64)
    check_range(name, found, pool.shape[0])
    return found


def _check_pair(name: str, other: torch.Tensor, count: int, pool: torch.Tensor) -> None:
    shape = (count, *pool.shape[1:])
    if tuple(other.shape) != shape or (other.dtype, other.device) != (pool.dtype, pool.device):
        raise InvalidInput(
            f"{name} must be {shape} {pool.dtype} on {pool.device}, not {tuple(other.shape)} "
            f"{other.dtype} on {other.device}"
        )
