"""The float64 twins: one for each public call, and right where something else can tell."""

from __future__ import annotations

import inspect

import pytest
import torch

from kvcached import kernels
from kvcached.kernels import reference
from kvcached.kernels.quant import quantize, row_scales

NOT_OF_RESULTS = {"out", "out_k", "out_v", "num_splits", "plan", "return_softmax_lse"}
"""Arguments that decide where results go and how they are made."""
MAKE_NOTHING = {"BoundCall", "bind", "KVView", "Level", "MlaPlan", "Plan", "plan_attention",
                "plan_mla", "ops", "reference"}  # fmt: skip
COMPUTE = sorted(set(kernels.__all__) - MAKE_NOTHING)


@pytest.mark.parametrize("name", COMPUTE)
def test_every_public_call_has_a_twin_with_its_arguments(name):
    call, twin = (
        inspect.signature(getattr(home, name)).parameters for home in (kernels, reference)
    )
    own = [p for p in call.values() if p.name not in NOT_OF_RESULTS]
    theirs = list(twin.values())
    assert [(p.name, p.kind, p.default) for p in theirs] == [
        (p.name, p.kind, p.default) for p in own
    ]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("paged", [True, False])
def test_attention_is_torchs(causal, paged):
    torch.manual_seed(0)
    q = torch.randn(7, 4, 8)
    cache = torch.randn(6, 4, 2, 8), torch.randn(6, 4, 2, 8)
    places = {"page_table": torch.tensor([[5, 0, 3], [1, 4, 2]])} if paged else {
        "cache_start": torch.tensor([2, 12])}  # fmt: skip
    out, lse = reference.attn_with_kvcache(
        q, *cache, cache_seqlens=torch.tensor([10, 3]), cu_seqlens_q=torch.tensor([0, 4, 7]),
        causal=causal, **places,
    )  # fmt: skip
    slots = ([20, 21, 22, 23, 0, 1, 2, 3, 12, 13], [4, 5, 6]) if paged else (
        range(2, 12), range(12, 15))  # fmt: skip
    for part, own in ((slice(0, 4), slots[0]), (slice(4, 7), slots[1])):
        k, v = (x.flatten(0, 1)[list(own)].double().transpose(0, 1) for x in cache)
        count, length = part.stop - part.start, len(own)
        seen = torch.ones(count, length, dtype=torch.bool).tril(length - count)
        want = torch.nn.functional.scaled_dot_product_attention(
            q[part].double().transpose(0, 1), k, v, enable_gqa=True,
            attn_mask=seen if causal else None,
        ).transpose(0, 1)  # fmt: skip
        torch.testing.assert_close(out[part], want)
    assert lse.shape == (7, 4)
    assert lse.dtype == torch.float64


def test_new_keys_are_written_behind_those_that_are_there():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 8), torch.randn(3, 1, 8), torch.randn(3, 1, 8)
    caches = torch.randn(4, 2, 1, 8), torch.randn(4, 2, 1, 8)
    table, before = torch.tensor([[3, 0], [1, 2]]), torch.tensor([3, 0])
    starts = torch.tensor([0, 1, 3])
    old = [cache.clone() for cache in caches]
    got = reference.attn_with_kvcache(
        q, *caches, k, v, cache_seqlens=before, page_table=table, cu_seqlens_q=starts
    )
    for cache, was, rows in zip(caches, old, (k, v), strict=True):
        was.flatten(0, 1)[[1, 2, 3]] = rows
        assert torch.equal(cache, was)
    after = before + starts.diff()
    again = reference.attn_with_kvcache(
        q, *caches, cache_seqlens=after, page_table=table, cu_seqlens_q=starts
    )
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


def test_quantised_rows_count_as_what_they_mean():
    torch.manual_seed(0)
    rows = torch.randn(3, 4, 2, 8)
    scale = row_scales(rows, torch.int8)
    stored, table = quantize(rows, scale, torch.int8), torch.tensor([[2, 0]])
    options = {"cache_seqlens": torch.tensor([6]), "page_table": table}
    q = torch.randn(1, 2, 8)
    got, _ = reference.attn_with_kvcache(
        q, stored, stored, k_descale=scale, v_descale=scale, **options
    )
    means = stored.double() * scale.double()[..., None]
    torch.testing.assert_close(got, reference.attn_with_kvcache(q, means, means, **options)[0])


def test_latents_are_keys_and_their_front_values():
    torch.manual_seed(0)
    q, latents = torch.randn(2, 3, 8), torch.randn(2, 4, 8)
    got, lse = reference.mla_with_kvcache(
        q, latents, torch.tensor([[1, 0]]), torch.tensor([5]), 6, softmax_scale=0.3
    )
    rows = torch.cat([latents[1], latents[0, :1]]).double()
    for token, seen in ((0, 4), (1, 5)):
        scores = q[token].double() @ rows[:seen].T * 0.3
        torch.testing.assert_close(got[token], scores.softmax(-1) @ rows[:seen, :6])
        torch.testing.assert_close(lse[token], scores.logsumexp(-1))
    scale = torch.tensor([0.02])
    stored = quantize(latents, scale.reshape(()), torch.int8)
    options = (torch.tensor([[1, 0]]), torch.tensor([5]), 6)
    got = reference.mla_with_kvcache(q, stored, *options, softmax_scale=0.3, kv_descale=scale)
    means = reference.mla_with_kvcache(
        q, stored.double() * scale.double(), *options, softmax_scale=0.3
    )
    torch.testing.assert_close(got, means)


@pytest.mark.parametrize("causal", [True, False])
def test_a_cascade_is_attention_over_the_tokens_of_all_levels(causal):
    torch.manual_seed(0)
    q, k, v = torch.randn(4, 2, 8), torch.randn(8, 2, 1, 8), torch.randn(8, 2, 1, 8)
    levels = [
        kernels.Level(torch.tensor([[7, 3]]), torch.tensor([3]), max_seqlen_q=4),
        kernels.Level(torch.tensor([[0, 1], [2, 5]]), torch.tensor([4, 2]), max_seqlen_q=2),
    ]
    got = reference.cascade_attention(q, k, v, levels, causal=causal)
    for request, blocks in enumerate(([7, 3, 0, 1], [7, 3, 2])):
        part = slice(2 * request, 2 * request + 2)
        # A block of its own for what is shared would end amid a block: rows one after another.
        kept = [0, 1, 2, *range(4, 8)][: 3 + (4, 2)[request]]
        rows = [x[blocks].flatten(0, 1)[kept][:, None] for x in (k, v)]
        want = reference.attn_with_kvcache(
            q[part], *rows, cache_seqlens=torch.tensor([len(kept)]), max_seqlen_q=2,
            cache_start=torch.tensor([0]), causal=causal,
        )  # fmt: skip
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a[part], b)
