"""The checked arguments of an attention call, and the checks that make them.

Shapes, dtypes, strides and devices are checked on every device; values (lengths, table entries)
only where reading them does not make a GPU wait.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from kvcached.errors import InvalidInput
from kvcached.kernels.quant import INT4
from kvcached.kernels.view import KVView
from kvcached.layout import cdiv

F32 = torch.float32
UNBOUNDED = 1 << 40
"""A window side that never cuts anything off."""
UNSCALED = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""Dtypes of queries."""
MASK_BITS = 64
"""Query tokens of a sequence that a ``custom_mask`` can tell apart."""


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """The checked arguments of one call, the same for every backend.

    Shapes: ``q [T, Hq, D]``, ``out [T, Hq, Dv]``, ``lse [T, Hq]`` float32, ``lens [B]`` int32,
    ``q_starts [B + 1]`` int32 or ``None`` if each sequence has ``max_q`` tokens, ``table [B, n]``
    int32 or ``None``, ``starts [B]`` int32 or ``None``, ``masks [T]`` int64 or ``None``,
    ``k_scale``, ``v_scale`` float32 ``()``, ``[Hkv]`` or ``[num_blocks, block_size, Hkv]``, or
    ``None``. ``left`` and ``right`` are the tokens that a query sees before and after its own
    position.
    """

    q: torch.Tensor
    kv: KVView
    out: torch.Tensor
    lse: torch.Tensor
    lens: torch.Tensor
    table: torch.Tensor | None
    starts: torch.Tensor | None
    q_starts: torch.Tensor | None
    max_q: int
    scale: float
    softcap: float
    left: int
    right: int
    slopes: torch.Tensor | None
    sinks: torch.Tensor | None
    masks: torch.Tensor | None = None
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None

    @property
    def longest(self) -> int:
        """An upper bound of the lengths that needs no look at the device."""
        kv = self.kv
        return kv.block_size * (kv.num_blocks if self.table is None else self.table.shape[1])


def check_call(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    *,
    cache_seqlens: Any,
    page_table: Any = None,
    cache_start: Any = None,
    cu_seqlens_q: Any = None,
    max_seqlen_q: int = 1,
    softmax_scale: float | None = None,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    custom_mask: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
) -> AttentionCall:
    """Check the arguments of ``attn_with_kvcache``; writes ``k`` and ``v`` to the cache.

    Raises ``InvalidInput``.
    """
    kv = KVView.from_tensors(k_cache, v_cache)
    _check_queries(q, kv)
    lens = index_tensor("cache_seqlens", cache_seqlens, 1, kv.device)
    q_starts = _query_starts(cu_seqlens_q, max_seqlen_q, len(lens), q)
    table, starts = _places(page_table, cache_start, len(lens), kv)
    left, right = _window(window_size, causal=causal)
    call = AttentionCall(
        q=q, kv=kv, out=_output(out, q, kv), lse=_empty_lse(q), lens=lens,
        table=table, starts=starts, q_starts=q_starts, max_q=max_seqlen_q,
        scale=kv.head_dim**-0.5 if softmax_scale is None else float(softmax_scale),
        softcap=_softcap(softcap), left=left, right=right,
        slopes=_per_head("alibi_slopes", alibi_slopes, q), sinks=_per_head("sinks", sinks, q),
        masks=_masks(custom_mask, q, max_seqlen_q),
        k_scale=_scale("k_descale", k_descale, kv), v_scale=_scale("v_descale", v_descale, kv),
    )  # fmt: skip
    if call.masks is not None and (left != UNBOUNDED or alibi_slopes is not None):
        raise InvalidInput("custom_mask goes with neither window_size nor alibi_slopes")
    if k is None and v is None:
        return call
    if kv.quantized:
        raise InvalidInput(
            f"k and v cannot be written to a {kv.dtype} cache here",
            hint="Write them with reshape_and_cache first.",
        )
    return replace(call, lens=_append(k, v, k_cache, v_cache, call))


def check_sizes(**sizes: int) -> dict[str, int]:
    """The sizes of a plan as they are; raises ``InvalidInput`` for those that no call can have."""
    for name, size in sizes.items():
        if size < 1:
            raise InvalidInput(f"{name} is {size}, but must be at least 1")
    return sizes


def check_planned(shape: dict[str, Any], **counts: int) -> None:
    """Raise ``InvalidInput`` if a call has more of something than its plan."""
    for name, count in counts.items():
        if count > shape[name]:
            raise InvalidInput(f"the plan has {name} {shape[name]}, the call {count}")


def group_of(num_q_heads: int, num_kv_heads: int) -> int:
    """Query heads a KV head; raises ``InvalidInput`` if these do not come out even."""
    if num_q_heads < 1 or num_q_heads % num_kv_heads:
        raise InvalidInput(f"{num_q_heads} query heads are no multiple of {num_kv_heads}")
    return num_q_heads // num_kv_heads


def index_tensor(name: str, value: Any, dims: int, device: torch.device) -> torch.Tensor:
    """``value`` (tensor, or numpy array for the CPU) as an int32 tensor; copies nothing."""
    tensor = value if isinstance(value, torch.Tensor) else torch.as_tensor(value)
    if tensor.dtype != torch.int32 or tensor.dim() != dims or tensor.device != device:
        raise InvalidInput(
            f"{name} must be {dims}-dimensional int32 on {device}, not {tensor.dim()}-dimensional "
            f"{str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
        )
    return tensor if tensor.stride(-1) == 1 or tensor.numel() <= 1 else tensor.contiguous()


def _check_queries(q: torch.Tensor, kv: KVView) -> None:
    if not isinstance(q, torch.Tensor) or q.dim() != 3:
        raise InvalidInput(f"q must be [T, Hq, D], not of shape {tuple(getattr(q, 'shape', ()))}")
    fits = q.dtype in UNSCALED if kv.quantized else q.dtype == kv.dtype
    if not fits or q.device != kv.device:
        raise InvalidInput(
            f"q is {q.dtype} on {q.device}, but the cache is {kv.dtype} on {kv.device}"
        )
    if q.shape[2] != kv.head_dim:
        raise InvalidInput(f"q has head dim {q.shape[2]}, but the cache has {kv.head_dim}")
    if q.shape[1] == 0 or q.shape[1] % kv.num_kv_heads:
        raise InvalidInput(
            f"q has {q.shape[1]} heads, which is no multiple of the cache's {kv.num_kv_heads}"
        )
    if q.stride(-1) != 1:
        raise InvalidInput(f"q has stride {q.stride(-1)} in its last dimension, not 1")


def _query_starts(cu: Any, max_q: int, batch: int, q: torch.Tensor) -> torch.Tensor | None:
    if isinstance(max_q, bool) or not isinstance(max_q, int) or max_q < 1:
        raise InvalidInput(f"max_seqlen_q is {max_q!r}, but must be an integer >= 1")
    if cu is None:
        if q.shape[0] != batch * max_q:
            raise InvalidInput(
                f"q has {q.shape[0]} tokens for {batch} sequences of max_seqlen_q={max_q}",
                hint="Pass cu_seqlens_q if the sequences differ in length.",
            )
        return None
    starts = index_tensor("cu_seqlens_q", cu, 1, q.device)
    if len(starts) != batch + 1:
        raise InvalidInput(f"cu_seqlens_q has {len(starts)} entries for {batch} sequences")
    if q.device.type == "cpu":
        _check_starts(starts, max_q, q.shape[0])
    return starts


def _check_starts(starts: torch.Tensor, max_q: int, tokens: int) -> None:
    counts = starts.diff()
    if int(starts[0]) != 0 or int(starts[-1]) != tokens or bool((counts < 0).any()):
        raise InvalidInput(f"cu_seqlens_q must rise from 0 to q's {tokens} tokens")
    if len(counts) and int(counts.max()) > max_q:
        raise InvalidInput(
            f"max_seqlen_q is {max_q}, but a sequence has {int(counts.max())} query tokens"
        )


def _places(
    page_table: Any, cache_start: Any, batch: int, kv: KVView
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if (page_table is None) == (cache_start is None):
        raise InvalidInput("pass either page_table or cache_start")
    name, value, dims = (
        ("cache_start", cache_start, 1) if page_table is None else ("page_table", page_table, 2)
    )
    tensor = index_tensor(name, value, dims, kv.device)
    if len(tensor) != batch:
        raise InvalidInput(f"{name} has {len(tensor)} rows for {batch} sequences")
    return (None, tensor) if page_table is None else (tensor, None)


def check_places(call: AttentionCall) -> None:
    """Check lengths, table width and slots by value; for tensors that are cheap to read."""
    longest, shortest = (int(call.lens.max()), int(call.lens.min())) if len(call.lens) else (0, 0)
    if shortest < 0:
        raise InvalidInput(f"cache_seqlens has a length of {shortest}")
    size = call.kv.block_size
    if call.table is not None and call.table.shape[1] < cdiv(longest, size):
        raise InvalidInput(
            f"page_table has {call.table.shape[1]} columns, but {longest} tokens in blocks of "
            f"{size} need {cdiv(longest, size)}"
        )
    if call.starts is not None and len(call.starts):
        slots = call.kv.num_blocks * size
        end = int((call.starts.long() + call.lens).max())
        if int(call.starts.min()) < 0 or end > slots:
            raise InvalidInput(f"cache_start leads to slot {end}, but the cache has {slots}")


def _window(window_size: tuple[int, int], *, causal: bool) -> tuple[int, int]:
    try:
        left, right = (int(side) for side in window_size)
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"window_size is {window_size!r}, not a pair of integers") from error
    if min(left, right) < -1:
        raise InvalidInput(f"window_size is {window_size!r}; -1 is unbounded, smaller is nothing")
    right = 0 if causal else right
    return (UNBOUNDED if left < 0 else left), (UNBOUNDED if right < 0 else right)


def _softcap(softcap: float) -> float:
    if not (math.isfinite(softcap) and softcap >= 0):
        raise InvalidInput(f"softcap is {softcap!r}, but must be finite and >= 0 (0: none)")
    return float(softcap)


def _per_head(name: str, value: torch.Tensor | None, q: torch.Tensor) -> torch.Tensor | None:
    if value is None:
        return None
    if value.shape != q.shape[1:2] or value.device != q.device:
        raise InvalidInput(
            f"{name} must be [{q.shape[1]}] on {q.device}, not {tuple(value.shape)} "
            f"on {value.device}"
        )
    return value.to(torch.float32).contiguous()


def _scale(name: str, scale: torch.Tensor | None, kv: KVView) -> torch.Tensor | None:
    """A scale of a quantised cache, and of no other."""
    if (scale is not None) != kv.quantized:
        what = "needs" if kv.quantized else "takes no"
        raise InvalidInput(f"a cache of {kv.dtype} {what} {name}")
    if scale is None:
        return None
    if any(n % 2 for n in (kv.head_dim, kv.head_dim_v, kv.k_ptr, kv.v_ptr, kv.v_block_stride,
                           kv.v_slot_stride, kv.v_head_stride)):  # fmt: skip
        raise InvalidInput(f"a cache of {kv.dtype} needs even head dims, strides and addresses")
    rows = (kv.num_blocks, kv.block_size, kv.num_kv_heads)
    shapes = (rows,) if kv.dtype == INT4 else ((), rows[2:], rows)
    if tuple(scale.shape) not in shapes or (scale.dtype, scale.device) != (F32, kv.device):
        raise InvalidInput(
            f"{name} must be float32 of shape {' or '.join(map(str, shapes))} on {kv.device}, not "
            f"{scale.dtype} {tuple(scale.shape)} on {scale.device}"
        )
    return scale


def _masks(masks: torch.Tensor | None, q: torch.Tensor, max_q: int) -> torch.Tensor | None:
    if masks is None:
        return None
    if masks.shape != q.shape[:1] or (masks.dtype, masks.device) != (torch.int64, q.device):
        raise InvalidInput(
            f"custom_mask must be int64 [{len(q)}] on {q.device}, not {masks.dtype} "
            f"{tuple(masks.shape)} on {masks.device}"
        )
    if max_q > MASK_BITS:
        raise InvalidInput(f"custom_mask has {MASK_BITS} bits, but max_seqlen_q is {max_q}")
    return masks.contiguous()


def _output(out: torch.Tensor | None, q: torch.Tensor, kv: KVView) -> torch.Tensor:
    shape = (*q.shape[:2], kv.head_dim_v)
    if out is None:
        return torch.empty(shape, dtype=q.dtype, device=q.device)
    if out.shape != shape or (out.dtype, out.device) != (q.dtype, q.device) or out.stride(-1) != 1:
        raise InvalidInput(
            f"out must be {shape} {q.dtype} on {q.device} with last stride 1, not "
            f"{tuple(out.shape)} {out.dtype} on {out.device} with strides {out.stride()}"
        )
    return out


def _empty_lse(q: torch.Tensor) -> torch.Tensor:
    return torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)


def _append(
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    call: AttentionCall,
) -> torch.Tensor:
    """Write ``k`` and ``v`` behind each sequence; returns the new lengths."""
    from kvcached.kernels.append import reshape_and_cache

    if k is None or v is None:
        raise InvalidInput("k and v must be given both or not at all")
    starts, device = call.q_starts, call.q.device
    if starts is None:
        starts = torch.arange(len(call.lens) + 1, dtype=torch.int32, device=device) * call.max_q
    counts = starts.diff()
    grown = replace(call, lens=call.lens + counts)
    if device.type == "cpu":
        check_places(grown)
    seqs = torch.repeat_interleave(counts.long(), output_size=call.q.shape[0])
    pos = torch.arange(call.q.shape[0], device=device) - starts[seqs] + call.lens[seqs]
    reshape_and_cache(k, v, k_cache, v_cache, _slots_of(call, seqs, pos))
    return grown.lens


def _slots_of(call: AttentionCall, seqs: torch.Tensor, pos: torch.Tensor) -> torch.Tensor:
    """The slots of positions ``pos`` of sequences ``seqs``, int32."""
    size = call.kv.block_size
    if call.table is not None:
        return (call.table[seqs, pos // size].long() * size + pos % size).to(torch.int32)
    assert call.starts is not None  # _places takes one of the two
    return (call.starts[seqs] + pos).to(torch.int32)
