"""Plans where Triton is not installed: for CPU tensors, of which a plan changes nothing.

So programs that plan their steps run on machines without a GPU too. ``kvcached.kernels`` takes
``Plan``, ``MlaPlan`` and the functions that make them from here if there is no Triton.
"""

from __future__ import annotations

from typing import Any

import torch

from kvcached.errors import BackendUnavailable, InvalidInput
from kvcached.kernels.checks import check_planned, check_sizes, group_of, index_tensor


class Plan:
    """As ``plan.Plan``, without anything to share. Made by ``plan_attention``."""

    known = None
    """Calls on the CPU are not remembered."""

    def __init__(self, shape: dict[str, Any]) -> None:
        self.shape = shape

    def update(self, cache_seqlens: Any, cu_seqlens_q: Any = None) -> None:
        """Check the lengths, int32 ``[B]``, and the starts; nothing is cut by them.

        Raises ``InvalidInput`` for more sequences than ``max_batch``.
        """
        lens = index_tensor("cache_seqlens", cache_seqlens, 1, self.shape["device"])
        if cu_seqlens_q is not None:
            index_tensor("cu_seqlens_q", cu_seqlens_q, 1, self.shape["device"])
        if len(lens) > self.shape["max_batch"]:
            raise InvalidInput(
                f"a plan for at most {self.shape['max_batch']} sequences got {len(lens)}"
            )


class MlaPlan:
    """As ``mla_plan.MlaPlan``, without anything to share. Made by ``plan_mla``."""

    known = None
    memory = None
    """For partial results, of which there are none on the CPU."""

    def __init__(self, shape: dict[str, Any]) -> None:
        self.shape = shape

    def check(self, batch: int, max_q: int, heads: int, device: torch.device) -> None:
        """Raise ``InvalidInput`` if the plan was made for other calls."""
        check_planned(self.shape, max_batch=batch, max_q=max_q, num_heads=heads)
        if device != self.shape["device"]:
            raise InvalidInput(f"the plan is for {self.shape['device']}, the call on {device}")


def plan_attention(
    max_batch: int, max_seqlen_k: int, num_q_heads: int, num_kv_heads: int, head_dim: int,
    kv_dtype: torch.dtype, *, device: torch.device | str = "cuda",
    dtype: torch.dtype | None = None, head_dim_v: int | None = None, max_q: int = 1,
    window_size: tuple[int, int] = (-1, -1), deterministic: bool = False,
) -> Plan:  # fmt: skip
    """A ``Plan`` of these sizes, as ``plan.plan_attention``, for the CPU.

    Raises ``InvalidInput`` for sizes that no call can have, and ``BackendUnavailable`` for a GPU.
    """
    shape = check_sizes(max_batch=max_batch, max_seqlen_k=max_seqlen_k, num_kv_heads=num_kv_heads,
                        head_dim=head_dim, max_q=max_q)  # fmt: skip
    return Plan(shape | {
        "group": group_of(num_q_heads, num_kv_heads), "head_dim_v": head_dim_v or head_dim,
        "kv_dtype": kv_dtype, "dtype": dtype or kv_dtype, "device": _cpu(device),
        "window_size": window_size, "deterministic": deterministic,
    })  # fmt: skip


def plan_mla(
    max_batch: int, num_heads: int, *, head_dim_v: int = 512, max_q: int = 1,
    device: torch.device | str = "cuda",
) -> MlaPlan:  # fmt: skip
    """An ``MlaPlan`` of these sizes, as ``mla_plan.plan_mla``, for the CPU.

    Raises ``InvalidInput`` for sizes that no call can have, and ``BackendUnavailable`` for a GPU.
    """
    shape = check_sizes(max_batch=max_batch, num_heads=num_heads, head_dim_v=head_dim_v,
                        max_q=max_q)  # fmt: skip
    return MlaPlan(shape | {"device": _cpu(device)})


def _cpu(device: torch.device | str) -> torch.device:
    where = torch.device(device)
    if where.type != "cpu":
        raise BackendUnavailable(
            f"a plan for {where} needs Triton, which is not installed",
            hint="pip install triton, or plan for device='cpu'.",
        )
    return where
