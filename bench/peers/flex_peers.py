"""Torch's FlexAttention on the problems of ``kernels.py``: compiled, and compiled for each shape.

Two ways. *On pages*: keys and values where they are, one block of the mask for each block of the
cache; so its tiles have the 16 tokens of a block. *Contiguous*: gathered beforehand into rows,
with a mask of 128 x 128 tokens, which is what it was made for.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from kernel_problems import DEVICE, Problem
from torch.nn.attention import flex_attention as flex

Call = Callable[[], torch.Tensor]
MASK = 128
LEAST_TILE = 16
"""Of a matrix product in Triton; a block of the mask must hold a whole number of tiles."""


@functools.cache
def compiled() -> Callable[..., Any]:
    """The call, one program a shape. On a CPU it is not compiled: that only shows that it runs."""
    if DEVICE == "cpu":
        return flex.flex_attention
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # there is one kernel to compile
    torch._dynamo.config.recompile_limit = 256  # noqa: SLF001 - each row is another shape
    return torch.compile(flex.flex_attention, dynamic=False)


def queries(problem: Problem, copy: int) -> torch.Tensor:
    """``[B, Hq, Sq, D]``, a view."""
    shape = problem.shape
    return problem.q[copy].view(len(shape.lens), -1, shape.q_heads, shape.dim).transpose(1, 2)


def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, **tile: int) -> torch.Tensor:
    """The results as all other peers return them."""
    out = compiled()(q, k, v, block_mask=mask, enable_gqa=True, kernel_options=tile)
    answer: torch.Tensor = out.transpose(1, 2).flatten(0, 1)
    return answer


def on_pages(problem: Problem) -> list[Call] | None:
    """Decode through a block mask made of block tables: the last block is masked by length."""
    shape = problem.shape
    size, batch = shape.block_size, len(shape.lens)
    if shape.place != "random" or problem.max_q > 1 or size < LEAST_TILE:
        return None
    pools = [pool.as_subclass(torch.Tensor) for pool in (problem.k, problem.v)]
    # A block's rows are one stride apart and so are, more of them, those of its neighbour: as many
    # rows lie between as make a block's stride, and blocks are counted in whole ones.
    apart, rest = divmod(pools[0].stride(0), size * pools[0].stride(1))
    if rest:
        return None
    total = (len(pools[0]) - 1) * apart + 1
    k, v = (pool.as_strided((1, shape.kv_heads, total * size, shape.dim),
                            (0, pool.stride(2), pool.stride(1), 1)) for pool in pools)  # fmt: skip
    full = torch.tensor([n // size for n in shape.lens], device=DEVICE)
    part = (problem.lens % size > 0).int()
    calls: list[Call] = []
    for copy in range(problem.copies):
        # its lists of blocks must have room for all there are, though no sequence has so many
        table = torch.zeros(batch, total, dtype=torch.int32, device=DEVICE)
        width = problem.tables[copy].shape[1]
        table[:, :width] = problem.tables[copy] * apart
        places = torch.full_like(table, -1)
        for row, ids, blocks in zip(places, table.long(), problem.blocks, strict=True):
            row[ids[:blocks]] = torch.arange(blocks, device=DEVICE, dtype=torch.int32)
        last = torch.zeros_like(table)
        last[:, 0] = table.gather(1, full[:, None])[:, 0]

        def mask(b: Any, _h: Any, _q: Any, row: Any, places: Any = places) -> Any:
            place = places[b, row // size]
            return (place >= 0) & (place * size + row % size < problem.lens[b])

        blocks_of = flex.BlockMask.from_kv_blocks(
            part[:, None, None], last[:, None, None], full.int()[:, None, None],
            table[:, None, None],
            BLOCK_SIZE=(MASK, size), mask_mod=mask, seq_lengths=(1, total * size),
            compute_q_blocks=False,
        )  # fmt: skip
        calls.append(
            functools.partial(
                call, queries(problem, copy), k, v, blocks_of, BLOCK_N=min(size, MASK)
            )
        )
    return calls


def contiguous(problem: Problem) -> list[Call] | None:
    """Rows of equal lengths; causal is bottom-right."""
    shape = problem.shape
    batch, count, length = len(shape.lens), shape.counts[0], shape.lens[0]
    if len(set(shape.lens)) > 1 or len(set(shape.counts)) > 1:
        return None
    mask = None
    if shape.causal and count > 1:
        ahead = length - count
        mask = flex.create_block_mask(
            lambda _b, _h, q, row: q + ahead >= row, None, None, count, length, device=DEVICE,
            BLOCK_SIZE=MASK,
        )  # fmt: skip
    calls: list[Call] = []
    for copy in range(problem.copies):
        k, v = (x.view(batch, -1, *x.shape[1:]).transpose(1, 2) for x in problem.contiguous(copy))
        calls.append(functools.partial(call, queries(problem, copy), k, v, mask))
    return calls


def flex_attention(problem: Problem, make: Callable[[Problem], Any]) -> list[Call] | None:
    """Calls of one of the two ways, one a copy, or ``None`` where it has no answer."""
    shape = problem.shape
    if shape.stored != "bfloat16" or shape.tree or shape.mla or shape.sinks:
        return None
    if shape.value_dim != shape.dim or len(set(shape.counts)) > 1:
        return None
    made: list[Call] | None = make(problem)
    return made
