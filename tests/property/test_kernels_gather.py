"""Laws of gathering what the rows of a quantised cache mean (properties 11 and 12)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from paged import NUM_BLOCKS, TRITON, ElasticCache, cases, few, owned, slots_of

from kvcached.kernels import gather, gather_kv, quant
from kvcached.kernels import reference as twins
from kvcached.kernels.quant import INT4, LARGEST

OUTPUTS = [torch.float32, torch.float16, *([] if TRITON else [torch.bfloat16])]


@pytest.fixture(autouse=True, scope="module")
def backend():
    """Triton's interpreter works on CPU tensors."""
    with pytest.MonkeyPatch.context() as patch:
        if TRITON:
            patch.setattr(gather, "_on_gpu", lambda _: True)
        yield


@st.composite
def stored(draw):
    """(case, stored dtype, kind of scale, dtype of the output); even dims, which int4 needs."""
    case = draw(cases())
    dtype = draw(st.sampled_from(list(LARGEST)))
    kind = "row" if dtype == INT4 else draw(st.sampled_from(["tensor", "head", "row"]))
    even = replace(case, dim=case.dim // 2 * 2 or 2, dim_v=case.dim_v // 2 * 2 or 2)
    return even, dtype, kind, draw(st.sampled_from(OUTPUTS))


def random_bytes(case, dtype):
    """K and V as any bytes that mean a number."""
    rows, generator = [], torch.Generator().manual_seed(case.seed)
    for dim in (case.dim, case.dim_v):
        width = dim // (2 if dtype == INT4 else 1)
        shape = (sum(case.lens), case.heads, width)
        values = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        if dtype not in (INT4, torch.int8):
            values[~values.view(dtype).float().isfinite()] = 0
        rows.append(values.view(dtype))
    return rows


def scale_of(case, kind):
    generator = torch.Generator().manual_seed(case.seed + 5)
    shape = {"tensor": (), "head": (case.heads,), "row": (sum(case.lens), case.heads)}[kind]
    return 0.001 + torch.rand(shape, generator=generator) / 2.1  # so that fp16 holds the products


def placed(scale, slots, case):
    """A scale of rows where the rows are; NaN everywhere else."""
    if scale.dim() < 2:
        return scale
    cache = torch.full((NUM_BLOCKS, case.block_size, case.heads), torch.nan)
    cache.flatten(0, 1)[slots.long()] = scale
    return cache


@few(80)
@given(made=stored(), apart=st.booleans())
def test_12_what_is_gathered_is_what_the_bytes_mean(made, apart):
    case, dtype, kind, to = made
    table = case.table()
    slots = slots_of(table, case.lens, case.block_size)
    starts = torch.tensor([0, *case.lens]).cumsum(0).int()
    sides, scale = random_bytes(case, dtype), scale_of(case, kind)
    pack = 2 if dtype == INT4 else 1
    sizes = case.sizes() | {"dtype": dtype, "dim": case.dim // pack, "dim_v": case.dim_v // pack}
    with ElasticCache(owned(table), **sizes) as cache:
        for rows, pool in zip(sides, (cache.k, cache.v), strict=True):
            for at, slot in enumerate(slots.tolist()):
                pool[slot // case.block_size, slot % case.block_size] = rows[at]
        scales = [placed(factor * scale, slots, case) for factor in (1, 2)]
        gap = 3 if apart else 0  # rows and heads of the output need not lie side by side
        outs = [torch.full((len(slots) + gap, case.heads + gap, dim), torch.nan, dtype=to)
                [: len(slots), : case.heads] for dim in (case.dim, case.dim_v)]  # fmt: skip
        got = gather_kv(cache.k, cache.v, table, starts, *outs, *scales)
        exact = twins.gather_kv(cache.k, cache.v, table, starts, *scales)
    for out, rows, factor, wanted in zip(got, sides, (1, 2), exact, strict=True):
        means = quant.dequantize(rows, factor * scale).to(to)
        assert torch.equal(out, means)
        step = {torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-8}[to]
        inside = wanted.abs() < torch.finfo(to).max
        assert ((out.double() - wanted).abs()[inside] <= step * wanted.abs()[inside] + 2**-24).all()


@pytest.mark.parametrize("dtype", [d for d in LARGEST if d != INT4])
def test_every_byte_means_what_its_dtype_says(dtype):
    pool = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 2, 8).view(dtype)
    outs = [torch.empty(16, 2, 8) for _ in "kv"]
    table, starts = torch.zeros(1, 1).int(), torch.tensor([0, 16]).int()
    got, _ = gather_kv(pool, pool, table, starts, *outs, torch.ones(()), torch.ones(()))
    means = pool[0].float()
    finite = means.isfinite()
    assert torch.equal(got[finite], means[finite])
    if not TRITON:  # its interpreter knows neither infinities nor NaN of these types
        assert torch.equal(got.isnan(), means.isnan())
        assert torch.equal(got.isinf(), means.isinf())


def test_rows_behind_the_last_sequence_are_left_as_they_were():
    pool = torch.ones(4, 16, 2, 8).to(torch.int8)
    outs = [torch.full((9, 2, 8), torch.nan) for _ in "kv"]
    table, starts = torch.tensor([[2], [1]]).int(), torch.tensor([0, 3, 7]).int()
    scales = torch.tensor(2.0), torch.tensor(3.0)
    if TRITON:  # as on a GPU, where lengths are not read
        from kvcached.kernels._gather_triton import gather_wide

        gather_wide(pool, pool, *scales, table, starts, *outs)
    else:
        gather_kv(pool, pool, table, starts, *(out[:7] for out in outs), *scales)
    for out, value in zip(outs, (2, 3), strict=True):
        assert (out[:7] == value).all()
        assert out[7:].isnan().all()
