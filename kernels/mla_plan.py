"""``plan_mla``: what a step's calls of ``mla_with_kvcache`` share, made once."""

from __future__ import annotations

from typing import Any

import torch

from kvcached.errors import InvalidInput
from kvcached.kernels._repeat import Known
from kvcached.kernels._workspace import Growing, make_workspace
from kvcached.kernels.checks import check_planned, check_sizes
from kvcached.kernels.decode import multiprocessors
from kvcached.layout import cdiv

TILE_ROWS = 64
"""Rows (token, head) of a tile, at most; a program an SM has one."""
MIN_TILE_ROWS = 16


class MlaPlan:
    """Memory and prepared launches of MLA calls that run one after another.

    Give it to all layers' calls of a step. It serves one launch at a time: one stream, or one
    captured graph. Made by ``plan_mla``.
    """

    def __init__(self, shape: dict[str, Any], device: torch.device) -> None:
        self.shape = shape
        self.device = device
        self.known = Known(0, device, planned=True)
        rows = TILE_ROWS * multiprocessors(device)
        items = shape["max_batch"] * cdiv(shape["max_q"] * shape["num_heads"], MIN_TILE_ROWS)
        self.memory = Growing(make_workspace(items, rows * shape["head_dim_v"], rows, device))

    def check(self, batch: int, max_q: int, heads: int, device: torch.device) -> None:
        """Raise ``InvalidInput`` if the plan was made for other calls."""
        check_planned(self.shape, max_batch=batch, max_q=max_q, num_heads=heads)
        if device != self.device:
            raise InvalidInput(f"the plan is for {self.device}, the call on {device}")


def plan_mla(
    max_batch: int, num_heads: int, *, head_dim_v: int = 512, max_q: int = 1,
    device: torch.device | str = "cuda",
) -> MlaPlan:  # fmt: skip
    """An ``MlaPlan`` for up to so many sequences, heads of a query and query tokens a sequence.

    On the CPU a plan does nothing. Raises ``InvalidInput`` for sizes that no call can have.
    """
    shape = check_sizes(max_batch=max_batch, num_heads=num_heads, head_dim_v=head_dim_v,
                        max_q=max_q)  # fmt: skip
    where = torch.device(device)
    if where.type == "cuda" and where.index is None:
        where = torch.device("cuda", torch.cuda.current_device())
    return MlaPlan(shape, where)
