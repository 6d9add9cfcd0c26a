"""Moving whole blocks: gather, scatter, copy, swap, compact. Bytes, not numbers.

``pool`` is any tensor whose first dimension is the block id: one layer's ``k_cache``
``[num_blocks, block_size, Hkv, D]``, or the records of a cross-layer cache
``[num_blocks, block_bytes]``. Blocks that are not named are never touched, mapped or not.

Ids are int32, on the pool's device or on the host. Those on the host (and all for CPU pools) are
checked by value; those on a GPU are not read back, so there the caller answers for them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba import njit

from kvcached.errors import InvalidInput
from kvcached.kernels._simd import move_bytes
from kvcached.kernels.checks import index_tensor

DMA_BYTES = 1 << 20
"""From this size on, a run of blocks between host and device is left to the copy engines."""
_HOST = torch.device("cpu")


def gather_pages(pool: torch.Tensor, page_ids: Any, out: torch.Tensor) -> torch.Tensor:
    """out[i] = pool[page_ids[i]]; ``page_ids`` int32 ``[n]``, ``out [n, *pool.shape[1:]]``."""
    ids = _ids("page_ids", page_ids, pool)
    _check_pair("out", out, len(ids), pool)
    _move(out, None, pool, ids)
    return out


def scatter_pages(src: torch.Tensor, page_ids: Any, pool: torch.Tensor) -> None:
    """pool[page_ids[i]] = src[i]; ids must differ. Shapes as in ``gather_pages``."""
    ids = _ids("page_ids", page_ids, pool)
    _check_pair("src", src, len(ids), pool)
    check_distinct("page_ids", ids)
    _move(pool, ids, src, None)


def copy_pages(pool: torch.Tensor, src_ids: Any, dst_ids: Any) -> None:
    """pool[dst_ids[i]] = pool[src_ids[i]], as if at once: no destination may be a source."""
    sources, targets = _ids("src_ids", src_ids, pool), _ids("dst_ids", dst_ids, pool)
    _check_lengths(sources, targets)
    check_distinct("dst_ids", targets)
    _check_apart(sources, targets)
    _move(pool, targets, pool, sources)


def swap_pages(src: torch.Tensor, dst: torch.Tensor, src_ids: Any, dst_ids: Any) -> None:
    """dst[dst_ids[i]] = src[src_ids[i]] between two pools, of which either may be on the host.

    Both pools have the same entry shape and dtype; ids are host int32. Between host and device,
    runs of ids that are consecutive on both sides and contiguous go to the copy engines from
    ``DMA_BYTES`` on; smaller ones are moved by one kernel, if the host side is pinned. Queued on
    the current stream: synchronise before the host reads what came.
    """
    if src.shape[1:] != dst.shape[1:] or src.dtype != dst.dtype:
        raise InvalidInput(
            f"blocks of {tuple(src.shape[1:])} {src.dtype} cannot be swapped with blocks of "
            f"{tuple(dst.shape[1:])} {dst.dtype}"
        )
    sources = _host_ids("src_ids", src_ids, len(src))
    targets = _host_ids("dst_ids", dst_ids, len(dst))
    _check_lengths(sources, targets)
    check_distinct("dst_ids", targets)
    if src.device == dst.device:
        if src.data_ptr() == dst.data_ptr():
            _check_apart(sources, targets)
        _move(dst, targets, src, sources)
        return
    host = src if src.device == _HOST else dst
    small = np.ones(len(sources), bool)
    for start, end in _consecutive(sources, targets):
        a, b = int(sources[start]), int(targets[start])
        run = src[a : a + end - start], dst[b : b + end - start]
        whole = run[0].is_contiguous() and run[1].is_contiguous()
        if not host.is_pinned() or (whole and run[0].nbytes >= DMA_BYTES):
            run[1].copy_(run[0], non_blocking=True)
            small[start:end] = False
    if small.any():
        _move(dst, targets[small], src, sources[small])


def compact_pages(
    kv: torch.Tensor | Sequence[torch.Tensor], moves: Any, page_tables: torch.Tensor | None = None
) -> None:
    """Copy block ``moves[i, 0]`` to ``moves[i, 1]`` and rename it in the block tables.

    On a GPU one launch does both. ``kv`` is a pool, or K and V of a layer. ``moves`` are host
    int32 ``[n, 2]``. They must be acyclic: no target may be a source or occur twice, no source may
    occur twice. ``page_tables`` int32 ``[B, n]`` on the pool's device is rewritten in place, every
    entry that names a source. Sources keep their contents. Raises ``InvalidInput`` before
    anything is written.
    """
    pools = [kv] if isinstance(kv, torch.Tensor) else list(kv)
    if not 1 <= len(pools) <= 2 or len({(len(pool), pool.device) for pool in pools}) > 1:
        raise InvalidInput("kv must be one pool, or two of as many blocks on one device")
    pairs = index_tensor("moves", moves, 2, _HOST).numpy()
    if pairs.shape[1] != 2:
        raise InvalidInput(f"moves must be [n, 2], not {pairs.shape}")
    order = np.argsort(pairs[:, 0], kind="stable")
    sources, targets = (
        _host_ids("moves", np.ascontiguousarray(side), len(pools[0])) for side in pairs[order].T
    )
    for side in (sources, targets):
        check_distinct("moves", side)
    _check_apart(sources, targets)
    if page_tables is not None:
        _check_table(page_tables, pools[0].device)
    if not len(sources):
        return
    if not _on_gpu(pools[0]):
        for pool in pools:
            _move(pool, targets, pool, sources)
        if page_tables is not None and page_tables.numel():
            _rename(page_tables.numpy(), sources.astype(np.int32), targets.astype(np.int32))
        return
    from kvcached.kernels._move_triton import compact

    device = pools[0].device
    with current(device):
        compact(pools, _upload(sources, device), _upload(targets, device), page_tables)


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
    """Copy entries of the first dimension; ids on the host or the device, ``None`` counts."""
    if _on_gpu(dst) or _on_gpu(src):
        from kvcached.kernels._move_triton import copy_entries

        device = dst.device if dst.is_cuda else src.device
        with current(device):
            copy_entries(dst, _upload(to, device), src, _upload(frm, device))
        return
    size = dst.element_size()
    inner = _runs(dst.shape[1:], dst.stride()[1:], src.stride()[1:], size)
    to, frm = (_every(len(other)) if ids is None else ids for ids, other in ((to, frm), (frm, to)))
    to_offsets, from_offsets = to * (dst.stride(0) * size), frm * (src.stride(0) * size)
    _copy(dst.data_ptr(), src.data_ptr(), to_offsets, from_offsets, *inner)


def _on_gpu(tensor: torch.Tensor) -> bool:
    """Whether Triton moves it; the tests of its interpreter say yes for CPU tensors."""
    return bool(tensor.is_cuda)


def current(device: torch.device) -> Any:
    """Triton launches on the current device; for a CPU, of its interpreter, there is none."""
    return torch.cuda.device(device if device.type == "cuda" else -1)


def _upload(ids: Any, device: torch.device) -> torch.Tensor | None:
    if ids is None or isinstance(ids, torch.Tensor):
        return ids
    return torch.from_numpy(ids.astype(np.int32)).to(device, non_blocking=True)


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


@njit(cache=True, nogil=True)
def _rename(table, sources, targets):
    """Replace each entry that is in the sorted ``sources`` by its target."""
    for row in range(table.shape[0]):
        for column in range(table.shape[1]):
            at = np.searchsorted(sources, table[row, column])
            if at < len(sources) and sources[at] == table[row, column]:
                table[row, column] = targets[at]


def _every(count: int) -> Any:
    return np.arange(count, dtype=np.int64)


def _consecutive(a: Any, b: Any) -> list[tuple[int, int]]:
    """(start, end) of each run in which both ids rise by 1."""
    if not len(a):
        return []
    cuts = np.flatnonzero((np.diff(a) != 1) | (np.diff(b) != 1)) + 1
    bounds = [0, *cuts.tolist(), len(a)]
    return list(itertools.pairwise(bounds))


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
    """No id may occur twice, as far as that can be seen from the host."""
    if isinstance(ids, torch.Tensor):
        return
    ordered = np.sort(ids)
    twice = np.flatnonzero(ordered[1:] == ordered[:-1])
    if len(twice):
        raise InvalidInput(f"{name} holds {ordered[twice[0]]} twice; each target is written once")


def _check_apart(sources: Any, targets: Any) -> None:
    if isinstance(sources, torch.Tensor) or isinstance(targets, torch.Tensor):
        return
    both = sources[np.isin(sources, targets)]
    if len(both):
        raise InvalidInput(f"block {both[0]} is both a source and a destination")


def _check_lengths(sources: Any, targets: Any) -> None:
    if len(sources) != len(targets):
        raise InvalidInput(f"src_ids has {len(sources)} ids and dst_ids {len(targets)}")


def _check_table(table: Any, device: torch.device) -> None:
    checked = index_tensor("page_tables", table, 2, device)
    if checked is not table:
        raise InvalidInput("page_tables is rewritten in place: its last stride must be 1")


def _host_ids(name: str, ids: Any, count: int) -> Any:
    found = index_tensor(name, ids, 1, _HOST).numpy().astype(np.int64)
    check_range(name, found, count)
    return found


def _ids(name: str, ids: Any, pool: torch.Tensor) -> Any:
    """Ids on the host as checked int64 in numpy; those on the device as they are."""
    if isinstance(ids, torch.Tensor) and ids.is_cuda:
        return index_tensor(name, ids, 1, pool.device)
    return _host_ids(name, ids, len(pool))


def _check_pair(name: str, other: torch.Tensor, count: int, pool: torch.Tensor) -> None:
    shape = (count, *pool.shape[1:])
    if tuple(other.shape) != shape or (other.dtype, other.device) != (pool.dtype, pool.device):
        raise InvalidInput(
            f"{name} must be {shape} {pool.dtype} on {pool.device}, not {tuple(other.shape)} "
            f"{other.dtype} on {other.device}"
        )
