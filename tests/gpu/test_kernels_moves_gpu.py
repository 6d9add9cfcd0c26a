"""Writing, moving, merging and cascades on a GPU, on elastic pages, against torch."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
from kvcached import CacheSpec, Config, KVCache, kernels  # noqa: E402
from kvcached.broker.budget import LocalBudget  # noqa: E402
from kvcached.kernels import ops, quant  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
BLOCKS, SIZE, HEADS, DIM = 64, 16, 8, 128


@pytest.fixture
def cache():
    """(K, V, ids): one layer, of whose 4,096 blocks some are mapped."""
    spec = CacheSpec(2, HEADS, DIM, "bfloat16", block_size=SIZE)
    with KVCache(spec, device="cuda", max_tokens=4096 * SIZE, budget=LocalBudget(1 << 30),
                 config=Config(broker=False), name="moves") as made:  # fmt: skip
        sequence = made.new_sequence()
        made.extend(sequence, BLOCKS * SIZE)
        k, v = made.layer(1)
        ids = torch.tensor(sequence.block_ids, device="cuda")[torch.randperm(BLOCKS)]
        for pool in (k, v):
            pool[ids] = torch.randn(BLOCKS, SIZE, HEADS, DIM, device="cuda").bfloat16()
        yield k, v, ids
        torch.cuda.synchronize()


@pytest.mark.parametrize("tokens", [1, 7, 900, 1024])
def test_rows_are_written_to_their_slots_also_from_slices(cache, tokens):
    k, v, ids = cache
    slots = torch.randperm(BLOCKS * SIZE, device="cuda")[:tokens]
    slots = (ids[slots // SIZE] * SIZE + slots % SIZE).int()
    slots[tokens // 2] = -1
    wide = torch.randn(tokens, 3 * HEADS, DIM, device="cuda").bfloat16()
    for key, value in (wide[:, :HEADS], wide[:, HEADS : 2 * HEADS]), (wide[:, ::3], wide[:, 1::3]):
        wanted = [pool[ids].clone() for pool in (k, v)]
        kernels.reshape_and_cache(key, value, k, v, slots)
        kept = slots >= 0
        block, offset = slots[kept].long() // SIZE, slots[kept].long() % SIZE
        place = (ids[None] == block[:, None]).int().argmax(1)
        for pool, rows, before in ((k, key, wanted[0]), (v, value, wanted[1])):
            before[place, offset] = rows[kept]
            assert torch.equal(pool[ids], before)


@pytest.mark.parametrize("scale", [(), (HEADS,), None])
@pytest.mark.parametrize("dtype", list(quant.LARGEST))
def test_quantised_rows_are_stored_as_quant_says(dtype, scale):
    if dtype == quant.INT4 and scale is not None:
        pytest.skip("int4 takes scales by row only")
    rows = torch.randn(50, HEADS, DIM, device="cuda").bfloat16()
    rows[3] = 0
    pack = 2 if dtype == quant.INT4 else 1
    k = torch.zeros(8, SIZE, HEADS, DIM // pack, dtype=torch.uint8, device="cuda").view(dtype)
    v, slots = k.clone(), torch.randperm(8 * SIZE, device="cuda")[:50].int()
    form = (8, SIZE, HEADS) if scale is None else scale
    scales = [0.01 + 0.02 * torch.rand(form, device="cuda") for _ in range(2)]
    kernels.reshape_and_cache(rows, 2 * rows, k, v, slots, "auto", *scales)
    for pool, given, x in ((k, scales[0], rows), (v, scales[1], 2 * rows)):
        made = quant.row_scales(x, dtype) if scale is None else given
        if scale is None:
            assert torch.equal(given.flatten(0, 1)[slots.long()], made)
        wanted = quant.quantize(x, made, dtype)
        got = pool.flatten(0, 1)[slots.long()]
        assert torch.equal(got.view(torch.uint8), wanted.view(torch.uint8))


def test_blocks_are_gathered_copied_and_compacted(cache):
    k, v, ids = cache
    half = BLOCKS // 2
    used, free = ids[:half], ids[half:]
    out = torch.empty(half, SIZE, HEADS, DIM, dtype=k.dtype, device="cuda")
    kernels.gather_pages(k, used.int(), out)
    assert torch.equal(out, k[used])
    starts = torch.tensor([0, 5, 5 + 17 * SIZE], device="cuda").int()
    table = torch.zeros(2, 17, device="cuda").int()
    table[0, 0], table[1] = used[0], used[1:18].int()
    outs = [torch.empty(5 + 17 * SIZE, HEADS, DIM, dtype=k.dtype, device="cuda") for _ in "kv"]
    before = [x.clone() for x in kernels.gather_kv(k, v, table, starts, *outs)]
    assert torch.equal(before[1], torch.cat([v[used[0], :5], v[used[1:18]].flatten(0, 1)]))
    moves = torch.stack([used, free], 1).int().cpu()
    kernels.compact_pages((k, v), moves, table)
    assert torch.equal(table[1], free[1:18].int())
    for pool in (k, v):
        pool[used] = torch.nan
    after = kernels.gather_kv(k, v, table, starts, *outs)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    kernels.copy_pages(k, free[:3].int(), used[:3].int())
    assert torch.equal(k[used[:3]], k[free[:3]])


@pytest.mark.parametrize("to", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", list(quant.LARGEST))
def test_quantised_rows_are_gathered_as_what_they_mean(dtype, to):
    dim = DIM // 2 if dtype == quant.INT4 else DIM
    bytes_ = torch.randint(0, 256, (2, 32, SIZE, HEADS, dim), device="cuda", dtype=torch.uint8)
    if dtype.is_floating_point:
        bytes_[~bytes_.view(dtype).float().isfinite()] = 0
    k, v = bytes_.view(dtype)
    by_row = torch.rand(2, 32, SIZE, HEADS, device="cuda") / 3 + 1e-3
    given = [by_row] if dtype == quant.INT4 else [by_row, by_row[:, 0, 0], by_row[:, 0, 0, 0]]
    starts = torch.tensor([0, 5, 5 + 17 * SIZE], device="cuda").int()
    ids = torch.randperm(32, device="cuda")
    table = torch.zeros(2, 17, device="cuda").int()
    table[0, 0], table[1] = ids[0].int(), ids[1:18].int()
    for scales in given:
        outs = [torch.full((9 + 17 * SIZE, HEADS, DIM), torch.nan, device="cuda", dtype=to)
                for _ in "kv"]  # fmt: skip
        kernels.gather_kv(k, v, table, starts, *outs, *scales)
        for out, pool, scale in zip(outs, (k, v), scales, strict=True):
            means = quant.dequantize(pool, scale).to(to)
            assert torch.equal(out[:5], means[ids[0], :5])
            assert torch.equal(out[5:-4], means[ids[1:18]].flatten(0, 1))
            assert out[-4:].isnan().all()


@pytest.mark.parametrize("size", [64, 1 << 20])
def test_blocks_go_to_pinned_memory_and_back(size):
    pool = torch.randn(8, size, device="cuda").bfloat16()
    host = torch.zeros(4, size, dtype=torch.bfloat16, pin_memory=True)
    ids, order = torch.tensor([6, 1, 2, 3]).int(), torch.arange(4).int()
    kernels.swap_pages(pool, host, ids, order)
    torch.cuda.synchronize()
    assert torch.equal(host, pool[ids.long().cuda()].cpu())
    other = torch.zeros_like(pool)
    kernels.swap_pages(host, other, order, ids)
    assert torch.equal(other[ids.long().cuda()], pool[ids.long().cuda()])


@pytest.mark.parametrize("parts", [1, 2, 4, 9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_parts_merge_as_the_twin_says(parts, dtype):
    outs = [torch.randn(33, 6, 80, device="cuda").to(dtype) for _ in range(parts)]
    lses = [4 * torch.randn(33, 6, device="cuda") for _ in range(parts)]
    got, lse = kernels.merge_states(outs, lses)
    wanted, total = kernels.reference.merge_states(outs, lses)
    loose = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(got.double(), wanted, atol=loose, rtol=loose)
    torch.testing.assert_close(lse.double(), total, atol=1e-5, rtol=1e-5)


def test_a_cascade_equals_the_flat_call_and_so_do_the_operators(cache):
    k, v, ids = cache
    shared, requests = 20, 10
    own = ids[shared : shared + 4 * requests].view(requests, 4).int()
    table = torch.cat([ids[:shared].int().expand(requests, shared), own], 1).contiguous()
    q = torch.randn(requests, 4 * HEADS, DIM, device="cuda").bfloat16()
    lens = torch.full((requests,), (shared + 4) * SIZE - 3, device="cuda").int()
    levels = [
        kernels.Level(
            table[:1, :shared].contiguous(), lens[:1] * 0 + shared * SIZE, None, requests
        ),
        kernels.Level(own, lens - shared * SIZE),
    ]
    got, lse = kernels.cascade_attention(q, k, v, levels, return_softmax_lse=True)
    flat, whole = ops.attn_with_kvcache(q, k, v, lens, table)
    torch.testing.assert_close(got, flat, atol=4e-3, rtol=2e-2)
    torch.testing.assert_close(lse, whole, atol=1e-3, rtol=1e-3)
    graph = torch.cuda.CUDAGraph()  # in which the levels lie side by side
    with torch.cuda.graph(graph):
        captured = kernels.cascade_attention(q, k, v, levels)
    for _ in range(20):
        captured.fill_(float("nan"))
        graph.replay()
        assert torch.equal(captured, got)
