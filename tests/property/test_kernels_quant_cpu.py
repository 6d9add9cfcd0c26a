"""Attention over quantised caches on the CPU: that over what the bytes mean (property 12)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from paged import (
    TRITON,
    ElasticCache,
    assert_close,
    cases,
    expect,
    few,
    lengths,
    owned,
    scales_of,
    slots_of,
)

from kvcached.kernels import attn_with_kvcache, gather_kv, reshape_and_cache
from kvcached.kernels.quant import INT4, LARGEST, dequantize

pytestmark = pytest.mark.skipif(TRITON, reason="the Triton kernels have laws of their own")


def options():
    return st.fixed_dictionaries({
        "causal": st.booleans(),
        "window_size": st.sampled_from([(-1, -1), (17, -1), (40, 3)]),
        "softcap": st.sampled_from([0.0, 5.0]),
    })  # fmt: skip


@st.composite
def quantised(draw):
    """(case, stored dtype, kind of scale); one dimension for keys and values, an even one."""
    case = draw(cases(options=options()))
    dtype = draw(st.sampled_from(list(LARGEST)))
    kind = "row" if dtype == INT4 else draw(st.sampled_from(["tensor", "head", "row"]))
    kept = torch.float32 if case.dtype == torch.float64 else case.dtype
    return replace(case, dim_v=case.dim, dtype=kept), dtype, kind


@few(80)
@given(made=quantised())
def test_12_attention_over_bytes_is_attention_over_what_they_mean(made):
    case, dtype, kind = made
    q, keys, values = case.rows()
    table = case.table()
    sizes = case.sizes() | {"dtype": dtype}
    if dtype == INT4:
        sizes |= {"dim": case.dim // 2, "dim_v": case.dim // 2}
    k_scale, v_scale = (scales_of(kind, case.heads, case.block_size) for _ in range(2))
    slots = slots_of(table, case.lens, case.block_size)
    starts = torch.tensor([0, *case.lens]).cumsum(0).int()
    with ElasticCache(owned(table), **sizes) as cache:
        reshape_and_cache(torch.cat(keys), torch.cat(values), cache.k, cache.v, slots, "auto",
                          k_scale, v_scale)  # fmt: skip
        outs = [torch.empty(sum(case.lens), *c.shape[2:], dtype=dtype) for c in (cache.k, cache.v)]
        gather_kv(cache.k, cache.v, table, starts, *outs)
        got = attn_with_kvcache(
            q, cache.k, cache.v, page_table=table, k_descale=k_scale, v_descale=v_scale,
            return_softmax_lse=True, **lengths(case), **case.options,
        )  # fmt: skip
    means = []
    for stored, scale in zip(outs, (k_scale, v_scale), strict=True):
        own = scale.flatten(0, 1)[slots.long()] if kind == "row" else scale
        means.append(dequantize(stored, own, torch.float64).split(case.lens))
    assert_close(case, got, expect(case, (q, *means)), factor=2)


@pytest.mark.parametrize("dtype", [d for d in LARGEST if d != INT4])
def test_every_byte_is_read_as_what_it_means(dtype):
    bytes_ = torch.arange(256, dtype=torch.uint8).reshape(1, 256, 1, 1).repeat(1, 1, 1, 2)
    stored, keys = bytes_.view(dtype), torch.zeros_like(bytes_).view(dtype)
    one, table = torch.ones(()), torch.zeros(1, 1, dtype=torch.int32)
    numbers = stored[0, :, 0, 0].float()
    for byte in range(256):  # a window of one token shows one value
        out = attn_with_kvcache(
            torch.zeros(1, 1, 2), keys, stored, cache_seqlens=torch.tensor([byte + 1]).int(),
            page_table=table, window_size=(0, 0), k_descale=one, v_descale=one,
        )  # fmt: skip
        assert torch.equal(out.flatten(), numbers[byte].expand(2)) or (
            out.isnan().all() and numbers[byte].isnan()
        )
