"""Ten thousand grow and shrink cycles on real memory: descriptors, mappings, bytes stay flat."""

import os
import re

import pytest
from cache_rig import Clock, block_pool

from kvcached.memory.host import HostBackend

PAGE, CYCLES = 1 << 14, 10_000


def held_by_process():
    with open("/proc/self/maps") as maps, open("/proc/self/status") as status:
        lines = sum(1 for _ in maps)
        resident = int(re.search(r"VmRSS:\s+(\d+) kB", status.read())[1])
    return len(os.listdir("/proc/self/fd")), lines, resident


@pytest.mark.slow
def test_cycles_leave_nothing_behind():
    backend = HostBackend(page_bytes=PAGE)
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

    for i in range(300):
        cycle(i)
    fds, maps, resident = held_by_process()
    bytes_before = backend.resident_bytes()
    for i in range(CYCLES):
        cycle(i)
    pool.check()
    fds_after, maps_after, resident_after = held_by_process()
    assert fds_after == fds
    assert maps_after <= maps + 20  # the allocator of the process may add some of its own
    assert resident_after <= resident + 16 * 1024, "kB: resident memory grew"
    assert backend.resident_bytes() == bytes_before
    assert len(pool.pages._ledger.handles) == len(pool.pages.extents) <= 5
    assert sum(map(len, pool.pages.runs._classes)) < 2000
    assert len(pool.ext) == 64, "extent ids are not reused"
    pool.close()
    assert backend.resident_bytes() == 0
    backend.shutdown()
