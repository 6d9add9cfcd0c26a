"""Two GPUs in one process: each cache keeps to its own, whichever device torch has current."""

from __future__ import annotations

import threading

import pytest
import torch

from kvcached import CacheSpec, Config, KVCache
from kvcached.broker.budget import LocalBudget
from kvcached.memory.cuda import CudaBackend
from kvcached.memory.fences import wait_for

pytestmark = pytest.mark.gpu
SPEC = CacheSpec(num_layers=32, num_kv_heads=8, head_dim=128)  # a block of 16 tokens: 2 MiB
CONFIG = Config(broker=False, ahead="0", spare_seconds=1e5)
GIB = 1 << 30


@pytest.fixture(autouse=True)
def two_devices():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    current = torch.cuda.current_device()
    for index in range(2):
        torch.zeros(1, device=f"cuda:{index}")
        torch.cuda.synchronize(index)
    yield
    torch.cuda.set_device(current)


def free_bytes(index):
    torch.cuda.synchronize(index)
    return torch.cuda.mem_get_info(index)[0]


def make(index, gib=8):
    return KVCache(SPEC, device=f"cuda:{index}", max_tokens=1 << 18, name=f"on-{index}",
                   budget=LocalBudget(gib << 30), config=CONFIG)  # fmt: skip


def other(index):
    """Have torch's current device be the other one."""
    torch.cuda.set_device(1 - index)


def fill(cache, index, blocks, value):
    """A sequence whose blocks hold a value of their own, in the first and the last layer."""
    sequence = cache.new_sequence()
    cache.extend(sequence, blocks * SPEC.block_size)
    for layer in (0, SPEC.num_layers - 1):
        for sign, part in zip((1, -1), cache.layer(layer), strict=True):
            assert part.device == torch.device("cuda", index)
            for block in sequence.block_ids:
                part[block] = sign * (value + block % 100)
    torch.cuda.synchronize(index)
    return sequence


def holds(cache, sequence, value):
    return all(
        bool((part[block] == sign * (value + block % 100)).all())
        for layer in (0, SPEC.num_layers - 1)
        for sign, part in zip((1, -1), cache.layer(layer), strict=True)
        for block in sequence.block_ids
    )


def test_each_grows_on_its_own_device():
    before = [free_bytes(index) for index in range(2)]
    other(0)
    with make(0) as cache:
        sequence = cache.new_sequence()
        cache.extend(sequence, 512 * SPEC.block_size)
        assert before[0] - free_bytes(0) >= GIB
        assert abs(before[1] - free_bytes(1)) < 64 << 20
        assert cache.backend.available() <= before[0] - GIB
        cache.free(sequence)
    assert before[0] - free_bytes(0) < 128 << 20


def test_both_at_once_with_the_other_device_current():
    with make(0) as first, make(1) as second:
        assert first.backend.uuid != second.backend.uuid
        caches, kept = (first, second), []
        for index, cache in enumerate(caches):
            other(index)
            kept.append(fill(cache, index, 8, 50 * (index + 1)))
        for index, cache in enumerate(caches):
            assert torch.cuda.current_device() == 0, "no call of ours has changed it"
            assert holds(cache, kept[index], 50 * (index + 1))
            cache.check()


@pytest.mark.parametrize("index", [0, 1])
def test_splits_copy_on_the_caches_own_device(index):
    other(index)
    with make(index) as cache:
        big = fill(cache, index, 64, 7)
        twin = fill(cache, index, 1, 50)
        cache.free(big)
        singles = [fill(cache, index, 1, number) for number in range(16)]
        for number, single in enumerate(singles):
            if number % 4:
                cache.free(single)
        torch.cuda.synchronize(index)
        tables = [single.block_ids for single in singles[::4]]
        cache.trim()
        assert cache.stats().counters.split >= 1
        assert cache.stats().backed_bytes == cache.stats().split_floor_bytes
        assert [single.block_ids for single in singles[::4]] == tables
        assert holds(cache, twin, 50)
        for number in range(0, 16, 4):
            assert holds(cache, singles[number], number)
        assert torch.cuda.current_device() == 1 - index


@pytest.mark.parametrize("index", [0, 1])
def test_a_fence_is_behind_the_work_of_its_own_device(index):
    other(index)
    with make(index) as cache:
        sequence = cache.new_sequence()
        cache.extend(sequence, 64 * SPEC.block_size)
        with torch.cuda.device(index):
            torch.cuda._sleep(400_000_000)
        assert torch.cuda.current_device() == 1 - index
        fence = cache.fence()  # of the cache's device, not the current one
        assert not fence.passed()
        cache.free(sequence, fence=fence)
        assert cache.stats().quarantined_bytes > 0
        torch.cuda.synchronize(1 - index)
        assert cache.stats().quarantined_bytes > 0, "the other device's work is not waited for"
        cache.trim(fence=fence)
        assert cache.stats().quarantined_bytes == 0


def test_two_backends_in_two_threads():
    errors = []

    def churn(index):
        try:
            backend = CudaBackend(f"cuda:{index}")
            room = backend.reserve(64 * backend.page_bytes)
            for round_ in range(30):
                start = round_ % 8 * 8
                handles = backend.back(room, [(start, 4), (start + 4, 4)])
                backend.copy(room.address + start * backend.page_bytes,
                             room.address + (start + 4) * backend.page_bytes, 1 << 20)  # fmt: skip
                wait_for(backend.fence())
                for offset, handle in zip((0, 4), handles, strict=True):
                    backend.unmap(room, start + offset, handle)
                    backend.release(handle)
            backend.close(room)
            backend.check()
            backend.shutdown()
        except BaseException as error:  # noqa: BLE001 - handed to the main thread below
            errors.append(error)

    threads = [threading.Thread(target=churn, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
