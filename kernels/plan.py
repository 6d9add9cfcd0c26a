"""``plan_attention``: what a step's attention calls share, made once: memory, parts, kernels.

The work of a skewed batch is cut on the device: one small kernel finds the smallest length of a
part with which all parts fit into a fixed list, and writes the list, long parts first. Launches
have one program for each place in the list, so a captured CUDA graph follows the lengths, and the
host never waits for them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from kvcached.errors import InvalidInput
from kvcached.kernels import _launch
from kvcached.kernels._decode import span
from kvcached.kernels._launch import Handle, handle_of, interpreted, target_of
from kvcached.kernels._repeat import Known
from kvcached.kernels._sizes import tile_config
from kvcached.kernels._workspace import Growing, make_workspace
from kvcached.kernels.checks import (
    UNBOUNDED,
    AttentionCall,
    check_planned,
    check_sizes,
    group_of,
    index_tensor,
)
from kvcached.kernels.decode import (
    MIN_SPLIT_TOKENS,
    NATURAL,
    Split,
    equal_parts,
    multiprocessors,
)
from kvcached.kernels.quant import LARGEST
from kvcached.layout import cdiv

LIST_PROGRAMS_PER_SM = 16
"""Places in the list of parts; short parts fill up the end, so more than run at a time."""
MIN_PART_TOKENS = 256
"""Of sequences that differ in length; below it a part costs more than it saves."""
FIXED_PART = 2048
"""Keys of a part in deterministic mode, where a result depends on its own sequence only."""
PLANNED_ENTRIES = 8192
"""Entries x sequences that a program of the planner compares at a time."""
CLASSES = 8
"""Of lengths, halving, in which the list is ordered."""


@triton.jit(do_not_specialize=["batch", "max_q", "left", "least", "most", "few_least", "few"])
def plan_kernel(
    LENS, Q_STARTS, WORK, batch, max_q, left, least, most, few_least, few,
    B: tl.constexpr, E: tl.constexpr, BN: tl.constexpr, LEFT: tl.constexpr, VARLEN: tl.constexpr,
    ORDERS: tl.constexpr,
):  # fmt: skip
    """E entries of the list. Each program cuts all the sequences: that is cheaper than waiting.

    ``least`` and the lengths of parts are counted in tiles of BN keys; ``most`` parts in all, which
    is the length of the list; of sequences of nearly one length, ``few_least`` and ``few``.
    """
    seq, entry = tl.arange(0, B), tl.program_id(0) * E + tl.arange(0, E)
    there = seq < batch
    length = tl.load(LENS + seq, mask=there, other=0)
    queries = seq * 0 + max_q
    if VARLEN:
        queries = tl.load(Q_STARTS + seq + 1, mask=there, other=0)
        queries -= tl.load(Q_STARTS + seq, mask=there, other=0)
    floor, end = span(length, queries, 0, queries, left, 0, LEFT, False)
    begin = floor // BN * BN
    tiles = tl.cdiv(tl.maximum(end - begin, 0), BN)
    longest, limit = tl.max(tiles, 0), most
    if longest * batch <= tl.sum(tl.where(there, tiles, 0), 0) // 8 * 9:
        least, limit = few_least, few
    low, high = least, tl.maximum(longest, least)
    while low < high:  # the smallest part with which the list suffices
        middle = (low + high) // 2
        count = tl.sum(tl.where(there, tl.maximum(tl.cdiv(tiles, middle), 1), 0), 0)
        if count <= limit:
            high = middle
        else:
            low = middle + 1
    share = tl.maximum(tl.cdiv(tiles, tl.maximum(tl.cdiv(tiles, low), 1)), 1)
    parts = tl.where(there, tl.maximum(tl.cdiv(tiles, share), 1), 0)
    # Long parts first, by classes of length; the order within a class is that of the batch.
    first, before = seq * 0, 0
    for order in tl.static_range(ORDERS):
        mine = share * (1 << order) <= low
        if order + 1 < ORDERS:
            mine = mine & (share * (2 << order) > low)
        counted = tl.where(mine, parts, 0)
        first = tl.where(mine, before + tl.cumsum(counted, 0) - counted, first)
        before += tl.sum(counted, 0)
    nth = entry[:, None] - first[None, :]
    own = (nth >= 0) & (nth < parts[None, :])
    lo = begin[None, :] + nth * share[None, :] * BN
    hi = tl.minimum(lo + share[None, :] * BN, end[None, :])
    at, valid = WORK + entry * 8, entry < most
    found = tl.sum(tl.where(own, seq[None, :] + 1, 0), 1) - 1  # -1: nobody's
    tl.store(at, found, mask=valid)
    tl.store(at + 1, tl.sum(tl.where(own, lo, 0), 1), mask=valid)
    tl.store(at + 2, tl.sum(tl.where(own, hi, 0), 1), mask=valid)
    tl.store(at + 3, tl.sum(tl.where(own, nth, 0), 1), mask=valid)
    tl.store(at + 4, tl.sum(tl.where(own, parts[None, :], 0), 1), mask=valid)


class Plan:
    """Workspace, parts and compiled kernels of attention calls that run one after another.

    Give it to all layers' calls of a step. It serves one launch at a time: one stream, or one
    captured graph; graphs that may be replayed side by side need a plan each. Calls with more
    tokens a sequence than ``max_q``, prompts, are cut as without a plan, in the plan's memory. Made
    by ``plan_attention``.
    """

    def __init__(self, shape: dict[str, Any], slots: int, *, window: int, fixed: int) -> None:
        self.shape = shape
        self.slots = slots
        self.window = window
        self.fixed = fixed
        self.balanced = False
        self._planners: dict[bool, tuple[Handle, int]] = {}
        self._parts: dict[int, int] = {}
        rows = shape["max_batch"] * shape["max_q"] * shape["group"] * shape["num_kv_heads"]
        self.known = Known(rows, shape["device"], planned=True)
        self.config = tile_config(
            shape["group"], shape["head_dim"], shape["head_dim_v"], shape["max_q"],
            shape["dtype"], shape["kv_dtype"], target_of(shape["device"]),
        )  # fmt: skip
        width = self.config["DVP"] * (2 if shape["kv_dtype"] in LARGEST else 1)
        rows = slots * shape["num_kv_heads"] * self.config["ROWS"]
        items = shape["max_batch"] * shape["num_kv_heads"]
        self.workspace = make_workspace(items, rows * width, rows, shape["device"], slots)
        self.memory = Growing(self.workspace)
        """For calls that are not cut by the list."""

    def update(self, cache_seqlens: Any, cu_seqlens_q: Any = None) -> None:
        """Cut the sequences for these lengths (int32 ``[B]``, tokens of the query included).

        Sequences of nearly one length are cut into as many parts as without it, others so that
        short parts fill up the end. Queues one kernel on the current stream and waits for nothing;
        call it whenever lengths change, before the first layer, and inside of a captured graph if
        it is to follow them. Without it every sequence is cut into equally many parts, or none. Has
        no effect on plans for one sequence or deterministic ones, which cut at fixed lengths.

        Raises ``InvalidInput`` for more sequences than ``max_batch``.
        """
        device = self.shape["device"]
        lens = index_tensor("cache_seqlens", cache_seqlens, 1, device)
        starts = (
            None if cu_seqlens_q is None else index_tensor("cu_seqlens_q", cu_seqlens_q, 1, device)
        )
        if len(lens) > self.shape["max_batch"]:
            raise InvalidInput(
                f"a plan for at most {self.shape['max_batch']} sequences got {len(lens)}"
            )
        alone = self.shape["max_batch"] == 1  # equal parts are the best there are
        if alone or self.fixed or (device.type == "cpu" and not interpreted()):
            return
        numbers = self._numbers(len(lens))
        if interpreted():
            constants = self._planner(varlen=starts is not None)
            plan_kernel[(cdiv(self.slots, constants["E"]),)](
                lens, lens if starts is None else starts, self.workspace.work, *numbers, **constants
            )
        elif _launch.device_here() == device.index:
            self._launch(lens, starts, numbers)
        else:
            with torch.cuda.device(device):
                self._launch(lens, starts, numbers)
        if not self.balanced:
            self.known.clear()  # they cut into equal parts
        self.balanced = True

    def _numbers(self, batch: int) -> tuple[int, ...]:
        """The arguments of ``plan_kernel`` that are no addresses."""
        tile = self.config["BN"]
        return (batch, self.shape["max_q"], min(self.window, 1 << 30), cdiv(MIN_PART_TOKENS, tile),
                self.slots, cdiv(MIN_SPLIT_TOKENS, tile), self._few(batch))  # fmt: skip

    def _planner(self, *, varlen: bool) -> dict[str, Any]:
        """The constants of ``plan_kernel``."""
        padded = triton.next_power_of_2(max(16, self.shape["max_batch"]))
        return {
            "B": padded, "E": max(2, min(64, PLANNED_ENTRIES // padded)), "BN": self.config["BN"],
            "LEFT": self.window < UNBOUNDED, "VARLEN": varlen, "ORDERS": CLASSES,
        }  # fmt: skip

    def _launch(
        self, lens: torch.Tensor, starts: torch.Tensor | None, numbers: tuple[int, ...]
    ) -> None:
        """Launch ``plan_kernel`` on the current stream of the plan's device, the current one."""
        index, varlen = self.shape["device"].index, starts is not None
        made = self._planners.get(varlen)
        if made is None:
            constants = self._planner(varlen=varlen)
            types = dict.fromkeys(("LENS", "Q_STARTS", "WORK"), "*i32")
            handle = handle_of(plan_kernel, types, constants, num_warps=8, device=index)
            made = self._planners[varlen] = handle, cdiv(self.slots, constants["E"])
        handle, grid = made
        places = lens.data_ptr(), 0 if starts is None else starts.data_ptr()
        handle((grid,), _launch.stream_of(index), *places, self.workspace.addresses[0], *numbers)

    def _few(self, batch: int) -> int:
        """Parts in all of a batch whose sequences are of one length."""
        parts = self._parts.get(batch)
        if parts is None:
            items = max(1, batch * self.shape["num_kv_heads"])
            parts = equal_parts(items, self.shape["max_seqlen_k"], self.shape["device"])
            self._parts[batch] = parts
        return min(self.slots, batch * parts)

    def config_for(self, call: AttentionCall) -> dict[str, int]:
        """The tiles of ``call``; raises ``InvalidInput`` if the plan was made for other calls."""
        kv, group = call.kv, call.q.shape[1] // call.kv.num_kv_heads
        has = {
            "num_kv_heads": kv.num_kv_heads, "group": group, "head_dim": kv.head_dim,
            "head_dim_v": kv.head_dim_v, "dtype": call.q.dtype, "kv_dtype": kv.dtype,
            "device": kv.device,
        }  # fmt: skip
        for name, value in has.items():
            if value != self.shape[name]:
                raise InvalidInput(f"the plan has {name} {self.shape[name]}, the call {value}")
        check_planned(self.shape, max_batch=len(call.lens), max_q=call.max_q)
        if call.left != self.window:
            raise InvalidInput("the plan was made for another window_size")
        return self.config

    def split(self, items: int, asked: int) -> Split:
        """How to cut the sequences of ``items`` (sequence, KV head) where no list says it."""
        capacity = self.slots * self.shape["num_kv_heads"] // items
        if self.fixed:
            return Split(min(capacity, self.slots), NATURAL, self.fixed)
        longest = self.shape["max_seqlen_k"]
        parts = asked or equal_parts(items, longest, self.shape["device"])
        parts = max(1, min(parts, capacity))
        return Split(parts, parts, 1 if asked else MIN_SPLIT_TOKENS)


def plan_attention(
    max_batch: int,
    max_seqlen_k: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    kv_dtype: torch.dtype,
    *,
    device: torch.device | str = "cuda",
    dtype: torch.dtype | None = None,
    head_dim_v: int | None = None,
    max_q: int = 1,
    window_size: tuple[int, int] = (-1, -1),
    deterministic: bool = False,
) -> Plan:
    """A ``Plan`` for calls of ``attn_with_kvcache`` with up to these sizes.

    ``dtype`` is that of the queries, by default the cache's or, of a quantised one, bfloat16.
    ``max_q`` query tokens a sequence, of which at most 64 // (num_q_heads // num_kv_heads). With
    ``deterministic`` a sequence is cut at fixed lengths, so its result does not depend, not in a
    bit, on what else is in the batch. On the CPU a plan does nothing.

    Raises ``InvalidInput`` for sizes that no call can have.
    """
    sizes = check_sizes(max_batch=max_batch, max_seqlen_k=max_seqlen_k, num_kv_heads=num_kv_heads,
                        head_dim=head_dim, max_q=max_q)  # fmt: skip
    group = group_of(num_q_heads, num_kv_heads)
    where = torch.device(device)
    if where.type == "cuda" and where.index is None:
        where = torch.device("cuda", torch.cuda.current_device())
    queries = dtype or (torch.bfloat16 if kv_dtype.itemsize == 1 else kv_dtype)
    shape = sizes | {
        "group": group, "head_dim_v": head_dim_v or head_dim,
        "kv_dtype": kv_dtype, "dtype": queries, "device": where,
    }  # fmt: skip
    config = tile_config(shape["group"], head_dim, shape["head_dim_v"], max_q, queries, kv_dtype,
                         target_of(where))  # fmt: skip
    if max_q > config["TOKENS"]:
        raise InvalidInput(
            f"max_q is {max_q}, but a tile holds {config['TOKENS']} tokens of {shape['group']} "
            "heads",
            hint="Leave plan=None for calls with more.",
        )
    window = UNBOUNDED if window_size[0] < 0 else int(window_size[0])
    if deterministic:
        fixed = cdiv(FIXED_PART, config["BN"]) * config["BN"]
        return Plan(
            shape, max_batch * cdiv(max_seqlen_k + fixed, fixed), window=window, fixed=fixed
        )
    if max_batch == 1:
        slots = equal_parts(num_kv_heads, max_seqlen_k, where)
    else:
        places = LIST_PROGRAMS_PER_SM * multiprocessors(where) // num_kv_heads
        slots = max(max_batch, min(places, max_batch * cdiv(max_seqlen_k, MIN_SPLIT_TOKENS)))
    return Plan(shape, slots, window=window, fixed=0)
