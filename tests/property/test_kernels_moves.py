"""Laws of writing to the cache and of moving its blocks (properties 11 and 13)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from paged import TRITON, ElasticCache, append, cases, few, lengths, owned, slots_of

from kvcached.errors import InvalidInput
from kvcached.kernels import (
    append as append_module,
)
from kvcached.kernels import (
    attn_with_kvcache,
    compact_pages,
    concat_and_cache_mla,
    copy_pages,
    gather,
    gather_kv,
    gather_pages,
    move,
    quant,
    reshape_and_cache,
    scatter_pages,
    swap_pages,
)
from kvcached.kernels import reference as twins
from kvcached.layout import cdiv

on_cpu_only = pytest.mark.skipif(TRITON, reason="a GPU does not read its slots back")


@pytest.fixture(autouse=True, scope="module")
def backend():
    """Triton's interpreter works on CPU tensors."""
    with pytest.MonkeyPatch.context() as patch:
        if TRITON:
            for module in (append_module, move, gather):
                patch.setattr(module, "_on_gpu", lambda _: True)
        yield


def gathered(cache, table, lens):
    starts = torch.tensor([0, *lens]).cumsum(0).int()
    outs = [torch.empty(sum(lens), *c.shape[2:], dtype=c.dtype) for c in (cache.k, cache.v)]
    return gather_kv(cache.k, cache.v, table, starts, *outs)


@few(60)
@given(case=cases())
def test_11_what_was_appended_is_gathered(case):
    _, keys, values = case.rows()
    key, value, table = torch.cat(keys), torch.cat(values), case.table()
    with ElasticCache(owned(table), **case.sizes()) as cache:
        append(key, value, cache.k, cache.v, slots_of(table, case.lens, case.block_size))
        k, v = gathered(cache, table, case.lens)
        starts = torch.tensor([0, *case.lens]).cumsum(0)
        for got, wanted in zip(
            (k, v), twins.gather_kv(cache.k, cache.v, table, starts), strict=True
        ):
            assert torch.equal(got.double(), wanted)
    assert torch.equal(k, key)
    assert torch.equal(v, value)


@few(60)
@given(case=cases(), skip=st.integers(0, 2**30))
def test_11_a_slot_of_minus_one_is_left_alone(case, skip):
    _, keys, values = case.rows()
    key, value, table = torch.cat(keys), torch.cat(values), case.table()
    slots = slots_of(table, case.lens, case.block_size)
    skipped = torch.tensor(
        [bool(skip >> (i % 30) & 1) for i in range(len(slots))], dtype=torch.bool
    )
    with ElasticCache(owned(table), **case.sizes()) as cache, \
         ElasticCache(owned(table), **case.sizes()) as twin:  # fmt: skip
        chosen = torch.where(skipped, -1, slots)
        append(key, value, cache.k, cache.v, chosen)
        twins.reshape_and_cache(key, value, twin.k, twin.v, chosen)
        used = torch.tensor(owned(table), dtype=torch.long)
        for ours, theirs in ((cache.k, twin.k), (cache.v, twin.v)):
            assert torch.equal(ours[used].view(torch.uint8), theirs[used].view(torch.uint8))


@on_cpu_only
@few(30)
@given(case=cases(longest=40), at=st.integers(0, 1000))
def test_11_a_slot_named_twice_is_refused_and_nothing_is_written(case, at):
    _, keys, values = case.rows()
    key, value, table = torch.cat(keys), torch.cat(values), case.table()
    slots = slots_of(table, case.lens, case.block_size)
    if len(slots) < 2:
        return
    slots[at % len(slots)] = slots[(at + 1) % len(slots)]
    with ElasticCache(owned(table), **case.sizes()) as cache:
        with pytest.raises(InvalidInput, match="twice"):
            reshape_and_cache(key, value, cache.k, cache.v, slots)
        assert cache.k[owned(table)].isnan().all()


@few(60)
@given(case=cases(longest=60))
def test_13_moving_blocks_and_tables_alike_changes_nothing(case):
    _, keys, values = case.rows()
    table, moved = case.table(0), case.table(1)
    blocks, used = owned(table), [cdiv(n, case.block_size) for n in case.lens]
    target = {block: new for row, other, n in zip(table, moved, used, strict=True)
              for block, new in zip(row[:n].tolist(), other[:n].tolist(), strict=True)}  # fmt: skip
    moves = {b: n for b, n in target.items() if n not in target}  # a target may not be a source
    after = table.clone().apply_(lambda block: moves.get(block, block))
    assert len(set(owned(after))) == len(blocks)  # images are disjoint
    with ElasticCache({*blocks, *moves.values()}, **case.sizes()) as cache:
        slots = slots_of(table, case.lens, case.block_size)
        reshape_and_cache(torch.cat(keys), torch.cat(values), cache.k, cache.v, slots)
        before = gathered(cache, table, case.lens)
        ids = torch.tensor([*moves], dtype=torch.int32), torch.tensor([*moves.values()]).int()
        for pool in (cache.k, cache.v):
            copy_pages(pool, *ids)
            pool[list(moves)] = torch.nan  # freed blocks are referenced by nobody
        for x, y in zip(before, gathered(cache, after, case.lens), strict=True):
            assert torch.equal(x, y)


@few(40)
@given(case=cases(longest=40), order=st.randoms())
def test_gathered_blocks_scatter_back(case, order):
    _, keys, values = case.rows()
    table = case.table()
    blocks = owned(table)
    order.shuffle(blocks)
    with ElasticCache(blocks, **case.sizes()) as cache:
        slots = slots_of(table, case.lens, case.block_size)
        reshape_and_cache(torch.cat(keys), torch.cat(values), cache.k, cache.v, slots)
        ids = torch.tensor(blocks, dtype=torch.int32)
        pool = cache.k
        out = torch.empty(len(ids), *pool.shape[1:], dtype=pool.dtype)
        gather_pages(pool, ids, out)
        if blocks:
            twin = twins.gather_pages(pool, ids)
            assert torch.equal(out.view(torch.uint8), twin.view(torch.uint8))
            pool[blocks] = 0
        twin = pool[blocks] if blocks else None
        scatter_pages(out, ids, pool)
        if blocks:
            twins.scatter_pages(out, torch.arange(len(ids)), twin)
            assert torch.equal(pool[blocks].view(torch.uint8), twin.view(torch.uint8))
        k, _ = gathered(cache, table, case.lens)
        assert torch.equal(k, torch.cat(keys))


@on_cpu_only
@few(30)
@given(case=cases(decode=True))
def test_new_keys_given_to_attention_are_written_first(case):
    q, keys, values = case.rows()
    if 0 in case.lens:
        return
    before = torch.tensor([n - 1 for n in case.lens], dtype=torch.int32)
    table = case.table()
    with ElasticCache(owned(table), **case.sizes()) as cache:
        slots = slots_of(table, case.lens, case.block_size)
        last = torch.tensor(case.lens).cumsum(0) - 1
        key, value = torch.cat(keys), torch.cat(values)
        reshape_and_cache(key, value, cache.k, cache.v, torch.where(
            torch.isin(torch.arange(len(slots)), last), -1, slots))  # fmt: skip
        got = attn_with_kvcache(q, cache.k, cache.v, key[last], value[last],
                                cache_seqlens=before, page_table=table)  # fmt: skip
        again = attn_with_kvcache(q, cache.k, cache.v, page_table=table, **lengths(case))
    assert torch.equal(got, again)


@few(60)
@given(case=cases(longest=60), both=st.booleans(), order=st.randoms())
def test_13_compaction_moves_blocks_and_tables_in_one_call(case, both, order):
    _, keys, values = case.rows()
    table, free = case.table(0), sorted({*owned(case.table(1))} - {*owned(case.table(0))})
    blocks = owned(table)
    order.shuffle(free)
    pairs = [*zip(order.sample(blocks, len(blocks)), free, strict=False)]
    if not both:
        pairs = pairs[: len(pairs) // 2]
    moves = torch.tensor(pairs, dtype=torch.int32).reshape(-1, 2)
    after = table.clone()
    with ElasticCache({*blocks, *free}, **case.sizes()) as cache:
        slots = slots_of(table, case.lens, case.block_size)
        reshape_and_cache(torch.cat(keys), torch.cat(values), cache.k, cache.v, slots)
        before = gathered(cache, table, case.lens)
        compact_pages((cache.k, cache.v), moves, after)
        renamed = dict(pairs)
        wanted = table.clone()
        twins.compact_pages((), moves, wanted)
        assert torch.equal(after, wanted)
        for pool in (cache.k, cache.v):
            pool[list(renamed)] = torch.nan
        for x, y in zip(before, gathered(cache, after, case.lens), strict=True):
            assert torch.equal(x, y)


@st.composite
def strided_pools(draw):
    """A pool whose entries are cut out of a larger tensor: any strides, and the ids of a move."""
    dims = draw(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(0, 2)),
                         min_size=1, max_size=4))  # fmt: skip
    dtype = draw(st.sampled_from([torch.int8, torch.int16, torch.float32, torch.float64]))
    whole = torch.randint(-128, 127, [6, *(n * step + more for n, step, more in dims)])
    pool = whole.to(dtype)
    cut = (slice(None), *(slice(0, n * step, step) for n, step, _ in dims))
    ids = draw(st.permutations(range(6)))
    count = draw(st.integers(0, 3))
    return pool, pool[cut], torch.tensor(ids[:count]).int(), torch.tensor(ids[3 : 3 + count]).int()


@few(100)
@given(made=strided_pools())
def test_copies_touch_the_named_entries_only_whatever_the_strides(made):
    whole, pool, sources, targets = made
    before = whole.clone()

    def again():
        """(all of it, the pool) as it was."""
        other = before.clone()
        return other, other.as_strided(pool.shape, pool.stride())

    wanted, view = again()
    twins.copy_pages(view, sources, targets)
    copy_pages(pool, sources, targets)
    assert torch.equal(whole, wanted)
    out = torch.empty(len(sources), *pool.shape[1:], dtype=pool.dtype)
    gather_pages(pool, sources, out)
    assert torch.equal(out, twins.gather_pages(pool, sources))
    scattered, view = again()
    twins.scatter_pages(out, targets, view)
    other, view = again()
    scatter_pages(out, targets, view)
    assert torch.equal(other, scattered)
    if len(sources):
        (other, view), (wanted, twin) = again(), again()
        pairs = torch.stack([sources, targets], 1)
        tables = torch.stack([sources, targets]).repeat(2, 1, 1)
        compact_pages(view, pairs, tables[0])
        twins.compact_pages(twin, pairs, tables[1])
        assert torch.equal(other, wanted)
        assert torch.equal(*tables)
        assert torch.equal(tables[0], torch.stack([targets, targets]))


@few(40)
@given(made=strided_pools())
def test_blocks_are_swapped_between_pools(made):
    _, pool, sources, targets = made
    other = torch.zeros_like(pool)
    wanted = other.clone()
    twins.swap_pages(pool, wanted, sources, targets)
    swap_pages(pool, other, sources, targets)
    assert torch.equal(other, wanted)


STORED = [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, quant.INT4]
NAMES = {torch.float8_e4m3fn: "fp8", torch.float8_e5m2: "fp8_e5m2", torch.int8: "int8",
         quant.INT4: "int4"}  # fmt: skip


def same_bytes(got, wanted):
    """Bitwise; but Triton's interpreter rounds fp8 ties away from zero and loses carries."""
    steps = (got.view(torch.uint8).int() - wanted.view(torch.uint8).int()).abs()
    if not TRITON or wanted.element_size() > 1 or not wanted.dtype.is_floating_point:
        return not steps.any()
    mantissa = 7 if wanted.dtype == torch.float8_e4m3fn else 3
    return int(steps[wanted.view(torch.uint8) & mantissa != 0].max()) <= 1


def quantised_caches(dtype, scale, dims):
    """Caches of 6 blocks of 4 slots, and scales of a kind: () or (heads,) given, None by row."""
    pack = 2 if dtype == quant.INT4 else 1
    caches = [torch.zeros(6, 4, 3, d // pack, dtype=dtype) for d in dims]
    if scale is None:
        return caches, [torch.zeros(6, 4, 3) for _ in dims]
    return caches, [0.02 + 0.1 * torch.rand(scale) for _ in dims]


@pytest.mark.parametrize("rows", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [(), (3,), None])
@pytest.mark.parametrize("dtype", STORED)
def test_12_rows_are_stored_as_quant_says(dtype, scale, rows):
    if dtype == quant.INT4 and scale is not None:
        return
    torch.manual_seed(1)
    key, value = torch.randn(7, 3, 24).to(rows), torch.randn(7, 3, 40).to(rows)
    key[2], value[3, 1] = 0, 1e3
    slots = torch.tensor([3, 22, -1, 0, 9, 17, 23]).int()
    caches, scales = quantised_caches(dtype, scale, (24, 40))
    wanted, wanted_scales = ([x.clone() for x in part] for part in (caches, scales))
    reshape_and_cache(key, value, *caches, slots, NAMES[dtype], *scales)
    twins.reshape_and_cache(key, value, *wanted, slots, NAMES[dtype], *wanted_scales)
    others = torch.ones(24, dtype=torch.bool)
    others[slots[slots >= 0].long()] = False
    for cache, twin in zip(caches, wanted, strict=True):
        assert same_bytes(cache, twin)
        assert not cache.flatten(0, 1)[others].view(torch.uint8).any()
    for got, made in zip(scales, wanted_scales, strict=True):
        assert torch.equal(got, made)


def test_fp8_goes_into_byte_caches_too():
    key = torch.randn(2, 3, 16)
    (k, v), scales = quantised_caches(torch.float8_e4m3fn, (), (16, 16))
    slots = torch.tensor([3, 5]).int()
    reshape_and_cache(key, key, k, v, slots, "fp8", *scales)
    twin = torch.zeros_like(k, dtype=torch.uint8)
    reshape_and_cache(key, key, twin, twin.clone(), slots, "fp8_e4m3", *scales)
    assert torch.equal(twin, k.view(torch.uint8))
    assert k.view(torch.uint8).any()


@pytest.mark.parametrize("kind", ["auto", "fp8", "fp8_e5m2", "int8"])
def test_11_latents_and_rotary_keys_share_a_row(kind):
    stored = {"auto": torch.float32, "int8": torch.int8, "fp8": torch.float8_e4m3fn,
              "fp8_e5m2": torch.float8_e5m2}[kind]  # fmt: skip
    kv_c, k_pe = torch.randn(5, 32), torch.randn(5, 8)
    cache = torch.zeros(4, 4, 40).to(stored)
    slots = torch.tensor([7, -1, 0, 15, 2]).int()
    scale = None if kind == "auto" else torch.tensor(0.03)
    wanted = cache.clone()
    concat_and_cache_mla(kv_c, k_pe, cache, slots, kind, scale)
    twins.concat_and_cache_mla(kv_c, k_pe, wanted, slots, kind, scale)
    assert same_bytes(cache, wanted)
    assert int((cache.float() != 0).any(-1).sum()) == 4
