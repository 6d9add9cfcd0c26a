"""Laws of writing to the cache and of moving its blocks (properties 11 and 13)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from paged import TRITON, ElasticCache, append, cases, few, lengths, owned, slots_of

from kvcached.errors import InvalidInput
from kvcached.kernels import (
    attn_with_kvcache,
    copy_pages,
    gather_kv,
    gather_pages,
    reshape_and_cache,
    scatter_pages,
)
from kvcached.kernels import reference as twins
from kvcached.layout import cdiv

on_cpu_only = pytest.mark.skipif(TRITON, reason="moving blocks has no Triton kernel yet")


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


@on_cpu_only
@few(60)
@given(case=cases())
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


@on_cpu_only
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
        scatter_pages(out, ids, pool)
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
