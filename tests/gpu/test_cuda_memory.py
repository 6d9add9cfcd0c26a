"""The elastic cache on a real GPU: contract, contents, splits, graphs, death of a peer."""

from __future__ import annotations

import gc
import subprocess
import sys
import time

import pytest
import torch

from kvcached import CacheSpec, Config, KVCache
from kvcached.broker.budget import LocalBudget
from kvcached.kernels import attn_with_kvcache, reshape_and_cache
from kvcached.kernels.reference import attn_with_kvcache as twin
from kvcached.memory.cuda import CudaBackend
from kvcached.memory.views import tensor_from_address
from kvcached.testing import check_memory_backend

pytestmark = pytest.mark.gpu
SPEC = CacheSpec(num_layers=4, num_kv_heads=2, head_dim=64, dtype="float16")
LLAMA_8B = CacheSpec(num_layers=32, num_kv_heads=8, head_dim=128)  # a block of 16 tokens: 2 MiB


@pytest.fixture(autouse=True)
def memory_is_back():
    """Every test leaves the device's free memory where it found it."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    before = torch.cuda.mem_get_info()[0]
    yield
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    assert before - torch.cuda.mem_get_info()[0] <= 128 << 20


def make(spec=SPEC, gib=8, **options):
    return KVCache(spec, device="cuda", max_tokens=1 << 20, budget=LocalBudget(gib << 30),
                   config=Config(check=spec is SPEC), **options)  # fmt: skip


def read(backend, address, nbytes):
    return tensor_from_address(address, nbytes, backend.device).cpu().numpy().tobytes()


def write(backend, address, data):
    view = tensor_from_address(address, len(data), backend.device)
    view.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    torch.cuda.synchronize()


def test_the_contract_holds_on_the_driver():
    page = CudaBackend("cuda:0").page_bytes
    total = torch.cuda.get_device_properties(0).total_memory
    ran = check_memory_backend(lambda: CudaBackend("cuda:0"), read=read, write=write,
                               zeroed=False, too_many_pages=total // page + 1)  # fmt: skip
    assert len(ran) >= 10


WITH_TORCH = """
import sys
import torch
from kvcached import CacheSpec, Config, KVCache
from kvcached.broker.budget import LocalBudget

def torch_works():
    return torch.ones(1000, device="cuda").sum().item() == 1000

assert not torch.cuda.is_initialized()
if sys.argv[1] == "torch first":
    assert torch_works()
spec = CacheSpec(num_layers=2, num_kv_heads=2, head_dim=64, dtype="float16")
cache = KVCache(spec, device="cuda", max_tokens=4096, budget=LocalBudget(64 << 20), config=Config())
sequence = cache.new_sequence()
cache.extend(sequence, 20)
assert torch.cuda.is_initialized() is (sys.argv[1] == "torch first")
k, _ = cache.layer(0)
k[1].fill_(3)
assert torch_works()
assert k[1].float().mean().item() == 3
cache.free(sequence, fence=cache.fence())
del k, _
cache.close()
assert torch_works()  # the context is torch's too
print("done")
"""


@pytest.mark.parametrize("order", ["torch first", "cache first"])
def test_the_context_is_shared_whoever_is_first(order):
    done = subprocess.run([sys.executable, "-c", WITH_TORCH, order], capture_output=True, text=True,
                          timeout=120, check=False)  # fmt: skip
    assert done.stdout.strip() == "done", done.stderr[-2000:]


def test_what_is_written_survives_growth_splits_and_a_fork():
    with make() as cache:
        sequences = [cache.new_sequence() for _ in range(600)]
        for number, sequence in enumerate(sequences):
            cache.extend(sequence, 16)
            for layer in range(SPEC.num_layers):
                for part in cache.layer(layer):
                    part[sequence.block_ids[0]] = number % 1000
        for number, sequence in enumerate(sequences):
            if number % 50:
                cache.free(sequence)
        torch.cuda.synchronize()
        table = [s.block_ids for s in sequences[::50]]
        cache.trim()
        assert [s.block_ids for s in sequences[::50]] == table
        fork = cache.fork(sequences[0])
        for number in range(0, 600, 50):
            for layer in range(SPEC.num_layers):
                for part in cache.layer(layer):
                    assert (part[sequences[number].block_ids[0]] == number % 1000).all()
        cache.extend(fork, 1)


def test_a_scattered_cache_trims_to_the_packed_floor():
    with make(LLAMA_8B) as cache:
        sequence = cache.new_sequence()
        cache.extend(sequence, 16 * 1024)  # 2 GiB in handles of 256 MiB
        ids = sequence.block_ids
        k, v = cache.layer(5)
        for block in ids[::64]:
            k[block], v[block] = block, -block
        keep = [cache.fork(sequence) for _ in range(1)]
        torch.cuda.synchronize()
        cache.free(sequence)
        assert cache.stats().blocks_in_use == 1024
        cache.free(keep[0])
        singles = [cache.new_sequence() for _ in range(1024)]
        for single in singles:
            cache.extend(single, 16)
        for index, single in enumerate(singles):
            if index % 64:
                cache.free(single)
        live = [s.block_ids[0] for s in singles[::64]]
        for block in live:
            k[block], v[block] = block, -block
        torch.cuda.synchronize()
        cache.trim()
        stats = cache.stats()
        assert stats.backed_bytes <= 1.02 * stats.packed_floor_bytes
        assert all((k[b] == b).all() and (v[b] == -b).all() for b in live)


def test_triton_reads_and_writes_the_mapped_pages_only():
    generator = torch.Generator("cuda").manual_seed(0)
    lens, heads = [1, 15, 16, 17, 200, 333], 4
    with make() as cache:
        gaps = [cache.new_sequence() for _ in lens]
        sequences = []
        for gap, length in zip(gaps, lens, strict=True):
            cache.extend(gap, 5000)  # leaves unmapped runs between the live ones
            sequences.append(cache.new_sequence())
            slots = cache.extend(sequences[-1], length)
            new = torch.randn(2, length, 2, 64, device="cuda", generator=generator).half()
            reshape_and_cache(new[0], new[1], *cache.layer(2), torch.tensor(slots, device="cuda"))
        for gap in gaps:
            cache.free(gap)
        torch.cuda.synchronize()
        cache.trim()
        k, v = cache.layer(2)
        table = torch.tensor(cache.block_tables(sequences), device="cuda")
        seqlens = torch.tensor(lens, dtype=torch.int32, device="cuda")
        q = torch.randn(len(lens), heads, 64, device="cuda", generator=generator).half()
        got, lse = attn_with_kvcache(q, k, v, cache_seqlens=seqlens, page_table=table,
                                     return_softmax_lse=True)  # fmt: skip
        used = sorted({b for s in sequences for b in s.block_ids})
        dense = {b: i for i, b in enumerate(used)}
        small = [torch.stack([part[b] for b in used]).cpu() for part in (k, v)]
        local = torch.zeros(table.shape, dtype=torch.int32)
        for row, sequence in enumerate(sequences):
            for column, block in enumerate(sequence.block_ids):
                local[row, column] = dense[block]
        want, want_lse = twin(q.cpu(), *small, cache_seqlens=seqlens.cpu(), page_table=local)
        assert (got.cpu().double() - want).abs().max() < 2e-3
        assert (lse.cpu().double() - want_lse).abs().max() < 1e-3


def test_a_captured_graph_replays_while_extents_come_and_go():
    with make(LLAMA_8B) as cache:
        sequence = cache.new_sequence()
        cache.extend(sequence, 64)
        k, _ = cache.layer(0)
        out = torch.zeros(len(sequence.block_ids), device="cuda")
        ids = torch.tensor(sequence.block_ids, device="cuda")
        rows = k.as_strided((k.shape[0], 1), (k.stride(0), 1))

        def read_blocks():
            out.copy_(rows[ids, 0].float())

        k[list(sequence.block_ids)] = 1
        read_blocks()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            read_blocks()
        for value in range(2, 12):
            other = cache.new_sequence()
            cache.extend(other, 16 * 200)
            for block in sequence.block_ids:
                k[block] = value
            torch.cuda.synchronize()
            cache.free(other)
            cache.trim()  # splits the extents beside, moves nothing
            graph.replay()
            torch.cuda.synchronize()
            assert (out == value).all()
        del graph  # its private memory is not ours to account for


def test_freed_blocks_wait_for_their_event():
    with make(LLAMA_8B) as cache:
        sequence = cache.new_sequence()
        cache.extend(sequence, 16 * 64)
        torch.cuda._sleep(200_000_000)
        cache.free(sequence, fence=cache.backend.fence(torch.cuda.current_stream().cuda_stream))
        cache.trim()
        assert cache.stats().quarantined_bytes > 0
        torch.cuda.synchronize()
        cache.trim()
        stats = cache.stats()
        assert stats.quarantined_bytes == 0
        assert stats.backed_bytes == stats.packed_floor_bytes


def test_out_of_memory_outside_is_an_error_that_changes_nothing():
    free = torch.cuda.mem_get_info()[0]
    hog = torch.empty(free - (3 << 30), dtype=torch.uint8, device="cuda")
    with make(LLAMA_8B, gib=64) as cache:
        sequence = cache.new_sequence()
        before = cache.stats()
        with pytest.raises(MemoryError):
            cache.extend(sequence, 16 * 4096)  # 8 GiB
        assert cache.stats() == before
        del hog
        torch.cuda.empty_cache()
        cache.extend(sequence, 16 * 4096)
        assert cache.stats().backed_bytes >= 8 << 30
        cache.free(sequence)


PEER = """
import sys, time
from kvcached import CacheSpec, KVCache
spec = CacheSpec(num_layers=32, num_kv_heads=8, head_dim=128)
cache = KVCache(spec, device="cuda", name="peer", max_tokens=1 << 20)
sequence = cache.new_sequence()
cache.extend(sequence, list(range(16 * 2048)))
if sys.argv[1] == "cached":
    cache.free(sequence)
print("ready", flush=True)
sys.stdin.read()
cache.close()
"""


@pytest.mark.parametrize("how", ["cached", "killed"])
def test_a_peer_gives_way_or_dies_and_its_bytes_come_back(how, monkeypatch):
    monkeypatch.setenv("KVCACHED_BUDGET", "5GiB")
    peer = subprocess.Popen([sys.executable, "-c", PEER, how], stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, text=True)  # fmt: skip
    try:
        assert peer.stdout.readline().strip() == "ready"
        with KVCache(LLAMA_8B, device="cuda", name="me", max_tokens=1 << 20) as cache:
            sequence = cache.new_sequence()
            if how == "killed":
                with pytest.raises(MemoryError):
                    cache.extend(sequence, 16 * 1024)
                peer.kill()
            deadline = time.monotonic() + 10
            while True:
                try:
                    cache.extend(sequence, 16 * 1024)
                    break
                except MemoryError:
                    assert how == "killed"
                    assert time.monotonic() < deadline
            assert cache.stats().in_use_bytes >= 2 << 30
            cache.free(sequence)
    finally:
        peer.stdin.close()
        peer.wait(30)
        peer.stdout.close()
