"""Prefill by TMA on a Hopper GPU: every shape that takes it, beside unmapped and unowned memory."""

from __future__ import annotations

import math

import pytest
import torch

from kvcached.kernels import _prefill_tma, attn_with_kvcache, prefill, reference
from kvcached.kernels._launch import runs_gluon
from kvcached.layout import cdiv

pytestmark = pytest.mark.gpu
BF16, FP16 = torch.bfloat16, torch.float16
TOLERANCE = {FP16: 2e-3, BF16: 1.6e-2}
RAGGED = {"lens": (1000, 37, 513, 2048, 128, 0, 1), "queries": (1000, 37, 100, 7, 128, 3, 1)}
EVEN = {"lens": (777, 1024, 512), "queries": (256, 256, 256)}

PADDED = {"lens": (5, 1024, 0, 300), "queries": (1024, 1024, 1024, 1024)}


@pytest.fixture(autouse=True)
def taken(monkeypatch):
    """Calls that took the kernel, without those that a stream has seen before."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if not runs_gluon(torch.device("cuda", torch.cuda.current_device())):
        pytest.skip("the kernel is for sm_90 and Triton 3.6")
    torch.manual_seed(0)
    calls, prepare = [], _prefill_tma.prepare_tma

    def noted(call, memory):
        calls.append(call)
        return prepare(call, memory)

    monkeypatch.setattr(prefill, "prepare_tma", noted)
    monkeypatch.setattr(_prefill_tma, "FULL_ROWS", 0)
    monkeypatch.setattr(_prefill_tma, "SHORT_QUERIES", 0)
    return calls


def placed(rows, block_size, slots, blocks):
    """A cache of NaN but for the rows, with a gap before every block, as between layers."""
    gapped = torch.full((blocks, 2, block_size, *rows[0].shape[1:]), math.nan, dtype=rows[0].dtype)
    for x, at in zip(rows, slots, strict=True):
        gapped[at // block_size, 1, at % block_size] = x
    return gapped.cuda()[:, 1]


def check(taken, dtype=BF16, dim=128, dim_v=None, *, lens, queries, heads=2, group=4,
          block_size=16, causal=True, sinks=False, runs=3):  # fmt: skip
    dim_v = dim_v or dim
    q = torch.randn(sum(queries), heads * group, dim).to(dtype)
    keys = [torch.randn(n, heads, dim).to(dtype) for n in lens]
    values = [torch.randn(n, heads, dim_v).to(dtype) for n in lens]
    counts = [cdiv(n, block_size) for n in lens]
    blocks = sum(counts) + 4
    ids = torch.randperm(blocks - 1)[: sum(counts)] + 1
    table = torch.full((len(lens), max(counts) + 2), 1 << 29, dtype=torch.int32)
    slots = []
    for row, part, n in zip(table, ids.split(counts), lens, strict=True):
        row[: len(part)] = part.int()
        pos = torch.arange(n)
        slots.append(part[pos // block_size] * block_size + pos % block_size)
    k, v = (placed(rows, block_size, slots, blocks) for rows in (keys, values))
    sink = torch.randn(heads * group) if sinks else None
    parts = [
        reference.attend_rows(part, a, b, causal=causal, window=(-1, -1), softcap=0.0, slopes=None,
                              sinks=sink, scale=dim**-0.5)
        for part, a, b in zip(q.split(queries), keys, values, strict=True)
    ]  # fmt: skip
    want, want_lse = (torch.cat(x) for x in zip(*parts, strict=True))
    even = len(set(queries)) == 1
    first = None
    for _ in range(runs):
        out = torch.full((*q.shape[:2], dim_v), math.nan, dtype=dtype, device="cuda")
        got, lse = attn_with_kvcache(
            q.cuda(), k, v, page_table=table.cuda(), out=out,
            cache_seqlens=torch.tensor(lens).int().cuda(),
            cu_seqlens_q=None if even else torch.tensor([0, *queries]).cumsum(0).int().cuda(),
            max_seqlen_q=max(queries), causal=causal, sinks=sink.cuda() if sinks else None,
            return_softmax_lse=True, num_splits=1,
        )  # fmt: skip
        first = first or (got, lse)
        assert torch.equal(got, first[0])
        assert torch.equal(lse, first[1])
    assert taken, "another kernel served the call"
    assert (first[0].cpu().double() - want).abs().max() < TOLERANCE[dtype]
    seen = ~torch.isneginf(want_lse)
    assert torch.equal(~torch.isneginf(first[1].cpu()), seen)
    assert (first[1].cpu().double() - want_lse)[seen].abs().max() < 1e-3


@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128), (256, 256)], ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_every_head_dim(taken, dims, dtype, causal):
    check(taken, dtype, *dims, causal=causal, **RAGGED)


@pytest.mark.parametrize("dims", [(64, 64), (128, 128)], ids=str)
def test_queries_in_front_of_short_prompts_see_nothing(taken, dims):
    """As a batch that is padded in front has them."""
    check(taken, BF16, *dims, **PADDED)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("shape", [EVEN, RAGGED, PADDED], ids=["even", "ragged", "padded"])
def test_short_prompts(taken, monkeypatch, dtype, shape):
    monkeypatch.setattr(_prefill_tma, "SHORT_QUERIES", 1 << 20)
    check(taken, dtype, sinks=True, **shape)


@pytest.mark.parametrize("block_size", [16, 32, 48, 64, 128, 256, 384])
def test_every_block_size(taken, block_size):
    check(taken, block_size=block_size, **RAGGED)


@pytest.mark.parametrize("group", [1, 2, 3, 7, 8, 32])
@pytest.mark.parametrize("shape", [EVEN, RAGGED], ids=["even", "ragged"])
def test_every_group(taken, group, shape):
    check(taken, group=group, sinks=True, **shape)


@pytest.mark.parametrize("ends", range(120, 137))
def test_every_end_of_a_tile(taken, ends):
    check(taken, lens=(ends, 128 + ends), queries=(ends, 40), runs=1)


def test_more_items_than_programs(taken):
    lens = tuple(torch.randint(100, 900, (60,)).tolist())
    check(taken, lens=lens, queries=tuple(max(1, n // 2) for n in lens), heads=8, runs=2)


def test_a_prompt_among_many_that_decode(taken, monkeypatch):
    """Tiles are taken from both ends of the batch, and most have rows for one warpgroup only."""
    monkeypatch.setattr(_prefill_tma, "is_mixed", lambda _call: True)
    lens = (900, *torch.randint(1, 900, (60,)).tolist(), 700)
    check(taken, lens=lens, queries=(500, *[1] * 60, 33), heads=8, runs=20)


def test_other_calls_take_the_other_kernel(taken):
    q = torch.randn(512, 8, 128, device="cuda").bfloat16()
    cache = torch.randn(33, 16, 2, 128, device="cuda").bfloat16()
    call = {"page_table": torch.arange(1, 33, device="cuda").int()[None], "max_seqlen_q": 512,
            "num_splits": 1, "cache_seqlens": torch.tensor([512], device="cuda").int()}  # fmt: skip
    plain = attn_with_kvcache(q, cache, cache, **call)
    assert len(taken) == 1
    for other in ({"window_size": (600, 0)}, {"softcap": 1e4}):
        got = attn_with_kvcache(q, cache, cache, **call, **other)
        assert (got - plain).abs().max() < 2e-2
    assert len(taken) == 1


def test_unmapped_memory_around_the_blocks_is_not_touched(taken):
    """Neither the base, nor blocks behind a sequence's last, nor entries behind its end."""
    from kvcached import CacheSpec, KVCache
    from kvcached.broker.budget import LocalBudget

    spec = CacheSpec(4, 2, 128, "bfloat16", block_size=16)
    with KVCache(spec, device="cuda", max_tokens=1 << 20, budget=LocalBudget(4 << 30)) as cache:
        lens, gaps, sequences = [1000, 333, 129], [], []
        for n in lens:
            gaps.append(cache.new_sequence())
            cache.extend(gaps[-1], 5000)
            sequences.append(cache.new_sequence())
            cache.extend(sequences[-1], n)
        missing = gaps[0].block_ids[len(gaps[0].block_ids) // 2]
        for gap in gaps:
            cache.free(gap)
        torch.cuda.synchronize()
        cache.trim()
        k, v = cache.layer(2)
        rows = []
        for sequence, n in zip(sequences, lens, strict=True):
            new = torch.randn(2, n, 2, 128, device="cuda").bfloat16()
            ids = torch.tensor(sequence.block_ids, device="cuda")
            pos = torch.arange(n, device="cuda")
            k[ids[pos // 16], pos % 16], v[ids[pos // 16], pos % 16] = new[0], new[1]
            rows.append(new)
        table = torch.full((3, 70), 1 << 29, dtype=torch.int32)
        for row, sequence in zip(table, sequences, strict=True):
            row[: len(sequence.block_ids)] = torch.tensor(sequence.block_ids) - missing
        q = torch.randn(sum(lens), 8, 128, device="cuda").bfloat16()
        out = attn_with_kvcache(
            q, k[missing:], v[missing:], page_table=table.cuda(), max_seqlen_q=max(lens),
            num_splits=1,
            cache_seqlens=torch.tensor(lens, device="cuda").int(),
            cu_seqlens_q=torch.tensor([0, *lens], device="cuda").cumsum(0).int(),
        )  # fmt: skip
        assert len(taken) == 1
        for part, got, new in zip(q.split(lens), out.split(lens), rows, strict=True):
            want, _ = reference.attend_rows(
                part.cpu(), new[0].cpu(), new[1].cpu(), causal=True, window=(-1, -1), softcap=0.0,
                slopes=None, sinks=None, scale=128**-0.5,
            )  # fmt: skip
            assert (got.cpu().double() - want).abs().max() < TOLERANCE[BF16]
