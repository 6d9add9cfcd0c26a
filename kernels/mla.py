"""``mla_with_kvcache``: multi-head latent attention over a paged cache of latents.

DeepSeek-V2 (2024) keeps one latent row a token, 512 + 64 elements, for all heads. With the
up-projections absorbed into the query and the output, decoding is attention of H heads over one
KV head whose value is the front of its key. Prefill expands the latents to keys and values of
``head_dim`` 192 and 128 and calls ``attn_with_kvcache``.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from kvcached.errors import InvalidInput
from kvcached.kernels._fit import HOPPER, Target, fit_tiles
from kvcached.kernels.attention import known_for
from kvcached.kernels.checks import AttentionCall, check_call
from kvcached.kernels.quant import INT4, LARGEST, require_hardware
from kvcached.layout import cdiv

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvcached.kernels._bound import Launch
    from kvcached.kernels._workspace import Memory
    from kvcached.kernels.mla_plan import MlaPlan

MAX_FUSED_SPLITS = 8
"""Of few rows. More are merged by a launch of their own, with a program for each row."""
MAX_SPLITS = 64
MIN_SPLIT_TOKENS = 256
"""Below this a split costs more than it saves."""
WIDE = {"BM": 64, "BN": 64}
"""The tiles of ``mla_wide_kernel``."""
EARLY = {"launch_pdl": 1}
"""It may begin before the kernel in front has ended, for whose end it waits. Its merge may not: so
many programs would gather on the few SMs that are free."""


def mla_with_kvcache(
    q: torch.Tensor, kv_cache: torch.Tensor, page_table: Any, cache_seqlens: Any,
    head_dim_v: int = 512, *, softmax_scale: float, causal: bool = True,
    kv_descale: torch.Tensor | None = None, plan: MlaPlan | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Absorbed attention of ``q`` over cached latents, for decoding and verifying.

    Parameters
    ----------
    q:
        ``[T, H, D]``, of each of the B sequences its last ``T // B`` tokens, absorbed: D is 576 in
        DeepSeek's models, the last 64 of them rotary.
    kv_cache:
        ``[num_blocks, block_size, D]`` of q's dtype (float32, float16, bfloat16; on a CPU float64
        too) or quantised (float8_e4m3fn, float8_e5m2, int8; on GPUs q is then of 16 bits), last
        stride 1. The first ``head_dim_v`` elements of a row are its value.
    page_table, cache_seqlens:
        Block ids of each sequence, int32 ``[B, n]``, and its tokens in the cache, int32 ``[B]``,
        those of ``q`` included.
    softmax_scale:
        Of the scores; that of the head dim before absorption, so there is no default.
    causal:
        Bottom-right aligned: the last query sees the last token, the one before it does not.
    kv_descale:
        Of a quantised cache: what stored numbers are multiplied by, the ``scale`` that
        ``concat_and_cache_mla`` was given. One float32, of shape ``()`` or ``[1]``.
    plan, out:
        A ``plan_mla``, for GPUs; ``[T, H, head_dim_v]`` to write to.

    Returns the output and the natural-log LSE, float32 ``[T, H]``; a query that sees no token gives
    0 and -inf. Raises ``InvalidInput`` naming the argument.
    """
    tensors = (q, kv_cache, kv_cache, page_table, None, cache_seqlens, *(None,) * 4, kv_descale,
               None, out)  # fmt: skip
    options = "mla", head_dim_v, softmax_scale, causal
    known = known_for(q, None) if plan is None else getattr(plan, "known", None)
    done = known and known.launch(tensors, options, with_lse=True)
    if done:
        return done
    call = check_mla(q, kv_cache, page_table, cache_seqlens, head_dim_v, softmax_scale,
                     causal=causal, kv_descale=kv_descale, out=out)  # fmt: skip
    memory = plan_memory(call, plan)
    if call.kv.device.type == "cpu":
        from kvcached.kernels.cpu import attend

        attend(replace(call, v_scale=call.k_scale))
        return call.out, call.lse
    with torch.cuda.device(call.kv.device):  # kernels are launched on the current one
        steps = prepare(call, memory=memory)
        for step in steps:
            step()
    if known is not None and steps:
        known.learn(tensors, options, call, steps)
    return call.out, call.lse


def plan_memory(call: AttentionCall, plan: MlaPlan | None) -> Memory | None:
    """Where a call finds memory for parts; raises ``InvalidInput`` if the plan is for others."""
    if plan is None:
        return None
    if not hasattr(plan, "check"):
        raise InvalidInput(f"plan is a {type(plan).__name__}, not what plan_mla makes")
    plan.check(len(call.lens), call.max_q, call.q.shape[1], call.kv.device)
    return plan.memory


def check_mla(
    q: torch.Tensor, kv_cache: torch.Tensor, page_table: Any, cache_seqlens: Any,
    head_dim_v: int, softmax_scale: float, *, causal: bool = True,
    kv_descale: torch.Tensor | None = None, out: torch.Tensor | None = None,
) -> AttentionCall:  # fmt: skip
    """The checked call: attention over one KV head whose value is the front of its key.

    The scale of a quantised cache is its ``k_scale`` and, since the kernels take it once, no other.
    """
    if not isinstance(kv_cache, torch.Tensor) or kv_cache.dim() != 3:
        shape = tuple(getattr(kv_cache, "shape", ()))
        raise InvalidInput(f"kv_cache must be [num_blocks, block_size, D], not of shape {shape}")
    if not 1 <= head_dim_v <= kv_cache.shape[2]:
        raise InvalidInput(f"head_dim_v is {head_dim_v}, but rows have {kv_cache.shape[2]}")
    if not math.isfinite(softmax_scale):
        raise InvalidInput(f"softmax_scale is {softmax_scale!r}, but must be finite")
    _check_descale(kv_cache, kv_descale)
    batch = len(cache_seqlens)
    tokens = q.shape[0] if isinstance(q, torch.Tensor) and q.dim() == 3 else 0
    if tokens and (not batch or tokens % batch):
        raise InvalidInput(f"q has {tokens} tokens, which is no multiple of {batch} sequences")
    keys = kv_cache[:, :, None]
    call = check_call(
        q, keys, keys[..., :head_dim_v], cache_seqlens=cache_seqlens, page_table=page_table,
        max_seqlen_q=max(1, tokens // max(1, batch)), softmax_scale=softmax_scale, causal=causal,
        k_descale=kv_descale, v_descale=kv_descale, out=out,
    )  # fmt: skip
    return replace(call, v_scale=None)


def _check_descale(kv_cache: torch.Tensor, scale: torch.Tensor | None) -> None:
    """A quantised cache has one scale for all, as ``concat_and_cache_mla`` writes it."""
    dtype = kv_cache.dtype
    if dtype == INT4:
        raise InvalidInput(
            "kv_cache is uint8, but latents are not stored as int4",
            hint="If it holds fp8, pass kv_cache.view(torch.float8_e4m3fn).",
        )
    if (scale is not None) != (dtype in LARGEST):
        raise InvalidInput(f"a cache of {dtype} {'takes no' if scale is not None else 'needs'} "
                           "kv_descale")  # fmt: skip
    if scale is None:
        return
    shape, kind, where = tuple(scale.shape), scale.dtype, scale.device
    if shape not in ((), (1,)) or (kind, where) != (torch.float32, kv_cache.device):
        raise InvalidInput(
            f"kv_descale must be float32 of shape () or (1,) on {kv_cache.device}, not {kind} "
            f"{shape} on {where}",
            hint="All latents have one scale; by row or by head there are none.",
        )


def mla_config(
    rows: int, dim: int, dim_v: int, itemsize: int, target: Target = HOPPER, *,
    in_bytes: bool = False,
) -> dict[str, int]:  # fmt: skip
    """Compile-time sizes of ``mla_kernel``, or (``in_bytes``) of ``mla_bytes_kernel``.

    They are for ``rows`` (token, head) of a sequence.

    64 rows take the matrix instructions of a warpgroup; an accumulator of 128 would not fit the
    registers, so more heads are two programs, the second of which finds the latents in the L2. All
    of shared memory is for tiles on their way; matrix instructions may still read one of them.
    Elsewhere 64 rows would spill (or, where warps make the products, each score be made twice).
    """
    import triton

    most, keys, stages = _tile_of(rows, itemsize, target, in_bytes=in_bytes)
    rest, least = dim - dim_v, 32 if in_bytes else 16  # products are of 16 elements, or pairs
    sizes = {
        "D": dim, "DV": dim_v, "DR": 0 if not rest else max(least, triton.next_power_of_2(rest)),
        "BM": max(16, min(most, triton.next_power_of_2(rows))), "BN": keys,
        "STAGES": stages,
    }  # fmt: skip
    width = sizes["DV"] + sizes["DR"]
    row, fewest = (width, 32) if in_bytes else (width * itemsize, 16)
    return fit_tiles(sizes, target, {"STAGES": 2, "BM": 16, "BN": fewest}, row=row, dim=width,
                     itemsize=itemsize)  # fmt: skip


def _tile_of(rows: int, itemsize: int, target: Target, *, in_bytes: bool) -> tuple[int, int, int]:
    """(rows at most, keys, stages) of a tile before it is fitted to the GPU."""
    if itemsize == 4:
        return 16, 16, 4 if in_bytes else 3
    if not target.warpgroups:
        return 32, 64, 4 if in_bytes else 3
    if in_bytes and rows <= 16:  # bytes leave room for more keys
        return 64, 128, 3
    if rows <= 32:
        return 64, 64, 4 if in_bytes else 3
    return (64, 64, 3) if in_bytes else (64, 32, 4)


def attend_mla(
    call: AttentionCall, num_splits: int = 0, config: Mapping[str, int] | None = None,
    num_warps: int = 8, *, wide: bool | None = None,
) -> None:  # fmt: skip
    """Run a checked call of ``check_mla`` in Triton; writes ``call.out`` and ``call.lse``."""
    for step in prepare(call, num_splits, config, num_warps, wide=wide):
        step()


def prepare(
    call: AttentionCall, num_splits: int = 0, config: Mapping[str, int] | None = None,
    num_warps: int = 8, memory: Memory | None = None, *, wide: bool | None = None,
) -> list[Launch]:  # fmt: skip
    """The launches of a checked call of ``check_mla``, as in ``prefill.prepare``.

    For tuning, ``config`` replaces entries of ``mla_config`` and ``wide`` says which kernel runs.
    """
    from kvcached.kernels._launch import target_of
    from kvcached.kernels._prefill_parts import splits_of
    from kvcached.kernels._workspace import workspace_of

    kv, q = call.kv, call.q
    _check_triton(call)
    if not q.shape[0]:
        return []
    rows = call.max_q * q.shape[1]
    if wide is None:
        wide = config is None and is_wide(call)
    sizes = WIDE if wide else mla_config(rows, kv.head_dim, kv.head_dim_v, q.element_size(),
                                         target_of(q.device), in_bytes=kv.quantized)  # fmt: skip
    sizes = sizes | dict(config or {})
    items = len(call.lens) * -(-rows // sizes["BM"])
    splits = num_splits or splits_of(  # a program an SM is all it holds
        call, items, programs_per_sm=1, most=MAX_SPLITS, least=MIN_SPLIT_TOKENS
    )
    if not 1 <= splits <= MAX_SPLITS or splits & (splits - 1):
        raise InvalidInput(f"num_splits is {splits}, but must be a power of two <= {MAX_SPLITS}")
    chosen = _wide(call, splits) if wide else _plain(call, sizes, splits, num_warps)
    return _steps(call, chosen, items, splits, memory or workspace_of)


def _check_triton(call: AttentionCall) -> None:
    """What the kernels do not take."""
    from kvcached.kernels._launch import interpreted

    kv, q = call.kv, call.q
    if q.dtype == torch.float64:
        raise InvalidInput("float64 attention runs on CPU tensors only", hint="Use float32.")
    if kv.quantized and q.dtype == torch.float32 and not interpreted():
        raise InvalidInput(
            f"float32 queries over latents of {kv.dtype} run on CPU tensors only",
            hint="Use bfloat16 or float16.",
        )
    least = 32 if kv.quantized else 16
    if kv.head_dim_v & (kv.head_dim_v - 1) or kv.head_dim_v < least:
        raise InvalidInput(f"head_dim_v is {kv.head_dim_v}, but must be a power of two >= {least}")
    require_hardware(kv.dtype, q.device)


class _Chosen(NamedTuple):
    kernel: Any
    constants: dict[str, Any]
    num_warps: int
    merges: bool
    """Whether the last part of a tile merges them all."""
    options: dict[str, int]


def _plain(call: AttentionCall, sizes: dict[str, int], splits: int, num_warps: int) -> _Chosen:
    """What takes all sizes and GPUs."""
    from kvcached.kernels._launch import interpreted
    from kvcached.kernels._mla_bytes import mla_bytes_kernel
    from kvcached.kernels._mla_kernels import mla_kernel

    kv, fused = call.kv, splits == 1 or is_fused(sizes, splits)
    constants = sizes | {
        "H": call.q.shape[1], "SPLITS": splits, "FUSED": fused, "BLOCK_SIZE": kv.block_size,
        "ALIGN": 16 if kv.k_ptr % 16 == 0 else max(2, kv.dtype.itemsize),
    }  # fmt: skip
    if kv.quantized:
        constants |= bytes_constants(call.q.dtype, kv.dtype) | {"EXACT": interpreted()}
        return _Chosen(mla_bytes_kernel, constants, num_warps, fused, {})
    constants["UPCAST"] = interpreted() and kv.dtype == torch.bfloat16  # its arithmetic is wrong
    return _Chosen(mla_kernel, constants, num_warps, fused, {})


def bytes_constants(dtype: torch.dtype, stored: torch.dtype) -> dict[str, Any]:
    """Those of ``mla_bytes_kernel`` that follow from the dtypes of queries and of the cache."""
    from kvcached.kernels.decode import compute_type

    return {"KIND": str(stored).removeprefix("torch."), "COMPUTE": compute_type(dtype, stored)}


def _wide(call: AttentionCall, splits: int) -> _Chosen:
    """What warpgroups share, if ``is_wide``."""
    from kvcached.kernels._mla_gluon import mla_wide_kernel

    heads = call.q.shape[1]
    constants = wide_constants(heads, splits, call.kv.block_size, rests=call.max_q * heads <= 32)
    return _Chosen(mla_wide_kernel, constants, 4, splits == 1 or constants["PAIR"], EARLY)


def wide_constants(
    heads: int, splits: int, block_size: int, *, rests: bool = False
) -> dict[str, Any]:
    """Compile-time sizes of ``mla_wide_kernel``; of two splits, the later one merges both."""
    return {"H": heads, "SPLITS": splits, "PAIR": splits == 2, "BLOCK_SIZE": block_size,
            "RESTS": rests, "ALIGN": 16}  # fmt: skip


def merge_constants(dim_v: int, splits: int) -> dict[str, int]:
    """Those of ``mla_merge_kernel``; 64 parts of few columns a program, so that many take part."""
    return {"DV": dim_v, "COLUMNS": 128, "SPLITS": splits, "ROWS": max(1, 64 // splits)}


def _steps(
    call: AttentionCall, chosen: _Chosen, items: int, splits: int, memory: Memory
) -> list[Launch]:
    """The launches: the kernels take the same arguments, but for the scale of quantised caches."""
    from kvcached.kernels._prefill_parts import (
        LOG2_E,
        launch,
        merge,
        with_positive_scale,
        workspace,
    )

    kv, out = call.kv, call.out
    counters = items if chosen.merges else 0
    # Warpgroups leave more than two parts in 16 bits.
    width = kv.head_dim_v if chosen.merges or "PAIR" not in chosen.constants else kv.head_dim_v // 2
    partial, state, finished = workspace(call, splits, width, counters, memory)
    q, scale = with_positive_scale(call)
    assert call.table is not None  # check_mla takes nothing else
    latents = (kv.k_ptr, call.k_scale) if kv.quantized else (kv.k_ptr,)
    per = 2 if kv.quantized else 1  # bytes are read in pairs
    steps = [launch(
        chosen.kernel, (items, splits, 1), call,
        (q, *latents, call.table, call.lens, partial, state, finished, out, call.lse,
         scale * LOG2_E.value, min(call.right, 1 << 30), call.max_q,
         call.table.stride(0), *q.stride()[:2], *out.stride()[:2], kv.block_stride // per,
         kv.slot_stride // per),
        chosen.constants, chosen.num_warps, **chosen.options,
    )]  # fmt: skip
    if not chosen.merges:
        join = merge_wide if width < kv.head_dim_v else merge
        steps.append(join(call, partial, state, splits, width))
    return steps


def merge_wide(call: AttentionCall, partial: Any, state: Any, splits: int, _width: int) -> Launch:
    """The launch that merges what ``mla_wide_kernel`` leaves of more than two parts."""
    from kvcached.kernels._mla_merge import mla_merge_kernel
    from kvcached.kernels._prefill_parts import launch

    tokens, heads, dim_v = call.out.shape
    constants = merge_constants(dim_v, splits)
    return launch(
        mla_merge_kernel,
        (cdiv(tokens * heads, constants["ROWS"]), dim_v // constants["COLUMNS"], 1), call,
        (partial, state, call.out, call.lse, tokens * heads, heads, *call.out.stride()[:2]),
        constants, 4,
    )  # fmt: skip


def is_wide(call: AttentionCall) -> bool:
    """Whether ``mla_wide_kernel`` can run it: DeepSeek's sizes in 16 bits, on Hopper."""
    from kvcached.kernels._launch import interpreted, runs_gluon

    kv, q = call.kv, call.q
    strides = kv.block_stride | kv.slot_stride | q.stride(0) | q.stride(1)
    return (
        (kv.head_dim, kv.head_dim_v, q.element_size()) == (576, 512, 2)
        and not kv.quantized
        and not (strides % 16 or (kv.k_ptr | q.data_ptr()) % 16)
        and runs_gluon(q.device)
        and not interpreted()
    )


def is_fused(sizes: Mapping[str, int], splits: int) -> bool:
    """Whether the last split of a tile merges them; 64 rows of 512 columns are too much for one."""
    return sizes["BM"] < 64 and splits <= MAX_FUSED_SPLITS
