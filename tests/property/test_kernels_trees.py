"""Laws of attention under a ``custom_mask`` (property 10): trees of drafts, and any other masks.

On elastically mapped pages full of NaN, on Numba or, under TRITON_INTERPRET=1, on Triton.
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
    append,
    assert_close,
    attend,
    bitwise,
    cases,
    expect,
    few,
    lengths,
    owned,
    scales_of,
    sized,
    slots_of,
    solve,
    with_options,
    with_threads,
)

from kvcached.errors import InvalidInput
from kvcached.kernels import attn_with_kvcache, gather_kv, reshape_and_cache
from kvcached.kernels.quant import INT4, LARGEST, dequantize

SPLITS = st.sampled_from([1, 4])


def a_tree(count, generator):
    """Masks of ``count`` drafts, each of which sees its ancestors and itself."""
    masks = []
    for j in range(count):
        parent = int(torch.randint(-1, j, (1,), generator=generator)) if j else -1
        masks.append((masks[parent] if parent >= 0 else 0) | 1 << j)
    return masks


def masks_of(queries, seed, kind):
    """int64 ``[T]``: trees, chains, or any bits at all."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "any":
        return torch.randint(-(2**63), 2**63 - 1, (sum(queries),), generator=generator)
    if kind == "chain":
        return torch.cat([(2 << torch.arange(count)) - 1 for count in queries])
    return torch.tensor([mask for n in queries for mask in a_tree(n, generator)]).long()


@st.composite
def options(draw):
    """What may go with a mask; ``causal`` is to make no difference."""
    return {
        "causal": draw(st.booleans()),
        "softcap": draw(st.sampled_from([0.0, 0.0, 5.0])),
        "alibi_slopes": None,
        "sinks": draw(st.sampled_from([None, 0.7])),
    }


@st.composite
def masked(draw):
    case = sized(draw(cases(options=options())))
    kind = draw(st.sampled_from(["tree", "tree", "chain", "any"]))
    return with_options(case, custom_mask=masks_of(case.queries, case.seed, kind))


@few(80)
@given(case=masked(), splits=SPLITS)
def test_10_masked_drafts_equal_their_float64_twin(case, splits):
    assert_close(case, solve(case, splits=splits), expect(case))


@few(30)
@given(case=cases(options=options()), splits=SPLITS)
def test_10_a_chain_of_drafts_is_causal_attention(case, splits):
    case = with_options(sized(case), causal=True)
    chain = with_options(case, custom_mask=masks_of(case.queries, 0, "chain"))
    assert_close(case, solve(chain, splits=splits), expect(case))


@few(30)
@given(case=cases(longest=60), seed=st.integers(0, 2**20))
def test_10_a_path_of_a_tree_equals_the_path_alone(case, seed):
    """What a draft sees of the others is its ancestors, as if they alone were behind the cache."""
    drafts = min(case.lens[0], case.queries[0])
    case = replace(case, lens=case.lens[:1], queries=(drafts,))
    tree = masks_of(case.queries, seed, "tree")
    q, (keys,), (values,) = case.rows()
    out, lse = solve(with_options(case, custom_mask=tree), rows=(q, [keys], [values]))
    kept = len(keys) - drafts
    for at, mask in enumerate(tree.tolist()):
        path = [*range(kept), *(kept + j for j in range(drafts) if mask >> j & 1)]
        alone = replace(case, lens=(len(path),), queries=(1,))
        got = solve(alone, rows=(q[at : at + 1], [keys[path]], [values[path]]))
        assert_close(case, got, (out[at : at + 1], lse[at : at + 1]), factor=2)


@pytest.mark.parametrize("drafts", [63, 64])
def test_masks_have_a_bit_for_each_of_64_drafts(drafts):
    case = Case(3, torch.float32, 16, 2, 2, 16, 16, (drafts + 9,), (drafts,))
    chain = with_options(case, custom_mask=masks_of(case.queries, 0, "chain"))
    assert_close(case, solve(chain, splits=2), expect(case))
    last = torch.zeros(drafts, dtype=torch.int64)
    last[0] = torch.tensor([1]) << (drafts - 1)
    later = with_options(case, custom_mask=last)
    assert_close(case, solve(later), expect(later))


@few(20)
@given(case=masked(), splits=SPLITS)
def test_6_what_lies_in_unowned_slots_makes_no_difference(case, splits):
    assert bitwise(solve(case, splits=splits), solve(case, splits=splits, fill=0))


@pytest.mark.skipif(TRITON, reason="the interpreter has one thread")
@few(15)
@given(case=masked())
def test_3_the_number_of_threads_makes_no_difference(case):
    one, four = with_threads(lambda: solve(case), 1, 4)
    assert bitwise(one, four)


@st.composite
def quantised(draw):
    """(masked case, stored dtype, kind of scale)."""
    case = draw(masked())
    dtype = draw(st.sampled_from(list(LARGEST)))
    kind = "row" if dtype == INT4 else draw(st.sampled_from(["tensor", "head", "row"]))
    return replace(case, dim_v=case.dim), dtype, kind


@pytest.mark.skipif(TRITON, reason="writes and gathers are Numba's here")
@few(60)
@given(made=quantised())
def test_12_masked_drafts_over_bytes_equal_those_over_what_they_mean(made):
    case, dtype, kind = made
    q, keys, values = case.rows()
    table, narrow = case.table(), case.dim // (2 if dtype == INT4 else 1)
    sizes = case.sizes() | {"dtype": dtype, "dim": narrow, "dim_v": narrow}
    scales = [scales_of(kind, case.heads, case.block_size) for _ in "kv"]
    slots = slots_of(table, case.lens, case.block_size)
    starts = torch.tensor([0, *case.lens]).cumsum(0).int()
    with ElasticCache(owned(table), **sizes) as cache:
        rows = [torch.cat(x).float() for x in (keys, values)]
        reshape_and_cache(*rows, cache.k, cache.v, slots, "auto", *scales)
        stored = [torch.empty(len(slots), case.heads, narrow, dtype=dtype) for _ in "kv"]
        gather_kv(cache.k, cache.v, table, starts, *stored)
        got = attn_with_kvcache(
            q, cache.k, cache.v, page_table=table, k_descale=scales[0], v_descale=scales[1],
            return_softmax_lse=True, **lengths(case), **case.options,
        )  # fmt: skip
    means = []
    for x, scale in zip(stored, scales, strict=True):
        own = scale.flatten(0, 1)[slots.long()] if kind == "row" else scale
        means.append(dequantize(x, own, torch.float64).split(case.lens))
    floor = 2e-6 if case.dtype == torch.float64 else 0.0  # scales are float32
    assert_close(case, got, expect(case, (q, *means)), factor=2, floor=floor)


@few(15)
@given(case=masked())
def test_masks_go_with_consecutive_slots_too(case):
    q, keys, values = case.rows()
    starts = torch.tensor([0, *case.lens]).cumsum(0)[:-1].int() + 3
    blocks = range((sum(case.lens) + 3) // case.block_size + 1)
    options = lengths(case) | case.options
    with ElasticCache(blocks, **case.sizes()) as cache:
        slots = torch.arange(sum(case.lens), dtype=torch.int32) + 3
        append(torch.cat(keys), torch.cat(values), cache.k, cache.v, slots)
        got = attend(q, cache.k, cache.v, 2, cache_start=starts, **options)
    assert_close(case, got, expect(case))


def test_what_masks_do_not_go_with_is_refused():
    q, cache = torch.zeros(2, 1, 16), torch.zeros(4, 16, 1, 16)
    common = {"cache_seqlens": torch.tensor([5]).int(), "page_table": torch.zeros(1, 1).int(),
              "max_seqlen_q": 2, "custom_mask": torch.tensor([1, 3])}  # fmt: skip
    for change, message in [
        ({"window_size": (3, 0)}, "neither window_size"),
        ({"alibi_slopes": torch.ones(1)}, "nor alibi_slopes"),
        ({"custom_mask": torch.tensor([1, 3]).int()}, "custom_mask must be int64"),
        ({"custom_mask": torch.tensor([1])}, "custom_mask must be int64"),
    ]:
        with pytest.raises(InvalidInput, match=message):
            attn_with_kvcache(q, cache, cache, **common | change)
