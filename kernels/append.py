"""``reshape_and_cache``: write new keys and values to their slots."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from kvcached.errors import InvalidInput
from kvcached.kernels.checks import index_tensor
from kvcached.kernels.move import check_distinct, check_range, check_rows, move_rows
from kvcached.kernels.view import KVView


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

    append_triton(key, value, kv, slots)


def _write_cpu(
    key: torch.Tensor, value: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: Any
) -> None:
    rows = np.flatnonzero(slots != -1)
    used = slots[rows]
    check_range("slot_mapping", used, k_cache.shape[0] * k_cache.shape[1])
    check_distinct("slot_mapping", used)
    move_rows(k_cache, used, key, rows)
    move_rows(v_cache, used, value, rows)
