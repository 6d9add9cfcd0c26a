"""Prefill on Hopper: whether ``_prefill_gluon`` serves a call, its sizes, its launch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kvcached.kernels._bound import launch_of
from kvcached.kernels._launch import TYPES, runs_gluon
from kvcached.kernels._prefill_parts import ALIGNED, chunks, splits_of, with_positive_scale
from kvcached.kernels._tensor_maps import can_map, tensor_map
from kvcached.kernels._workspace import workspace_of
from kvcached.kernels.checks import UNBOUNDED
from kvcached.kernels.decode import multiprocessors
from kvcached.layout import cdiv

if TYPE_CHECKING:
    from kvcached.kernels._bound import Launch
    from kvcached.kernels._workspace import Memory
    from kvcached.kernels.checks import AttentionCall


@dataclass(frozen=True, slots=True)
class Sizes:
    """What fits shared memory and registers for some head dims.

    ``keys`` of a tile, ``stages`` of the ring, warpgroups that compute (``consumers``) 64 rows each
    and have ``registers`` a thread, of which the producer has ``few`` and all have ``start``.
    """

    keys: int
    stages: int = 2
    consumers: int = 2
    registers: int = 232
    few: int = 40
    start: int = 168

    @property
    def rows(self) -> int:
        """Query tokens x heads of a KV head in a tile."""
        return ROWS * self.consumers


ROWS = 64
"""Of a warpgroup, those of its matrix instructions."""
GROUP_WARPS = 4
"""Of each of the warpgroups of a program."""
LEAST_BOX = 16
"""Rows of the smallest copy."""
SIZES = {
    (64, 64): Sizes(128, consumers=3, registers=160, few=32, start=128),
    (128, 128): Sizes(128),
    (192, 128): Sizes(128),
    (256, 256): Sizes(64),
}
"""By head dims of keys and values. Of 64 columns the softmax takes as long as both products: a
third warpgroup computes meanwhile."""
SHORT_QUERIES = 1024
SHORT_SIZES = {(128, 128): Sizes(64, stages=4)}
"""With up to ``SHORT_QUERIES`` query tokens, where the diagonal cuts a large part of the keys, and
of mixed batches."""
L2_KEYS = 16 << 20
"""Bytes of keys and values of the heads that are walked over side by side; see ``beside``."""
FULL_ROWS = 512
"""Query tokens x heads on average of a sequence, or the batch is mixed: most would fill no tile."""


def suits_tma(call: AttentionCall, num_splits: int = 0) -> bool:
    """Whether ``prepare_tma`` serves a call of many query tokens best.

    With ``num_splits`` 0 it must fill the GPU without parts.
    """
    kv, group = call.kv, call.q.shape[1] // call.kv.num_kv_heads
    if (
        (kv.head_dim, kv.head_dim_v) not in SIZES
        or call.table is None
        or not call.q.is_cuda
        or call.q.dtype not in {torch.bfloat16, torch.float16}
        or group > 2 * ROWS
        or num_splits > 1
        or call.slopes is not None
        or call.softcap > 0
        or call.left < UNBOUNDED
    ):
        return False
    if not (can_copy(call) and runs_gluon(call.q.device)):
        return False
    items = tiles_of(call) * kv.num_kv_heads
    if not has_full_tiles(call):
        prompts = (call.q.shape[0] - len(call.lens)) * group // sizes_of(call).rows
        if call.q_starts is None or prompts * kv.num_kv_heads < multiprocessors(call.q.device):
            return False  # almost all decode
    return num_splits == 1 or splits_of(call, items, programs_per_sm=1, most=2, least=1) == 1


def can_copy(call: AttentionCall) -> bool:
    """Whether boxes and 16-byte copies find their places."""
    kv, q, out = call.kv, call.q, call.out
    boxes = box_rows(kv.block_size, sizes_of(call).keys) > 0
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
    tokens: int = sizes_of(call).rows // (call.q.shape[1] // call.kv.num_kv_heads)
    if call.q_starts is None:
        return int(batch * cdiv(call.max_q, tokens))
    return int(call.q.shape[0]) // tokens + batch


def has_full_tiles(call: AttentionCall) -> bool:
    """Whether sequences have the query tokens of several tiles on average."""
    rows: int = call.q.shape[0] * (call.q.shape[1] // call.kv.num_kv_heads)
    return rows >= FULL_ROWS * len(call.lens)


def is_mixed(call: AttentionCall) -> bool:
    """Whether most sequences have too few tokens for a tile: they decode beside a prompt."""
    return call.q_starts is not None and not has_full_tiles(call)


def beside(call: AttentionCall, tiles: int) -> int:
    """Heads (of a ragged q; else heads of sequences) that are walked over side by side.

    As many as have their keys in the L2 cache, which else all programs would read from memory for
    each of their tiles; of equal sequences at least as many as fill the GPU with long tiles.
    """
    kv = call.kv
    fit = L2_KEYS // (call.longest * kv.dtype.itemsize * (kv.head_dim + kv.head_dim_v))
    if call.q_starts is not None:
        return int(max(1, min(kv.num_kv_heads, fit)))
    each, heads = tiles // len(call.lens), kv.num_kv_heads * len(call.lens)
    least = cdiv(4 * multiprocessors(call.q.device), each)
    return int(max(1, min(heads, max(fit, least))))


def sizes_of(call: AttentionCall) -> Sizes:
    """Those for the head dims and the queries of a call."""
    dims = call.kv.head_dim, call.kv.head_dim_v
    short = call.max_q <= SHORT_QUERIES or is_mixed(call)
    return SHORT_SIZES[dims] if short and dims in SHORT_SIZES else SIZES[dims]


def constants_of(
    sizes: Sizes, group: int, dim: int, dim_v: int, block_size: int, *, varlen: bool, sinks: bool,
    mixed: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Compile-time values of ``prefill_tma_kernel``."""
    first, rest = chunks(dim)
    return {
        "G": group, "DA": first, "DB": rest, "DV": dim_v, "BN": sizes.keys, "PAGE": block_size,
        "BOX": box_rows(block_size, sizes.keys), "TOKENS": sizes.rows // group,
        "STAGES": sizes.stages, "VARLEN": varlen, "MIXED": mixed, "HAS_SINKS": sinks,
        "CONSUMERS": sizes.consumers, "REGISTERS": sizes.registers, "FEW": sizes.few,
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
        | dict.fromkeys(("TABLE", "LENS", "Q_STARTS", "QUEUE"), "*i32")
    )  # fmt: skip


def prepare_tma(call: AttentionCall, memory: Memory = workspace_of) -> list[Launch]:
    """The launch of a checked ``call`` that ``suits_tma``."""
    from kvcached.kernels._prefill_gluon import prefill_tma_kernel

    kv = call.kv
    assert call.table is not None  # as ``suits_tma`` says
    group = call.q.shape[1] // kv.num_kv_heads
    sizes = sizes_of(call)
    constants = constants_of(
        sizes, group, kv.head_dim, kv.head_dim_v, kv.block_size,
        varlen=call.q_starts is not None, sinks=call.sinks is not None, mixed=is_mixed(call),
    )  # fmt: skip
    tiles = tiles_of(call)
    items = tiles * kv.num_kv_heads
    q, scale = with_positive_scale(call)
    keys, values = _maps(call, constants["BOX"])
    queue = memory(2, 0, 0, q.device).finished
    arguments = (
        q, keys, keys, values, kv.k_ptr, kv.v_ptr, call.table, call.lens,
        call.q_starts, call.sinks, queue, call.out, call.lse, scale, min(call.right, 1 << 30),
        len(call.lens), call.max_q, tiles, items, beside(call, tiles),
        call.table.stride(0), kv.num_kv_heads,
        *q.stride()[:2], *call.out.stride()[:2], kv.block_stride, kv.slot_stride, kv.head_stride,
        kv.v_block_stride, kv.v_slot_stride, kv.v_head_stride,
    )  # fmt: skip
    programs = min(items, multiprocessors(q.device))
    return [launch_of(prefill_tma_kernel, (programs,), arguments, constants,
                      types_of(q.dtype, constants), q.device, GROUP_WARPS, ALIGNED,
                      maxnreg=sizes.start)]  # fmt: skip


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
