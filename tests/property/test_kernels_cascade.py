"""Laws of cascade attention and of merging: shared once is the same as repeated by each request."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from paged import TRITON, few

from kvcached.kernels import (
    Level,
    attn_with_kvcache,
    cascade_attention,
    merge,
    merge_states,
    reference,
)

BLOCK, HEADS, GROUP, DIM = 4, 2, 3, 16


@pytest.fixture(autouse=True, scope="module")
def backend():
    """Triton's interpreter works on CPU tensors; attention itself stays with Numba here."""
    with pytest.MonkeyPatch.context() as patch:
        if TRITON:
            patch.setattr(merge, "_on_gpu", lambda _: True)
        yield


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@st.composite
def problems(draw):
    """A prefix for all, one for each half, and each request's own tokens; 1-3 queries a request."""
    requests = draw(st.integers(1, 5))
    half = draw(st.integers(0, requests))
    return {
        "seed": draw(st.integers(0, 2**20)),
        "halves": (half, requests - half),
        "prefix": draw(st.integers(0, 20)),
        "middles": (draw(st.integers(0, 9)), draw(st.integers(0, 9))),
        "own": tuple(draw(st.integers(0, 9)) for _ in range(requests)),
        "queries": draw(st.integers(1, 3)),
        "sinks": draw(st.booleans()),
        "softcap": draw(st.sampled_from([0.0, 3.0])),
        "causal": draw(st.booleans()),
    }


class Cache:
    """Sequences in scattered blocks of one pool."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)
        self.k, self.v = (self.random(64, BLOCK, HEADS, DIM) for _ in range(2))
        self.free = torch.randperm(64, generator=self.generator).tolist()

    def random(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    def table(self, *lens):
        rows = [[self.free.pop() for _ in range(-(-n // BLOCK))] for n in lens]
        width = max([1, *map(len, rows)])
        return torch.tensor([row + [-9] * (width - len(row)) for row in rows]).int()


def solve(p):
    """(what cascade gives, what attention over the joined rows gives in float64)."""
    cache, requests = Cache(p["seed"]), len(p["own"])
    q = cache.random(requests * p["queries"], HEADS * GROUP, DIM)
    tables = [cache.table(p["prefix"]), cache.table(*p["middles"]), cache.table(*p["own"])]
    starts = int32(0, p["halves"][0] * p["queries"], requests * p["queries"])
    levels = [
        Level(tables[0], int32(p["prefix"]), max_seqlen_q=len(q)),
        Level(tables[1], int32(*p["middles"]), starts, max([1, *starts.diff().tolist()])),
        Level(tables[2], int32(*p["own"]), max_seqlen_q=p["queries"]),
    ]
    sinks = cache.random(HEADS * GROUP) if p["sinks"] else None
    options = {"softcap": p["softcap"], "causal": p["causal"], "sinks": sinks}
    got = cascade_attention(q, cache.k, cache.v, levels, return_softmax_lse=True, **options)
    return got, reference.cascade_attention(q, cache.k, cache.v, levels, **options)


@few(80)
@given(p=problems())
def test_4_levels_merge_to_attention_over_all_their_tokens(p):
    # Queries of which some lie in a shared level would see it in part: not what a cascade is.
    if p["causal"]:
        p["own"] = tuple(max(own, p["queries"]) for own in p["own"])
    (out, lse), (wanted, wanted_lse) = solve(p)
    torch.testing.assert_close(out.double(), wanted, atol=4e-6, rtol=1e-5)
    torch.testing.assert_close(lse.double(), wanted_lse, atol=1e-5, rtol=1e-5)


def test_one_level_is_plain_attention():
    cache = Cache(0)
    q, table = cache.random(2, HEADS * GROUP, DIM), cache.table(5, 9)
    out = torch.full_like(q, torch.nan)
    got = cascade_attention(q, cache.k, cache.v, [Level(table, int32(5, 9))], out=out)
    plain = attn_with_kvcache(q, cache.k, cache.v, page_table=table, cache_seqlens=int32(5, 9))
    assert got is out
    torch.testing.assert_close(got, plain)


@few(60)
@given(seed=st.integers(0, 2**20), parts=st.integers(1, 9), dim=st.sampled_from([8, 24, 80]),
       sinks=st.booleans())  # fmt: skip
def test_4_any_number_of_parts_merges_as_the_twin_says(seed, parts, dim, sinks):
    generator = torch.Generator().manual_seed(seed)
    outs = [torch.randn(5, 3, dim, generator=generator) for _ in range(parts)]
    lses = [6 * torch.randn(5, 3, generator=generator) for _ in range(parts)]
    for part, lse in zip(outs, lses, strict=True):
        lse[0, 1] = -torch.inf
        part[0, 1] = 0
    extra = torch.randn(3, generator=generator) if sinks else None
    wanted, total = reference.merge_states(outs, lses, sinks=extra)
    out, lse = merge_states(outs, lses, sinks=extra)
    torch.testing.assert_close(out.double(), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), total, atol=1e-5, rtol=1e-5)
    assert not wanted[0, 1].any()
    assert total[0, 1] == -torch.inf
    half = merge_states([x.half() for x in outs], lses, out=torch.empty(5, 3, dim).half())[0]
    assert half.dtype == torch.float16
