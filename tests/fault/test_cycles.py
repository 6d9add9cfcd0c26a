"""Ten thousand grow and shrink cycles on real memory: descriptors, mappings, bytes stay flat."""

import ctypes
import gc
import os
import re

import pytest
from cache_rig import Clock, block_pool, stop_caretaker

from kvcached.broker.budget import LocalBudget
from kvcached.cache import KVCache
from kvcached.config import HOST_MEMORY, Config
from kvcached.layout import CacheSpec
from kvcached.memory.host import HostBackend

pytestmark = pytest.mark.slow
PAGE, WARM, CYCLES = 1 << 14, 300, 10_000


def held_by_process():
    with open("/proc/self/maps") as maps, open("/proc/self/status") as status:
        lines = sum(1 for _ in maps)
        resident = int(re.search(r"VmRSS:\s+(\d+) kB", status.read())[1])
    return len(os.listdir("/proc/self/fd")), lines, resident


def stay_flat(backend, cycle):
    for i in range(WARM):
        cycle(i)
    gc.collect()
    fds, maps, resident = held_by_process()
    bytes_before = backend.resident_bytes()
    for i in range(CYCLES):
        cycle(i)
    gc.collect()
    fds_after, maps_after, resident_after = held_by_process()
    assert fds_after == fds
    assert maps_after <= maps + 4  # the allocator of the process may add an arena of its own
    assert resident_after <= resident + 2 * 1024, "kB: resident memory grew"
    assert backend.resident_bytes() == bytes_before


@pytest.fixture(params=HOST_MEMORY)
def backend(request):
    backend = HostBackend(page_bytes=PAGE, memory=request.param)
    yield backend
    assert backend.resident_bytes() == 0
    backend.shutdown()


def test_cycles_of_a_block_pool_leave_nothing_behind(backend):
    pool = block_pool(backend, clock=Clock(), block_bytes=PAGE, num_blocks=400, longest=8)
    held = pool.alloc(3)

    def cycle(i):
        ids = pool.alloc(1 + i % 13)
        pool.copy(int(held[0]), int(ids[0]))  # touches the memory
        pool.free(ids)
        if i % 3:
            pool.reclaim(1 << 30)
        else:
            pool.trim()

    stay_flat(backend, cycle)
    pool.check()
    assert len(pool.pages._ledger.handles) == len(pool.pages.extents) <= 5
    assert sum(map(len, pool.pages.runs._classes)) < 2000
    assert len(pool.ext) == 64, "extent ids are not reused"
    pool.close()


def test_cycles_of_a_cache_leave_nothing_behind(backend):
    spec = CacheSpec(2, 1, 128, "float16")  # a block is a page
    assert spec.block_bytes == PAGE
    config = Config(broker=False, spare_seconds=1e5)
    with KVCache(spec, name="cycles", max_tokens=6400, budget=LocalBudget(1 << 30),
                 backend=backend, config=config) as cache:  # fmt: skip
        stop_caretaker(cache)
        base, held = cache._blocks.pages.address_of(0), cache.new_sequence()
        cache.extend(held, 40)

        def cycle(i):
            tokens = list(range(i, i + 16 * (1 + i % 5)))
            sequence = cache.new_sequence(tokens)
            cache.extend(sequence, tokens[sequence.num_cached_tokens :])
            twin = cache.fork(held)
            cache.extend(twin, 20)  # copies the last block, and one more
            for block in sequence.block_ids:
                ctypes.memset(base + block * PAGE, i % 256, PAGE)
            cache.free(twin)
            cache.free(sequence)  # cached
            if i % 3:
                cache.evict_prefixes(1 << 30)
            else:
                cache.trim()  # splits too

        stay_flat(backend, cycle)
        stats = cache.stats()
        assert (stats.sequences, stats.blocks_in_use, stats.blocks_cached) == (1, 3, 0)
        assert stats.counters.grow > CYCLES
        assert len(cache._prefixes) == 0
        cache.check()
