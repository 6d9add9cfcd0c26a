"""The rows of ``kernels.py`` that write to a cache or move its blocks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from kernel_problems import DEVICE, Problem, Shape, int32
from kernel_timing import Limits, Timing, host_costs, host_us, timed

from kvcached import kernels
from kvcached.kernels import quant

Moved = tuple[Timing, float, tuple[str, float] | None, dict[str, Any]]
BLOCK_BYTES = 2 << 20
"""A block of Llama-3.1-8B over all layers."""


def cache_of(tokens: int) -> Problem:
    """An elastic cache of blocks of 16 tokens with 8 heads of 128; its ids are shuffled."""
    return Problem(Shape((tokens,), 8, 8, 128), copies=1)


def append(limits: Limits, tokens: int, target: tuple[str, float], *, dry: bool) -> Moved:
    """Write so many tokens to random slots; as many copies as pass the L2 cache twice."""
    tokens = 4 if dry else tokens
    copies = 1 if dry else max(2, min(128, (200 << 20) // (tokens * 4096)))
    problem = cache_of(tokens * copies)
    try:
        slots = torch.randperm(tokens * copies).reshape(copies, tokens)
        blocks = problem.tables[0][0].cpu().long()
        slots = (blocks[slots // 16] * 16 + slots % 16).int().to(DEVICE)
        key, value = torch.randn(2, copies, tokens, 8, 128, device=DEVICE).bfloat16()

        calls = [
            partial(kernels.reshape_and_cache, key[i], value[i], problem.k, problem.v, slots[i])
            for i in range(copies)
        ]
        calls[0]()
        block, offset = slots[0].long() // 16, slots[0].long() % 16
        equal = torch.equal(problem.k[block, offset], key[0])
        equal &= torch.equal(problem.v[block, offset], value[0])
        timing = timed(calls)
        host = host_costs(calls[0])
        # as engines do it without a kernel: two indexed assignments
        flat = [(slots[i].long() // 16, slots[i].long() % 16) for i in range(copies)]

        def index(i: int) -> None:
            problem.k[flat[i]], problem.v[flat[i]] = key[i], value[i]

        peer = timed([lambda i=i: index(i) for i in range(copies)]).us
        more = {"error": 0.0 if equal else 1.0, "peers": {"torch indexing": peer}} | host
        return timing, limits.copy_us(tokens * 8192), target, more
    finally:
        problem.close()


def blocks_of(dry: bool) -> int:  # noqa: FBT001 - it is all that is asked
    """1 GiB of K and V in blocks of 16 tokens."""
    return 6 if dry else (1 << 30) // (16 * 8 * 128 * 2 * 2)


def gather_rows(limits: Limits, *, dry: bool) -> Moved:
    """Gather the rows of 1 GiB of scattered blocks."""
    blocks = blocks_of(dry)
    problem = cache_of(blocks * 16)
    try:
        starts = int32([0, blocks * 16])
        outs = [torch.empty(blocks * 16, 8, 128, dtype=torch.bfloat16, device=DEVICE)
                for _ in range(2)]  # fmt: skip

        def call() -> Any:
            return kernels.gather_kv(problem.k, problem.v, problem.tables[0], starts, *outs)

        call()
        ids = problem.tables[0][0].long()
        equal = torch.equal(outs[0].view(-1, 16, 8, 128), problem.k[ids])
        peer = timed([lambda: (problem.k[ids], problem.v[ids])], 12).us
        more = {"error": 0.0 if equal else 1.0, "host_us": host_us(call),
                "peers": {"torch indexing": peer}}  # fmt: skip
        return timed([call], 20), limits.copy_us(blocks * 131072), ("ratio", 0.92), more
    finally:
        problem.close()


def gather_wide(limits: Limits, stored: str, *, dry: bool) -> Moved:
    """Gather what the rows of scattered quantised blocks mean: 1 GiB of bfloat16."""
    blocks = blocks_of(dry)
    shape = Shape((blocks * 16,), 8, 8, 128, stored=stored)
    problem = Problem(shape, copies=1)
    try:
        starts = int32([0, blocks * 16])
        outs = [torch.empty(blocks * 16, 8, 128, dtype=torch.bfloat16, device=DEVICE)
                for _ in range(2)]  # fmt: skip
        scales = problem.options["k_descale"], problem.options["v_descale"]
        ids, caches = problem.tables[0][0].long(), (problem.k, problem.v)

        def call() -> Any:
            return kernels.gather_kv(*caches, problem.tables[0], starts, *outs, *scales)

        def by_torch() -> Any:
            by_row = scales[0].dim() == 3
            return [quant.dequantize(cache[ids], scale[ids] if by_row else scale, torch.bfloat16)
                    for cache, scale in zip(caches, scales, strict=True)]  # fmt: skip

        call()
        few = ids[:64]
        own = scales[0][few] if scales[0].dim() == 3 else scales[0]
        wanted = quant.dequantize(problem.k[few], own).bfloat16()
        equal = torch.equal(outs[0].view(-1, 16, 8, 128)[:64], wanted)
        more = {"error": 0.0 if equal else 1.0, "host_us": host_us(call)}
        nbytes = shape.kv_bytes + 2 * outs[0].nbytes
        timing = timed([call], 20)
        try:
            more["peers"] = {"torch indexing": timed([by_torch], 6).us}
        except RuntimeError as error:  # what torch cannot index or convert
            more["peers_failed"] = {"torch indexing": str(error).partition("\n")[0][:160]}
        return timing, limits.copy_us(nbytes), ("ratio", 0.92), more
    finally:
        problem.close()


def gather_blocks(limits: Limits, *, dry: bool) -> Moved:
    """Gather 1 GiB of whole records, K and V together."""
    blocks = blocks_of(dry)
    pool = torch.randn(2 * blocks, 16384 * 2, device=DEVICE).bfloat16()
    ids = torch.randperm(2 * blocks)[:blocks].int().to(DEVICE)
    out = torch.empty(blocks, 16384 * 2, dtype=torch.bfloat16, device=DEVICE)

    def call() -> Any:
        return kernels.gather_pages(pool, ids, out)

    call()
    equal = torch.equal(out, pool[ids.long()])
    index = ids.long()
    peer = timed([lambda: torch.index_select(pool, 0, index, out=out)], 12).us
    more = {"error": 0.0 if equal else 1.0, "host_us": host_us(call),
            "peers": {"torch.index_select": peer}}  # fmt: skip
    return timed([call], 20), limits.copy_us(blocks * 131072), ("ratio", 0.92), more


def launch_of(problem: Problem, moves: torch.Tensor, table: torch.Tensor) -> Callable[[], Any]:
    """The launch of ``compact_pages`` with moves that are on the device, sorted."""
    from kvcached.kernels import _move_triton

    order = moves[moves[:, 0].argsort()].to(DEVICE)
    sources, targets = order[:, 0].contiguous(), order[:, 1].contiguous()
    return lambda: _move_triton.compact([problem.k, problem.v], sources, targets, table)


def compact(limits: Limits, *, dry: bool) -> Moved:
    """Move 1 GiB of blocks to free ones and rewrite a table; the moves come from the host."""
    blocks = blocks_of(dry)
    problem = cache_of(2 * blocks * 16)
    try:
        ids = problem.tables[0][0].cpu()
        used, free = ids[:blocks], ids[blocks:]
        there, back = torch.stack([used, free], 1), torch.stack([free, used], 1)
        table = used.to(DEVICE).view(2, -1).contiguous()
        wanted = problem.k[used[:3].long().to(DEVICE)].clone()

        def call(moves: torch.Tensor = there) -> None:
            kernels.compact_pages((problem.k, problem.v), moves, table)

        call()
        equal = torch.equal(problem.k[free[:3].long().to(DEVICE)], wanted)
        equal &= torch.equal(table.cpu().flatten(), free)
        host = host_us(call, 10)
        more = {"error": 0.0 if equal else 1.0, "host_us": host, "moves": blocks}
        calls: list[Callable[[], Any]] = [call, lambda: call(back)]
        if DEVICE == "cuda":  # the launch alone: checking and uploading the moves is host_us
            calls = [launch_of(problem, moves, table) for moves in (there, back)]
        timing = timed(calls, 20)
        return timing, limits.copy_us(blocks * 131072), ("ratio", 0.92), more
    finally:
        problem.close()


def swap(limits: Limits, way: str, *, dry: bool) -> Moved:
    """Blocks of 2 MiB between the device and pinned memory: one way, or both at once."""
    count, size = (3, 64) if dry else (512, BLOCK_BYTES // 2)
    pools = [torch.zeros(2 * count, size, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)]
    hosts = [torch.zeros(count, size, dtype=torch.bfloat16, pin_memory=DEVICE == "cuda")
             for _ in range(2)]  # fmt: skip
    ids = torch.randperm(2 * count)[:count].int()
    order = torch.arange(count).int()
    streams = [torch.cuda.Stream() for _ in range(2)] if DEVICE == "cuda" else []

    def out(i: int = 0) -> None:
        kernels.swap_pages(pools[i], hosts[i], ids, order)

    def back(i: int = 0) -> None:
        kernels.swap_pages(hosts[i], pools[i], order, ids)

    def both() -> None:
        if not streams:
            out(0)
            back(1)
            return
        here = torch.cuda.current_stream()
        for stream in streams:  # before any work: the second must not wait for the first
            stream.wait_stream(here)
        for index, work in enumerate((out, back)):
            with torch.cuda.stream(streams[index]):
                work(index)
        for stream in streams:
            here.wait_stream(stream)

    works = {"d2h": (out, 1, 50), "h2d": (back, 1, 50), "both": (both, 2, 80)}
    work, directions, target = works[way]
    pools[0].normal_()
    out()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    equal = torch.equal(hosts[0], pools[0][ids.long().to(DEVICE)].cpu())
    timing = timed([work], 10)
    nbytes = directions * count * size * 2
    more = {"error": 0.0 if equal else 1.0, "host_us": host_us(work, 5),
            "gb_per_s": round(nbytes / timing.us / 1e3, 2)}  # fmt: skip
    return timing, limits.copy_us(2 * nbytes), ("gb_per_s", target), more


MOVES: dict[str, Callable[..., Moved]] = {
    "W1_b256": lambda limits, dry: append(limits, 256, ("us", 5), dry=dry),
    "W1_8192": lambda limits, dry: append(limits, 8192, ("ratio", 0.85), dry=dry),
    "G1_rows": gather_rows,
    "G1_fp8": lambda limits, dry: gather_wide(limits, "fp8", dry=dry),
    "G1_int4": lambda limits, dry: gather_wide(limits, "int4", dry=dry),
    "G1_blocks": gather_blocks,
    "G1_compact": compact,
    "O1_d2h": lambda limits, dry: swap(limits, "d2h", dry=dry),
    "O1_h2d": lambda limits, dry: swap(limits, "h2d", dry=dry),
    "O1_both": lambda limits, dry: swap(limits, "both", dry=dry),
}
