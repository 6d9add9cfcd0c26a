"""Merging attention results over disjoint sets of tokens by their log-sum-exp."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvcached.errors import InvalidInput


def merge_state(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of two disjoint sets of tokens.

    ``out [T, H, D]``, ``lse [T, H]`` in natural log. Associative and commutative up to rounding;
    ``(0, -inf)`` is the identity. Returns (out of out_a's dtype, lse float32).
    """
    return merge_states([out_a, out_b], [lse_a, lse_b])


def merge_states(
    outs: Sequence[torch.Tensor],
    lses: Sequence[torch.Tensor],
    *,
    sinks: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``merge_state`` of any number (>= 1) of results; on a GPU in Triton, four a launch.

    ``sinks`` float32 ``[H]`` join the softmax's denominator (not the LSE), as in
    ``attn_with_kvcache``: the parts are then taken without them. ``out`` is written to if given.
    Raises ``InvalidInput``.
    """
    if not outs or len(outs) != len(lses):
        raise InvalidInput(f"{len(outs)} outputs and {len(lses)} LSEs cannot be merged")
    for part, lse in zip(outs, lses, strict=True):
        if part.shape != outs[0].shape or lse.shape != part.shape[:-1]:
            raise InvalidInput(
                f"an output of shape {tuple(part.shape)} with an LSE of shape {tuple(lse.shape)} "
                f"does not fit outputs of shape {tuple(outs[0].shape)}"
            )
    if out is not None and out.shape != outs[0].shape:
        raise InvalidInput(f"out must be {tuple(outs[0].shape)}, not {tuple(out.shape)}")
    if sinks is not None and sinks.shape != outs[0].shape[-2:-1]:
        raise InvalidInput(f"sinks must be {tuple(outs[0].shape[-2:-1])}, not {tuple(sinks.shape)}")
    if _on_gpu(outs[0]) and outs[0].dtype != torch.float64:
        return _merge_triton(outs, lses, sinks, out)
    merged, total = _merge_torch(outs, lses, sinks)
    if out is None:
        return merged.to(outs[0].dtype), total
    return out.copy_(merged), total


def _merge_torch(
    outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor], sinks: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    parts = torch.stack([lse.float() for lse in lses])
    total = torch.logsumexp(parts, 0)
    whole = total if sinks is None else torch.logaddexp(total, sinks.float())
    # Where all parts are empty, -inf - -inf would be NaN; the weights are 0 there.
    weights = torch.exp(parts - whole.masked_fill(total == -torch.inf, 0.0))
    kind = torch.promote_types(outs[0].dtype, torch.float32)
    merged = sum(w[..., None].to(kind) * out.to(kind) for w, out in zip(weights, outs, strict=True))
    return torch.as_tensor(merged), total


def _merge_triton(
    outs: Sequence[torch.Tensor],
    lses: Sequence[torch.Tensor],
    sinks: torch.Tensor | None,
    out: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    from kvcached.kernels._merge_triton import merge_triton

    device = outs[0].device
    to = torch.empty(outs[0].shape, dtype=outs[0].dtype, device=device)
    if out is not None and out.is_contiguous():
        to = out
    per_head = None if sinks is None else sinks.float().contiguous()
    with torch.cuda.device(device if device.type == "cuda" else -1):  # it launches on the current
        lse = merge_triton(outs, lses, per_head, to)
    return (to if out is None or to is out else out.copy_(to)), lse


def _on_gpu(tensor: torch.Tensor) -> bool:
    """Whether Triton merges; the tests of its interpreter say yes for CPU tensors."""
    return bool(tensor.is_cuda)
