"""Laws of the Triton attention alone: planned parts, quantised caches.

They run in the interpreter (TRITON_INTERPRET=1), on slots full of NaN.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from paged import (
    TRITON,
    Case,
    ElasticCache,
    assert_close,
    bitwise,
    cases,
    expect,
    few,
    lengths,
    owned,
    slots_of,
)

from kvcached.errors import InvalidInput
from kvcached.kernels import reference, reshape_and_cache
from kvcached.kernels.checks import check_call, check_places
from kvcached.kernels.quant import INT4, LARGEST, dequantize, quantize, row_scales

pytest.importorskip("triton")
from kvcached.kernels import plan as planning
from kvcached.kernels.decode import attend_triton

pytestmark = pytest.mark.skipif(not TRITON, reason="only the Triton kernel does this")
POOL = 256


def run(call, splits=1, plan=None):
    call.out.fill_(torch.nan)
    check_places(call)
    attend_triton(call, splits, plan)
    return call.out, call.lse


def plan_for(case, *, slots=None, **options):
    """A plan for ``case``, with a list of ``slots`` places if that is given."""
    window = case.options.get("window_size", (-1, -1))
    plan = planning.plan_attention(
        len(case.lens), max(case.lens) or 1, case.heads * case.group, case.heads, case.dim,
        case.dtype, device="cpu", head_dim_v=case.dim_v, max_q=max([1, *case.queries]),
        window_size=window, **options,
    )  # fmt: skip
    if slots is not None:
        plan = planning.Plan(plan.shape, max(slots, len(case.lens)), window=plan.window, fixed=0)
    return plan


def solve_planned(case, plan, *, update=True, rows=None):
    q, keys, values = rows or case.rows()
    table = case.table()
    with ElasticCache(owned(table), **case.sizes()) as cache:
        slots = slots_of(table, case.lens, case.block_size)
        reshape_and_cache(torch.cat(keys), torch.cat(values), cache.k, cache.v, slots)
        call = check_call(q, cache.k, cache.v, page_table=table, **lengths(case), **case.options)
        plan.workspace.partial.fill_(torch.nan)
        plan.workspace.state.fill_(torch.nan)
        if update:
            plan.update(call.lens, call.q_starts)
        got = run(call, 0, plan)
    assert not plan.workspace.finished.any()
    return got


@few(80)
@given(case=cases(decode=True, longest=400), slots=st.integers(1, 20), least=st.integers(1, 130),
       parts=st.integers(1, 5))  # fmt: skip
def test_3_a_planned_batch_equals_its_float64_twin(case, slots, least, parts):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "MIN_PART_TOKENS", least)
        patch.setattr(planning, "MIN_SPLIT_TOKENS", least)
        patch.setattr(planning, "equal_parts", lambda *_: parts)
        plan = plan_for(case, slots=slots)
        got = solve_planned(case, plan)
        assert_close(case, got, expect(case), factor=2)
        assert bitwise(got, solve_planned(case, plan))


@pytest.mark.parametrize("window", [(-1, -1), (70, 0)])
def test_the_list_of_a_skewed_batch_covers_each_key_once_long_parts_first(window):
    lens = (2000, 0, 64, 700, 65, 1)
    case = Case(0, torch.float16, 16, 1, 2, 64, 64, lens, (1,) * 6, {"window_size": window})
    plan = plan_for(case, slots=20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "MIN_PART_TOKENS", 1)
        plan.update(torch.tensor(lens, dtype=torch.int32))
    work = [row[:5] for row in plan.workspace.work.tolist() if row[0] >= 0]
    assert len(work) <= plan.slots
    for seq, length in enumerate(lens):
        parts = [row for row in work if row[0] == seq]
        first = 0 if window[0] < 0 else max(0, length - 1 - window[0])
        begin = first // plan.config["BN"] * plan.config["BN"]
        assert [row[3] for row in parts] == list(range(len(parts)))
        assert {row[4] for row in parts} == {len(parts)}
        edges = [begin, *(row[2] for row in parts)]
        assert [row[1] for row in parts] == edges[:-1] or length == 0
        assert edges[-1] == length
    sizes = [hi - lo for _, lo, hi, *_ in work]
    tile = plan.config["BN"]
    assert all(b <= 2 * max(a, tile) + tile for a, b in pairwise(sizes))
    if window[0] < 0:
        assert 14 < len(work) <= 20  # the list is used
        assert max(sizes) == 2 * tile


@few(20)
@given(case=cases(decode=True, longest=400), other=st.integers(0, 400))
def test_3_deterministic_results_do_not_depend_on_the_batch(case, other):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "FIXED_PART", 64)
        beside = replace(case, lens=(case.lens[0], other), queries=(1, 1))
        alone = replace(case, lens=case.lens[:1], queries=(1,))
        rows = beside.rows()
        two = solve_planned(beside, plan_for(beside, deterministic=True), rows=rows)
        one = solve_planned(
            alone, plan_for(alone, deterministic=True), rows=[part[:1] for part in rows]
        )
    assert bitwise(one, [part[:1] for part in two])
    assert_close(beside, two, expect(beside), factor=2)


@pytest.mark.parametrize("group", [1, 3, 8])
def test_what_rounding_takes_off_weights_is_added_where_the_tile_has_rows_to_spare(group):
    """Values whose weighted sum is almost 0, so that nothing else is rounded much."""
    tokens, dim = 70, 32
    case = Case(5, torch.float16, 16, 1, group, dim, dim, (tokens,), (1,))
    q, (keys,), (values,) = case.rows()
    q[:] = q[0, 0].clone()
    weights = torch.softmax(keys[:, 0].double() @ q[0, 0].double() * dim**-0.5, 0)
    values[-1, 0] -= (weights @ values[:, 0].double() / weights[-1]).half()
    table = case.table()
    with ElasticCache(owned(table), **case.sizes()) as cache:
        reshape_and_cache(
            keys, values, cache.k, cache.v, slots_of(table, case.lens, case.block_size)
        )
        call = check_call(q, cache.k, cache.v, page_table=table, **lengths(case))
        out, _ = run(call, 2)
    rounded = (weights / weights.max()).half().double() * weights.max()
    assert ((weights - rounded) @ values[:, 0].double()).abs().max() > 1e-5, "a test of rounding"
    assert (out[0].double() - weights @ values[:, 0].double()).abs().max() < 1e-6


@few(10)
@given(case=cases(decode=True))
def test_a_plan_without_a_list_cuts_into_equal_parts(case):
    got = solve_planned(case, plan_for(case, slots=9), update=False)
    assert_close(case, got, expect(case), factor=2)


def test_a_plan_for_other_calls_is_refused():
    case = Case(0, torch.float16, 16, 2, 2, 64, 64, (5, 9), (1, 1))
    for change, message in [
        ({"heads": 1, "group": 4}, "num_kv_heads 1, the call 2"), ({"dim": 32}, "head_dim 32"),
        ({"lens": (5,), "queries": (1,)}, "max_batch 1, the call 2"),
        ({"options": {"window_size": (3, 0)}}, "another window_size"),
        ({"dtype": torch.float32}, "dtype torch.float32"),
    ]:  # fmt: skip
        with pytest.raises(InvalidInput, match=message):
            solve_planned(case, plan_for(replace(case, **change)), update=False)
    with pytest.raises(InvalidInput, match="at most 2 sequences got 3"):
        plan_for(case).update(torch.zeros(3, dtype=torch.int32))
    with pytest.raises(InvalidInput, match="a tile holds"):
        planning.plan_attention(1, 9, 8, 1, 64, torch.float16, device="cpu", max_q=40)
    with pytest.raises(InvalidInput, match="max_batch is 0"):
        planning.plan_attention(0, 9, 8, 1, 64, torch.float16, device="cpu")


# --- quantised caches -------------------------------------------------------------------------


@st.composite
def quantized(draw):
    """(case, stored dtype, scales) of a cache without any other option."""
    dtype = draw(st.sampled_from(list(LARGEST)))
    scales = "row" if dtype == INT4 else draw(st.sampled_from(["tensor", "head", "row"]))
    return draw(cases()), dtype, scales


def stored_rows(x, dtype, scales):
    """``x [L, Hkv, D]`` as stored, and its scale."""
    scale = row_scales(x, dtype)
    if scales != "row":
        scale = torch.cat([scale, torch.ones(1, x.shape[1]) / 1000]).amax(0)
        scale = scale.amax() if scales == "tensor" else scale
    return quantize(x, scale, dtype), scale


def place(rows, slots, size):
    """``rows`` at ``slots`` of a pool whose other bytes are NaN, or 0xFF where there is none."""
    pool = torch.full((POOL * size, *rows.shape[1:]), 0xFF, dtype=torch.uint8)
    if rows.dtype == torch.float32:
        whole = torch.full((POOL * size, *rows.shape[1:]), torch.nan)
        whole[slots] = rows
        return whole.view(POOL, size, *rows.shape[1:])
    pool[slots] = rows.view(torch.uint8)
    return pool.view(rows.dtype).view(POOL, size, *rows.shape[1:])


WIDE_INT4 = Case(1, torch.float16, 16, 1, 4, 128, 128, (540, 0, 3), (1, 1, 1)), INT4, "row"
"""Long enough for the tiles of ``INT4_SIZES``."""


@few(80)
@given(given_=quantized(), splits=st.sampled_from([1, 3]))
@example(given_=WIDE_INT4, splits=1)
def test_12_attention_over_a_quantised_cache_is_that_over_what_it_means(given_, splits):
    case, dtype, scales = given_
    counts = [-(-n // case.block_size) for n in case.lens]
    ids = torch.randperm(POOL, generator=torch.Generator().manual_seed(case.seed))[: sum(counts)]
    table = torch.zeros(len(counts), max([*counts, 1]), dtype=torch.int32)
    for row, part in zip(table, ids.split(counts), strict=True):
        row[: len(part)] = part
    slots = slots_of(table, case.lens, case.block_size).long()
    q, keys, values = case.rows()
    caches, means = [], []
    for rows in (keys, values):
        stored, scale = stored_rows(torch.cat(rows).float(), dtype, scales)
        spread = place(scale, slots, case.block_size) if scales == "row" else scale
        caches.append((place(stored, slots, case.block_size), spread))
        means.append(dequantize(stored, scale, torch.float64).split(case.lens))
    (k, ks), (v, vs) = caches
    call = check_call(
        q, k, v, page_table=table, k_descale=ks, v_descale=vs, **lengths(case), **case.options
    )
    rough = replace(case, dtype=torch.float16) if case.dtype == torch.bfloat16 else case
    got = run(call, splits)
    wanted = expect(case, (q, *means))
    loose = case.dtype == torch.bfloat16
    assert_close(case if loose else rough, got, wanted, factor=2, floor=2e-3)
    if case.options == {}:
        twin = reference.attn_with_kvcache(
            q, k, v, page_table=table, k_descale=ks, v_descale=vs, **lengths(case)
        )
        torch.testing.assert_close(twin[0], wanted[0])
