"""Laws of latent attention over pages: on Numba, or under TRITON_INTERPRET=1 on Triton.

The pages that no sequence owns are not mapped, and what is not owned on mapped ones is NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from paged import TRITON, ElasticCache, assert_close, bitwise, few, owned, slots_of

from kvcached.errors import InvalidInput
from kvcached.kernels import (
    concat_and_cache_mla,
    merge_state,
    mla_with_kvcache,
    reference,
    reshape_and_cache,
)
from kvcached.kernels.mla import attend_mla, check_mla, merge_constants
from kvcached.kernels.quant import dequantize, quantize
from kvcached.layout import cdiv

DTYPES = [torch.float32, torch.float16, torch.bfloat16, *([] if TRITON else [torch.float64])]
STORED = [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8]
DESCALE = torch.tensor(0.02)
"""Of quantised latents; some of int8 are cut off at the limit."""
SPLITS = st.sampled_from([1, 2, 4, 16])


@dataclass(frozen=True)
class Latents:
    """Sequences of ``lens`` latent rows, of each of which the last ``queries`` tokens ask."""

    seed: int
    dtype: torch.dtype
    block_size: int
    heads: int
    dim: int
    dim_v: int
    lens: tuple[int, ...]
    queries: int
    scale: float = 0.1
    causal: bool = True
    config: dict = field(default_factory=dict)
    stored: torch.dtype | None = None

    @property
    def descale(self):
        return None if self.stored is None else DESCALE

    def random(self, *shape, salt):
        generator = torch.Generator().manual_seed(self.seed + salt)
        return torch.randn(*shape, generator=generator).to(self.dtype)

    def rows(self):
        """(q ``[T, H, D]``, a list of latent rows ``[L, D]``: of quantised ones what they mean)."""
        q = self.random(len(self.lens) * self.queries, self.heads, self.dim, salt=0)
        rows = [self.random(n, self.dim, salt=i + 1) for i, n in enumerate(self.lens)]
        if self.stored is not None:
            rows = [dequantize(quantize(x[:, None], DESCALE, self.stored), DESCALE)[:, 0]
                    for x in rows]  # fmt: skip
        return q, rows

    def table(self, placement=0):
        counts = [cdiv(n, self.block_size) for n in self.lens]
        generator = torch.Generator().manual_seed(self.seed * 7 + placement)
        ids = (torch.randperm(4000, generator=generator)[: sum(counts)] + 1).int()
        table = torch.full((len(counts), max([*counts, 1])), -(2**31), dtype=torch.int32)
        for row, part in zip(table, ids.split(counts), strict=True):
            row[: len(part)] = part
        return table


def solve(case, *, rows=None, placement=0, splits=1, fill=0xFF):
    """(out, lse) from latents at ``placement``: in the K part of a cache without any V of use."""
    q, latents = rows or case.rows()
    table = case.table(placement)
    sizes = {"block_size": case.block_size, "heads": 1, "dim": case.dim, "dim_v": 2}
    with ElasticCache(owned(table), fill=fill, dtype=case.stored or case.dtype, **sizes) as cache:
        slots = slots_of(table, case.lens, case.block_size)
        write(case, torch.cat(latents), cache, slots)
        lens = torch.tensor(case.lens, dtype=torch.int32)
        out = torch.full((*q.shape[:2], case.dim_v), torch.nan, dtype=q.dtype)
        arguments = (q, cache.k[:, :, 0], table, lens, case.dim_v)
        if not TRITON:
            return mla_with_kvcache(
                *arguments, softmax_scale=case.scale, causal=case.causal, out=out,
                kv_descale=case.descale,
            )  # fmt: skip
        call = check_mla(*arguments, case.scale, causal=case.causal, kv_descale=case.descale,
                         out=out)  # fmt: skip
        attend_mla(call, splits, case.config)
        return call.out, call.lse


def write(case, rows, cache, slots):
    """Latents to their slots, quantised on the way if the cache is."""
    if case.stored is None:
        reshape_and_cache(rows[:, None], rows[:, None, :2], cache.k, cache.v, slots)
        return
    concat_and_cache_mla(rows[:, :-8], rows[:, -8:], cache.k[:, :, 0], slots, scale=DESCALE)


def expect(case, rows=None):
    """(out, lse) in float64, of latents that lie one after another in blocks of one."""
    q, latents = rows or case.rows()
    lens = torch.tensor([len(part) for part in latents])
    table = (lens.cumsum(0) - lens)[:, None] + torch.arange(max(lens))
    return reference.mla_with_kvcache(
        q, torch.cat(latents)[:, None], table, lens, case.dim_v, softmax_scale=case.scale,
        causal=case.causal,
    )  # fmt: skip


@st.composite
def latents(draw, most=2):
    length = st.one_of(st.sampled_from([0, 1, 15, 16, 17, 33]), st.integers(0, 60))
    dtype = draw(st.sampled_from(DTYPES))
    stored = draw(st.sampled_from([None, *(STORED if dtype != torch.float64 else [])]))
    dim_v = draw(st.sampled_from([16, 32] if stored is None else [32, 64]))
    return Latents(
        seed=draw(st.integers(0, 2**20)), dtype=dtype, stored=stored,
        block_size=draw(st.sampled_from([1, 5, 16, 64])),
        heads=draw(st.sampled_from([1, 3, 16, 20])),
        dim=dim_v + draw(st.sampled_from([0, 8, 16])), dim_v=dim_v,
        lens=tuple(draw(st.lists(length, min_size=1, max_size=most))),
        queries=draw(st.sampled_from([1, 1, 2, 5])),
        scale=draw(st.sampled_from([0.1, 0.3, -0.2, 0.0])), causal=draw(st.booleans()),
        config={"BN": 16, "BM": draw(st.sampled_from([16, 32]))},
    )  # fmt: skip


@few(120)
@given(case=latents(), splits=SPLITS)
def test_5_it_equals_its_float64_twin(case, splits):
    assert_close(case, solve(case, splits=splits), expect(case))


@few(40)
@given(case=latents())
def test_1_where_the_blocks_lie_makes_no_difference(case):
    assert bitwise(solve(case, placement=0), solve(case, placement=1))


@few(40)
@given(case=latents())
def test_2_the_block_size_makes_no_difference(case):
    first, *others = [solve(replace(case, block_size=size)) for size in (1, 5, 64)]
    assert all(bitwise(first, other) for other in others)


@pytest.mark.skipif(not TRITON, reason="only the Triton kernel splits the keys")
@few(30)
@given(case=latents(most=1), splits=st.sampled_from([2, 8, 16]))
def test_3_splits_are_merged_in_a_fixed_order(case, splits):
    got = solve(case, splits=splits)
    assert_close(case, got, expect(case))
    assert bitwise(got, solve(case, splits=splits))


@few(40)
@given(case=latents(most=1), share=st.floats(0, 1))
def test_4_two_parts_merge_to_the_whole(case, share):
    case = replace(case, causal=False)
    q, (rows,) = case.rows()
    cut = int(len(rows) * share)
    halves = [solve(replace(case, lens=(len(part),)), rows=(q, [part]))
              for part in (rows[:cut], rows[cut:])]  # fmt: skip
    assert_close(case, merge_state(*halves[0], *halves[1]), expect(case), factor=2, floor=2e-6)


@few(40)
@given(case=latents(), splits=SPLITS)
def test_6_what_lies_in_unowned_slots_makes_no_difference(case, splits):
    assert bitwise(solve(case, splits=splits), solve(case, splits=splits, fill=0))


@few(40)
@given(case=latents(most=1))
def test_10_verifying_tokens_together_equals_one_at_a_time(case):
    case = replace(case, causal=True, queries=4, lens=(max(4, case.lens[0]),))
    q, (rows,) = case.rows()
    together = solve(case)
    for at in range(4):
        seen = len(rows) - 3 + at
        got = solve(replace(case, queries=1, lens=(seen,)), rows=(q[at : at + 1], [rows[:seen]]))
        assert_close(case, got, (together[0][at : at + 1], together[1][at : at + 1]), factor=2)


@pytest.mark.parametrize("stored", STORED, ids=str)
@few(20)
@given(case=latents(), splits=SPLITS)
def test_12_over_stored_bytes_it_is_that_over_what_they_mean(stored, case, splits):
    dtype = torch.float16 if case.dtype == torch.float64 else case.dtype
    case = replace(case, stored=stored, dtype=dtype, dim=case.dim + 32, dim_v=32)
    assert_close(case, solve(case, splits=splits), expect(case))


@pytest.mark.parametrize("heads", [16, 64, 128])
def test_14_the_sizes_of_deepseek_with_the_tiles_that_ship(heads):
    case = Latents(3, torch.float16, 64, heads, 576, 512, (70, 1), 1, scale=192**-0.5)
    for splits in (1, 2):
        assert_close(case, solve(case, splits=splits), expect(case))


@pytest.mark.parametrize(("heads", "tokens"), [(16, 1), (16, 2), (64, 1)])
@pytest.mark.parametrize("stored", STORED, ids=str)
def test_14_the_same_of_quantised_latents(stored, heads, tokens):
    """Tiles of 16, of 32 and of 64 rows; the last keep even and odd columns apart."""
    case = Latents(3, torch.float16, 64, heads, 576, 512, (70, 2), tokens, scale=192**-0.5,
                   stored=stored, config={} if heads < 64 else {"BM": 64, "BN": 32})  # fmt: skip
    for splits in (1, 2):
        assert_close(case, solve(case, splits=splits), expect(case))


def in_16_bits(parts, lse):
    """(partial, state) as warpgroups leave them: float16 beside a power of two for each half."""
    halves = parts.view(*parts.shape[:-1], 2, 256)
    power = ((halves.abs().amax(-1).view(torch.int32) >> 23) - 126).clamp(max=126)
    small = (halves * torch.exp2(-power.float())[..., None]).half()
    places = small.view(*lse.shape, 2, 8, 4, 4, 2).transpose(-2, -3)  # a thread's eight together
    state = torch.empty(*lse.shape, 2)
    state[..., 0] = lse
    state.view(torch.int16)[..., 2:] = power.short()
    return places.contiguous().view(torch.float32).flatten(), state.flatten()


@pytest.mark.skipif(not TRITON, reason="only the Triton kernels merge parts")
@few(20)
@given(seed=st.integers(0, 2**20), splits=st.sampled_from([4, 16]), size=st.floats(-30, 30),
       spread=st.floats(0, 6))  # fmt: skip
def test_3_parts_in_16_bits_merge_to_the_whole(seed, splits, size, spread):
    from kvcached.kernels._mla_merge import mla_merge_kernel

    generator = torch.Generator().manual_seed(seed)
    tokens, heads = 2, 3
    parts = torch.randn(tokens, heads, splits, 512, generator=generator) * 10.0**size
    parts *= 10 ** torch.linspace(-spread, spread, splits)[:, None]
    lse = 3 * torch.randn(tokens, heads, splits, generator=generator)
    lse[0, 0], parts[0, 0] = -1.0e30, 0  # no split saw a key
    lse[1, 1, 2], parts[1, 1, 2] = -1.0e30, 0
    out, natural = torch.full((tokens, heads, 512), torch.nan), torch.empty(tokens, heads)
    mla_merge_kernel[(2, 4)](
        *in_16_bits(parts, lse), out, natural, tokens * heads, heads, *out.stride()[:2],
        **merge_constants(512, splits) | {"ROWS": 4},
    )  # fmt: skip
    weights = torch.softmax(lse.double() * math.log(2), -1)[..., None]
    want = (weights * parts.double()).sum(2)
    bound = (weights * parts.double().abs().amax(-1, keepdim=True)).sum(2) * 2.0**-11
    assert ((out - want).abs() <= bound + 1e-6 * want.abs()).all()
    assert natural[0, 0] == -math.inf
    assert not out[0, 0].any()
    seen = torch.logsumexp(lse.double() * math.log(2), -1).flatten()[1:]
    assert (natural.flatten()[1:] - seen).abs().max() < 1e-5


def test_scores_and_values_are_those_of_the_scale_and_of_no_other():
    q, rows = torch.ones(1, 1, 34), torch.ones(2, 34).to(torch.int8)
    rows[1] = 2
    given = (q, rows[None], torch.zeros(1, 1).int(), torch.tensor([2]).int(), 32)
    for scale in (torch.tensor(0.5), torch.tensor([0.125])):
        if TRITON:
            call = check_mla(*given, 0.1, kv_descale=scale)
            attend_mla(call)
            out, lse = call.out, call.lse
        else:
            out, lse = mla_with_kvcache(*given, softmax_scale=0.1, kv_descale=scale)
        scores = torch.tensor([3.4, 6.8]).double() * float(scale)
        want = float(scale) * (torch.softmax(scores, 0) * torch.tensor([1, 2])).sum()
        assert (out.double() - want).abs().max() < 1e-6
        assert float(lse) == pytest.approx(float(torch.logsumexp(scores, 0)), abs=1e-5)


def _arguments(**changes):
    return {
        "q": torch.zeros(2, 4, 24), "kv_cache": torch.zeros(4, 16, 24),
        "page_table": torch.tensor([[1, 0], [2, 3]]).int(),
        "cache_seqlens": torch.tensor([3, 20]).int(), "head_dim_v": 16, "softmax_scale": 0.1,
    } | changes  # fmt: skip


BAD = {
    "kv_cache must be": {"kv_cache": torch.zeros(4, 16, 1, 24)},
    "head_dim_v is 25": {"head_dim_v": 25},
    "softmax_scale is nan": {"softmax_scale": float("nan")},
    "q has 3 tokens": {"q": torch.zeros(3, 4, 24)},
    "q has head dim 16": {"q": torch.zeros(2, 4, 16)},
    "page_table has 1 rows": {"page_table": torch.tensor([[1, 2]]).int()},
    "int8 needs kv_descale": {"kv_cache": torch.zeros(4, 16, 24).char()},
    "float32 takes no kv_descale": {"kv_descale": torch.ones(())},
    "not stored as int4": {"kv_cache": torch.zeros(4, 16, 24).byte(), "kv_descale": torch.ones(())},
    r"of shape \(\) or \(1,\) on cpu, not torch.float32 \(2,\)": {
        "kv_cache": torch.zeros(4, 16, 24).char(),
        "kv_descale": torch.ones(2),
    },
    "kv_descale must be float32": {
        "kv_cache": torch.zeros(4, 16, 24).char(),
        "kv_descale": torch.ones((), dtype=torch.half),
    },
    "needs even head dims": {
        "kv_cache": torch.zeros(4, 16, 25).char(),
        "q": torch.zeros(2, 4, 25),
        "kv_descale": torch.ones(()),
    },
    "plan is a object, not what plan_mla": {"plan": object()},
}


@pytest.mark.parametrize("message", BAD)
def test_what_cannot_work_is_refused_by_name(message):
    with pytest.raises(InvalidInput, match=message):
        mla_with_kvcache(**_arguments(**BAD[message]))


@pytest.mark.skipif(not TRITON, reason="a limit of the Triton kernel")
def test_the_triton_kernel_says_what_it_does_not_take():
    call = check_mla(*list(_arguments().values())[:4], 16, 0.1)
    with pytest.raises(InvalidInput, match="num_splits is 3"):
        attend_mla(call, 3)
    odd = check_mla(*list(_arguments().values())[:4], 20, 0.1)
    with pytest.raises(InvalidInput, match="head_dim_v is 20"):
        attend_mla(odd)
    stored = _arguments(kv_cache=torch.zeros(4, 16, 24).char(), kv_descale=torch.ones(()))
    call = check_mla(*list(stored.values())[:4], 16, 0.1, kv_descale=stored["kv_descale"])
    with pytest.raises(InvalidInput, match="head_dim_v is 16, but must be a power of two >= 32"):
        attend_mla(call)
