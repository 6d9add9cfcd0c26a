"""``attn_with_kvcache``: attention over a paged cache, on the device where the cache lies.

The arguments are those of ``flash_attn_with_kvcache`` (Dao-AILab/flash-attention), in its order.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from kvcached.errors import InvalidInput
from kvcached.kernels.checks import AttentionCall, check_call

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvcached.kernels._bound import Launch
    from kvcached.kernels._repeat import Known
    from kvcached.kernels._workspace import Memory
    from kvcached.kernels.plan import Plan


def attn_with_kvcache(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor,
    k: torch.Tensor | None = None, v: torch.Tensor | None = None, *,
    cache_seqlens: Any, page_table: Any = None, cache_start: Any = None,
    cu_seqlens_q: Any = None, max_seqlen_q: int = 1, softmax_scale: float | None = None,
    causal: bool = True, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None, sinks: torch.Tensor | None = None,
    custom_mask: torch.Tensor | None = None, k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None, num_splits: int = 0, plan: Plan | None = None,
    out: torch.Tensor | None = None, return_softmax_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Attention of ``q`` over sequences in a paged cache; raises ``InvalidInput`` by argument.

    Parameters
    ----------
    q:
        ``[T, Hq, D]``, the query tokens of all sequences one after another.
    k_cache, v_cache:
        ``[num_blocks, block_size, Hkv, D]`` and ``[..., Dv]`` of q's dtype (float32, float16,
        bfloat16; on CPUs float64) or quantised as in ``kernels.quant``, then with ``k_descale`` and
        ``v_descale``; last stride 1, ``Hq % Hkv == 0``. Only slots that a query sees are read.
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
    custom_mask:
        In place of ``causal``: bit j of int64 ``[T]`` tells whether the token sees the j-th query
        token of its sequence, of at most 64 (a tree of drafts).
    k_descale, v_descale:
        Scales of a quantised cache, float32: ``()``, ``[Hkv]`` or (of int4 always) ``[num_blocks,
        block_size, Hkv]``.
    num_splits, plan:
        For GPUs: parts of each sequence (0: as needed); a ``plan_attention``, for unlike lengths.
    out, return_softmax_lse:
        ``[T, Hq, Dv]`` to write to (0 for a query that sees no token); whether to return the
        natural-log LSE too, float32 ``[T, Hq]`` (-inf).
    """
    tensors = (q, k_cache, v_cache, page_table, cache_start, cache_seqlens, cu_seqlens_q,
               custom_mask, sinks, alibi_slopes, k_descale, v_descale, out)  # fmt: skip
    options = max_seqlen_q, softmax_scale, causal, window_size, softcap, num_splits
    known = known_for(q, plan) if k is None and v is None else None
    done = known and known.launch(tensors, options, with_lse=return_softmax_lse)
    if not done:
        call = _checked(tensors, options, k, v)
        _run(call, num_splits, plan, known, (tensors, options))
        done = call.out, call.lse
    return done if return_softmax_lse else done[0]


def known_for(q: Any, plan: Plan | None) -> Known | None:
    """Where the launches of calls with this ``q`` and ``plan`` are remembered."""
    if plan is not None:
        return plan.known
    if not isinstance(q, torch.Tensor) or not q.is_cuda:
        return None
    return _known_here()(q.get_device())


@functools.cache
def _known_here() -> Callable[[int], Known | None]:
    from kvcached.kernels._repeat import known_here  # importing it at each call takes longer

    return known_here


def _checked(tensors: tuple[Any, ...], options: tuple[Any, ...], k: Any, v: Any) -> AttentionCall:
    q, k_cache, v_cache, table, starts, lens, cu, mask, sinks, slopes, k_scale, v_scale, out = (
        tensors
    )
    max_q, scale, causal, window, softcap, _ = options
    return check_call(
        q, k_cache, v_cache, k, v, cache_seqlens=lens, page_table=table, cache_start=starts,
        cu_seqlens_q=cu, max_seqlen_q=max_q, softmax_scale=scale, causal=causal,
        window_size=window, softcap=softcap, alibi_slopes=slopes, sinks=sinks, out=out,
        custom_mask=mask, k_descale=k_scale, v_descale=v_scale,
    )  # fmt: skip


def _run(
    call: AttentionCall, num_splits: int, plan: Plan | None, known: Known | None,
    given: tuple[Any, Any],
) -> None:  # fmt: skip
    """The one place where a checked call goes to the kernel that serves it best."""
    if call.kv.device.type == "cpu":
        from kvcached.kernels.cpu import attend

        attend(call)
        return
    with torch.cuda.device(call.kv.device):  # kernels are launched on the current one
        steps = prepare(call, num_splits, plan)
        for step in steps:
            step()
    if known is not None and steps:
        known.learn(*given, call, steps)


def prepare(
    call: AttentionCall, num_splits: int = 0, plan: Plan | None = None,
    memory: Memory | None = None,
) -> list[Launch]:  # fmt: skip
    """The launches of a checked call on a GPU, of the kernel that serves it best.

    Their memory for parts is the plan's, or without one from ``memory``, by default that of the
    current stream.
    """
    from kvcached.kernels import decode, prefill
    from kvcached.kernels._workspace import workspace_of

    memory = memory or workspace_of
    if plan is not None and not hasattr(plan, "split"):
        raise InvalidInput(f"plan is a {type(plan).__name__}, not what plan_attention makes")
    if plan is not None and call.max_q > plan.shape["max_q"]:
        memory, plan = plan.memory, None
    if plan is None and prefill.suits_prefill(call):
        return prefill.prepare(call, num_splits, memory=memory)
    return decode.prepare(call, num_splits, plan, memory)
