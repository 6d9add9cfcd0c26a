"""``attn_with_kvcache``: attention over a paged cache, on the device where the cache lies.

The arguments are those of ``flash_attn_with_kvcache`` (Dao-AILab/flash-attention), in its order.
"""

from __future__ import annotations

from typing import Any

import torch

from kvcached.kernels.checks import AttentionCall, check_call


def attn_with_kvcache(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
    k: torch.Tensor | None = None, v: torch.Tensor | None = None, *,
    cache_seqlens: Any, page_table: Any = None, cache_start: Any = None,
    cu_seqlens_q: Any = None, max_seqlen_q: int = 1, softmax_scale: float | None = None,
    causal: bool = True, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None, sinks: torch.Tensor | None = None,
    custom_mask: None = None, k_descale: None = None, v_descale: None = None,
    num_splits: int = 0, plan: None = None,
    out: torch.Tensor | None = None, return_softmax_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Attention of ``q`` over sequences that lie in a paged cache; decode, prefill or both.

    Parameters
    ----------
    q:
        ``[T, Hq, D]``, the query tokens of all sequences one after another.
    k_cache, v_cache:
        ``[num_blocks, block_size, Hkv, D]`` and ``[..., Dv]`` of q's dtype (float32, float16,
        bfloat16, float64), last stride 1, ``Hq % Hkv == 0``. Only slots that a query sees are read.
    k, v:
        ``[T, Hkv, D]``, ``[..., Dv]``: of the query tokens, to be written to the cache first. Then
        ``cache_seqlens`` counts the tokens *before* them.
    cache_seqlens:
        int32 ``[B]``, tokens of each sequence in the cache, the query tokens included.
    page_table, cache_start:
        One of the two. Block ids of each sequence, int32 ``[B, n]`` with ``n * block_size`` at
        least the longest; or the slot of its first token, int32 ``[B]``, the others right behind.
    cu_seqlens_q, max_seqlen_q:
        Where each sequence's tokens start in ``q``, int32 ``[B + 1]``, and the most that one has.
        Without the first each has ``max_seqlen_q``.
    causal, window_size, softmax_scale:
        Bottom-right aligned: the last query sees the last token. A window ``(left, right)`` bounds
        what a query sees around its place, -1 is unbounded. The scale is ``D ** -0.5`` by default.
    softcap, alibi_slopes, sinks:
        Scores become ``softcap * tanh(score / softcap)``; slopes ``[Hq]`` take off ``slope *
        distance``; sinks ``[Hq]`` join the softmax's denominator (not the LSE).
    out, return_softmax_lse:
        ``[T, Hq, Dv]`` to write to; whether to return the natural-log LSE too, float32 ``[T, Hq]``.
        A query that sees no token gives 0 and -inf.

    Raises ``InvalidInput`` naming the argument. ``num_splits`` is a hint for GPUs; ``custom_mask``,
    ``k_descale``, ``v_descale`` and ``plan`` are reserved and must be ``None``.
    """
    call = check_call(
        q, k_cache, v_cache, k, v, cache_seqlens=cache_seqlens, page_table=page_table,
        cache_start=cache_start, cu_seqlens_q=cu_seqlens_q, max_seqlen_q=max_seqlen_q,
        softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap,
        alibi_slopes=alibi_slopes, sinks=sinks, out=out, custom_mask=custom_mask,
        k_descale=k_descale, v_descale=v_descale, plan=plan,
    )  # fmt: skip
    _run(call, num_splits)
    return (call.out, call.lse) if return_softmax_lse else call.out


def _run(call: AttentionCall, num_splits: int) -> None:
    if call.kv.device.type == "cpu":
        from kvcached.kernels.cpu import attend

        attend(call)
    else:
        from kvcached.kernels.decode import attend_triton
        from kvcached.kernels.prefill import attend_prefill, suits_prefill

        with torch.cuda.device(call.kv.device):  # Triton launches on the current one
            if suits_prefill(call):
                attend_prefill(call, num_splits)
            else:
                attend_triton(call, num_splits)
