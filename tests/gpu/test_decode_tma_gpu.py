"""Decode by TMA on a Hopper GPU: equal shares of any lengths, merged; same results each time.

Slots that no sequence owns hold NaN in every test.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from gpu.attention_problems import BF16, DEVICE, captured, close, problem, same

from kvcached.kernels import _decode_tma, _repeat, attn_with_kvcache
from kvcached.kernels._launch import runs_gluon

pytestmark = pytest.mark.gpu
RUNS = 10
UNLIKE = (3000, 1, 64, 700, 65, 1999, 0, 2, 9000)


@pytest.fixture(autouse=True)
def taken(monkeypatch):
    """Counts calls that the kernel serves; the work of all is long enough for it."""
    if not torch.cuda.is_available() or not runs_gluon(torch.device("cuda", 0)):
        pytest.skip("no Hopper GPU")
    torch.manual_seed(0)
    made, prepare = [], _decode_tma.prepare_tma

    def counted(*arguments):
        made.append(1)
        return prepare(*arguments)

    monkeypatch.setattr(_repeat, "_streams", {})  # calls that are known are not prepared
    monkeypatch.setattr(_decode_tma, "MIN_TILES", 0)
    monkeypatch.setattr(_decode_tma, "prepare_tma", counted)
    return made


def check(one, taken, **options):
    """Right, and the same in every run."""
    first = one.solve(**options)
    assert taken, "another kernel was called"
    close(first, one.expect())
    assert all(same(one.solve(**options), first) for _ in range(RUNS - 1))


@pytest.mark.parametrize("block_size", [16, 48, 64, 256])
@pytest.mark.parametrize("lens", [UNLIKE, (1,), (0, 0, 5), (5000,), (128,) * 40, (129, 20_000)])
def test_lengths_and_block_sizes(lens, block_size, taken):
    check(problem(lens, block_size=block_size), taken)


@pytest.mark.parametrize(("q_heads", "heads", "options"), [
    (3, 3, {}), (24, 3, {}), (8, 1, {}), (14, 2, {}), (20, 4, {}), (16, 16, {}),
    (8, 2, {"causal": False}), (8, 2, {"softmax_scale": -0.3}),
])  # fmt: skip
def test_heads_and_options(q_heads, heads, options, taken):
    check(problem((2500, 64, 701, 4), q_heads=q_heads, heads=heads, **options), taken)


def test_sinks_join_the_denominator(taken):
    sinks = torch.full((8,), 0.5).to(DEVICE)
    check(problem((2500, 64, 0, 700), sinks=sinks), taken)


def test_a_batch_of_many_sequences(taken):
    draw = random.Random(0)
    lens = tuple(draw.randrange(0, 300) for _ in range(_decode_tma.MAX_BATCH))
    one = problem(lens, q_heads=2, heads=1)
    plan = one.plan()
    plan.update(one.lens)
    check(one, taken, plan=plan)


@pytest.mark.parametrize("lens", [(30_000,), (40_000, 1, 30_000)])
def test_long_sequences_give_the_same_result_in_a_thousand_runs(lens, taken):
    one = problem(lens, q_heads=32, heads=8)
    first = one.solve()
    assert taken
    unlike = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    for _ in range(1000):
        unlike += (one.solve()[0] != first[0]).sum()
    assert not int(unlike)


def test_half_precision(taken):
    one = problem((2500, 64, 0, 700))
    made = [x.half() for x in (one.q, one.k, one.v)]
    half = replace(one, q=made[0], k=made[1], v=made[2])
    check(half, taken, out=torch.full_like(made[0], math.nan))


def test_a_plan_lends_its_memory(taken):
    one = problem(UNLIKE)
    plan = one.plan()
    check(one, taken, plan=plan)
    plan.update(one.lens)
    check(one, taken, plan=plan)
    for held in plan.memory._held:
        assert not held.finished.any(), "counters are zero after each launch"


def test_a_captured_call_follows_the_lengths(taken):
    one = problem(UNLIKE)
    out = torch.empty_like(one.q)
    graph, got = captured(torch.cuda.Stream(), lambda: one.solve(out=out))
    assert taken
    for lens in (UNLIKE, (64,) * 9, (1, 1, 3, 400, 5, 6, 0, 1, 8192), UNLIKE):
        now = [min(n, most) for n, most in zip(lens, UNLIKE, strict=True)]
        one.lens.copy_(torch.tensor(now, dtype=torch.int32))
        out.fill_(math.nan)
        graph.replay()
        torch.cuda.synchronize()
        close(got, one.expect())


def test_launches_that_begin_early_see_what_those_in_front_wrote(taken):
    one = problem((4000, 33, 2500, 700))
    two = replace(one, q=torch.empty_like(one.q))
    q, k = one.q.clone(), one.k.clone()
    block = int(one.table[0, 0])

    def chain(between):
        one.q.copy_(q)
        one.k.copy_(k)
        for _ in range(10):
            one.solve(out=two.q)
            between()
            two.solve(out=one.q)
            between()
            one.k[block] = one.q[:1, : one.k.shape[2]] * 0.5

    chain(torch.cuda.synchronize)
    assert taken
    want = one.q.clone()
    assert not want.isnan().any()
    for _ in range(RUNS):
        chain(lambda: None)
        assert torch.equal(one.q, want)


def test_other_layouts_of_the_cache(taken):
    one = problem((2500, 64, 0, 700), heads=4)
    want = one.solve()
    both = torch.stack([one.k, one.v], 1)  # a block's keys, then its values
    apart = replace(one, k=both[:, 0], v=both[:, 1])
    assert same(apart.solve(), want)
    assert len(taken) == 2
    by_head = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (one.k, one.v)]
    close(replace(one, k=by_head[0], v=by_head[1]).solve(), one.expect())
    assert len(taken) == 2, "no boxes of heads that lie apart"


def test_no_blocks_but_its_own_are_read(taken):
    """What the table says behind a sequence's end is nothing that may be looked at."""
    one = problem((2500, 64, 700))
    out, lse = torch.empty_like(one.q), None
    table = one.table.clone()
    for row, n in enumerate((2500, 64, 700)):
        table[row, -(-n // 16) :] = 2**30
    out, lse = attn_with_kvcache(one.q, one.k, one.v, cache_seqlens=one.lens, page_table=table,
                                 return_softmax_lse=True)  # fmt: skip
    assert taken
    close((out, lse), one.expect())
    assert out.dtype == BF16
