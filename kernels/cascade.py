"""Cascade attention: what requests share is attended once for all of them.

Queries that share a prefix are one sequence of query tokens over it, so its keys and values are
read once and not once a request; each request's own part follows, and the parts are merged by
their log-sum-exp (Ye et al. 2024, FlashInfer's cascade inference; Juravsky et al. 2024, Hydragen).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from kvcached.errors import InvalidInput
from kvcached.kernels.attention import attn_with_kvcache
from kvcached.kernels.merge import merge_states
from kvcached.layout import cdiv

SHARED_ROWS = 128
"""Query tokens x heads of a KV head in a tile of prefill."""


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
    attend = [
        partial(
            attn_with_kvcache, q, k_cache, v_cache, page_table=level.page_table,
            cache_seqlens=level.cache_seqlens, cu_seqlens_q=level.cu_seqlens_q,
            max_seqlen_q=level.max_seqlen_q, causal=causal and number == len(levels) - 1,
            num_splits=_parts(level, q, k_cache), **options,
        )
        for number, level in enumerate(levels)
    ]  # fmt: skip
    parts = _results(attend, q)
    merged, lse = merge_states(*zip(*parts, strict=True), sinks=sinks, out=out)
    return (merged, lse) if return_softmax_lse else merged


def _parts(level: Level, q: torch.Tensor, k_cache: torch.Tensor) -> int:
    """How many parts many queries take what they share in; 0 where that is not for here to say.

    A tile of so many rows has an SM to itself, and each part is written and read once more.
    """
    from kvcached.kernels.decode import multiprocessors

    rows = level.max_seqlen_q * int(q.shape[1]) // int(k_cache.shape[2])
    if not q.is_cuda or q.dtype != k_cache.dtype or rows < SHARED_ROWS:
        return 0
    tiles = len(level.cache_seqlens) * int(k_cache.shape[2]) * cdiv(rows, SHARED_ROWS)
    return 1 << (max(1, multiprocessors(q.device) // tiles).bit_length() - 1)


def _results(attend: Sequence[Callable[[], Any]], q: torch.Tensor) -> list[Any]:
    """What the calls for all levels return.

    Many queries over what they share compute, one over its own reads memory. So in a captured
    graph the last level lies beside the others; else the host would take longer than the GPU.
    """
    if len(attend) == 1 or not q.is_cuda or not torch.cuda.is_current_stream_capturing():
        return [level() for level in attend]
    with torch.cuda.device(q.device):
        here = torch.cuda.current_stream()
        beside = _stream_beside(here.device_index, here.cuda_stream)
        beside.wait_stream(here)
        with torch.cuda.stream(beside):
            parts = [level() for level in attend[:-1]]
        parts.append(attend[-1]())
        here.wait_stream(beside)
    return parts


@functools.cache
def _stream_beside(device: int, _stream: int) -> torch.cuda.Stream:
    """Of each stream the same one, so that what one call allocated serves the next."""
    return torch.cuda.Stream(device)
