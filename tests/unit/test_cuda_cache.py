"""Caches over the fake CUDA driver: clearing policies, waits, fences of splits."""

import threading

import pytest

from kvcached import CacheSpec, Config, KVCache
from kvcached.broker.budget import LocalBudget
from kvcached.errors import DriverError, InvalidInput
from kvcached.memory import cuda
from kvcached.memory.cuda import CudaBackend
from kvcached.testing import FakeCudaDriver

NOTHING = dict.fromkeys(FakeCudaDriver().open_resources(), 0)


@pytest.fixture
def driver():
    return FakeCudaDriver(num_devices=3)


# --- clearing -----------------------------------------------------------------------------------

KNOWN = 'ResmanDebugLevel: 4294967295\nRegistryDwords: "{}"\n'


@pytest.fixture
def params(tmp_path, monkeypatch):
    """The file in which the driver says what it was told."""
    path = tmp_path / "params"
    monkeypatch.setattr("kvcached.memory.scrub.driver_clears.__defaults__", (str(path),))
    monkeypatch.setattr("kvcached.memory.scrub.must_clear.__defaults__", (str(path),))
    return path


@pytest.mark.parametrize(
    ("zero", "told", "cleared"),
    [
        ("never", None, False),
        ("always", "", True),
        ("on-tenant-change", None, True),  # it is not known what the driver does
        ("on-tenant-change", "", False),
        ("on-tenant-change", "NVreg=1;RMDisableScrubOnFree=1", True),
    ],
)
def test_the_policies_of_clearing(params, zero, told, cleared):
    if told is not None:
        params.write_text(KNOWN.format(told))
    driver = FakeCudaDriver(dirt=0xAB)
    backend = CudaBackend(driver=driver, zero=zero)
    reservation, handle = backend.reserve(4 * backend.page_bytes), backend.create(2)
    backend.map(reservation, 1, handle)
    start, size = reservation.address + backend.page_bytes, 2 * backend.page_bytes
    assert driver.read(start, size) == bytes([0 if cleared else 0xAB]) * size
    driver.write(start, b"mine")
    backend.unmap(reservation, 1, handle)
    backend.map(reservation, 0, handle)
    assert driver.read(reservation.address, 4) == b"mine", "what is ours stays"
    backend.unmap(reservation, 0, handle)
    backend.release(handle)
    backend.close(reservation)
    backend.shutdown()
    assert driver.open_resources() == NOTHING


def test_clearing_that_fails_undoes_the_map(driver):
    backend = CudaBackend(driver=driver, zero="always")
    reservation, handle = backend.reserve(backend.page_bytes), backend.create(1)
    driver.fail("cuMemsetD8Async")
    with pytest.raises(DriverError, match="cuMemsetD8Async"):
        backend.map(reservation, 0, handle)
    assert not driver.mappings
    backend.map(reservation, 0, handle)
    assert driver.calls["cuMemsetD8Async"] == 2, "and it is cleared when it works"


def test_an_unknown_policy(driver):
    with pytest.raises(InvalidInput, match="sometimes"):
        CudaBackend(driver=driver, zero="sometimes")


# --- a whole cache ------------------------------------------------------------------------------


def test_a_cache_never_waits_for_the_device(driver):
    """Growth, fences, splits and closing wait for one stream of ours, where bytes were copied."""
    spec = CacheSpec(num_layers=2, num_kv_heads=1, head_dim=2, dtype="int8", block_size=8)
    backend = CudaBackend(driver=driver, zero="never")
    config = Config(broker=False, max_handle="512")
    with KVCache(spec, backend=backend, budget=LocalBudget(1 << 16), max_tokens=512,
                 config=config) as cache:  # fmt: skip
        sequences = [cache.new_sequence() for _ in range(12)]
        for sequence in sequences:
            cache.extend(sequence, 8)
        for sequence in sequences[::2]:
            cache.free(sequence, fence=cache.fence(stream=0))
        cache.trim()
    waits = {name: count for name, count in driver.calls.items() if "Synchronize" in name}
    assert set(waits) <= {"cuStreamSynchronize"}
    copied = driver.calls["cuMemcpyDtoDAsync"]
    assert 0 < waits["cuStreamSynchronize"] <= copied
    assert driver.calls["cuEventQuery"] >= 6
    backend.shutdown()
    assert driver.open_resources() == NOTHING


def test_trim_and_reclaim_split_only_behind_the_fence(driver):
    spec = CacheSpec(num_layers=2, num_kv_heads=1, head_dim=2, dtype="int8", block_size=8)
    backend, budget = CudaBackend(driver=driver, zero="never"), LocalBudget(1 << 16)
    with KVCache(spec, backend=backend, budget=budget, max_tokens=512,
                 config=Config(broker=False, ahead="0")) as cache:  # fmt: skip
        keep, drop = cache.new_sequence(), cache.new_sequence()
        cache.extend(drop, 8 * 16)
        cache.free(drop)
        cache.extend(keep, 8)  # one block of the extent of sixteen
        driver.work_pending = True
        fence = cache.fence(stream=0)
        with cache.idle(fence=fence):
            assert cache.reclaim(1 << 20) == 0
            driver.finish()
            assert cache.reclaim(1 << 20) == 15 * spec.block_bytes
        stats = cache.stats()
        assert stats.counters.split == 1
        assert stats.backed_bytes == stats.packed_floor_bytes
        driver.work_pending = True
        fence = cache.fence(stream=0)
        threading.Timer(0.05, driver.finish).start()
        cache.trim(fence=fence)
        assert fence.passed()
    backend.shutdown()


# --- which device -------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cuda:1", "GPU-00000000-0000-fa4e-0000-000000000001"])
def test_a_cache_goes_to_the_gpu_that_is_named(driver, monkeypatch, device):
    monkeypatch.setattr(cuda, "load_driver", lambda: driver)
    spec = CacheSpec(num_layers=2, num_kv_heads=2, head_dim=64)
    config = Config(broker=False, budget="64MiB")
    with KVCache(spec, device=device, max_tokens=4096, config=config) as cache:
        assert cache.stats().device == "cuda:1"
        cache.extend(cache.new_sequence(), 20)
        cache.check()


@pytest.mark.parametrize("device", ["gpu", "tpu:0", "GPU-12"])
def test_what_is_no_device_is_refused_with_those_that_are(driver, monkeypatch, device):
    monkeypatch.setattr(cuda, "load_driver", lambda: driver)
    with pytest.raises(InvalidInput, match=device) as caught:
        KVCache(CacheSpec(num_layers=2, num_kv_heads=2, head_dim=64), device=device)
    assert "UUID" in caught.value.hint
