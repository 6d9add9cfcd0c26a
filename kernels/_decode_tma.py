"""Decode on Hopper: whether ``_decode_gluon`` serves a call, its sizes, its launch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from kvcached.kernels._bound import launch_of
from kvcached.kernels._launch import TYPES, runs_gluon
from kvcached.kernels._prefill_tma import box_rows
from kvcached.kernels._tensor_maps import can_map, tensor_map
from kvcached.kernels.checks import UNBOUNDED
from kvcached.kernels.decode import multiprocessors

if TYPE_CHECKING:
    from kvcached.kernels._bound import Launch
    from kvcached.kernels._workspace import Memory
    from kvcached.kernels.checks import AttentionCall
    from kvcached.kernels.plan import Plan

DIM = 128
"""The head dim for which it beats the other kernel."""
KEYS = 64
"""Of a tile: 32 KiB of keys and values."""
STAGES = 3
"""Tiles of a ring. With more on their way memory is read more slowly."""
WARPS = 4
"""That consume; one more produces."""
REGISTERS = 168
"""A thread at the start."""
LEAST_SHARED = 116 << 10
"""Bytes of shared memory of which an SM has no two: a program has an SM to itself."""
MIN_TILES = 24
"""Of a program: shorter work is begun and ended sooner by the other kernel."""
MAX_GROUP = 8
"""Heads of a KV head: beside each there is a row for what rounding takes off its weights."""
MAX_BATCH = 256
"""Sequences whose tiles a warp counts up."""
MERGED_ELEMENTS = 8192
"""Of partial results that are merged at a time, 64 registers a thread."""
ALIGNED = frozenset({"Q", "PARTIAL", "OUT", "stride_qt", "stride_qh", "stride_ot", "stride_oh"})


def suits_tma(call: AttentionCall, num_splits: int, plan: Plan | None) -> bool:
    """Whether ``prepare_tma`` serves a call of few query tokens a sequence best."""
    kv, q = call.kv, call.q
    if (
        not kv.head_dim == kv.head_dim_v == DIM
        or kv.dtype != q.dtype
        or q.dtype not in {torch.bfloat16, torch.float16}
        or not q.is_cuda
        or call.max_q > 1
        or call.table is None
        or call.q_starts is not None
        or call.masks is not None
        or call.slopes is not None
        or call.softcap > 0
        or call.left < UNBOUNDED
    ):
        return False
    if q.shape[1] > MAX_GROUP * kv.num_kv_heads or len(call.lens) > MAX_BATCH or num_splits:
        return False
    if plan is not None and plan.fixed:  # what else is in a batch must not show
        return False
    programs, tiles = multiprocessors(q.device), len(call.lens) * call.longest // KEYS
    few = len(call.lens) * kv.num_kv_heads <= programs
    unlike = plan is not None and plan.balanced
    return (
        (few or unlike)
        and kv.num_kv_heads <= programs
        and tiles * kv.num_kv_heads >= MIN_TILES * programs
        and _can_copy(call)
        and runs_gluon(q.device)
    )


def _can_copy(call: AttentionCall) -> bool:
    """Whether boxes and 16-byte accesses find their places."""
    kv, q, out = call.kv, call.q, call.out
    side_by_side = (  # the heads of a token: a head is a range of columns
        kv.num_kv_heads * kv.head_stride <= kv.slot_stride
        and kv.num_kv_heads * kv.v_head_stride <= kv.v_slot_stride
    )
    places = (kv.k_ptr, kv.v_ptr, q.data_ptr(), out.data_ptr())
    strides = (kv.block_stride, kv.slot_stride, kv.head_stride, kv.v_block_stride,
               kv.v_slot_stride, kv.v_head_stride, *q.stride()[:2], *out.stride()[:2])  # fmt: skip
    return (
        box_rows(kv.block_size, KEYS) > 0
        and side_by_side
        and can_map(places, strides, q.element_size())
    )


def most_parts(batch: int, heads: int, device: torch.device) -> int:
    """Parts of sequences that a launch may have to keep."""
    return multiprocessors(device) + batch * heads


def constants_of(
    batch: int, heads: int, group: int, block_size: int, *, sinks: bool = False
) -> dict[str, Any]:  # fmt: skip
    """Compile-time values of ``decode_tma_kernel``."""
    rows = 1 << (group - 1).bit_length()
    return {
        "B": 1 << (batch - 1).bit_length(), "KV_HEADS": heads, "G": group, "D": DIM,
        "BM": 16, "ROWS": rows, "BN": KEYS, "PAGE": block_size, "BOX": box_rows(block_size, KEYS),
        "STAGES": STAGES,
        "GROUP": min(16, MERGED_ELEMENTS // (rows * DIM)), "HAS_SINKS": sinks,
    }  # fmt: skip


def types_of(dtype: torch.dtype, constants: dict[str, Any]) -> dict[str, str]:
    """Triton's types of the arguments that are no i32, for q's dtype."""
    from triton.experimental.gluon import language as gl

    name, layout = TYPES[dtype], gl.NVMMASharedLayout(128, 16, 3)
    box = f"tensordesc<{name}[1, {constants['BOX']}, {constants['D']}],{layout!r}>"
    return (
        {"K_MAP": box, "V_MAP": box, "Q": f"*{name}", "OUT": f"*{name}", "scale": "fp32"}
        | dict.fromkeys(("SINKS", "PARTIAL", "STATE", "LSE"), "*fp32")
        | dict.fromkeys(("TABLE", "LENS", "FINISHED"), "*i32")
    )


def prepare_tma(call: AttentionCall, memory: Memory) -> list[Launch]:
    """The launch of a checked ``call`` that ``suits_tma``; parts are kept in ``memory``."""
    from kvcached.kernels._decode_gluon import decode_tma_kernel

    kv, q, batch = call.kv, call.q, len(call.lens)
    assert call.table is not None  # as ``suits_tma`` says
    heads = kv.num_kv_heads
    programs = multiprocessors(q.device)
    constants = constants_of(
        batch, heads, q.shape[1] // heads, kv.block_size, sinks=call.sinks is not None
    )  # fmt: skip
    rows = most_parts(batch, heads, q.device) * constants["ROWS"]
    work = memory(batch * heads, rows * DIM, rows, q.device)
    arguments = (
        q, *_maps(call, constants["BOX"]), call.table, call.lens, call.sinks, work.partial,
        work.state, work.finished, call.out, call.lse, call.scale, batch, call.table.stride(0),
        *q.stride()[:2], *call.out.stride()[:2], kv.head_stride,
        kv.v_head_stride,
    )  # fmt: skip
    return [launch_of(decode_tma_kernel, (programs,), arguments, constants,
                      types_of(q.dtype, constants), q.device, WARPS, ALIGNED,
                      launch_pdl=True, maxnreg=REGISTERS, least_shared=LEAST_SHARED)]  # fmt: skip


def _maps(call: AttentionCall, rows: int) -> tuple[bytes, bytes]:
    """The maps of keys and of values."""
    kv = call.kv
    blocks, size, last = kv.num_blocks, kv.block_size, kv.num_kv_heads - 1
    return (
        tensor_map(kv.k_ptr, kv.dtype, (blocks, size, last * kv.head_stride + kv.head_dim),
                   (kv.block_stride, kv.slot_stride), rows),
        tensor_map(kv.v_ptr, kv.dtype, (blocks, size, last * kv.v_head_stride + kv.head_dim_v),
                   (kv.v_block_stride, kv.v_slot_stride), rows),
    )  # fmt: skip
