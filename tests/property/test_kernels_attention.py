"""Laws of attention over a paged cache; the numbers are those of the kernels' list of properties.

All run on elastically mapped pages full of NaN, on Numba or, under TRITON_INTERPRET=1, on Triton.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from paged import (
    DTYPES,
    TRITON,
    Case,
    ElasticCache,
    assert_close,
    attend,
    bitwise,
    cases,
    expect,
    few,
    sized,
    solve,
    with_options,
    with_threads,
)

from kvcached.kernels import merge_state, merge_states, reshape_and_cache
from kvcached.kernels import reference as twins

SPLITS = st.sampled_from([1, 2, 5])


@st.composite
def options(draw):
    """Everything that changes the scores; heads are cut to size by ``sized``."""
    return {
        "causal": draw(st.booleans()),
        "window_size": draw(st.sampled_from([(-1, -1), (0, 0), (17, -1), (40, 3), (-1, 2)])),
        "softcap": draw(st.sampled_from([0.0, 0.0, 5.0])),
        "alibi_slopes": draw(st.sampled_from([None, 0.3])),
        "sinks": draw(st.sampled_from([None, 0.7])),
        "softmax_scale": draw(st.sampled_from([0.05, 0.2])),
    }


@few(60)
@given(case=cases(options=options()), splits=SPLITS)
def test_5_it_equals_its_float64_twin(case, splits):
    case = sized(case)
    assert_close(case, solve(case, splits=splits), expect(case))


@few(20)
@given(case=cases(decode=True))
def test_1_where_the_blocks_lie_makes_no_difference(case):
    assert bitwise(solve(case, placement=0), solve(case, placement=1))


@few(20)
@given(case=cases())
def test_2_the_block_size_makes_no_difference(case):
    sizes = [replace(case, block_size=size) for size in (1, 8, 16, 64)]
    first, *others = [solve(sized) for sized in sizes]
    assert all(bitwise(first, other) for other in others)


@pytest.mark.skipif(not TRITON, reason="only the Triton kernel splits the keys")
@few(30)
@given(case=cases(decode=True), splits=st.integers(2, 8))
def test_3_the_number_of_splits_makes_no_difference(case, splits):
    got = solve(case, splits=splits)
    assert_close(case, got, solve(case), factor=2)
    assert bitwise(got, solve(case, splits=splits))


@pytest.mark.skipif(TRITON, reason="the interpreter has one thread")
@few(20)
@given(case=cases())
def test_3_the_number_of_threads_makes_no_difference(case):
    one, four = with_threads(lambda: solve(case), 1, 4)
    assert bitwise(one, four)


@few(20)
@given(case=cases(decode=True), share=st.floats(0, 1))
def test_4_two_parts_merge_to_the_whole(case, share):
    q, keys, values = case.rows()
    cuts = [int(n * share) for n in case.lens]
    halves = []
    for part in (lambda x, cut: x[:cut], lambda x, cut: x[cut:]):
        rows = [[part(x, cut) for x, cut in zip(xs, cuts, strict=True)] for xs in (keys, values)]
        half = replace(case, lens=tuple(len(x) for x in rows[0]))
        halves.append(solve(half, rows=(q, *rows)))
    merged = merge_state(*halves[0], *halves[1])
    # The LSE is float32 whatever the dtype.
    assert_close(case, merged, expect(case), factor=2, floor=2e-6)


@few(30)
@given(seed=st.integers(0, 2**20), parts=st.integers(1, 4), order=st.randoms())
def test_4_merging_is_associative_commutative_and_has_an_identity(seed, parts, order):
    generator = torch.Generator().manual_seed(seed)
    outs = [torch.randn(3, 2, 8, generator=generator) for _ in range(parts)]
    lses = [4 * torch.randn(3, 2, generator=generator) for _ in range(parts)]
    lses[0][0] = -torch.inf
    outs[0][0] = 0
    whole = merge_states(outs, lses)
    state = torch.zeros(3, 2, 8), torch.full((3, 2), -torch.inf)  # the identity
    for i in order.sample(range(parts), parts):
        state = merge_state(*state, outs[i], lses[i])
    for got in (state, twins.merge_states(outs, lses)):
        torch.testing.assert_close(got[0].float(), whole[0])
        torch.testing.assert_close(got[1].float(), whole[1])


@few(20)
@given(case=cases(), splits=SPLITS)
def test_6_what_lies_in_unowned_slots_makes_no_difference(case, splits):
    assert bitwise(solve(case, splits=splits), solve(case, splits=splits, fill=0))


@few(20)
@given(case=cases(decode=True), left=st.integers(0, 40))
def test_6_rows_before_the_window_are_not_read(case, left):
    case = with_options(case, window_size=(left, -1))
    q, keys, values = case.rows()
    spoiled = [[x.clone() for x in xs] for xs in (keys, values)]
    for x in [*spoiled[0], *spoiled[1]]:
        x[: max(0, len(x) - 1 - left)] = torch.nan
    assert bitwise(solve(case), solve(case, rows=(q, *spoiled)))


@few(20)
@given(case=cases(decode=True), shift=st.sampled_from([-2.0, 1.0, 4.0]))
def test_8_shifting_values_shifts_the_output(case, shift):
    q, keys, values = case.rows()
    out, lse = expect(case, (q, keys, [v.double() for v in values]))
    rows = (q, keys, [(v.double() + shift).to(case.dtype) for v in values])
    moved = torch.where(torch.isneginf(lse)[..., None], out, out + shift)
    assert_close(case, solve(case, rows=rows), (moved, lse), factor=2)


@few(20)
@given(case=cases(), seed=st.integers(0, 2**20))
def test_8_without_positions_the_order_of_keys_makes_no_difference(case, seed):
    case = with_options(case, causal=False)
    q, keys, values = case.rows()
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(n, generator=generator) for n in case.lens]
    rows = [[x[order] for x, order in zip(xs, orders, strict=True)] for xs in (keys, values)]
    assert_close(case, solve(case, rows=(q, *rows)), expect(case))


@few(20)
@given(case=cases())
def test_8_scaling_keys_is_scaling_the_softmax(case):
    q, keys, values = case.rows()
    doubled = (q, [2 * k for k in keys], values)
    case = with_options(case, softmax_scale=0.125)
    assert bitwise(solve(with_options(case, softmax_scale=0.0625), rows=doubled), solve(case))


@few(20)
@given(case=cases())
def test_9_neutral_options_change_nothing(case):
    heads = case.heads * case.group
    wide = with_options(case, window_size=(max(case.lens) + 1, -1))
    silent = with_options(case, sinks=torch.full((heads,), -1e30))
    flat = with_options(case, alibi_slopes=torch.zeros(heads))
    plain = solve(case)
    assert all(bitwise(solve(other), plain) for other in (wide, silent, flat))
    assert_close(case, solve(with_options(case, softcap=1e3)), plain, factor=2, floor=1e-3)


@few(15)
@given(case=cases(longest=60))
def test_10_verifying_tokens_together_equals_one_at_a_time(case):
    case = replace(
        case, queries=tuple(min(q, n) for q, n in zip(case.queries, case.lens, strict=True))
    )
    q, keys, values = case.rows()
    together = solve(case)
    owners = [i for i, count in enumerate(case.queries) for _ in range(count)]
    for at, i in enumerate(owners):
        later = sum(case.queries[: i + 1]) - at - 1
        seen = case.lens[i] - later
        one = replace(case, lens=(seen,), queries=(1,))
        got = solve(one, rows=(q[at : at + 1], [keys[i][:seen]], [values[i][:seen]]))
        assert_close(case, got, (together[0][at : at + 1], together[1][at : at + 1]), factor=2)


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65])
@pytest.mark.parametrize("group", [1, 3, 7, 8, 12])
def test_14_edges(length, group):
    for dim in (80, 192) if TRITON else (64, 80, 96, 128, 192, 256, 576):
        dtype = DTYPES[dim % len(DTYPES)]
        case = Case(dim, dtype, 16, 2, group, dim, min(dim, 512), (length, 5), (1, 1))
        assert_close(case, solve(case, splits=2), expect(case))


@few(15)
@given(case=cases(decode=True))
def test_sequences_may_lie_in_consecutive_slots_without_a_table(case):
    q, keys, values = case.rows()
    starts = torch.tensor([0, *case.lens]).cumsum(0)[:-1].int() + 3
    blocks = range((sum(case.lens) + 3) // case.block_size + 1)
    with ElasticCache(blocks, **case.sizes()) as cache:
        slots = torch.arange(sum(case.lens), dtype=torch.int32) + 3
        reshape_and_cache(torch.cat(keys), torch.cat(values), cache.k, cache.v, slots)
        lens = torch.tensor(case.lens, dtype=torch.int32)
        got = attend(q, cache.k, cache.v, 2, cache_seqlens=lens, cache_start=starts)
    assert_close(case, got, expect(case))
