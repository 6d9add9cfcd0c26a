"""``reshape_and_cache``, ``concat_and_cache_mla``: write new keys and values to their slots."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numba import njit

from kvcached.errors import InvalidInput
from kvcached.kernels import quant
from kvcached.kernels._simd import move_bytes
from kvcached.kernels.checks import index_tensor
from kvcached.kernels.move import check_rows

if TYPE_CHECKING:
    from kvcached.kernels._bound import Launch
    from kvcached.kernels._repeat import KnownAppends

_SKIP = -1
_KINDS = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
    "int8": torch.int8,
    "int4": quant.INT4,
}


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

    Parameters
    ----------
    key, value:
        ``[T, Hkv, D]``, ``[T, Hkv, Dv]``: float32, float16, bfloat16 (float64 if not quantised), of
        any strides but 1 in the last dimension.
    k_cache, v_cache:
        ``[num_blocks, block_size, Hkv, D]`` of the dtype that is stored: that of the rows, or one
        of ``quant.py`` (int4: uint8 of half the width).
    slot_mapping:
        int32 ``[T]``, ``block * block_size + offset``, -1 to skip a token.
    kv_cache_dtype:
        ``"fp8"``, ``"fp8_e4m3"``, ``"fp8_e5m2"`` (these also into uint8 caches, as vLLM keeps
        them), ``"int8"``, ``"int4"``; ``"auto"``: as the cache's dtype says.
    k_scale, v_scale:
        float32 scales of a quantised cache. ``()`` or ``[Hkv]`` are given and read; ``[num_blocks,
        block_size, Hkv]`` are written: each row's largest over the largest that can be stored.

    On the CPU a slot that is named twice or does not exist raises ``InvalidInput``, and then
    nothing is written; on a GPU slots are not read back, so there the caller answers for them.
    """
    given = key, value, slot_mapping, k_cache, v_cache, k_scale, v_scale
    if _on_gpu(k_cache) and _known().launch(given, kv_cache_dtype):
        return
    call = check_append(key, value, k_cache, v_cache, slot_mapping, kv_cache_dtype, k_scale,
                        v_scale)  # fmt: skip
    if _on_gpu(call.k_cache):
        device = call.k_cache.device
        with torch.cuda.device(device if device.type == "cuda" else -1):  # launches are there
            steps = prepare(call)
            for step in steps:
                step()
        if call.slots is slot_mapping and steps:
            _known().learn(given, kv_cache_dtype, steps)
        return
    slots = call.slots.numpy()
    _check_slots(slots, call.k_cache)
    _write_cpu(key, call.k_cache, slots, k_scale)
    _write_cpu(value, call.v_cache, slots, v_scale)


@dataclass(frozen=True, slots=True)
class AppendCall:
    """The checked arguments of ``reshape_and_cache``; caches have the dtype that they store."""

    key: torch.Tensor
    value: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    slots: torch.Tensor
    k_scale: torch.Tensor | None
    v_scale: torch.Tensor | None


def check_append(
    key: torch.Tensor, value: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
    slot_mapping: Any, kv_cache_dtype: str = "auto", k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> AppendCall:  # fmt: skip
    """Check all that can be seen without reading memory; raises ``InvalidInput``."""
    k_cache, v_cache = _stored_as(kv_cache_dtype, k_cache), _stored_as(kv_cache_dtype, v_cache)
    _check_pair(key, value, k_cache, v_cache)
    slots = index_tensor("slot_mapping", slot_mapping, 1, k_cache.device)
    sides = (("key", key, k_cache, k_scale), ("value", value, v_cache, v_scale))
    quantised = k_cache.dtype != key.dtype
    for name, rows, cache, scale in sides:
        if quantised:
            _check_quantised(name, rows, len(slots), cache)
            check_scale(f"{name[0]}_scale", scale, cache)
        else:
            check_rows(name, rows, len(slots), cache)
            _refuse_scale(f"{name[0]}_scale", scale)
        if rows.stride(-1) != 1 and rows.shape[-1] > 1:
            raise InvalidInput(f"{name} has stride {rows.stride(-1)} in its last dimension, not 1")
    if len({scale.dim() == 3 for scale in (k_scale, v_scale) if scale is not None}) > 1:
        raise InvalidInput("k_scale and v_scale must both be given, or both be made by row")
    return AppendCall(key, value, k_cache, v_cache, slots, k_scale, v_scale)


def prepare(call: AppendCall) -> list[Launch]:
    """The launch of a checked call on a GPU, if it has rows."""
    from kvcached.kernels._write_triton import append_launches, append_quant_launches

    rows = call.key, call.value, call.k_cache, call.v_cache, call.slots
    if call.k_scale is None or call.v_scale is None:
        return append_launches(*rows)
    return append_quant_launches(*rows, call.k_scale, call.v_scale)


@functools.cache
def _known() -> KnownAppends:
    from kvcached.kernels._repeat import KnownAppends

    return KnownAppends()


def concat_and_cache_mla(
    kv_c: torch.Tensor,
    k_pe: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: Any,
    kv_cache_dtype: str = "auto",
    scale: torch.Tensor | None = None,
) -> None:
    """Write the latent ``kv_c [T, R]`` and the rotary key ``k_pe [T, P]`` to one row of a cache.

    ``kv_cache [num_blocks, block_size, R + P]`` of the rows' dtype, fp8 or int8; ``scale`` is then
    one float32, of shape ``()`` or ``[1]``. All else as in ``reshape_and_cache``.
    """
    reshape_and_cache(*split_latents(kv_c, k_pe, kv_cache, slot_mapping, kv_cache_dtype, scale))


def split_latents(
    kv_c: torch.Tensor, k_pe: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: Any,
    kv_cache_dtype: str = "auto", scale: torch.Tensor | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """The arguments of ``reshape_and_cache`` for rows whose front is the key, and rest the value.

    Raises ``InvalidInput``.
    """
    if kv_cache.dim() != 3 or kv_c.dim() != 2 or k_pe.dim() != 2:
        raise InvalidInput(
            "kv_c, k_pe and kv_cache must be [T, R], [T, P] and [num_blocks, block_size, R + P], "
            f"not {tuple(kv_c.shape)}, {tuple(k_pe.shape)} and {tuple(kv_cache.shape)}"
        )
    latent, rotary = kv_c.shape[1], k_pe.shape[1]
    if kv_cache.shape[2] != latent + rotary:
        raise InvalidInput(f"kv_cache has rows of {kv_cache.shape[2]}, not of {latent} + {rotary}")
    if kv_cache_dtype == "int4" or (scale is not None and scale.numel() != 1):
        raise InvalidInput(
            "an MLA cache has one scale for all: no int4, no scales by row",
            hint="Use fp8 or int8 with a scale of shape ().",
        )
    one = None if scale is None else scale.reshape(())
    cache = kv_cache.unsqueeze(2)
    return (kv_c.unsqueeze(1), k_pe.unsqueeze(1), cache[..., :latent], cache[..., latent:],
            slot_mapping, kv_cache_dtype, one, one)  # fmt: skip


def _stored_as(kind: str, cache: torch.Tensor) -> torch.Tensor:
    """``cache`` with the dtype that ``kv_cache_dtype`` names."""
    if not isinstance(cache, torch.Tensor) or cache.dim() != 4:
        raise InvalidInput(
            "caches must be tensors [num_blocks, block_size, num_kv_heads, head_dim], not "
            f"{type(cache).__name__} of shape {tuple(getattr(cache, 'shape', ()))}"
        )
    if cache.stride(-1) != 1:
        raise InvalidInput(f"a cache has stride {cache.stride(-1)} in its last dimension, not 1")
    if kind == "auto":
        return cache
    if kind not in _KINDS:
        raise InvalidInput(f"kv_cache_dtype is {kind!r}, not 'auto' or one of {', '.join(_KINDS)}")
    wanted = _KINDS[kind]
    if cache.dtype != wanted and not (cache.dtype == torch.uint8 and "fp8" in kind):
        raise InvalidInput(f"kv_cache_dtype is {kind!r}, but the cache is {cache.dtype}")
    return cache if cache.dtype == wanted else cache.view(wanted)


def _check_pair(key: Any, value: Any, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
    if k_cache.shape[:3] != v_cache.shape[:3] or 0 in k_cache.shape or 0 in v_cache.shape:
        raise InvalidInput(
            f"k_cache has shape {tuple(k_cache.shape)} and v_cache {tuple(v_cache.shape)}: they "
            "must be equal but for the last dimension, and none may be 0"
        )
    if (k_cache.dtype, k_cache.device) != (v_cache.dtype, v_cache.device):
        raise InvalidInput(
            f"k_cache is {k_cache.dtype} on {k_cache.device}, v_cache {v_cache.dtype} on "
            f"{v_cache.device}: they must be equal"
        )
    if key.dtype != value.dtype:
        raise InvalidInput(f"key is {key.dtype}, but value must be so too, not {value.dtype}")


def _check_quantised(name: str, rows: torch.Tensor, count: int, cache: torch.Tensor) -> None:
    width = cache.shape[3] * (2 if cache.dtype == quant.INT4 else 1)
    shape = (count, cache.shape[2], width)
    floats = (torch.float32, torch.float16, torch.bfloat16)
    fits = tuple(rows.shape) == shape and rows.device == cache.device and rows.dtype in floats
    if not fits or cache.dtype not in quant.LARGEST:
        raise InvalidInput(
            f"{name} must be {shape} of float32, float16 or bfloat16 on {cache.device} for a cache "
            f"of {cache.dtype}, not {tuple(rows.shape)} {rows.dtype} on {rows.device}"
        )


def check_scale(name: str, scale: torch.Tensor | None, cache: torch.Tensor) -> None:
    """``scale`` must be one of a quantised ``cache``."""
    by_row, heads = tuple(cache.shape[:3]), cache.shape[2]
    allowed: list[tuple[int, ...]] = [by_row]
    if cache.dtype != quant.INT4:
        allowed += [(), (heads,)]
    if scale is None or tuple(scale.shape) not in allowed:
        got = None if scale is None else tuple(scale.shape)
        raise InvalidInput(f"{name} of a {cache.dtype} cache must be of shape {allowed}, not {got}")
    if scale.dtype != torch.float32 or scale.device != cache.device:
        raise InvalidInput(
            f"{name} must be float32 on {cache.device}, not {scale.dtype} on {scale.device}"
        )


def _refuse_scale(name: str, scale: torch.Tensor | None) -> None:
    if scale is not None:
        raise InvalidInput(
            f"{name} is given, but the cache is not quantised", hint=f"Leave {name}=None."
        )


def _on_gpu(tensor: torch.Tensor) -> bool:
    """Whether Triton writes it; the tests of its interpreter say yes for CPU tensors."""
    return isinstance(tensor, torch.Tensor) and bool(tensor.is_cuda)


def _check_slots(slots: Any, cache: torch.Tensor) -> None:
    num_slots = cache.shape[0] * cache.shape[1]
    bad, twice = _first_bad(slots, num_slots)
    if twice:
        raise InvalidInput(f"slot_mapping holds {bad} twice; each slot is written once")
    if bad != _SKIP:
        raise InvalidInput(f"slot_mapping holds {bad}, but slots go from 0 to {num_slots - 1}")


def _write_cpu(
    rows: torch.Tensor, cache: torch.Tensor, slots: Any, scale: torch.Tensor | None
) -> None:
    """Write one side; the new rows are quantised by torch, and only they."""
    if scale is not None:
        if scale.dim() == 3:
            made = quant.row_scales(rows, cache.dtype)
            _put(made.unsqueeze(2), scale.unsqueeze(3), slots)
            scale = made
        rows = quant.quantize(rows, scale, cache.dtype)
    _put(rows, cache, slots)


def _put(rows: torch.Tensor, cache: torch.Tensor, slots: Any) -> None:
    _, block_size, heads, dim = cache.shape
    places = (cache.data_ptr(), block_size, *cache.stride()[:3])
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
