"""Float64 twins in plain torch: what every kernel must equal. Slow on purpose, nothing is fused.

Names and arguments are those of the kernels; results are float64.
"""

from __future__ import annotations

from typing import Any

import torch

from kvcached.kernels.quant import dequantize


def rows_of(
    cache: torch.Tensor, blocks: torch.Tensor, length: int, scale: torch.Tensor | None = None
) -> torch.Tensor:
    """The first ``length`` rows of the sequence in ``blocks``: ``[length, Hkv, D]`` float64.

    With a ``scale`` as in ``quant.py``: what they mean.
    """
    size = cache.shape[1]
    needed = blocks[: -(-length // size)].long()
    rows = cache[needed].reshape(-1, *cache.shape[2:])[:length]
    if scale is None:
        return rows.double()
    own = scale[needed].reshape(-1, scale.shape[2])[:length] if scale.dim() == 3 else scale
    return dequantize(rows, own, torch.float64)


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
    *,
    cache_seqlens: torch.Tensor,
    page_table: torch.Tensor,
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
    """Twin of ``kernels.attn_with_kvcache``; returns (out ``[T, Hq, Dv]``, lse ``[T, Hq]``)."""
    if cu_seqlens_q is None:
        cu_seqlens_q = torch.arange(len(cache_seqlens) + 1) * max_seqlen_q
    if k_descale is not None and v_descale is not None:
        k_cache = dequantize(k_cache, k_descale, torch.float64)
        v_cache = dequantize(v_cache, v_descale, torch.float64)
    outs = [torch.zeros(0, q.shape[1], v_cache.shape[-1], dtype=torch.float64)]
    lses = [torch.zeros(0, q.shape[1], dtype=torch.float64)]
    for i, length in enumerate(cache_seqlens.tolist()):
        part = slice(int(cu_seqlens_q[i]), int(cu_seqlens_q[i + 1]))
        out, lse = attend_rows(
            q[part],
            rows_of(k_cache, page_table[i], length),
            rows_of(v_cache, page_table[i], length),
            scale=q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale,
            causal=causal, window=window_size, softcap=softcap, slopes=alibi_slopes, sinks=sinks,
            masks=None if custom_mask is None else custom_mask[part],
        )  # fmt: skip
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses)


def reshape_and_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Twin of ``kernels.reshape_and_cache``."""
    for i, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            block, offset = divmod(slot, k_cache.shape[1])
            k_cache[block, offset] = key[i]
            v_cache[block, offset] = value[i]


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
    return torch.stack([pool[i] for i in page_ids.tolist()])


def merge_states(
    outs: list[torch.Tensor], lses: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Twin of ``kernels.merge_states``."""
    lse = torch.stack([x.double() for x in lses])
    total = torch.logsumexp(lse, 0)
    weights = torch.nan_to_num(torch.exp(lse - total))
    return (weights[..., None] * torch.stack([x.double() for x in outs])).sum(0), total
