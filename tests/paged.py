"""Paged caches on elastically mapped host pages, for the tests of the kernels.

Only the pages under the blocks in use are mapped; their neighbours fault when touched. Every byte
of a mapped page that no sequence owns is 0xFF, which is a NaN in each dtype.

``TRITON_INTERPRET=1`` makes the same tests run the Triton kernels instead of the Numba ones.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass, field, replace

import torch
from hypothesis import settings
from hypothesis import strategies as st

from kvcached.kernels import attn_with_kvcache, reference, reshape_and_cache
from kvcached.kernels.checks import check_call, check_places
from kvcached.layout import CacheSpec, Geometry, cdiv
from kvcached.memory.host import HostBackend
from kvcached.memory.views import layer_views

TRITON = os.environ.get("TRITON_INTERPRET") == "1"
PAGE_BYTES = 4096
NUM_BLOCKS = 5000
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DTYPES = [torch.float32, torch.float16, torch.bfloat16, *([] if TRITON else [torch.float64])]


def few(count: int) -> settings:
    """At most ``count`` examples (a tenth in the slow interpreter), but all that nightly asks."""
    wanted = settings.default.max_examples
    return settings(
        max_examples=wanted if wanted > 1000 else max(8, count // 10) if TRITON else count
    )


def with_threads(run, *counts):
    """What ``run`` gives with each of these numbers of threads."""
    before, found = torch.get_num_threads(), []
    try:
        for count in counts:
            torch.set_num_threads(count)
            found.append(run())
    finally:
        torch.set_num_threads(before)
    return found


class ElasticCache:
    """Layer 1 of a two-layer cache in which only some blocks are mapped. A context manager."""

    def __init__(self, blocks, *, block_size, heads, dim, dim_v, dtype, fill=0xFF):
        name = str(dtype).removeprefix("torch.")
        spec = CacheSpec(2, heads, dim, name, block_size=block_size, head_dim_v=dim_v)
        self.backend = HostBackend(PAGE_BYTES, capacity_bytes=1 << 30)
        geometry = Geometry.of(spec, page_bytes=PAGE_BYTES, num_blocks=NUM_BLOCKS)
        self.range = self.backend.reserve(geometry.reserved_bytes)
        pages = sorted({page for block in blocks for page in geometry.pages_of(block)})
        self.mapped = {page: self.backend.create(1) for page in pages}
        for page, handle in self.mapped.items():
            self.backend.map(self.range, page, handle)
            ctypes.memset(self.range.address + page * PAGE_BYTES, fill, PAGE_BYTES)
        self.k, self.v = layer_views(spec, geometry, self.range.address, "cpu", 1)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for page, handle in self.mapped.items():
            self.backend.unmap(self.range, page, handle)
            self.backend.release(handle)
        self.backend.close(self.range)
        self.backend.shutdown()


@dataclass(frozen=True)
class Case:
    """Sequences of ``lens`` tokens, the last ``queries`` of which ask. Nothing is placed yet."""

    seed: int
    dtype: torch.dtype
    block_size: int
    heads: int
    group: int
    dim: int
    dim_v: int
    lens: tuple[int, ...]
    queries: tuple[int, ...]
    options: dict = field(default_factory=dict)

    def random(self, *shape, salt=0):
        generator = torch.Generator().manual_seed(self.seed + salt)
        return torch.randn(*shape, generator=generator).to(self.dtype)

    def rows(self):
        """(q, keys, values): ``[T, Hq, D]`` and a list of ``[L, Hkv, D]`` a sequence each."""
        q = self.random(sum(self.queries), self.heads * self.group, self.dim)
        keys = [self.random(n, self.heads, self.dim, salt=2 * i + 1)
                for i, n in enumerate(self.lens)]  # fmt: skip
        values = [self.random(n, self.heads, self.dim_v, salt=2 * i + 2)
                  for i, n in enumerate(self.lens)]  # fmt: skip
        return q, keys, values

    def table(self, placement=0):
        """int32 block ids, scattered over the address space; garbage behind the last of each."""
        counts = [cdiv(n, self.block_size) for n in self.lens]
        generator = torch.Generator().manual_seed(self.seed * 7 + placement)
        ids = (torch.randperm(NUM_BLOCKS - 1, generator=generator)[: sum(counts)] + 1).int()
        table = torch.full((len(counts), max([*counts, 1])), -(2**31), dtype=torch.int32)
        for row, part in zip(table, ids.split(counts), strict=True):
            row[: len(part)] = part
        return table

    def sizes(self):
        return {"block_size": self.block_size, "heads": self.heads, "dim": self.dim,
                "dim_v": self.dim_v, "dtype": self.dtype}  # fmt: skip


def owned(table):
    return sorted({block for block in table.flatten().tolist() if block >= 0})


def slots_of(table, lens, block_size):
    """The slots of all rows of all sequences, one after another."""
    parts = [row[torch.arange(n) // block_size] * block_size + torch.arange(n) % block_size
             for row, n in zip(table, lens, strict=True)]  # fmt: skip
    return torch.cat(parts).int()


def scales_of(kind, heads, block_size):
    """Scales of one side of a quantised cache, to be read or (by row) to be written."""
    if kind == "row":  # NaN where nobody has written
        return torch.full((NUM_BLOCKS, block_size, heads), torch.nan)
    return torch.tensor(0.02) if kind == "tensor" else 0.01 + 0.02 * torch.rand(heads)


def append(key, value, k_cache, v_cache, slots):
    """``reshape_and_cache`` by the backend under test."""
    if not TRITON:
        reshape_and_cache(key, value, k_cache, v_cache, slots)
        return
    from kvcached.kernels._write_triton import append_launches

    for step in append_launches(key, value, k_cache, v_cache, slots):
        step()


def attend(q, k_cache, v_cache, splits=1, **options):
    """(out, lse) by the backend under test; the output starts as NaN."""
    shape = (*q.shape[:2], v_cache.shape[-1])
    out = torch.full(shape, torch.nan, dtype=q.dtype)
    if not TRITON:
        return attn_with_kvcache(q, k_cache, v_cache, out=out, return_softmax_lse=True, **options)
    from kvcached.kernels.decode import attend_triton

    call = check_call(q, k_cache, v_cache, out=out, **options)
    check_places(call)
    attend_triton(call, splits)
    return call.out, call.lse


def solve(case, *, placement=0, rows=None, splits=1, fill=0xFF):
    """(out, lse) of a case whose rows lie at ``placement`` on mapped pages."""
    q, keys, values = rows or case.rows()
    table = case.table(placement)
    with ElasticCache(owned(table), fill=fill, **case.sizes()) as cache:
        slots = slots_of(table, case.lens, case.block_size)
        reshape_and_cache(torch.cat(keys), torch.cat(values), cache.k, cache.v, slots)
        return attend(
            q, cache.k, cache.v, splits, page_table=table, **lengths(case), **case.options
        )


def lengths(case):
    starts = torch.tensor([0, *case.queries], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return {"cache_seqlens": torch.tensor(case.lens, dtype=torch.int32), "cu_seqlens_q": starts,
            "max_seqlen_q": max([1, *case.queries])}  # fmt: skip


def expect(case, rows=None):
    """(out, lse) in float64 from the rows alone, without any cache."""
    q, keys, values = rows or case.rows()
    o = case.options
    masks = o.get("custom_mask")
    trees = [None] * len(case.lens) if masks is None else masks.split(case.queries)
    parts = [
        reference.attend_rows(
            part, k, v, scale=o.get("softmax_scale", case.dim**-0.5),
            causal=o.get("causal", True), window=o.get("window_size", (-1, -1)),
            softcap=o.get("softcap", 0.0), slopes=o.get("alibi_slopes"), sinks=o.get("sinks"),
            masks=tree,
        )
        for part, k, v, tree in zip(q.split(case.queries), keys, values, trees, strict=True)
    ]  # fmt: skip
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])


def assert_close(case, got, wanted, factor=1.0, floor=0.0):
    """Outputs are averages of the values, so their error is measured against those."""
    (out, lse), (wanted_out, wanted_lse) = got, wanted
    assert torch.isfinite(out).all()
    scale = max([1.0, float(wanted_out.abs().max()) if wanted_out.numel() else 0.0])
    error = (out.double() - wanted_out.double()).abs()
    allowed = max(floor, factor * TOLERANCE[case.dtype]) * scale
    assert not out.numel() or float(error.max()) <= allowed
    empty = torch.isneginf(wanted_lse)
    assert torch.equal(torch.isneginf(lse), empty)
    assert (out[empty] == 0).all()
    torch.testing.assert_close(
        lse[~empty].double(), wanted_lse[~empty].double(), atol=1e-4 * max(1, factor), rtol=1e-5
    )


def bitwise(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


NO_OPTIONS = st.just({})


@st.composite
def cases(draw, *, options=NO_OPTIONS, decode=False, longest=150):
    """Odd sizes on purpose: lengths around a tile, groups that are no power of two."""
    longest = min(longest, 100) if TRITON else longest  # one position costs the interpreter 1 ms
    length = st.one_of(st.sampled_from([0, 1, 15, 16, 17, 63, 64, 65]), st.integers(0, longest))
    lens = tuple(draw(st.lists(length, min_size=1, max_size=2 if TRITON else 3)))
    most, heads = (12, 2) if TRITON else (40, 3)
    queries = tuple(1 if decode else draw(st.integers(0, min(n + 1, most))) for n in lens)
    group, dim = draw(st.sampled_from([1, 3, 7, 8, 12])), draw(st.sampled_from([16, 64, 80, 96]))
    return Case(
        seed=draw(st.integers(0, 2**20)), dtype=draw(st.sampled_from(DTYPES)),
        block_size=draw(st.sampled_from([1, 5, 8, 16, 64])), heads=draw(st.integers(1, heads)),
        group=group, dim=dim, dim_v=draw(st.sampled_from([dim, dim, 24])), lens=lens,
        queries=queries, options=draw(options),
    )  # fmt: skip


def with_options(case, **options):
    return replace(case, options=case.options | options)


def sized(case):
    """``case`` with one slope and one sink for each of its query heads."""
    heads = torch.arange(1, case.heads * case.group + 1) / (case.heads * case.group)
    per_head = {name: None if case.options[name] is None else heads * case.options[name]
                for name in ("alibi_slopes", "sinks")}  # fmt: skip
    return with_options(case, **per_head)
