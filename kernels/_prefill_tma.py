"""Prefill on Hopper: whether ``_prefill_gluon`` serves a call, its sizes, its launch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from kvcached.kernels._bound import launch_of
from kvcached.kernels._launch import TYPES, runs_gluon
from kvcached.kernels._prefill_parts import ALIGNED, chunks, splits_of, with_positive_scale
from kvcached.kernels._tensor_maps import can_map, tensor_map
from kvcached.kernels.checks import UNBOUNDED
from kvcached.kernels.decode import multiprocessors
from kvcached.layout import cdiv

if TYPE_CHECKING:
    from kvcached.kernels._bound import Launch
    from kvcached.kernels.checks import AttentionCall

ROWS = 128
"""Query tokens x heads of a KV head in a tile: 64 for each of two warpgroups."""
GROUP_WARPS = 4
"""Of each of the three warpgroups of a program."""
LEAST_BOX = 16
"""Rows of the smallest copy."""
KEYS = {(64, 64): 128, (128, 128): 128, (192, 128): 128, (256, 256): 64}
"""Keys of a tile by head dims of keys and values: two of each fit shared memory."""
FASTER = {(128, 128), (256, 256)}
"""Where it beats the other kernel: 64 columns are too few to hide the softmax behind, and 192 are
those of many KV heads, which are walked over side by side and so come from memory each time."""
SHORT = 2048
"""Up to so many keys a tile takes too short for what begins and ends it; the other kernel wins."""
FULL_TILES = 4
"""On average of a sequence; most of a mixed batch would fill none."""
REGISTERS = 168
"""A thread at the start, so that the 384 threads of a program fit an SM."""


def suits_tma(call: AttentionCall, num_splits: int = 0) -> bool:
    """Whether ``prepare_tma`` serves a call of many query tokens best.

    With ``num_splits`` 0 it must fill the GPU without parts.
    """
    kv, group = call.kv, call.q.shape[1] // call.kv.num_kv_heads
    if (
        (kv.head_dim, kv.head_dim_v) not in FASTER
        or call.table is None
        or not call.q.is_cuda
        or call.q.dtype not in {torch.bfloat16, torch.float16}
        or group > ROWS
        or num_splits > 1
        or call.slopes is not None
        or call.softcap > 0
        or call.left < UNBOUNDED
    ):
        return False
    if call.longest <= SHORT or call.q.shape[0] * group < FULL_TILES * ROWS * len(call.lens):
        return False
    if not (can_copy(call) and runs_gluon(call.q.device)):
        return False
    items = tiles_of(call) * kv.num_kv_heads
    return num_splits == 1 or splits_of(call, items, programs_per_sm=1, most=2, least=1) == 1


def can_copy(call: AttentionCall) -> bool:
    """Whether boxes and 16-byte copies find their places."""
    kv, q, out = call.kv, call.q, call.out
    boxes = box_rows(kv.block_size, KEYS[kv.head_dim, kv.head_dim_v]) > 0
    side_by_side = (  # the heads of a token: a head is a range of columns
        kv.num_kv_heads * kv.head_stride <= kv.slot_stride
        and kv.num_kv_heads * kv.v_head_stride <= kv.v_slot_stride
    )
    places = (kv.k_ptr, kv.v_ptr, q.data_ptr(), out.data_ptr())
    strides = (kv.block_stride, kv.slot_stride, kv.head_stride, kv.v_block_stride,
               kv.v_slot_stride, kv.v_head_stride, *q.stride()[:2], *out.stride()[:2])  # fmt: skip
    return boxes and side_by_side and can_map(places, strides, q.element_size())


def box_rows(block_size: int, keys: int) -> int:
    """Rows that one copy brings: the most that lie in one block of any tile; 0 if too few."""
    rows = math.gcd(block_size, keys)
    return rows if rows >= LEAST_BOX else 0


def tiles_of(call: AttentionCall) -> int:
    """Tiles that the kernel walks over for each KV head; some of a ragged q are empty."""
    batch: int = len(call.lens)
    tokens: int = ROWS // (call.q.shape[1] // call.kv.num_kv_heads)
    if call.q_starts is None:
        return batch * cdiv(call.max_q, tokens)
    return int(call.q.shape[0]) // tokens + batch


def constants_of(
    group: int, dim: int, dim_v: int, block_size: int, *, varlen: bool, sinks: bool
) -> dict[str, Any]:
    """Compile-time values of ``prefill_tma_kernel``."""
    keys, (first, rest) = KEYS[dim, dim_v], chunks(dim)
    return {
        "G": group, "DA": first, "DB": rest, "DV": dim_v, "BN": keys, "PAGE": block_size,
        "BOX": box_rows(block_size, keys), "TOKENS": ROWS // group,
        "STAGES": 2, "VARLEN": varlen, "HAS_SINKS": sinks, "REGISTERS": 232, "FEW": 40,
    }  # fmt: skip


def types_of(dtype: torch.dtype, constants: dict[str, Any]) -> dict[str, str]:
    """Triton's types of the arguments that are no i32, for q's dtype."""
    from triton.experimental.gluon import language as gl

    name, layout = TYPES[dtype], gl.NVMMASharedLayout(128, 16, 3)
    widths = {"K_MAP": "DA", "K_REST_MAP": "DB" if constants["DB"] else "DA", "V_MAP": "DV"}
    return (
        {x: f"tensordesc<{name}[1, {constants['BOX']}, {constants[width]}],{layout!r}>"
         for x, width in widths.items()}
        | {"Q": f"*{name}", "OUT": f"*{name}", "K": "i64", "V": "i64", "scale": "fp32"}
        | dict.fromkeys(("SINKS", "LSE"), "*fp32")
        | dict.fromkeys(("TABLE", "LENS", "Q_STARTS"), "*i32")
    )  # fmt: skip


def prepare_tma(call: AttentionCall) -> list[Launch]:
    """The launch of a checked ``call`` that ``suits_tma``."""
    from kvcached.kernels._prefill_gluon import prefill_tma_kernel

    kv = call.kv
    assert call.table is not None  # as ``suits_tma`` says
    group = call.q.shape[1] // kv.num_kv_heads
    constants = constants_of(
        group, kv.head_dim, kv.head_dim_v, kv.block_size,
        varlen=call.q_starts is not None, sinks=call.sinks is not None,
    )  # fmt: skip
    tiles = tiles_of(call)
    items = tiles * kv.num_kv_heads
    q, scale = with_positive_scale(call)
    keys, values = _maps(call, constants["BOX"])
    arguments = (
        q, keys, keys, values, kv.k_ptr, kv.v_ptr, call.table, call.lens,
        call.q_starts, call.sinks, call.out, call.lse, scale, min(call.right, 1 << 30),
        len(call.lens), call.max_q, tiles, items,
        call.table.stride(0), kv.num_kv_heads,
        *q.stride()[:2], *call.out.stride()[:2], kv.block_stride, kv.slot_stride, kv.head_stride,
        kv.v_block_stride, kv.v_slot_stride, kv.v_head_stride,
    )  # fmt: skip
    programs = min(items, multiprocessors(q.device))
    return [launch_of(prefill_tma_kernel, (programs,), arguments, constants,
                      types_of(q.dtype, constants), q.device, GROUP_WARPS, ALIGNED,
                      maxnreg=REGISTERS)]  # fmt: skip


def _maps(call: AttentionCall, rows: int) -> tuple[bytes, bytes]:
    """The maps of keys and of values."""
    kv = call.kv
    blocks, size = kv.num_blocks, kv.block_size
    return (
        tensor_map(kv.k_ptr, kv.dtype,
                   (blocks, size, (kv.num_kv_heads - 1) * kv.head_stride + kv.head_dim),
                   (kv.block_stride, kv.slot_stride), rows),
        tensor_map(kv.v_ptr, kv.dtype,
                   (blocks, size, (kv.num_kv_heads - 1) * kv.v_head_stride + kv.head_dim_v),
                   (kv.v_block_stride, kv.v_slot_stride), rows),
    )  # fmt: skip
