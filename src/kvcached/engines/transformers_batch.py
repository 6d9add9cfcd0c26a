"""``PackedBatch``: where the new tokens of one forward pass go, sent to the device in one copy."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvcached.errors import InvalidInput
from kvcached.layout import cdiv

if TYPE_CHECKING:
    from kvcached.cache import KVCache

_WIDTHS = 32
"""Block tables have a multiple of so many columns: calls of one shape need no new checks, and the
shape would change with each block that a sequence grows by."""
_ALIGNED = 4
"""int32 values in 16 bytes: Triton compiles another kernel for an address less round than that."""


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Where the new tokens of one forward pass go and what they see; int32 tensors.

    ``slot_mapping [T]``, ``cu_seqlens_q [n + 1]``, ``cache_seqlens [n]`` (the new tokens
    included), ``block_table [n, width]`` (0 behind the last block of a sequence). ``rows``, int64
    ``[T]``, picks the packed tokens out of a padded ``[B * Q]`` batch; ``None``: no padding.
    """

    slot_mapping: torch.Tensor
    cu_seqlens_q: torch.Tensor
    cache_seqlens: torch.Tensor
    block_table: torch.Tensor
    max_seqlen_q: int
    rows: torch.Tensor | None = None

    @classmethod
    def of(cls, cache: KVCache, work: Seq[tuple[Any, np.ndarray]], rows: Any = None) -> PackedBatch:
        """From ``(sequence, slots of its new tokens)`` pairs, as ``extend`` returned the slots."""
        if not work:
            raise InvalidInput("a batch needs at least one sequence")
        counts = [len(slots) for _, slots in work]
        sequences = [sequence for sequence, _ in work]
        table = cache.block_tables(sequences)
        wide = np.zeros((len(table), cdiv(table.shape[1], _WIDTHS) * _WIDTHS), np.int32)
        wide[:, : table.shape[1]] = table
        slots, starts, lengths, tables, picked = upload(
            (
                np.concatenate([slots for _, slots in work]),
                np.cumsum([0, *counts]),
                np.array([sequence.num_tokens for sequence in sequences]),
                wide,
                np.empty(0, np.int32) if rows is None else np.asarray(rows),
            ),
            cache.backend.device,
        )
        return cls(
            slots, starts, lengths, tables, max(1, *counts), None if rows is None else picked.long()
        )


def upload(arrays: Seq[np.ndarray], device: str) -> list[torch.Tensor]:
    """The arrays as int32 tensors on ``device``, each at a multiple of 16 bytes.

    One copy for all. To a GPU it starts from pinned memory, so that the host does not wait for the
    kernels that are queued before it.
    """
    sizes = [cdiv(array.size, _ALIGNED) * _ALIGNED for array in arrays]
    ends = np.cumsum(sizes).tolist()
    host = torch.empty(ends[-1], dtype=torch.int32, pin_memory=device.startswith("cuda"))
    for array, end, size in zip(arrays, ends, sizes, strict=True):
        host.numpy()[end - size : end - size + array.size] = array.reshape(-1)
    there = host.to(device, non_blocking=True)
    return [
        there[end - size : end - size + array.size].view(array.shape)
        for array, end, size in zip(arrays, ends, sizes, strict=True)
    ]
