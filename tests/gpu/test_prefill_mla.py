"""Prefill, mixed batches and latent attention on a GPU, with the tiles that ship."""

from __future__ import annotations

import math

import pytest
import torch

from kvcached.kernels import (
    attn_with_kvcache,
    bind,
    concat_and_cache_mla,
    mla_with_kvcache,
    plan_mla,
    reference,
)
from kvcached.kernels.mla import attend_mla, check_mla
from kvcached.kernels.quant import dequantize, quantize
from kvcached.layout import cdiv

pytestmark = pytest.mark.gpu
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.fixture(autouse=True)
def a_device():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.manual_seed(0)


def paged(rows, block_size):
    """(cache ``[blocks, block_size, H, D]`` of NaN but for the rows, table) on the device."""
    counts = [cdiv(len(x), block_size) for x in rows]
    ids = torch.randperm(sum(counts) + 3)[: sum(counts)] + 1
    cache = torch.full((sum(counts) + 4, block_size, *rows[0].shape[1:]), math.nan).to(
        rows[0].dtype
    )
    table = torch.full((len(rows), max(counts)), -(2**31), dtype=torch.int32)
    for row, part, x in zip(table, ids.split(counts), rows, strict=True):
        row[: len(part)] = part.int()
        pos = torch.arange(len(x))
        cache[part[pos // block_size], pos % block_size] = x
    return cache.cuda(), table.cuda()


def expect(q, keys, values, queries, **options):
    parts = [reference.attend_rows(part, k, v, **options)
             for part, k, v in zip(q.split(queries), keys, values, strict=True)]  # fmt: skip
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])


def close(got, want, dtype):
    out, lse = (x.cpu().double() for x in got)
    assert (out - want[0]).abs().max() < TOLERANCE[dtype]
    empty = torch.isneginf(want[1])
    assert torch.equal(torch.isneginf(lse), empty)
    assert (lse - want[1])[~empty].abs().max() < 1e-3


PLAIN = {"causal": True, "window": (-1, -1), "softcap": 0.0, "slopes": None, "sinks": None}
EXTRAS = {"causal": True, "window": (77, -1), "softcap": 20.0, "slopes": 0.2, "sinks": 0.5}


def check_attention(dtype, dim, dim_v, *, lens, queries, block_size, heads=2, group=4, splits=0,
                    options=PLAIN):  # fmt: skip
    q = torch.randn(sum(queries), heads * group, dim).to(dtype)
    keys = [torch.randn(n, heads, dim).to(dtype) for n in lens]
    values = [torch.randn(n, heads, dim_v).to(dtype) for n in lens]
    options = options | {
        name: options[name]
        if options[name] is None
        else torch.full((heads * group,), options[name])
        for name in ("slopes", "sinks")
    }
    want = expect(q, keys, values, queries, scale=dim**-0.5, **options)
    (k, table), (v, _) = [
        (torch.manual_seed(1), paged(rows, block_size))[1] for rows in (keys, values)
    ]
    per_head = {name: None if options[name] is None else options[name].cuda()
                for name in ("slopes", "sinks")}  # fmt: skip
    got = [
        attn_with_kvcache(
            q.cuda(), k, v, page_table=table, cache_seqlens=torch.tensor(lens).int().cuda(),
            cu_seqlens_q=torch.tensor([0, *queries]).cumsum(0).int().cuda(),
            max_seqlen_q=max(queries), causal=options["causal"], window_size=options["window"],
            softcap=options["softcap"], alibi_slopes=per_head["slopes"], sinks=per_head["sinks"],
            num_splits=splits, return_softmax_lse=True,
        )
        for _ in range(3)
    ]  # fmt: skip
    close(got[0], want, dtype)
    for again in got[1:]:
        assert all(torch.equal(x, y) for x, y in zip(again, got[0], strict=True))


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 192, 256])
def test_prefill_of_every_head_dim(dim, dtype):
    check_attention(dtype, dim, dim, lens=(333, 700), queries=(333, 200), block_size=16)


@pytest.mark.parametrize("block_size", [1, 5, 16, 64, 256])
@pytest.mark.parametrize("options", [PLAIN, PLAIN | {"causal": False}, EXTRAS])
def test_prefill_of_every_block_size(block_size, options):
    check_attention(torch.bfloat16, 128, 128, lens=(1, 333, 700), queries=(1, 333, 200),
                    block_size=block_size, options=options)  # fmt: skip


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("splits", [1, 4, 5])
def test_a_mixed_batch_with_all_options_and_splits(dim, splits):
    check_attention(torch.bfloat16, dim, dim, lens=(900, 800, 1, 130, 17, 700),
                    queries=(1, 300, 1, 4, 17, 2), block_size=16, splits=splits,
                    options=EXTRAS)  # fmt: skip


@pytest.mark.parametrize("group", [1, 7, 8, 12, 32])
def test_prefill_of_every_group(group):
    check_attention(torch.bfloat16, 128, 128, lens=(400,), queries=(300,), block_size=16,
                    group=group)  # fmt: skip


def test_prefill_of_expanded_latents():
    check_attention(torch.bfloat16, 192, 128, lens=(400, 300), queries=(300, 300), block_size=64,
                    heads=8, group=1)  # fmt: skip


def check_latents(dtype, heads, tokens, *, lens, block_size=64, options=PLAIN, splits=0, size=1.0):
    q = torch.randn(len(lens) * tokens, heads, 576).to(dtype)
    rows = [(torch.randn(n, 1, 576) * size).to(dtype) for n in lens]
    scale = 192**-0.5 / size
    values = [x[..., :512] for x in rows]
    want = expect(q, rows, values, (tokens,) * len(lens), scale=scale, **options)
    cache, table = paged(rows, block_size)
    seqlens = torch.tensor(lens).int().cuda()

    def solve():
        call = check_mla(q.cuda(), cache[:, :, 0], table, seqlens, 512, scale,
                         causal=options["causal"])  # fmt: skip
        attend_mla(call, splits)
        return call.out, call.lse

    got = [solve() for _ in range(20)]
    close((got[0][0].double() / size, got[0][1]), (want[0] / size, want[1]), dtype)
    for again in got[1:]:
        assert all(torch.equal(x, y) for x, y in zip(again, got[0], strict=True))


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("heads", [16, 64, 128])
@pytest.mark.parametrize("tokens", [1, 3])
def test_latent_attention(heads, tokens, dtype):
    check_latents(dtype, heads, tokens, lens=(3, 900, 3000, 64))


@pytest.mark.parametrize("block_size", [1, 5, 16, 64, 256])
@pytest.mark.parametrize("splits", [1, 2, 8, 64])
def test_latent_attention_of_every_block_size_in_parts(splits, block_size):
    check_latents(torch.bfloat16, 20, 5, lens=(5, 900, 130, 63, 65), block_size=block_size,
                  splits=splits)  # fmt: skip


@pytest.mark.parametrize(("heads", "tokens"), [(16, 1), (16, 2), (12, 2), (5, 3)])
@pytest.mark.parametrize("splits", [1, 2, 8])
def test_latent_attention_of_few_rows(splits, heads, tokens):
    """Of up to 32 rows each has another one, for what rounding takes off its weights."""
    check_latents(torch.bfloat16, heads, tokens, lens=(3, 900, 2500, 64), splits=splits)


@pytest.mark.parametrize("splits", [1, 2, 4])
def test_latent_attention_of_all_tokens_and_of_none(splits):
    check_latents(torch.bfloat16, 128, 2, lens=(0, 300, 2), options=PLAIN | {"causal": False},
                  splits=splits)  # fmt: skip


@pytest.mark.parametrize("size", [1e-20, 1e20])
@pytest.mark.parametrize("splits", [2, 8])
def test_parts_of_latents_that_are_far_from_1(size, splits):
    check_latents(torch.bfloat16, 20, 3, lens=(900, 1500, 3), splits=splits, size=size)


def test_latent_attention_of_a_public_call_equals_that_of_a_graph():
    q, cache = torch.randn(8, 128, 576), torch.randn(8 * 16, 64, 576)
    table = torch.randperm(128).int().view(8, 16).cuda()
    lens = torch.tensor([1024, 1, 64, 65, 1000, 129, 900, 77]).int().cuda()
    arguments = (q.bfloat16().cuda(), cache.bfloat16().cuda(), table, lens)
    want = mla_with_kvcache(*arguments, softmax_scale=0.1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = mla_with_kvcache(*arguments, softmax_scale=0.1)
    for _ in range(3):
        [x.fill_(math.nan) for x in got]
        graph.replay()
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8], ids=str)
@pytest.mark.parametrize(("heads", "tokens"), [(16, 1), (16, 2), (128, 1), (20, 5)])
@pytest.mark.parametrize("block_size", [1, 16, 64])
def test_latent_attention_over_what_was_quantised(stored, heads, tokens, block_size):
    lens, scale = (tokens, 900, 3000, 64), torch.tensor(0.03)
    rows = [torch.randn(n, 1, 576) for n in lens]
    cache, table = paged([quantize(x, scale, stored).view(torch.uint8) for x in rows], block_size)
    cache = cache[:, :, 0]
    blocks = torch.full_like(cache, 255).view(stored)  # NaN in fp8 where nobody writes
    slots = [row[torch.arange(n) // block_size] * block_size + torch.arange(n) % block_size
             for row, n in zip(table.cpu(), lens, strict=True)]  # fmt: skip
    joined = torch.cat(rows)[:, 0].cuda()
    concat_and_cache_mla(joined[:, :512], joined[:, 512:], blocks, torch.cat(slots).int().cuda(),
                         scale=scale.cuda())  # fmt: skip
    q = torch.randn(len(lens) * tokens, heads, 576).bfloat16()
    keys = [dequantize(quantize(x, scale, stored), scale) for x in rows]
    want = expect(q, keys, [x[..., :512] for x in keys], (tokens,) * len(lens), scale=192**-0.5,
                  **PLAIN)  # fmt: skip
    given = (q.cuda(), blocks, table, torch.tensor(lens).int().cuda())
    options = {"softmax_scale": 192**-0.5, "kv_descale": scale.cuda()}
    got = [tuple(mla_with_kvcache(*given, **options)) for _ in range(20)]
    close(got[0], want, torch.bfloat16)
    plan = plan_mla(len(lens), heads, max_q=tokens)
    bound = bind(mla_with_kvcache, *given, **options, plan=plan)
    got += [bound() for _ in range(2)]
    got.append(mla_with_kvcache(*given, **options, plan=plan))
    for again in got[1:]:
        assert all(torch.equal(x, y) for x, y in zip(again, got[0], strict=True))
