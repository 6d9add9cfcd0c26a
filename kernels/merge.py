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
    outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """``merge_state`` of any number (>= 1) of results."""
    if not outs or len(outs) != len(lses):
        raise InvalidInput(f"{len(outs)} outputs and {len(lses)} LSEs cannot be merged")
    for out, lse in zip(outs, lses, strict=True):
        if out.shape != outs[0].shape or lse.shape != out.shape[:-1]:
            raise InvalidInput(
                f"an output of shape {tuple(out.shape)} with an LSE of shape {tuple(lse.shape)} "
                f"does not fit outputs of shape {tuple(outs[0].shape)}"
            )
    parts = torch.stack([lse.float() for lse in lses])
    total = torch.logsumexp(parts, 0)
    # Where all parts are empty, -inf - -inf would be NaN; the weights are 0 there.
    weights = torch.exp(parts - total.masked_fill(total == -torch.inf, 0.0))
    kind = torch.promote_types(outs[0].dtype, torch.float32)
    merged = sum(w[..., None].to(kind) * out.to(kind) for w, out in zip(weights, outs, strict=True))
    return torch.as_tensor(merged).to(outs[0].dtype), total
