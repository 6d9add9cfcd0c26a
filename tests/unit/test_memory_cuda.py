"""CudaBackend on a fake driver: contract, statuses, contexts, fences, and every call failing."""

import itertools

import pytest

from kvcached.errors import (
    BackendUnavailable,
    ClosedError,
    DriverError,
    ForkedProcessError,
    InvalidInput,
    KvcachedError,
    OutOfPages,
    PoolBroken,
    UnknownName,
)
from kvcached.memory.base import Fence, MemoryBackend
from kvcached.memory.cuda import CudaBackend
from kvcached.memory.driver import Driver
from kvcached.testing import CLAUSES, FakeCudaDriver, check_memory_backend

NOTHING = dict.fromkeys(FakeCudaDriver().open_resources(), 0)


@pytest.fixture
def driver():
    return FakeCudaDriver(num_devices=3)


def test_conforms():
    drivers = []

    def make():
        drivers.append(FakeCudaDriver())
        return CudaBackend(driver=drivers[-1])

    ran = check_memory_backend(
        make,
        read=lambda backend, address, n: backend._call.driver.read(address, n),
        write=lambda backend, address, data: backend._call.driver.write(address, data),
    )
    assert ran == tuple(CLAUSES)
    assert all(driver.open_resources() == NOTHING for driver in drivers)


def test_describes_its_device(driver):
    backend = CudaBackend(2, driver=driver)
    assert isinstance(backend, MemoryBackend)
    assert backend.device == "cuda:2"
    assert backend.page_bytes == driver.granularity
    assert backend.uuid.endswith("0002")
    assert backend.name == "Fake GPU"
    assert backend.total_bytes == backend.available() == driver.capacity
    backend.shutdown()
    assert driver.open_resources() == NOTHING


@pytest.mark.parametrize(
    ("text", "ordinal"),
    [
        ("cuda", 0),
        ("cuda:1", 1),
        (2, 2),
        ("1", 1),
        ("GPU-00000000-0000-fa4e-0000-000000000001", 1),
        ("00000000-0000-FA4E-0000-000000000002", 2),
    ],
)
def test_devices_by_ordinal_and_uuid(driver, text, ordinal):
    backend = CudaBackend(text, driver=driver)
    assert backend.device == f"cuda:{ordinal}"
    backend.shutdown()


@pytest.mark.parametrize("device", ["cuda:3", 7, "GPU-00000000-0000-fa4e-0000-00000000000f"])
def test_devices_that_are_not_there(driver, device):
    with pytest.raises(UnknownName, match="this process sees 3"):
        CudaBackend(device, driver=driver)
    assert driver.open_resources() == NOTHING


@pytest.mark.parametrize("device", ["cpu", "cuda:x", "GPU-12", True, -1])
def test_devices_that_make_no_sense(driver, device):
    with pytest.raises(InvalidInput, match="is not a CUDA device"):
        CudaBackend(device, driver=driver)


def test_without_a_driver_library():
    class NoLibrary(FakeCudaDriver):
        def cuInit(self, flags):  # noqa: N802
            raise RuntimeError("libcuda.so.1 was not found")

    with pytest.raises(BackendUnavailable, match=r"libcuda\.so\.1 was not found") as caught:
        CudaBackend(driver=NoLibrary())
    assert "no NVIDIA driver was found" in caught.value.message
    assert "older" not in caught.value.message
    assert "nvidia-smi" in caught.value.hint


def test_without_a_device(driver):
    driver.fail("cuInit", status="CUDA_ERROR_NO_DEVICE")
    with pytest.raises(BackendUnavailable, match="CUDA_ERROR_NO_DEVICE"):
        CudaBackend(driver=driver)


def test_a_driver_that_is_too_old():
    with pytest.raises(BackendUnavailable, match=r"knows CUDA up to 11\.8") as caught:
        CudaBackend(driver=FakeCudaDriver(version=11_080))
    assert "525" in caught.value.hint


def test_a_driver_without_a_function_that_the_bindings_want(driver):
    def missing(*_):
        raise RuntimeError('Function "cuMemCreate" not found')

    driver.cuMemCreate = missing
    backend = CudaBackend(driver=driver)
    with pytest.raises(BackendUnavailable, match="older than cuda-bindings") as caught:
        backend.create(1)
    assert "pip install" in caught.value.hint


def test_the_real_bindings_have_all_that_is_called():
    """Where they are installed; tried with 12.9 and 13.3. No driver is needed for it."""
    driver = pytest.importorskip("cuda.bindings.driver")
    wanted = {*(name for name in vars(Driver) if name.startswith("cu")), *Driver.__annotations__}
    assert len(wanted) > 35
    assert {name for name in wanted if not hasattr(driver, name)} == set()


def test_a_device_that_lets_nobody_in():
    driver = FakeCudaDriver(compute_mode=2)
    with pytest.raises(BackendUnavailable, match="lets this process in no more") as caught:
        CudaBackend(driver=driver)
    assert "COMPUTE" in caught.value.hint
    assert driver.open_resources() == NOTHING


@pytest.mark.parametrize(
    ("status", "hint"),
    [("CUDA_ERROR_NO_DEVICE", "CUDA_VISIBLE_DEVICES"),
     ("CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", "reboot"), ("CUDA_ERROR_UNKNOWN", "nvidia-smi")],
)  # fmt: skip
def test_what_cuinit_says_has_a_remedy(driver, status, hint):
    driver.fail("cuInit", status=status)
    with pytest.raises(BackendUnavailable, match=status) as caught:
        CudaBackend(driver=driver)
    assert hint in caught.value.hint


def test_without_virtual_memory_management():
    driver = FakeCudaDriver(vmm=False)
    with pytest.raises(BackendUnavailable, match="virtual memory management"):
        CudaBackend(driver=driver)
    assert driver.open_resources() == NOTHING


def test_exportable_handles_where_allowed():
    for allowed in (True, False):
        driver = FakeCudaDriver(exportable=allowed)
        backend = CudaBackend(driver=driver, exportable=True)
        assert backend.exportable  # not refused so far
        backend.release(backend.create(1))
        assert backend.exportable is allowed
        backend.shutdown()


def test_statuses_become_errors(driver):
    backend = CudaBackend(driver=driver)
    with pytest.raises(OutOfPages, match=r"cuMemCreate says CUDA_ERROR_OUT_OF_MEMORY for 2\.0 MiB"):
        backend.create((2 << 20) // backend.page_bytes)
    driver.fail("cuMemAddressReserve", status="CUDA_ERROR_NOT_PERMITTED")
    with pytest.raises(DriverError) as caught:
        backend.reserve(backend.page_bytes)
    assert caught.value.status == "CUDA_ERROR_NOT_PERMITTED"
    assert caught.value.call == "cuMemAddressReserve"
    assert not isinstance(caught.value, MemoryError)
    backend.check()
    backend.shutdown()


def test_mistakes_never_reach_the_driver(driver):
    backend = CudaBackend(driver=driver)
    reservation, handle = backend.reserve(4 * backend.page_bytes), backend.create(2)
    backend.map(reservation, 1, handle)
    before = driver.calls.copy()
    for mistake in (
        lambda: backend.map(reservation, 2, handle),
        lambda: backend.unmap(reservation, 0, handle),
        lambda: backend.release(handle),
        lambda: backend.close(reservation),
        lambda: backend.reserve(1),
        backend.shutdown,
    ):
        with pytest.raises(InvalidInput):
            mistake()
    assert driver.calls == before
    backend.unmap(reservation, 1, handle)
    backend.release(handle)
    backend.close(reservation)
    backend.shutdown()


def test_a_thread_keeps_its_own_context(driver):
    driver.cuInit(0)
    driver.cuCtxPushCurrent(0xBEEF)
    backend = CudaBackend(driver=driver)
    backend.available()
    backend.fence().close()
    driver.fail("cuMemGetInfo")
    with pytest.raises(DriverError):
        backend.available()
    assert driver.contexts == [0xBEEF]
    backend.shutdown()
    assert driver.contexts == [0xBEEF]


def test_fences_are_polled_and_give_their_event_back(driver):
    backend = CudaBackend(driver=driver)
    driver.work_pending = True
    fence = backend.fence()
    assert isinstance(fence, Fence)
    assert not fence.passed()
    assert not fence.passed()
    driver.finish()
    assert fence.passed()
    assert not driver.events
    queries = driver.calls["cuEventQuery"]
    assert fence.passed()  # stays true, asks nobody
    assert driver.calls["cuEventQuery"] == queries
    backend.shutdown()


def test_a_fence_that_fails_says_so_and_is_not_passed(driver):
    backend = CudaBackend(driver=driver)
    fence = backend.fence()
    driver.fail("cuEventQuery", status="CUDA_ERROR_ILLEGAL_ADDRESS")
    with pytest.raises(DriverError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        fence.passed()
    assert fence.passed()
    driver.fail("cuEventRecord")
    with pytest.raises(DriverError):
        backend.fence()
    backend.fence()  # never polled: shutdown destroys it
    backend.shutdown()
    assert driver.open_resources() == NOTHING


def test_a_map_that_cannot_be_undone_says_so(driver):
    backend = CudaBackend(driver=driver)
    reservation, handle = backend.reserve(backend.page_bytes), backend.create(1)
    driver.fail("cuMemSetAccess")
    driver.fail("cuMemUnmap")
    with pytest.raises(PoolBroken, match="could not be undone"):
        backend.map(reservation, 0, handle)


def test_released_memory_is_free_only_when_unmapped_everywhere(driver):
    """The fake keeps the driver's rule, so the backend's own check is what protects it."""
    backend = CudaBackend(driver=driver)
    reservation, handle = backend.reserve(4 * backend.page_bytes), backend.create(1)
    for page_index in (0, 2):
        backend.map(reservation, page_index, handle)
    backend.unmap(reservation, 0, handle)
    assert backend.available() == driver.capacity - backend.page_bytes
    backend.unmap(reservation, 2, handle)
    backend.release(handle)
    assert backend.available() == driver.capacity
    backend.close(reservation)
    backend.shutdown()


def test_after_shutdown_and_after_a_fork(driver):
    backend, other = CudaBackend(driver=driver), CudaBackend(driver=driver)
    fence = backend.fence()
    backend.shutdown()
    for call in (backend.available, fence.close, backend.check, backend.fence):
        if call == fence.close:
            call()  # idempotent: shutdown closed it
            continue
        with pytest.raises(ClosedError):
            call()
    calls = driver.calls.copy()
    other.disown()  # what the hook does in the child
    for call in (other.available, other.check, lambda: other.create(1), lambda: other.reserve(64)):
        with pytest.raises(ForkedProcessError):
            call()
    other.shutdown()
    assert driver.calls == calls  # nothing is asked of a driver that belongs to the parent


def _work(backend, driver):
    reservation, handle = backend.reserve(8 * backend.page_bytes), backend.create(2)
    try:
        backend.map(reservation, 1, handle)
        try:
            backend.map(reservation, 4, handle)
            try:
                driver.write(reservation.address + backend.page_bytes, b"abc")
                backend.copy(reservation.address + 2 * backend.page_bytes,
                             reservation.address + backend.page_bytes, 3)  # fmt: skip
                backend.fence().passed()
            finally:
                backend.unmap(reservation, 4, handle)
        finally:
            backend.unmap(reservation, 1, handle)
    finally:
        backend.release(handle)
        backend.close(reservation)


def _give_back_all(backend):
    for rng in list(backend._books.ranges.values()):
        for page_index, state in list(rng.handles.items()):
            backend.unmap(rng.reservation, page_index, state.handle)
        backend.close(rng.reservation)
    for state in list(backend._books.handles.values()):
        backend.release(state.handle)
    backend.shutdown()


def live(driver, made):
    made.append(CudaBackend(driver=driver))
    _work(made[0], driver)


@pytest.mark.parametrize("status", ["CUDA_ERROR_UNKNOWN", "CUDA_ERROR_OUT_OF_MEMORY"])
def test_nth_driver_call_fails(status):
    """F7, F8: every call site of a whole life, from cuInit on; nothing leaks, books agree."""
    failed_in = set()
    for fail_at in itertools.count(1):
        driver, made = FakeCudaDriver(), []
        driver.fail("*", fail_at, status=status)
        try:
            live(driver, made)
        except KvcachedError as error:
            call = driver.last_failed
            failed_in.add(call)
            broken = isinstance(error, PoolBroken)
        else:
            break
        assert not broken
        driver.heal()
        for backend in made:
            backend.check()
            _give_back_all(backend)
        # A pop that fails leaves the context on the thread's stack: nobody can mend that.
        assert driver.open_resources() == NOTHING or call == "cuCtxPopCurrent", (fail_at, call)
    assert failed_in == set(driver.calls)
