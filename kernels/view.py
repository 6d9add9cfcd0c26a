"""``KVView``: where the keys and values of one layer lie, and the checks of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvcached.errors import InvalidInput
from kvcached.kernels.quant import INT4, LARGEST

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, *LARGEST)
"""Of elements; the last four are quantised."""


@dataclass(frozen=True, slots=True)
class KVView:
    """K and V of one layer as addresses, since the base of an elastic cache may be unmapped.

    Element (block, slot, head, d) of K is at ``k_ptr`` plus ``block * block_stride + slot *
    slot_stride + head * head_stride + d`` elements; V goes by the ``v_*`` strides.
    ``num_blocks`` bounds the block ids. The strides are those of stored elements, the head dims
    those of the keys and values: of int4 two are stored as one.
    """

    k_ptr: int
    v_ptr: int
    dtype: torch.dtype
    device: torch.device
    num_blocks: int
    block_size: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    block_stride: int
    slot_stride: int
    head_stride: int
    v_block_stride: int
    v_slot_stride: int
    v_head_stride: int

    @classmethod
    def from_tensors(cls, k_cache: torch.Tensor, v_cache: torch.Tensor) -> KVView:
        """From strided tensors ``[num_blocks, block_size, num_kv_heads, head_dim]``; reads nothing.

        Raises ``InvalidInput`` if the two do not fit together or the last stride is not 1.
        """
        for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
            _check_cache(name, cache)
        if k_cache.shape[:3] != v_cache.shape[:3]:
            raise InvalidInput(
                f"v_cache has shape {tuple(v_cache.shape)} and k_cache {tuple(k_cache.shape)}: "
                "all but the last dimension must be equal"
            )
        if (k_cache.dtype, k_cache.device) != (v_cache.dtype, v_cache.device):
            raise InvalidInput(
                f"v_cache is {v_cache.dtype} on {v_cache.device}, but k_cache is "
                f"{k_cache.dtype} on {k_cache.device}: they must be equal"
            )
        blocks, size, heads, _ = k_cache.shape
        dim, dim_v = (x.shape[3] * (2 if x.dtype == INT4 else 1) for x in (k_cache, v_cache))
        return cls(
            k_cache.data_ptr(), v_cache.data_ptr(), k_cache.dtype, k_cache.device,
            blocks, size, heads, dim, dim_v,
            *k_cache.stride()[:3], *v_cache.stride()[:3],
        )  # fmt: skip

    @property
    def quantized(self) -> bool:
        """Whether elements need a scale."""
        return self.dtype in LARGEST


def _check_cache(name: str, cache: torch.Tensor) -> None:
    if not isinstance(cache, torch.Tensor) or cache.dim() != 4:
        shape = tuple(getattr(cache, "shape", ()))
        raise InvalidInput(
            f"{name} must be a tensor [num_blocks, block_size, num_kv_heads, head_dim], "
            f"not {type(cache).__name__} of shape {shape}"
        )
    if cache.stride(-1) != 1:
        raise InvalidInput(f"{name} has stride {cache.stride(-1)} in its last dimension, not 1")
    if cache.dtype not in DTYPES:
        raise InvalidInput(f"{name} is {cache.dtype}; the kernels know {_names(DTYPES)}")
    if 0 in cache.shape:
        raise InvalidInput(f"{name} has shape {tuple(cache.shape)}: no dimension may be 0")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
