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
_PAD = -1
"""The slot of a token that is not written."""
_ALIGNED = 4
"""int32 values in 16 bytes: Triton compiles another kernel for an address less round than that."""


Work = Seq[tuple[Any, np.ndarray]]
"""Sequences of a ``KVCache``, each with the slots of its new tokens."""


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Where the new tokens of one forward pass go and what they see; int32 tensors.

    ``slot_mapping [T]`` (-1: a pad), ``cu_seqlens_q [n + 1]``, ``cache_seqlens [n]`` (the new
    tokens included), ``block_table [n, width]`` (0 behind the last block of a sequence).
    ``cu_seqlens_q`` is ``None`` if each sequence has ``max_seqlen_q`` query tokens, pads in front
    among them: as the last query sees the last token, those see none. ``rows``, int64 ``[T]``,
    picks the packed tokens out of a batch ``[B * Q]`` that is padded elsewhere.
    """

    slot_mapping: torch.Tensor
    cu_seqlens_q: torch.Tensor | None
    cache_seqlens: torch.Tensor
    block_table: torch.Tensor
    max_seqlen_q: int
    rows: torch.Tensor | None = None

    @classmethod
    def of(cls, cache: KVCache, work: Work, rows: Any = None) -> PackedBatch:
        """From ``(sequence, slots of its new tokens)`` pairs, as ``extend`` returned the slots."""
        if not work:
            raise InvalidInput("a batch needs at least one sequence")
        counts = [len(slots) for _, slots in work]
        even = rows is None and counts[0] > 0 and len({*counts}) == 1
        slots, lengths, tables, starts, picked = upload(
            (
                np.concatenate([slots for _, slots in work]),
                *_lengths_and_tables(cache, work),
                np.cumsum([0] if even else [0, *counts]),
                np.empty(0, np.int32) if rows is None else np.asarray(rows),
            ),
            cache.backend.device,
        )
        return cls(
            slots, None if even else starts, lengths, tables, max(1, *counts),
            None if rows is None else picked.long(),
        )  # fmt: skip

    @classmethod
    def behind_pads(cls, cache: KVCache, work: Work, width: int) -> PackedBatch:
        """From pairs as for ``of``, each the end of a row of ``width``: ``T`` is ``B * width``."""
        if not work:
            raise InvalidInput("a batch needs at least one sequence")
        places = np.full((len(work), width), _PAD, np.int32)
        for row, (_, slots) in zip(places, work, strict=True):
            row[width - len(slots) :] = slots
        slots, lengths, tables = upload(
            (places.reshape(-1), *_lengths_and_tables(cache, work)), cache.backend.device
        )
        return cls(slots, None, lengths, tables, width)


def _lengths_and_tables(cache: KVCache, work: Work) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each sequence, and its block ids in a row of a width that seldom changes."""
    sequences = [sequence for sequence, _ in work]
    table = cache.block_tables(sequences)
    wide = np.zeros((len(table), cdiv(table.shape[1], _WIDTHS) * _WIDTHS), np.int32)
    wide[:, : table.shape[1]] = table
    return np.array([sequence.num_tokens for sequence in sequences]), wide


def upload(arrays: Seq[np.ndarray], device: str) -> list[torch.Tensor]:
    """Arrays ``[n]`` or ``[n, m]`` as int32 tensors on ``device``, each at a multiple of 16 bytes.

    One copy for all. To a GPU it starts from pinned memory, so that the host does not wait for the
    kernels that are queued before it.
    """
    starts, total = [], 0
    for array in arrays:
        starts.append(total)
        total += cdiv(array.size, _ALIGNED) * _ALIGNED
    host = torch.empty(total, dtype=torch.int32, pin_memory=device.startswith("cuda"))
    flat = host.numpy()
    for array, start in zip(arrays, starts, strict=True):
        flat[start : start + array.size] = array.reshape(-1)
    there = host.to(device, non_blocking=True)
    return [
        there.as_strided(array.shape, (*array.shape[1:], 1), start)
        for array, start in zip(arrays, starts, strict=True)
    ]
