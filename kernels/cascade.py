"""Cascade attention: what requests share is attended once for all of them.

Queries that share a prefix are one sequence of query tokens over it, so its keys and values are
read once and not once a request; each request's own part follows, and the parts are merged by
their log-sum-exp (Ye et al. 2024, FlashInfer's cascade inference; Juravsky et al. 2024, Hydragen).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvcached.errors import InvalidInput
from kvcached.kernels.attention import attn_with_kvcache
from kvcached.kernels.merge import merge_states


@dataclass(frozen=True, slots=True)
class Level:
    """Groups of queries, each with the tokens that all of its queries see.

    Group g holds the query tokens from ``cu_seqlens_q[g]`` to ``cu_seqlens_q[g + 1]`` (int32
    ``[G + 1]``) or, without that, the g-th ``max_seqlen_q``. They see the first
    ``cache_seqlens[g]`` (int32 ``[G]``) tokens of the blocks ``page_table[g]`` (int32 ``[G, n]``).
    ``max_seqlen_q`` is the most query tokens of a group.
    """

    page_table: Any
    cache_seqlens: Any
    cu_seqlens_q: Any = None
    max_seqlen_q: int = 1


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
    out: torch.Tensor | None = None,
    return_softmax_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of ``q [T, Hq, D]`` over the union of its groups' tokens in all levels.

    ``levels`` go from what most share to what each request has alone; that last one holds the query
    tokens themselves and is causal, if ``causal``, while all others are seen whole. The rest is as
    in ``attn_with_kvcache``; windows and ALiBi, which ask for distances across levels, are not
    offered. Raises ``InvalidInput``.
    """
    if not levels:
        raise InvalidInput("cascade_attention needs at least one level")
    if out is not None and (out.shape[:-1] != q.shape[:-1] or out.shape[-1] != v_cache.shape[-1]):
        raise InvalidInput(f"out must be {(*q.shape[:2], v_cache.shape[-1])}, not {out.shape}")
    scales = {"k_descale": k_descale, "v_descale": v_descale}
    options = {name: scale for name, scale in scales.items() if scale is not None}
    options |= {"softmax_scale": softmax_scale, "softcap": softcap, "return_softmax_lse": True}
    parts = [
        attn_with_kvcache(
            q, k_cache, v_cache, page_table=level.page_table, cache_seqlens=level.cache_seqlens,
            cu_seqlens_q=level.cu_seqlens_q, max_seqlen_q=level.max_seqlen_q,
            causal=causal and number == len(levels) - 1, **options,
        )
        for number, level in enumerate(levels)
    ]  # fmt: skip
    merged, lse = merge_states(*zip(*parts, strict=True), sinks=sinks, out=out)
    return (merged, lse) if return_softmax_lse else merged
