"""Attention over scattered blocks on a GPU, for tests: the call, and its float64 result.

Slots that no sequence owns hold NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from kvcached.kernels import attn_with_kvcache, plan_attention, reference
from kvcached.kernels.quant import quantize, row_scales
from kvcached.layout import cdiv

DEVICE = "cuda"
BF16 = torch.bfloat16
TOLERANCE = 1.6e-2


@dataclass(frozen=True)
class Problem:
    """Tensors of a call on the device, and its float64 result."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    lens: torch.Tensor
    table: torch.Tensor
    options: dict = field(default_factory=dict)

    def solve(self, **options):
        """(out, LSE); the output starts as NaN."""
        out = options.pop("out", None)
        if out is None:
            out = torch.full((*self.q.shape[:2], self.q.shape[2]), math.nan, dtype=BF16).to(DEVICE)
        return attn_with_kvcache(
            self.q, self.k, self.v, cache_seqlens=self.lens, page_table=self.table, out=out,
            return_softmax_lse=True, **self.options | options,
        )  # fmt: skip

    def expect(self):
        options = {name: x.cpu() if isinstance(x, torch.Tensor) else x
                   for name, x in self.options.items()}  # fmt: skip
        tables = self.table.cpu().clamp(min=0)
        return reference.attn_with_kvcache(
            self.q.cpu(), self.k.cpu(), self.v.cpu(), cache_seqlens=self.lens.cpu(),
            page_table=tables, **options,
        )  # fmt: skip

    def plan(self, **options):
        heads, dim = self.q.shape[1:]
        return plan_attention(
            len(self.lens), int(self.lens.max()), heads, self.k.shape[2], dim, self.k.dtype,
            device=DEVICE, max_q=self.options.get("max_seqlen_q", 1), **options,
        )  # fmt: skip


def problem(lens, *, block_size=16, q_heads=8, heads=2, dim=128, stored=BF16, by_row=True,
            **options):  # fmt: skip
    """Sequences of ``lens`` tokens, scattered over a cache of NaN."""
    counts = [cdiv(n, block_size) for n in lens]
    ids = torch.randperm(sum(counts) + 3)[: sum(counts)] + 1
    table = torch.full((len(lens), max(counts)), -(2**31), dtype=torch.int32)
    slots = []
    for row, part, n in zip(table, ids.split(counts), lens, strict=True):
        row[: len(part)] = part.int()
        slots.append(
            part[torch.arange(n) // block_size] * block_size + torch.arange(n) % block_size
        )
    slots, shape = torch.cat(slots), (sum(counts) + 4, block_size, heads)
    caches, scales = [], {}
    for name in ("k_descale", "v_descale"):
        rows = torch.randn(sum(lens), heads, dim)
        if stored == BF16:
            caches.append(_placed(rows.to(BF16), slots, shape))
            continue
        by = row_scales(rows, stored)
        given = by if by_row else by.amax(0)
        caches.append(_placed(quantize(rows, given, stored), slots, shape))
        scales[name] = (_placed(given, slots, shape) if by_row else given).to(DEVICE)
    q = torch.randn(len(lens) * options.get("max_seqlen_q", 1), q_heads, dim).to(BF16)
    return Problem(
        q.to(DEVICE), *(x.to(DEVICE) for x in caches),
        torch.tensor(lens, dtype=torch.int32).to(DEVICE), table.to(DEVICE), options | scales,
    )  # fmt: skip


def _placed(rows, slots, shape):
    """``rows`` at ``slots``; the other bytes are 0xFF, which is NaN in every float that has one."""
    width = rows[0, 0].numel() * rows.element_size()
    pool = torch.full((shape[0] * shape[1], shape[2], width), 0xFF, dtype=torch.uint8)
    pool[slots] = rows.contiguous().view(torch.uint8).view(len(slots), shape[2], width)
    return pool.view(rows.dtype).view(*shape, *rows.shape[2:])


def close(got, want):
    out, lse = (x.cpu().double() for x in got)
    assert (out - want[0]).abs().max() < TOLERANCE
    empty = torch.isneginf(want[1])
    assert torch.equal(torch.isneginf(lse), empty)
    assert (lse - want[1])[~empty].abs().max() < 1e-3


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def captured(stream, fire):
    """A graph of ``fire`` and what it returned, after a run that compiles."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        fire()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            made = fire()
    torch.cuda.synchronize()
    return graph, made
