"""Split-KV attention in Triton: shapes, splits and launch.

One launch: a program takes (tile of query tokens of one sequence, KV head, part of the keys). The
query heads of a KV head and the tokens of the tile are packed into the rows of the tile, so one
read of K and V serves them all. Parts store their partial results; the last one to finish, found
by a counter that it also resets, merges them in a fixed order (FlashDecoding, Dao et al. 2023, in
one launch). So the result does not depend on timing, and a captured CUDA graph can be replayed.
The parts are equal shares of each sequence, or come from a list that a ``Plan`` made on the device.
On GPUs that have clusters (sm_90 on), those of short sequences are one, and merge together after a
barrier; and where each program has an SM to itself, a launch begins while the one in front ends.

K and V come as integer addresses: Triton asks the driver about pointer objects and refuses an
address that is not mapped, and the base of an elastic cache may be just that. Rows are masked by
length, so memory that no sequence owns is never read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton.language as tl

from kvcached.errors import InvalidInput
from kvcached.kernels._bound import Launch, launch_of
from kvcached.kernels._decode import attend_kernel
from kvcached.kernels._fit import fitted
from kvcached.kernels._launch import TYPES, interpreted, starts_early, target_of
from kvcached.kernels._sizes import (
    CROWD,
    CROWD_SIZES,
    INT4_SIZES,
    SHORT_PART_TOKENS,
    alone,
    crowded,
    num_warps,
    tile_config,
    together,
    wide_int4,
)
from kvcached.kernels._workspace import workspace_of
from kvcached.kernels.quant import INT4, require_hardware
from kvcached.layout import cdiv

if TYPE_CHECKING:
    from kvcached.kernels._workspace import Memory
    from kvcached.kernels.checks import AttentionCall
    from kvcached.kernels.plan import Plan

MAX_SPLITS = 128
"""Parts of a sequence without a plan; the last part to finish merges them all alone."""
MIN_SPLIT_TOKENS = 64
"""A part has a tile at least."""
LONG_PART_TOKENS = 4096
"""So much work hides what a part costs."""
PROGRAMS_PER_SM = 2
"""Parts of so many tokens are made until there are so many programs, shorter ones for one."""
NATURAL = 1 << 30
"""A divisor that cuts no sequence: parts have ``least`` tokens each."""


@dataclass(frozen=True, slots=True)
class Split:
    """How keys are cut: ``max(keys / divisor, least)`` a part, at most ``most`` parts."""

    most: int
    divisor: int
    least: int = MIN_SPLIT_TOKENS


def compute_type(dtype: torch.dtype, stored: torch.dtype) -> Any:
    """What products are made in: 16 bits hold every stored value, but fp8 exactly in fp16 only."""
    if dtype == torch.float32 or (interpreted() and dtype == torch.bfloat16):
        return tl.float32  # the interpreter's bf16 arithmetic is wrong
    if dtype == torch.float16 or stored.itemsize == 1:
        return tl.float16
    return tl.bfloat16


_STORED = {
    torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16,
    torch.float8_e4m3fn: tl.int8, torch.float8_e5m2: tl.int8, torch.int8: tl.int8,
    INT4: tl.uint8,
}  # fmt: skip


def constants_of(
    call: AttentionCall, config: dict[str, int], *, split: bool, planned: bool,
    early: bool = False, cluster: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """The compile-time arguments of ``attend_kernel``; parts in clusters of ``cluster`` or 0."""
    kv, q, out = call.kv, call.q, call.out
    unbounded = 1 << 30
    kind = "int4" if kv.dtype == INT4 else str(kv.dtype).removeprefix("torch.")
    k_scales, k_strides = _scales(call.k_scale)
    v_scales, v_strides = _scales(call.v_scale)
    strides = dict(zip(
        ("qt", "qh", "ot", "oh", "kb", "ks", "kh", "vb", "vs", "vh",
         "kcb", "kcs", "kch", "vcb", "vcs", "vch"),
        (*q.stride()[:2], *out.stride()[:2], kv.block_stride, kv.slot_stride, kv.head_stride,
         kv.v_block_stride, kv.v_slot_stride, kv.v_head_stride, *k_strides, *v_strides),
        strict=True,
    ))  # fmt: skip
    return {f"stride_{name}": stride for name, stride in strides.items()} | config | {
        "KV_HEADS": kv.num_kv_heads, "BLOCK_SIZE": kv.block_size, "PAGED": call.table is not None,
        "VARLEN": call.q_starts is not None, "SPLIT": split, "PLANNED": planned,
        "LEFT": call.left < unbounded, "TREE": call.masks is not None,
        # A lone query is the last token: with a causal mask it sees all that there is.
        "RIGHT": call.right < unbounded and call.max_q > 1 and call.masks is None,
        "HAS_SINKS": call.sinks is not None, "HAS_SLOPES": call.slopes is not None,
        "HAS_CAP": call.softcap > 0, "KIND": kind, "STORED": _STORED[kv.dtype],
        "COMPUTE": compute_type(q.dtype, kv.dtype), "K_SCALES": k_scales, "V_SCALES": v_scales,
        "ALIGN": 16 if (kv.k_ptr | kv.v_ptr) % 16 == 0 else kv.dtype.itemsize,
        "EXACT": interpreted(),
        "ALIGN_Q": _row_alignment(q), "ALIGN_OUT": _row_alignment(out),
        "RESTS": not kv.quantized and q.element_size() == 2 and 2 * config["ROWS"] <= config["BM"],
        "EARLY": early, "CLUSTER": cluster,
    }  # fmt: skip


def _row_alignment(x: torch.Tensor) -> int:
    """Bytes that every row of queries is aligned to, of which 16 are of use."""
    size = x.element_size()
    ends = x.data_ptr() | x.stride(0) * size | x.stride(1) * size
    return 16 if ends % 16 == 0 else size


def _scales(scale: torch.Tensor | None) -> tuple[int, tuple[int, ...]]:
    """(0 none, 1 one a head, 2 one a row; strides of block, slot and head)."""
    if scale is None:
        return 0, (0, 0, 0)
    if scale.dim() < 3:
        return 1, (0, 0, *scale.stride()) if scale.dim() else (0, 0, 0)
    return 2, scale.stride()


def types_of(dtype: torch.dtype) -> dict[str, str]:
    """Triton's types of the arguments of ``attend_kernel`` that are no i32, for q's dtype."""
    queries = f"*{TYPES[dtype]}"
    floats = ("SINKS", "SLOPES", "K_SCALE", "V_SCALE", "PARTIAL", "STATE", "LSE")
    ints = ("TABLE", "LENS", "Q_STARTS", "WORK", "FINISHED")
    return {
        "Q": queries, "OUT": queries, "K": "i64", "V": "i64", "MASKS": "*i64",
        "scale": "fp32", "softcap": "fp32", "stride_table": "i32",
    } | dict.fromkeys(floats, "*fp32") | dict.fromkeys(ints, "*i32")  # fmt: skip


def attend_triton(call: AttentionCall, num_splits: int = 0, plan: Plan | None = None) -> None:
    """Run a checked ``call`` in Triton; writes ``call.out`` and ``call.lse``. See ``prepare``."""
    for step in prepare(call, num_splits, plan):
        step()


def prepare(
    call: AttentionCall, num_splits: int = 0, plan: Plan | None = None,
    memory: Memory = workspace_of,
) -> list[Launch]:  # fmt: skip
    """The launch of a checked ``call``, if it has queries: tiles, parts, memory for them.

    That is the plan's, or without one from ``memory``, by default the current stream's.
    """
    if not call.q.shape[0]:
        return []
    kv, q, batch = call.kv, call.q, len(call.lens)
    if q.dtype == torch.float64:
        raise InvalidInput("float64 attention runs on CPU tensors only", hint="Use float32.")
    require_hardware(kv.dtype, q.device)
    group = q.shape[1] // kv.num_kv_heads
    config = tile_config(group, kv.head_dim, kv.head_dim_v, call.max_q, q.dtype, kv.dtype,
                         target_of(q.device))  # fmt: skip
    if plan is not None:
        config = plan.config_for(call)
    q_tiles = cdiv(call.max_q, config["TOKENS"])
    items = batch * q_tiles * kv.num_kv_heads
    split = _split(call, items, num_splits, plan)
    if plan is None:
        rows = items * split.most * config["ROWS"] if split.most > 1 else 0
        width = config["DVP"] * (2 if kv.quantized else 1)
        work = memory(items, rows * width, rows, q.device)
    else:
        work = plan.workspace
    start = _start(call, config, items, split, num_splits, plan)
    split = start.split
    table = call.starts if call.table is None else call.table
    stride, columns = (0, 0) if call.table is None else (call.table.stride(0), call.table.shape[1])
    arguments = (
        q, kv.k_ptr, kv.v_ptr, table, call.lens, call.q_starts, call.masks, call.sinks, call.slopes,
        call.k_scale, call.v_scale, *work.tensors, call.out, call.lse,
        call.scale, call.softcap, min(call.left, 1 << 30), min(call.right, 1 << 30), call.max_q,
        q_tiles, split.divisor, split.least, stride, columns,
    )  # fmt: skip
    return [launch_of(attend_kernel, start.grid, arguments, start.constants, types_of(q.dtype),
                      q.device, start.warps, frozenset(), **start.options)]  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Start:
    """How parts become programs."""

    split: Split
    grid: tuple[int, int]
    constants: dict[str, Any]
    warps: int
    options: dict[str, int]


def _start(
    call: AttentionCall, config: dict[str, int], items: int, split: Split, asked: int,
    plan: Plan | None,
) -> _Start:  # fmt: skip
    """Programs of ``items`` (tile, KV head), each in parts, or of the list of a plan.

    Where each has an SM to itself, it gets so much shared memory that no two share one, and may
    begin before the kernel in front has ended (programmatic dependent launch of CUDA). Else the
    next launch would be placed beside it, on some SMs twice and on others not at all, which costs
    more than an early start saves. The same goes for four to an SM, where they fill nearly all.
    """
    planned, size = plan is not None and plan.balanced, call.q.element_size()
    grid = (plan.slots * call.kv.num_kv_heads, 1) if plan is not None and planned else (
        items, split.most)  # fmt: skip
    warps, cluster, options = num_warps(config, size), 0, {}
    fixed = plan is not None and plan.fixed  # then the size of the batch must not show
    plain = not (fixed or planned or call.kv.quantized) and split.most == call.max_q == 1
    early, sms, beside = False, multiprocessors(call.q.device), 1
    longest = call.longest if plan is None else plan.shape["max_seqlen_k"]
    tokens = longest * items // (grid[0] * grid[1])
    if grid[0] * grid[1] <= sms and not fixed:
        early = starts_early(call.q.device)
        if early and not asked and not planned:
            config, cluster = together(config, size, split.most, longest)
        if cluster:
            split, grid = Split(cluster, cluster), (items * cluster, 1)
        else:
            # Not of quantised caches, which would not fit in two warps' registers.
            short = tokens <= SHORT_PART_TOKENS and not call.kv.quantized
            # A plan's list cuts at its own tiles: larger ones would reach over the end of a block.
            config, warps = alone(config, size, short=short, early=early and not planned)
    elif plain and crowded(config, items, sms) and starts_early(call.q.device):
        config, beside, early = config | CROWD_SIZES, CROWD, True
    elif not (fixed or planned) and wide_int4(config, call.kv.dtype, tokens):
        config = config | INT4_SIZES
    if early:
        options = {"launch_pdl": True, "cluster": max(1, cluster),
                   "least_shared": _share_of_shared(call.q.device, beside)}  # fmt: skip
    config = fitted(config, size, call.kv.dtype, target_of(call.q.device))
    constants = constants_of(call, config, split=planned or split.most > 1, planned=planned,
                             early=early, cluster=cluster)  # fmt: skip
    return _Start(split, grid, constants, warps, options)


def _share_of_shared(device: torch.device, programs: int) -> int:
    """Bytes of shared memory with which an SM has room for so many programs, and no more."""
    properties = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_multiprocessor) // (programs + 1)


def _split(call: AttentionCall, items: int, asked: int, plan: Plan | None) -> Split:
    """Parts of each sequence: as asked, as planned, or enough to fill the GPU, but none tiny."""
    if asked and not 1 <= asked <= MAX_SPLITS:
        raise InvalidInput(f"num_splits is {asked}, but at most {MAX_SPLITS} can be merged")
    if plan is not None:
        return plan.split(items, asked)
    if asked:
        return Split(asked, asked, 1)
    splits = equal_parts(items, call.longest, call.q.device)
    return Split(splits, splits)


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 1 of what stands in for one."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def equal_parts(items: int, longest: int, device: torch.device) -> int:
    """Parts a sequence, of up to ``longest`` tokens, where ``items`` programs would take it whole.

    One program on most SMs reads memory as fast as several do, and each part costs microseconds.
    So there is one wave of parts, unless parts are long: then programs share an SM, which evens out
    their ends.
    """
    if device.type != "cuda":
        return 1
    sms = multiprocessors(device)
    parts = sms // items
    if 4 * items * parts < 3 * sms:  # too few SMs would work
        parts += 1
    long = min(PROGRAMS_PER_SM * sms // items, longest // LONG_PART_TOKENS)
    most = min(MAX_SPLITS, cdiv(longest, MIN_SPLIT_TOKENS))
    return int(max(1, min(most, max(parts, long))))
