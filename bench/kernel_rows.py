"""The rows of ``kernels.py``: shapes, targets, and how each is measured.

A target is (what, how much): ``ratio`` of the limit, at most so many ``us``, at least so many
``tflops`` or ``gb_per_s``, ``speedup`` over the flat call.
"""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from attention_peers import available
from kernel_moves import MOVES
from kernel_problems import DEVICE, Problem, Shape, int32
from kernel_timing import Limits, Timing, host_costs, host_us, pace, timed

from kvcached import kernels
from kvcached.errors import InvalidInput

Row = dict[str, Any]


def skewed() -> tuple[int, ...]:
    """64 lengths from 2**8 to 2**15, even in the exponent, from the seed 0."""
    draw = random.Random(0)
    return tuple(int(2 ** draw.uniform(8, 15)) for _ in range(64))


def llama(batch: int, length: int, **more: Any) -> Shape:
    """Heads of Llama-3.1-8B."""
    return Shape((length,) * batch, 32, 8, 128, **more)


def latent(batch: int, length: int, heads: int, **more: Any) -> Shape:
    """Heads of DeepSeek's absorbed MLA."""
    return Shape((length,) * batch, heads, 1, 576, dim_v=512, block_size=64, mla=True, **more)


ATTENTION: dict[str, tuple[Shape, tuple[str, float]]] = {
    "D0": (llama(1, 1024), ("us", 6.5)),
    "D1": (llama(1, 32768), ("ratio", 0.87)),
    "D2": (llama(16, 4096), ("ratio", 0.94)),
    "D3": (llama(64, 2048), ("ratio", 0.95)),
    "D3_page1": (llama(64, 2048, block_size=1), ("ratio", 0.81)),
    "D3_page64": (llama(64, 2048, block_size=64), ("ratio", 0.95)),
    "D3_page256": (llama(64, 2048, block_size=256), ("ratio", 0.95)),
    "D3_contiguous": (llama(64, 2048, place="contiguous"), ("ratio", 0.95)),
    "D3_strided": (llama(64, 2048, place="strided"), ("ratio", 0.95)),
    "D4": (llama(128, 8192), ("ratio", 0.98)),
    "D5": (Shape(skewed(), 32, 8, 128), ("ratio", 0.94)),
    "D6": (Shape((131072,) * 8, 64, 8, 128), ("ratio", 0.97)),
    "D8": (Shape((4096,) * 16, 32, 32, 128), ("ratio", 0.96)),
    "D9": (Shape((8192,) * 64, 64, 8, 64, sinks=True), ("ratio", 0.92)),
    "D10": (Shape((4096,) * 64, 16, 8, 256), ("ratio", 0.94)),
    "D14": (Shape((8192,) * 32, 32, 1, 128), ("ratio", 0.87)),
    "D11": (llama(128, 8192, stored="fp8"), ("ratio", 0.90)),
    "D12": (llama(128, 8192, stored="int8"), ("ratio", 0.87)),
    "D13": (llama(128, 8192, stored="int4"), ("ratio", 0.65)),
    "S1": (llama(64, 4096, queries=4), ("ratio", 0.92)),
    "S2": (llama(16, 8192, queries=8, tree=True), ("ratio", 0.87)),
    "M1": (latent(64, 4096, 16), ("ratio", 0.87)),
    "M1_fp8": (latent(64, 4096, 16, stored="fp8"), ("ratio", 0.80)),
    "M2": (latent(64, 8192, 64), ("ratio", 0.82)),
    "M3": (latent(128, 4096, 128), ("ratio", 0.50)),
    "M4": (latent(1, 65536, 128), ("ratio", 0.45)),
    "P1": (llama(1, 8192, queries=8192), ("tflops", 450)),
    "P2": (llama(16, 1024, queries=1024), ("tflops", 350)),
    "P3": (Shape((16384,), 16, 16, 128, queries=16384, causal=False), ("tflops", 500)),
    "P4": (llama(1, 32768, queries=2048), ("tflops", 450)),
    "P5": (Shape((4096,) * 4, 64, 8, 64, queries=4096), ("tflops", 350)),
    "P6": (Shape((4096,) * 2, 16, 8, 256, queries=4096), ("tflops", 380)),
    "P7": (Shape((4096,), 128, 128, 192, queries=4096, dim_v=128), ("tflops", 400)),
}
ON_ROWS = ("D2", "D4", "D6", "D8", "D10", "S1")
"""Rows of which some peers read contiguous keys faster than ours do pages: ours read them too."""
ATTENTION |= {f"{ident}_contiguous": (replace(shape, place="contiguous"), target)
              for ident, (shape, target) in ATTENTION.items() if ident in ON_ROWS}  # fmt: skip
MIXED = Shape((10240, *[4096] * 63), 32, 8, 128, queries=(2048, *[1] * 63))
PREFIX, OWN, REQUESTS = 16384, 512, 64
IDS = [
    "D0", "D1", "D2", "D3", "D4", "D5", "D6", "D8", "D9", "D10", "D14", "P1", "P2", "P3", "P4",
    "M1", "M2", "M3", "M4", "S1", "S2", "C1", "W1_b256", "W1_8192", "G1_rows", "G1_blocks",
    "G1_compact", "G1_fp8", "G1_int4", "X1", "P5", "P6", "P7", "D11", "D12", "D13", "M1_fp8",
    "D3_page1", "D3_page64", "D3_page256", "D3_contiguous", "D3_strided", "O1_d2h", "O1_h2d",
    "O1_both", *(f"{ident}_contiguous" for ident in ON_ROWS),
]  # fmt: skip
"""All rows; what matters most comes first, should the time run out."""
assert {*IDS} == {*ATTENTION, "C1", "X1", *MOVES}


NOT_YET = ("not supported yet", "GPUs only", "on GPUs")
RUNS = 20
"""Results of so many runs must be equal bit by bit."""


class Missing(Exception):  # noqa: N818 - not an error of the row
    """The API that a row needs is not there."""


def need(name: str) -> Any:
    """A kernel by its public name."""
    found = getattr(kernels, name, None)
    if found is None:
        raise Missing(f"kvcached.kernels has no {name}")
    return found


def plan_of(problem: Problem) -> dict[str, Any]:
    """A plan for the problem, if there are plans and one fits it.

    It is brought up to date if lengths differ; a server that knows that they do not would not.
    """
    make, shape = getattr(kernels, "plan_attention", None), problem.shape
    if make is None or shape.mla or problem.max_q * shape.q_heads // shape.kv_heads > 64:
        return {}
    plan = make(len(shape.lens), max(shape.lens), shape.q_heads, shape.kv_heads, shape.dim,
                problem.k.dtype, device=DEVICE, max_q=problem.max_q)  # fmt: skip
    if len(set(shape.lens)) > 1:
        plan.update(problem.lens, *([problem.cu_q] if "cu_seqlens_q" in problem.options else []))
    return {"plan": plan}


def our_calls(problem: Problem) -> tuple[list[partial[Any]], Row]:
    """Our calls, one a copy, and what else there is to say of them."""
    shape, more = problem.shape, Row()
    if shape.mla:
        latents = problem.k.squeeze(2)
        options = {"kv_descale": problem.options.get("k_descale"),
                   "plan": kernels.plan_mla(len(shape.lens), shape.q_heads, max_q=problem.max_q,
                                            head_dim_v=shape.value_dim, device=DEVICE)}  # fmt: skip
        return [
            partial(kernels.mla_with_kvcache, problem.q[copy], latents, problem.tables[copy],
                    problem.lens, shape.value_dim, softmax_scale=shape.dim**-0.5,
                    out=problem.out[copy], **options)
            for copy in range(problem.copies)
        ], more  # fmt: skip
    options = problem.options | plan_of(problem)
    plan = options.get("plan")
    if plan is not None and plan.balanced:
        more["plan_us"] = timed([lambda: plan.update(problem.lens)]).us if DEVICE == "cuda" else 0.0
    return [
        partial(kernels.attn_with_kvcache, problem.q[copy], problem.k, problem.v,
                cache_seqlens=problem.lens, out=problem.out[copy], **problem.place(copy), **options)
        for copy in range(problem.copies)
    ], more  # fmt: skip


def output(result: Any) -> torch.Tensor:
    """The output of a call that may return its LSE too."""
    return result[0] if isinstance(result, tuple) else result


def base_row(timing: Timing, limit_us: float, target: tuple[str, float] | None) -> Row:
    """What every row has."""
    return {"value": timing.us, "unit": "us", "us": timing.us, "p99": timing.p99,
           "repeats": timing.repeats, "captured": timing.captured,
           "limit_us": round(limit_us, 2), "ratio_to_limit": round(limit_us / timing.us, 4),
           "target": None if target is None else target[1],
           "target_of": None if target is None else target[0]}  # fmt: skip


def peers_of(problem: Problem) -> Row:
    """Microseconds and errors of each peer that takes the problem; why others failed."""
    times, errors, rms, failed = {}, {}, {}, {}
    for name, make in available().items():
        if pace.warming and "contiguous" in name and not name.startswith("Flex"):
            continue  # torch's own, compiled long ago
        if pace.late:
            failed[name] = "no time"
            continue
        try:
            calls = make(problem)
            if calls is None:
                continue
            out = calls[0]().clone()
            off = problem.errors(out.reshape(problem.out[0].shape))
            errors[name], rms[name] = off["error"], off["error_rms"]
            times[name] = timed(calls).us
            del calls, out
        except Exception as error:  # noqa: BLE001 - a peer that fails is a result
            failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
    return {
        "peers": times,
        "peer_errors": errors,
        "peer_errors_rms": rms,
        "peer_error": min(errors.values(), default=None),
        "peer_error_rms": min(rms.values(), default=None),
    } | ({"peers_failed": failed} if failed else {})


def attention_row(ident: str, limits: Limits, *, dry: bool) -> Row:
    """One call over a problem, beside the peers."""
    shape, target = ATTENTION[ident]
    problem = Problem(shape.small(), copies=2) if dry else Problem(shape)
    shape = problem.shape
    try:
        calls, more = our_calls(problem)
        first = output(calls[0]()).clone()
        errors = problem.errors(first)
        same = all(
            torch.equal(output(calls[0]()), first)
            for _ in range(2 if dry or pace.warming else RUNS)
        )
        timing = timed(calls)
        row = base_row(timing, limits.us(shape.nbytes, shape.flops), target)
        row |= {"tb_per_s": round(shape.nbytes / timing.us / 1e6, 3),
                "tflops": round(shape.flops / timing.us / 1e6, 1),
                "runs_equal": same} | errors | host_costs(calls[0]) | more  # fmt: skip
        return row | peers_of(problem)
    finally:
        problem.close()


def cascade_row(limits: Limits, *, dry: bool) -> Row:
    """A prefix that all share and their own parts: cascade beside one flat call."""
    prefix, own, requests = (64, 16, 3) if dry else (PREFIX, OWN, REQUESTS)
    cascade, level = need("cascade_attention"), need("Level")
    problem = Problem(llama(requests, prefix + own), copies=1)
    try:
        shared = prefix // 16
        table = problem.tables[0]
        table[:, :shared] = table[0, :shared].clone()
        alone = table[:, shared:].contiguous()
        own_lens, q, out = int32([own] * requests), problem.q[0], problem.out[0]
        levels = [level(table[:1, :shared].contiguous(), int32([prefix]), None, requests),
                  level(alone, own_lens)]  # fmt: skip
        calls, _ = our_calls(problem)

        def call() -> Any:
            return cascade(q, problem.k, problem.v, levels, out=out)

        errors = problem.errors(call())
        timing, flat = timed([call]), timed(calls)
        one = Shape((prefix, *[own] * requests), 32, 8, 128, causal=False)
        flops = problem.shape.flops
        row = base_row(timing, limits.us(one.kv_bytes, flops), ("speedup", 13))
        row |= {"flat_us": flat.us, "speedup": round(flat.us / timing.us, 2)} | errors
        return row | {"host_us": host_us(call), "peers": {"ours, flat": flat.us}}
    finally:
        problem.close()


def mixed_row(limits: Limits, *, dry: bool) -> Row:
    """A prefill chunk and decodes in one call, beside the two apart."""
    shape = Shape((60, 30, 20), 32, 8, 128, queries=(9, 1, 1)) if dry else MIXED
    problem = Problem(shape, copies=1)
    try:
        calls, _ = our_calls(problem)
        errors = problem.errors(calls[0]())
        timing = timed(calls)
        chunk, table, out = shape.counts[0], problem.tables[0], problem.out[0]
        apart = [
            lambda: kernels.attn_with_kvcache(
                problem.q[0][:chunk], problem.k, problem.v, cache_seqlens=problem.lens[:1],
                page_table=table[:1], max_seqlen_q=chunk, out=out[:chunk]),
            lambda: kernels.attn_with_kvcache(
                problem.q[0][chunk:], problem.k, problem.v, cache_seqlens=problem.lens[1:],
                page_table=table[1:], out=out[chunk:]),
        ]  # fmt: skip
        times = [timed([call]).us for call in apart]
        row = base_row(timing, limits.us(shape.nbytes, shape.flops), ("us", round(sum(times), 1)))
        row |= errors | host_costs(calls[0])
        row |= {
            "prefill_us": times[0],
            "decode_us": times[1],
            "tflops": round(shape.flops / timing.us / 1e6, 1),
        }
        found = peers_of(problem)
        found["peers"]["ours, apart"] = round(sum(times), 2)
        return row | found
    finally:
        problem.close()


def measure(ident: str, limits: Limits, *, dry: bool) -> Row:
    """The row of an id; raises ``Missing`` or whatever goes wrong."""
    try:
        return _measure(ident, limits, dry=dry)
    except InvalidInput as error:
        if any(words in str(error) for words in NOT_YET):
            raise Missing(str(error).partition("\n")[0]) from error
        raise


def _measure(ident: str, limits: Limits, *, dry: bool) -> Row:
    if ident == "C1":
        return cascade_row(limits, dry=dry)
    if ident == "X1":
        return mixed_row(limits, dry=dry)
    if ident in MOVES:
        timing, limit_us, target, more = MOVES[ident](limits, dry=dry)
        return base_row(timing, limit_us, target) | more
    return attention_row(ident, limits, dry=dry)


def met(row: Row) -> bool | None:
    """Whether a row reaches its target."""
    if row.get("target") is None or "us" not in row:
        return None
    what, target = row["target_of"], row["target"]
    if what == "us":
        return bool(row["us"] <= target)
    return bool(row[{"ratio": "ratio_to_limit"}.get(what, what)] >= target)
