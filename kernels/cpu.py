"""Attention on CPU tensors: packs a checked call for the compiled workers of ``_attend``."""

from __future__ import annotations

import functools
import struct
from typing import Any

import numpy as np
import torch
from numba import njit

from kvcached.errors import InvalidInput
from kvcached.kernels import _team, quant
from kvcached.kernels._attend import E4M3, E5M2, INT4, INT8, Q_TILE_ROWS, TASK, attention_worker
from kvcached.kernels.checks import UNBOUNDED, AttentionCall, check_places

STORAGE: dict[torch.dtype, Any] = {
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.bfloat16: np.uint16,
    torch.float16: np.int16,
}
KINDS = {
    torch.float8_e4m3fn: E4M3,
    torch.float8_e5m2: E5M2,
    torch.int8: INT8,
    quant.INT4: INT4,
}
_NAMES = TASK.names or ()
_PACK = struct.Struct("".join("d" if TASK[name].kind == "f" else "q" for name in _NAMES))
_worker = functools.cache(attention_worker)


def attend(call: AttentionCall) -> None:
    """Run ``call``; writes ``call.out`` and ``call.lse``.

    Raises ``InvalidInput`` for a length, table width or block id that leads out of the cache;
    ids behind a sequence's last block are not looked at.
    """
    check_places(call)
    lens, batch = call.lens.numpy(), len(call.lens)
    if call.table is not None:
        _check_ids(call.table.numpy(), lens, call.kv)
    starts = (
        np.arange(batch + 1, dtype=np.int32) * np.int32(call.max_q)
        if call.q_starts is None
        else call.q_starts.numpy()
    )
    group = call.q.shape[1] // call.kv.num_kv_heads
    tokens = max(1, Q_TILE_ROWS // group)
    seqs, firsts = _items(starts, tokens)
    if not len(seqs):
        return
    items = len(seqs) * call.kv.num_kv_heads
    counter = np.zeros(1, np.int64)
    arrays = {"counter": counter, "lens": lens, "q_starts": starts, "item_seq": seqs,
              "item_token": firsts}  # fmt: skip
    fields = _fields(call, group) | {name: array.ctypes.data for name, array in arrays.items()}
    fields |= {"items": items, "item_tokens": min(tokens, call.max_q)}
    task = np.frombuffer(_PACK.pack(*[fields[name] for name in _NAMES]), np.uint8)
    worker = _worker(STORAGE[call.q.dtype], call.kv.quantized)
    _team.run(worker, task.ctypes.data, min(torch.get_num_threads(), items))


def _items(starts: Any, tokens: int) -> tuple[Any, Any]:
    """(sequence, first query token in it) of each tile of at most ``tokens`` query tokens."""
    counts = np.diff(starts)
    if not len(counts) or counts.max() <= tokens:
        seqs = np.flatnonzero(counts).astype(np.int32)
        return seqs, np.zeros_like(seqs)
    tiles = -(-counts // tokens)
    seqs = np.repeat(np.arange(len(counts), dtype=np.int32), tiles)
    before = np.cumsum(tiles) - tiles
    firsts = (np.arange(len(seqs)) - before[seqs]) * tokens
    # The last tile of a causal sequence has the most to do: take the long ones first.
    return seqs[::-1].copy(), firsts[::-1].astype(np.int32)


def _fields(call: AttentionCall, group: int) -> dict[str, int | float]:
    """The fields of ``TASK`` that the call alone decides."""
    kv, q, out, table = call.kv, call.q, call.out, call.table
    tensors = {"q": q, "out": out, "lse": call.lse, "table": table, "starts": call.starts,
               "sinks": call.sinks, "slopes": call.slopes, "masks": call.masks,
               "k_scale": call.k_scale, "v_scale": call.v_scale}  # fmt: skip
    addresses = {name: 0 if x is None else x.data_ptr() for name, x in tensors.items()}
    return addresses | _scale_fields(call) | {
        "k": kv.k_ptr, "v": kv.v_ptr, "kv_heads": kv.num_kv_heads, "group": group,
        "dim": kv.head_dim, "dim_v": kv.head_dim_v, "block_size": kv.block_size,
        "left": call.left, "right": call.right if call.masks is None else UNBOUNDED,
        "q_token": q.stride(0), "q_head": q.stride(1),
        "out_token": out.stride(0), "out_head": out.stride(1),
        "table_row": 0 if table is None else table.stride(0),
        "k_block": kv.block_stride, "k_slot": kv.slot_stride, "k_head": kv.head_stride,
        "v_block": kv.v_block_stride, "v_slot": kv.v_slot_stride, "v_head": kv.v_head_stride,
        "scale": call.scale, "softcap": call.softcap,
    }  # fmt: skip


def scale_steps(scale: torch.Tensor) -> tuple[int, ...]:
    """Strides of a scale by block, slot and head; 0 where it is the same for all."""
    return (0, 0, 0, *scale.stride())[-3:]


def _scale_fields(call: AttentionCall) -> dict[str, int]:
    """How bytes are read, and the strides of both scales: by block, slot and head."""
    strides = {"stored": KINDS.get(call.kv.dtype, 0)}
    for name, scale in (("k_scale", call.k_scale), ("v_scale", call.v_scale)):
        steps = (0, 0, 0) if scale is None else scale_steps(scale)
        names = [f"{name}_{part}" for part in ("block", "slot", "head")]
        strides |= dict(zip(names, steps, strict=True))
    return strides


def _check_ids(table: Any, lens: Any, kv: Any) -> None:
    row, column = _bad_id(table, lens, kv.block_size, kv.num_blocks)
    if row >= 0:
        raise InvalidInput(
            f"page_table[{row}, {column}] is {table[row, column]}, but the cache has "
            f"{kv.num_blocks} blocks"
        )


@njit(cache=True, nogil=True)
def _bad_id(table, lens, block_size, num_blocks):
    """(row, column) of the first block id that is needed and does not exist, else (-1, -1)."""
    for row in range(len(lens)):
        for column in range((lens[row] + block_size - 1) // block_size):
            if not 0 <= table[row, column] < num_blocks:
                return row, column
    return -1, -1
