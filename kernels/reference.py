"""Float64 twins in plain torch: what every kernel must equal. Slow on purpose, nothing is fused.

Each public call has a twin of its name here, with the arguments that decide what comes out: none
for where results go (``out``), how work is cut (``num_splits``, ``plan``) or whether the LSE is
returned, which it always is. Results are float64. Those that write and move are in
``reference_moves``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from kvcached.kernels.reference_moves import (
    compact_pages,
    concat_and_cache_mla,
    copy_pages,
    gather_kv,
    gather_pages,
    reshape_and_cache,
    rows_at,
    rows_of,
    scatter_pages,
    slots_of,
    swap_pages,
)

if TYPE_CHECKING:
    from kvcached.kernels.cascade import Level

__all__ = [
    "attend_rows",
    "attn_with_kvcache",
    "cascade_attention",
    "compact_pages",
    "concat_and_cache_mla",
    "copy_pages",
    "gather_kv",
    "gather_pages",
    "merge_state",
    "merge_states",
    "mla_with_kvcache",
    "reshape_and_cache",
    "rows_of",
    "scatter_pages",
    "swap_pages",
]


def attend_rows(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scale: float,
    causal: bool,
    window: tuple[int, int],
    softcap: float,
    slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    masks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one sequence: ``q [S, Hq, D]`` over ``keys [L, Hkv, D]``, ``values``.

    ``masks`` int64 ``[S]``: bit j shows the j-th query token to a query; in place of ``causal``.
    """
    group = q.shape[1] // keys.shape[1]
    keys, values = (x.double().repeat_interleave(group, 1) for x in (keys, values))
    scores = torch.einsum("shd,lhd->hsl", q.double(), keys) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    here = torch.arange(len(q))[:, None] + (len(keys) - len(q))
    distance = torch.arange(len(keys))[None, :] - here  # negative: the key lies before the query
    if slopes is not None:
        scores = scores - slopes.double()[:, None, None] * distance.abs()
    left, right = window[0], 0 if causal else window[1]
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if left >= 0:
        hidden |= distance < -left
    if masks is not None:
        nth = torch.arange(len(keys)) - (len(keys) - len(q))  # which query token a key is of
        bits = (masks[:, None] >> nth.clamp(min=0)[None, :]) & 1
        hidden |= (nth >= 0)[None, :] & (bits == 0)
    elif right >= 0:
        hidden |= distance > right
    scores = scores.masked_fill(hidden, -torch.inf)
    lse = torch.logsumexp(scores, -1)
    total = lse if sinks is None else torch.logaddexp(lse, sinks.double()[:, None])
    weights = torch.exp(scores - total[..., None])
    weights = weights.masked_fill(torch.isneginf(lse)[..., None], 0.0)  # the query sees nothing
    return torch.einsum("hsl,lhd->shd", weights, values), lse.T


def attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    *,
    cache_seqlens: torch.Tensor,
    page_table: torch.Tensor | None = None,
    cache_start: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    max_seqlen_q: int = 1,
    softmax_scale: float | None = None,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    custom_mask: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Twin of ``kernels.attn_with_kvcache``; returns (out ``[T, Hq, Dv]``, lse ``[T, Hq]``).

    ``k`` and ``v`` are written to the cache, in its dtype.
    """
    if cu_seqlens_q is None:
        cu_seqlens_q = torch.arange(len(cache_seqlens) + 1) * max_seqlen_q
    starts, size = cu_seqlens_q.tolist(), k_cache.shape[1]
    parts = []
    for i, before in enumerate(cache_seqlens.tolist()):
        part = slice(starts[i], starts[i + 1])
        length = before if k is None else before + len(k[part])
        if page_table is not None:
            slots = slots_of(page_table[i], length, size)
        else:
            assert cache_start is not None, "pass either page_table or cache_start"
            slots = cache_start[i] + torch.arange(length, device=k_cache.device)
        if k is not None and v is not None:
            reshape_and_cache(k[part], v[part], k_cache, v_cache, slots[before:])
        parts.append(attend_rows(
            q[part], rows_at(k_cache, slots, k_descale), rows_at(v_cache, slots, v_descale),
            scale=q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale,
            causal=causal, window=window_size, softcap=softcap, slopes=alibi_slopes, sinks=sinks,
            masks=None if custom_mask is None else custom_mask[part],
        ))  # fmt: skip
    if not parts:
        return q.new_zeros(*q.shape[:2], v_cache.shape[-1]).double(), q.new_zeros(0, q.shape[1])
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])


def mla_with_kvcache(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    page_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    head_dim_v: int = 512,
    *,
    softmax_scale: float,
    causal: bool = True,
    kv_descale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Twin of ``kernels.mla_with_kvcache``: one KV head, whose value is the front of its key."""
    keys = kv_cache.unsqueeze(2)
    return attn_with_kvcache(
        q, keys, keys[..., :head_dim_v], cache_seqlens=cache_seqlens, page_table=page_table,
        max_seqlen_q=len(q) // max(1, len(cache_seqlens)), softmax_scale=softmax_scale,
        causal=causal, k_descale=kv_descale, v_descale=kv_descale,
    )  # fmt: skip


def cascade_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    levels: Sequence[Level],
    *,
    softmax_scale: float | None = None,
    causal: bool = True,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Twin of ``kernels.cascade_attention``, one query token after another, and nothing merged."""
    parts = []
    for token in range(len(q)):
        keys, values = [], []
        for number, level in enumerate(levels):
            groups = len(level.cache_seqlens)
            starts = level.cu_seqlens_q
            if starts is None:
                starts = torch.arange(groups + 1) * level.max_seqlen_q
            group = next(g for g in range(groups) if starts[g] <= token < starts[g + 1])
            length = int(level.cache_seqlens[group])
            if causal and number == len(levels) - 1:  # it ends with the group's query tokens
                length = max(0, length - (int(starts[group + 1]) - 1 - token))
            blocks = level.page_table[group]
            keys.append(rows_of(k_cache, blocks, length, k_descale))
            values.append(rows_of(v_cache, blocks, length, v_descale))
        parts.append(attend_rows(
            q[token : token + 1], torch.cat(keys), torch.cat(values),
            scale=q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale,
            causal=False, window=(-1, -1), softcap=softcap, slopes=None, sinks=sinks,
        ))  # fmt: skip
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])


def merge_state(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Twin of ``kernels.merge_state``."""
    return merge_states([out_a, out_b], [lse_a, lse_b])


def merge_states(
    outs: Sequence[torch.Tensor],
    lses: Sequence[torch.Tensor],
    *,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Twin of ``kernels.merge_states``."""
    lse = torch.logsumexp(torch.stack([x.double() for x in lses]), 0)
    total = lse if sinks is None else torch.logaddexp(lse, sinks.double())
    merged = torch.zeros_like(outs[0], dtype=torch.float64)
    for out, own in zip(outs, lses, strict=True):
        weight = torch.exp(own.double() - total)
        weight = weight.masked_fill(torch.isneginf(own), 0.0)  # it saw nothing, nor may anyone
        merged += weight[..., None] * out.double()
    return merged, lse
