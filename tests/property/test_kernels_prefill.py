"""Laws of the prefill kernel: many query tokens a sequence, over pages, in the interpreter.

All run on elastically mapped pages full of NaN. On a GPU see ``tests/gpu/test_prefill_mla.py``.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from paged import (
    TRITON,
    Case,
    ElasticCache,
    assert_close,
    bitwise,
    expect,
    few,
    lengths,
    owned,
    sized,
    slots_of,
    with_options,
)

from kvcached.kernels import merge_state, reshape_and_cache
from kvcached.kernels.checks import check_call, check_places

pytestmark = pytest.mark.skipif(not TRITON, reason="a Triton kernel: TRITON_INTERPRET=1 or a GPU")

SMALL = {"BM": 32, "BN": 16}
"""A tile that several of still fit a sequence which the interpreter can afford."""


def run(case, *, splits=1, placement=0, rows=None, fill=0xFF, config=SMALL, table=True,
        even=False):  # fmt: skip
    """(out, lse) of the prefill kernel for a case whose rows lie at ``placement``.

    ``even`` sequences have the same number of queries, of which the kernel is told only that.
    """
    from kvcached.kernels.prefill import attend_prefill

    q, keys, values = rows or case.rows()
    out = torch.full((*q.shape[:2], case.dim_v), torch.nan, dtype=q.dtype)
    if table:
        blocks = case.table(placement)
        where = {"page_table": blocks}
        used, slots = owned(blocks), slots_of(blocks, case.lens, case.block_size)
    else:  # one sequence behind another, from slot 3 on
        starts = torch.tensor([3, *case.lens]).cumsum(0)[:-1].int()
        where = {"cache_start": starts}
        slots = torch.arange(sum(case.lens), dtype=torch.int32) + 3
        used = range((sum(case.lens) + 3) // case.block_size + 1)
    with ElasticCache(used, fill=fill, **case.sizes()) as cache:
        reshape_and_cache(torch.cat(keys), torch.cat(values), cache.k, cache.v, slots)
        asked = lengths(case) | ({"cu_seqlens_q": None} if even else {})
        call = check_call(q, cache.k, cache.v, out=out, **where, **asked, **case.options)
        check_places(call)
        attend_prefill(call, splits, config)
    return call.out, call.lse


@st.composite
def prompts(draw, options=st.just({}), most=2):  # noqa: B008
    """Lengths around the edges of tiles, with and without context before the queries."""
    length = st.one_of(st.sampled_from([0, 1, 15, 16, 17, 33]), st.integers(0, 50))
    lens = tuple(draw(st.lists(length, min_size=1, max_size=most)))
    queries = tuple(draw(st.sampled_from([min(n, 1), n // 2, n, n + 1])) for n in lens)
    dim = draw(st.sampled_from([16, 48, 64, 80, 24]))
    return Case(
        seed=draw(st.integers(0, 2**20)),
        dtype=draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])),
        block_size=draw(st.sampled_from([1, 5, 8, 16, 64])), heads=draw(st.sampled_from([1, 1, 2])),
        group=draw(st.sampled_from([1, 3, 4])), dim=dim,
        dim_v=draw(st.sampled_from([dim, dim, 48, 40])), lens=lens, queries=queries,
        options=draw(options),
    )  # fmt: skip


@st.composite
def choices(draw):
    return {
        "causal": draw(st.booleans()),
        "window_size": draw(st.sampled_from([(-1, -1), (0, 0), (17, -1), (40, 3), (-1, 2)])),
        "softcap": draw(st.sampled_from([0.0, 0.0, 5.0])),
        "alibi_slopes": draw(st.sampled_from([None, 0.3])),
        "sinks": draw(st.sampled_from([None, 0.7])),
        "softmax_scale": draw(st.sampled_from([0.05, 0.2, -0.1, 0.0])),
    }


@few(80)
@given(case=prompts(choices()), splits=st.sampled_from([1, 1, 2, 5]))
def test_5_it_equals_its_float64_twin(case, splits):
    case = sized(case)
    assert_close(case, run(case, splits=splits), expect(case))


@few(40)
@given(case=prompts())
def test_1_where_the_blocks_lie_makes_no_difference(case):
    assert bitwise(run(case, placement=0), run(case, placement=1))


@few(40)
@given(case=prompts(most=1))
def test_2_the_block_size_makes_no_difference(case):
    first, *others = [run(replace(case, block_size=size)) for size in (1, 5, 16, 64)]
    assert all(bitwise(first, other) for other in others)


@few(40)
@given(case=prompts(), splits=st.integers(2, 8))
def test_3_the_number_of_splits_makes_no_difference(case, splits):
    got = run(case, splits=splits)
    assert_close(case, got, expect(case))
    assert bitwise(got, run(case, splits=splits))


@few(40)
@given(case=prompts(most=1), share=st.floats(0, 1))
def test_4_context_and_chunk_merge_to_the_whole(case, share):
    """What chunked prefill rests on: queries see all of a prefix, and are causal in the rest."""
    queries = min(case.queries[0], case.lens[0])
    case = replace(case, queries=(queries,))
    q, keys, values = case.rows()
    cut = int((case.lens[0] - queries) * share)
    prefix = with_options(replace(case, lens=(cut,)), causal=False)
    suffix = replace(case, lens=(case.lens[0] - cut,))
    one = run(prefix, rows=(q, [keys[0][:cut]], [values[0][:cut]]))
    two = run(suffix, rows=(q, [keys[0][cut:]], [values[0][cut:]]))
    assert_close(case, merge_state(*one, *two), expect(case), factor=2, floor=2e-6)


@few(40)
@given(case=prompts(choices()), splits=st.sampled_from([1, 3]))
def test_6_what_lies_in_unowned_slots_makes_no_difference(case, splits):
    case = sized(case)
    assert bitwise(run(case, splits=splits), run(case, splits=splits, fill=0))


@few(40)
@given(case=prompts(most=1), left=st.integers(0, 30))
def test_6_rows_before_the_first_window_are_not_read(case, left):
    case = with_options(case, window_size=(left, -1))
    q, keys, values = case.rows()
    spoiled = [[x.clone() for x in xs] for xs in (keys, values)]
    for x in [*spoiled[0], *spoiled[1]]:
        x[: max(0, case.lens[0] - case.queries[0] - left)] = torch.nan
    assert bitwise(run(case), run(case, rows=(q, *spoiled)))


@few(40)
@given(case=prompts())
def test_9_neutral_options_change_nothing(case):
    heads = case.heads * case.group
    wide = with_options(case, window_size=(max(case.lens) + 1, -1))
    silent = with_options(case, sinks=torch.full((heads,), -1e30))
    assert all(bitwise(run(other), run(case)) for other in (wide, silent))


@few(40)
@given(case=prompts(most=1))
def test_10_a_prompt_at_once_equals_its_tokens_one_by_one(case):
    queries = min(case.queries[0], case.lens[0], 6)
    case = replace(case, queries=(queries,))
    q, keys, values = case.rows()
    together = run(case)
    for at in range(queries):
        seen = case.lens[0] - queries + at + 1
        one = replace(case, lens=(seen,), queries=(1,))
        got = run(one, rows=(q[at : at + 1], [keys[0][:seen]], [values[0][:seen]]))
        assert_close(case, got, (together[0][at : at + 1], together[1][at : at + 1]), factor=2)


@few(40)
@given(case=prompts())
def test_sequences_may_lie_in_consecutive_slots_without_a_table(case):
    assert_close(case, run(case, table=False), expect(case))


@few(40)
@given(case=prompts(), splits=st.sampled_from([1, 2]), more=st.integers(0, 20))
def test_queries_in_front_of_a_short_prompt_see_nothing(case, splits, more):
    """So a batch that is padded in front needs no starts, and no token of it is moved."""
    case = replace(case, queries=(max(1, *case.lens) + more,) * len(case.lens))
    got, wanted = run(case, splits=splits, even=True), expect(case)
    assert_close(case, got, wanted)
    assert torch.isneginf(got[1]).any() or not more


@few(40)
@given(case=prompts(choices(), most=5), splits=st.sampled_from([1, 2]))
def test_prompts_and_single_tokens_share_a_launch(case, splits):
    """Sequences of few tokens take tiles of 16 rows; those beside them do not."""
    lens = tuple(max(n, 1) for n in case.lens)
    queries = tuple(1 if i % 2 else n for i, n in enumerate(lens))
    case = sized(replace(case, lens=lens, queries=queries, group=min(case.group, 4)))
    assert_close(case, run(case, splits=splits), expect(case))


def test_more_sequences_than_one_look_at_their_starts_covers():
    """The search for a tile's sequence reads 256 starts at a time."""
    lens = (1,) * 255 + (9, 1, 9)
    case = Case(1, torch.float32, 4, 1, 1, 16, 16, lens, lens)
    assert_close(case, run(case, config={"BM": 16, "BN": 16}), expect(case))


def test_the_kernel_is_chosen_by_rows_and_width():
    from kvcached.kernels.prefill import suits_prefill

    def suited(dim, tokens):
        cache = torch.zeros(2, 16, 1, dim)
        q, lens = torch.zeros(tokens, 8, dim), torch.tensor([16]).int()
        table = torch.tensor([[1]]).int()
        return suits_prefill(
            check_call(q, cache, cache, cache_seqlens=lens, page_table=table, max_seqlen_q=tokens)
        )

    assert [suited(64, 8), suited(64, 9), suited(512, 9)] == [False, True, False]


def test_14_more_query_heads_than_a_tile_has_rows():
    case = Case(5, torch.float32, 4, 1, 40, 16, 16, (9, 3), (4, 3))
    assert_close(case, run(case, config={"BN": 16}), expect(case))


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 192, 256])
def test_14_every_head_dim_with_the_tiles_that_ship(dim):
    case = Case(dim, torch.float16, 16, 1, 3, dim, min(dim, 128), (67, 130), (67, 1))
    assert_close(case, run(case, config=None), expect(case))
