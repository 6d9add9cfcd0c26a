"""Torch operators of the kernels, so that ``torch.compile`` calls them and goes on.

``torch.ops.kvcached.reshape_and_cache`` and ``.attn_with_kvcache`` exist once this module is
imported. They declare what they write, so compiled code keeps their order.

A backend that makes writes functional and does not undo it again (``aot_eager``) copies what an
operator writes, the whole cache included. That is slow, and it faults where a cache is mapped in
part only: under such a backend write to an elastic cache outside of the graph.
"""

from __future__ import annotations

import torch
from torch import library

from kvcached.kernels import append, attention


@library.custom_op(
    "kvcached::reshape_and_cache", mutates_args=("k_cache", "v_cache", "k_scale", "v_scale")
)
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
    """``kernels.reshape_and_cache`` as an operator."""
    append.reshape_and_cache(
        key, value, k_cache, v_cache, slot_mapping, kv_cache_dtype, k_scale, v_scale
    )


@reshape_and_cache.register_fake
def _(*_args: object, **_options: object) -> None:
    """Nothing is returned, so nothing has a shape."""


@library.custom_op("kvcached::attn_with_kvcache", mutates_args=())
def attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    page_table: torch.Tensor | None = None,
    cache_start: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    max_seqlen_q: int = 1,
    softmax_scale: float | None = None,
    causal: bool = True,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    custom_mask: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``kernels.attn_with_kvcache`` as an operator: returns (out ``[T, Hq, Dv]``, lse ``[T, Hq]``).

    It writes nothing but its results: new keys and values go by ``reshape_and_cache``.
    """
    extra = {"custom_mask": custom_mask, "k_descale": k_descale, "v_descale": v_descale}
    out, lse = attention.attn_with_kvcache(
        q, k_cache, v_cache, cache_seqlens=cache_seqlens, page_table=page_table,
        cache_start=cache_start, cu_seqlens_q=cu_seqlens_q, max_seqlen_q=max_seqlen_q,
        softmax_scale=softmax_scale, causal=causal, window_size=(window_left, window_right),
        softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks, return_softmax_lse=True,
        **{name: value for name, value in extra.items() if value is not None},
    )  # fmt: skip
    return out, lse


@attn_with_kvcache.register_fake
def _(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, *_args: object, **_more: object
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    packed = 2 if v_cache.dtype == torch.uint8 else 1  # int4
    out = q.new_empty((*q.shape[:2], v_cache.shape[3] * packed))
    return out, q.new_empty(q.shape[:2], dtype=torch.float32)
