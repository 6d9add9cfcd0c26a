"""The test tools themselves: a suite that cannot fail proves nothing."""

import pytest

from kvcached.errors import DriverError, InvalidInput, OutOfPages
from kvcached.memory.base import Fence, Handle, MemoryBackend, Reservation
from kvcached.testing import (
    CLAUSES,
    OPERATIONS,
    CountingBackend,
    FailingBackend,
    FakeBackend,
    LimitedBackend,
    ManualFence,
    check_memory_backend,
    model_specs,
)


def life(backend):
    """One of each operation but ``available``: 8 calls."""
    reservation, handle = backend.reserve(4 * backend.page_bytes), backend.create(2)
    backend.map(reservation, 1, handle)
    start = reservation.address + backend.page_bytes
    backend.copy(start + backend.page_bytes, start, backend.page_bytes)
    backend.copy_many([(start + backend.page_bytes, start, backend.page_bytes)])
    backend.unmap(reservation, 1, handle)
    backend.release(handle)
    backend.close(reservation)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda inner: inner,
        CountingBackend,
        FailingBackend,
        lambda inner: LimitedBackend(inner, 1 << 12),
        lambda inner: CountingBackend(FailingBackend(LimitedBackend(inner, 1 << 12))),
    ],
)
def test_fake_and_wrappers_conform(wrap):
    ran = check_memory_backend(lambda: wrap(FakeBackend(capacity_pages=64)))
    assert ran == tuple(CLAUSES)
    assert isinstance(wrap(FakeBackend()), MemoryBackend)


class ForgetsUnmap(FakeBackend):
    def unmap(self, reservation, page_index, handle):
        self._require_open()


class ReleasesAnything(FakeBackend):
    def release(self, handle):
        if handle.key in self._contents and not self._books.handles[handle.key].mapped:
            super().release(handle)


class CopiesBackwards(FakeBackend):
    def copy(self, dst, src, nbytes):
        super().copy(src, dst, nbytes)


class DirtyMemory(FakeBackend):
    def create(self, num_pages):
        handle = super().create(num_pages)
        self._contents[handle.key][-1] = 1
        return handle


class ReusesKeys(FakeBackend):
    def release(self, handle):
        super().release(handle)
        self._books._last_key -= 1


class ClosesWithMappings(FakeBackend):
    def close(self, reservation):
        self._books.drop_range(self._books._range(reservation))


class ForgivingShutdown(FakeBackend):
    def shutdown(self):
        self._closed = True


class Endless(FakeBackend):
    def __init__(self):
        super().__init__()
        self._capacity = 1 << 60

    def create(self, num_pages):
        return super().create(min(num_pages, 8) if num_pages > 8 else num_pages)


class RoundsSizesUp(FakeBackend):
    def reserve(self, nbytes):
        return super().reserve(-(-nbytes // self.page_bytes) * self.page_bytes)


class MapsOver(FakeBackend):
    def map(self, reservation, page_index, handle):
        for page in list(self._books.ranges[reservation.address].handles):
            if page == page_index:
                old = self._books.ranges[reservation.address].handles[page].handle
                self.unmap(reservation, page, old)
        super().map(reservation, page_index, handle)


@pytest.mark.parametrize(
    "broken",
    [
        ForgetsUnmap,
        ReleasesAnything,
        CopiesBackwards,
        DirtyMemory,
        ReusesKeys,
        ClosesWithMappings,
        ForgivingShutdown,
        Endless,
        RoundsSizesUp,
        MapsOver,
    ],
)
def test_the_suite_catches_a_backend_that_is_wrong(broken):
    with pytest.raises(AssertionError) as caught:
        check_memory_backend(broken)
    assert any(str(caught.value).startswith(name) for name in CLAUSES)


def test_counting():
    backend = CountingBackend(FakeBackend())
    life(backend)
    assert dict(backend.calls) == dict.fromkeys(set(OPERATIONS) - {"available"}, 1)


def test_failing_at_each_operation_once():
    """After the one failure everything works; the failed call had no effect."""
    for fail_at in range(1, 9):
        backend = FailingBackend(FakeBackend(), fail_at)
        with pytest.raises((OutOfPages, DriverError), match="injected"):
            life(backend)
        assert (backend.seen, backend.raised) == (fail_at, 1)
        backend.inner.check()
    backend = FailingBackend(FakeBackend(), 9)
    life(backend)
    assert (backend.seen, backend.raised) == (8, 0)


def test_failing_for_good_and_only_some():
    backend = FailingBackend(
        FakeBackend(), 2, sticky=True, only=("create",), error=ZeroDivisionError
    )
    handle = backend.create(1)
    backend.reserve(64)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError, match="create"):
            backend.create(1)
    backend.release(handle)
    assert (backend.seen, backend.raised) == (4, 3)
    with pytest.raises(InvalidInput, match="mmap"):
        FailingBackend(FakeBackend(), only=("mmap",))


def test_limiting():
    backend = LimitedBackend(FakeBackend(64), 3 * 64)
    handle = backend.create(2)
    with pytest.raises(OutOfPages, match="128 of 192 taken"):
        backend.create(2)
    assert backend.available() == 64
    backend.release(handle)
    with pytest.raises(InvalidInput):
        backend.release(handle)
    assert backend.created_bytes == 0


def test_fake_faults_where_hardware_would():
    backend = FakeBackend(64)
    reservation, handle = backend.reserve(256), backend.create(1)
    backend.map(reservation, 1, handle)
    inside = reservation.address + 64
    backend.write(inside, b"x" * 64)
    assert backend.read(inside + 60, 4) == b"xxxx"
    for address, nbytes in ((inside - 1, 1), (inside + 63, 2), (0, 1), (inside + 64, 1)):
        with pytest.raises(InvalidInput, match="not mapped"):
            backend.read(address, nbytes)
        with pytest.raises(InvalidInput, match="not mapped"):
            backend.write(address, b"y" * nbytes)
    assert backend.read(inside, 64) == b"x" * 64
    assert backend.page_bytes == 64
    assert isinstance(reservation, Reservation)
    assert isinstance(handle, Handle)


def test_manual_fence():
    fence = ManualFence()
    assert isinstance(fence, Fence)
    assert not fence.passed()
    fence.done = True
    assert fence.passed()


def test_model_specs_hold_what_the_models_publish():
    specs = model_specs()
    assert len(specs) == 13
    assert specs["Llama-3.1-8B"].block_bytes == 2 << 20  # 2 MiB at 16 tokens of bfloat16
    assert specs["DeepSeek-V3"].token_bytes == 61 * 576 * 2
    assert specs["SmolLM2-135M"].token_bytes == 30 * 2 * 3 * 64 * 2
    halves = model_specs(dtype="float8_e4m3fn", block_size=32)
    assert all(halves[name].block_bytes == spec.block_bytes for name, spec in specs.items())
