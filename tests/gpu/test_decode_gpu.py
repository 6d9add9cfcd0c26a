"""Split-KV attention on a GPU, with the tiles that ship: parts, plans, graphs, streams.

Slots that no sequence owns hold NaN in every test.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import partial

import pytest
import torch

from kvcached.kernels import attn_with_kvcache, plan_attention, reference
from kvcached.kernels.quant import INT4, quantize, row_scales
from kvcached.layout import cdiv

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
BF16 = torch.bfloat16
TOLERANCE = 1.6e-2
RUNS = 20
SKEWED = (3000, 1, 64, 700, 65, 1999, 0, 2)


@pytest.fixture(autouse=True)
def a_device():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.manual_seed(0)


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


@pytest.mark.parametrize("block_size", [1, 16, 48, 64, 256])
def test_block_sizes_and_splits(block_size):
    one = problem(SKEWED, block_size=block_size)
    want = one.expect()
    for splits in (0, 1, 2, 7, 128):
        first = one.solve(num_splits=splits)
        close(first, want)
        assert all(same(one.solve(num_splits=splits), first) for _ in range(RUNS - 1))


@pytest.mark.parametrize("stored", [BF16, torch.int8])
@pytest.mark.parametrize("lens", [(1024,), (1,), (700, 0, 129), (1000, 128, 1, 513, 64)])
def test_clusters_merge_the_parts_of_short_sequences(lens, stored):
    one = problem(lens, stored=stored)
    first = one.solve()
    close(first, one.expect())
    assert all(same(one.solve(), first) for _ in range(RUNS - 1))


@pytest.mark.parametrize("lens", [(1000,), (20_000,), (900,) * 30])
def test_a_launch_that_begins_early_sees_what_those_in_front_wrote(lens):
    one = problem(lens, softmax_scale=0.5)
    two = replace(one, q=torch.empty_like(one.q))
    q, k = one.q.clone(), one.k.clone()
    block = int(one.table[0, 0])

    def chain(between):
        """Each call attends with the result of the last; keys are written between them."""
        one.q.copy_(q)
        one.k.copy_(k)
        for _ in range(10):
            between()
            one.solve(out=two.q)
            between()
            two.solve(out=one.q)
            between()
            one.k[block] = one.q[:1, : one.k.shape[2]] * 0.5

    one.solve(out=two.q)  # compiled
    chain(torch.cuda.synchronize)
    want = one.q.clone()
    assert not want.isnan().any()
    for _ in range(RUNS):
        chain(lambda: None)
        assert torch.equal(one.q, want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain(lambda: None)
    for _ in range(RUNS):
        graph.replay()
        assert torch.equal(one.q, want)


@pytest.mark.parametrize(("q_heads", "heads", "dim", "options"), [
    (3, 3, 64, {}), (24, 3, 64, {}), (32, 1, 128, {}), (8, 4, 256, {}), (8, 2, 80, {}),
    (16, 4, 128, {"max_seqlen_q": 4}),
    (8, 2, 128, {"max_seqlen_q": 8, "custom_mask": (1, 3, 5, 11, 19, 37, 69, 139)}),
    (8, 2, 128, {"window_size": (100, 0), "softcap": 20.0, "sinks": 0.5}),
])  # fmt: skip
def test_heads_dims_and_options(q_heads, heads, dim, options):
    lens = (2500, 64, 700)
    tensors = {}
    if "custom_mask" in options:
        tensors["custom_mask"] = torch.tensor(options["custom_mask"] * len(lens)).to(DEVICE)
    if "sinks" in options:
        tensors["sinks"] = torch.full((q_heads,), options["sinks"]).to(DEVICE)
    one = problem(lens, q_heads=q_heads, heads=heads, dim=dim, **options | tensors)
    want = one.expect()
    for splits in (1, 5):
        close(one.solve(num_splits=splits), want)


@pytest.mark.parametrize(("lens", "options"), [
    (SKEWED, {}), ((1500,) * 4, {}), ((2000,), {}),
    # Few programs of 32 rows, whose parts begin in the middle of a block.
    ((4000, 1300), {"block_size": 128, "q_heads": 32, "heads": 1}),
])  # fmt: skip
def test_plans_change_no_result_and_each_run_is_the_same(lens, options):
    one = problem(lens, **options)
    want = one.expect()
    for deterministic in (False, True):
        plan = one.plan(deterministic=deterministic)
        for update in (False, True):
            if update:
                plan.update(one.lens)
            first = one.solve(plan=plan)
            close(first, want)
            assert all(same(one.solve(plan=plan), first) for _ in range(RUNS - 1))
            assert not plan.workspace.finished.any()


def test_a_deterministic_plan_gives_a_sequence_the_same_result_in_any_batch():
    one = problem(SKEWED)
    plan = one.plan(deterministic=True)
    whole = one.solve(plan=plan)
    for place in (0, 3, 5):
        alone = replace(one, q=one.q[place : place + 1], lens=one.lens[place : place + 1],
                        table=one.table[place : place + 1])  # fmt: skip
        assert same(alone.solve(plan=plan), [x[place : place + 1] for x in whole])


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


def test_a_captured_plan_follows_the_lengths():
    one = problem(SKEWED)
    plan = one.plan()
    out = torch.empty_like(one.q)

    def step():
        plan.update(one.lens)
        return one.solve(plan=plan, out=out)

    graph, got = captured(torch.cuda.Stream(), step)
    for lens in (SKEWED, (64,) * 8, (1, 2, 3, 400, 5, 6, 0, 1), SKEWED):
        now = [min(n, most) for n, most in zip(lens, SKEWED, strict=True)]
        one.lens.copy_(torch.tensor(now, dtype=torch.int32))
        out.fill_(math.nan)
        graph.replay()
        torch.cuda.synchronize()
        close(got, one.expect())


def test_graphs_without_a_plan_have_parts_of_their_own_and_run_side_by_side():
    problems = [problem((2000,), dim=64), problem((1700, 1700), dim=64)]
    graphs = []
    for one in problems:
        out = torch.empty_like(one.q)
        solve = partial(one.solve, num_splits=9, out=out)
        graphs.append(captured(torch.cuda.Stream(), solve))
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(RUNS):
        for stream, (graph, _) in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for one, (_, got) in zip(problems, graphs, strict=True):
        close(got, one.expect())


def test_streams_side_by_side_do_not_mix_their_parts():
    problems = [problem((2900, 2300)), problem((1900, 2700))]
    alone = [one.solve(num_splits=30) for one in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    results = []
    for _ in range(RUNS):
        for stream, one in zip(streams, problems, strict=True):
            with torch.cuda.stream(stream):
                results.append(one.solve(num_splits=30))
    torch.cuda.synchronize()
    assert all(same(got, alone[i % 2]) for i, got in enumerate(results))


@pytest.mark.parametrize(("stored", "by_row"), [
    (torch.float8_e4m3fn, True), (torch.float8_e4m3fn, False), (torch.float8_e5m2, True),
    (torch.int8, True), (torch.int8, False), (INT4, True),
])  # fmt: skip
def test_quantised_caches(stored, by_row):
    one = problem((1500, 0, 64, 333), stored=stored, by_row=by_row)
    want = one.expect()
    for splits in (1, 5):
        first = one.solve(num_splits=splits)
        close(first, want)
        assert all(same(one.solve(num_splits=splits), first) for _ in range(RUNS - 1))


def test_int4_of_many_sequences_in_wide_tiles():
    one = problem((1500, 0, 64, 333, 513) * 8, stored=INT4)
    want = one.expect()
    for splits in (0, 1, 3):
        close(one.solve(num_splits=splits), want)


@pytest.mark.parametrize("dim", [64, 80])
def test_int4_of_other_dims(dim):
    one = problem((700, 65), dim=dim, stored=INT4)
    close(one.solve(num_splits=3), one.expect())


def test_rows_that_are_not_aligned():
    one = problem((900, 65))
    want = one.solve(num_splits=4)
    wide = torch.empty(2, 8, 129, dtype=BF16, device=DEVICE)
    odd, out = wide[..., 1:], wide.clone()[..., 1:]
    odd.copy_(one.q)
    assert same(replace(one, q=odd).solve(num_splits=4, out=out), want)
    assert same(one.solve(num_splits=4), want)


def test_calls_that_are_known_read_the_tensors_of_now():
    small, large = problem((900, 65)), problem((300,) * 100)
    for one in (small, large, small):  # the stream's workspace grows in between
        want = one.solve(num_splits=8)
        close(want, one.expect())
        views = replace(one, k=one.k.view_as(one.k), v=one.v.view_as(one.v), q=one.q.clone())
        assert same(views.solve(num_splits=8), want)
        doubled = replace(one, q=2 * one.q)
        close(doubled.solve(num_splits=8), doubled.expect())
