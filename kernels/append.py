"""``reshape_and_cache``: write new keys and values to their slots."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit

from kvcached.errors import InvalidInput
from kvcached.kernels._simd import move_bytes
from kvcached.kernels.checks import index_tensor
from kvcached.kernels.move import check_rows
from kvcached.kernels.view import KVView

_SKIP = -1


def reshape_and_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: Any,
    kv_cache_dtype: str = "auto",
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """Write ``key[i]``, ``value[i]`` to slot ``slot_mapping[i]`` (vLLM's argument order).

    ``key [T, Hkv, D]``, ``value [T, Hkv, Dv]``, of the caches' dtype and any strides but 1 in the
    last dimension; caches ``[num_blocks, block_size, Hkv, D]``; ``slot_mapping`` int32 ``[T]``,
    ``block * block_size + offset``, -1 to skip a token. On the CPU a slot that is named twice or
    does not exist raises ``InvalidInput``, and then nothing is written; on a GPU slots are not
    read back, so there the caller answers for them.
    """
    if kv_cache_dtype != "auto" or k_scale is not None or v_scale is not None:
        raise InvalidInput(
            f"kv_cache_dtype={kv_cache_dtype!r}: quantised caches are not supported yet",
            hint="Use kv_cache_dtype='auto' without scales.",
        )
    kv = KVView.from_tensors(k_cache, v_cache)
    slots = index_tensor("slot_mapping", slot_mapping, 1, kv.device)
    for name, rows, cache in (("key", key, k_cache), ("value", value, v_cache)):
        check_rows(name, rows, len(slots), cache)
        if rows.stride(-1) != 1 and rows.shape[-1] > 1:
            raise InvalidInput(f"{name} has stride {rows.stride(-1)} in its last dimension, not 1")
    if kv.device.type == "cpu":
        _write_cpu(key, value, k_cache, v_cache, slots.numpy())
        return
    from kvcached.kernels.decode import append_triton

    with torch.cuda.device(kv.device):  # Triton launches on the current one
        append_triton(key, value, kv, slots)


def _write_cpu(
    key: torch.Tensor, value: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: Any
) -> None:
    num_slots = k_cache.shape[0] * k_cache.shape[1]
    bad, twice = _first_bad(slots, num_slots)
    if twice:
        raise InvalidInput(f"slot_mapping holds {bad} twice; each slot is written once")
    if bad != _SKIP:
        raise InvalidInput(f"slot_mapping holds {bad}, but slots go from 0 to {num_slots - 1}")
    for rows, cache in ((key, k_cache), (value, v_cache)):
        _, block_size, heads, dim = cache.shape
        block, slot, head = cache.stride()[:3]
        places = (cache.data_ptr(), block_size, block, slot, head)
        source = (rows.data_ptr(), *rows.stride()[:2])
        _write(slots, places, source, heads, dim, cache.element_size())


@njit(cache=True, nogil=True)
def _first_bad(slots, num_slots):
    """(slot, named twice?) of a slot that cannot be written, else (-1, False)."""
    ordered = np.sort(slots)
    for i in range(len(ordered)):
        slot = ordered[i]
        if slot < _SKIP or slot >= num_slots:
            return slot, False
        if i > 0 and slot == ordered[i - 1] and slot != _SKIP:
            return slot, True
    return np.int32(_SKIP), False


@njit(cache=True, nogil=True)
def _write(slots, places, source, heads, dim, itemsize):
    """Copy row i to slot ``slots[i]``; addresses in bytes, strides in elements."""
    cache, block_size, block_stride, slot_stride, head_stride = places
    rows, row_stride, row_head_stride = source
    whole = head_stride == dim and row_head_stride == dim  # the heads lie side by side in both
    pieces, width = (1, heads * dim) if whole else (heads, dim)
    for i in range(len(slots)):
        slot = np.int64(slots[i])
        if slot == _SKIP:
            continue
        to = slot // block_size * block_stride + slot % block_size * slot_stride
        frm = i * row_stride
        for _ in range(pieces):
            move_bytes(cache + to * itemsize, rows + frm * itemsize, width * itemsize)
            to += head_stride
            frm += row_head_stride
