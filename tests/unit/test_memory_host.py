"""HostBackend: the contract, and the kernel's view of it."""

import ctypes
import fcntl
import mmap
import os
import signal
import subprocess
import sys

import pytest
from host_maps import PAGE, lines_of, maps_of, rss_of

from kvcached.config import HOST_MEMORY
from kvcached.errors import ClosedError, InvalidInput, OutOfPages
from kvcached.memory.base import Handle, MemoryBackend
from kvcached.memory.host import HostBackend
from kvcached.memory.memfd import MemfdMemory
from kvcached.testing import CLAUSES, check_memory_backend


@pytest.fixture(params=HOST_MEMORY)
def memory(request):
    return request.param


@pytest.fixture
def backend(memory):
    backend = HostBackend(PAGE, memory=memory)
    yield backend
    backend.shutdown()


@pytest.mark.parametrize("page_bytes", [mmap.PAGESIZE, 1 << 16, 2 << 20])
def test_conforms(page_bytes, memory):
    ran = check_memory_backend(lambda: HostBackend(page_bytes, memory=memory))
    assert ran == tuple(CLAUSES)


def test_is_a_memory_backend(backend):
    assert isinstance(backend, MemoryBackend)
    assert backend.device == "cpu"
    assert backend.can_alias == (backend._memory.__class__ is MemfdMemory)
    assert HostBackend.__module__ == "kvcached.memory.host"


@pytest.mark.parametrize("page_bytes", [0, -4096, 2048, 3 << 20, "2M", 4096.0, True])
def test_bad_page_sizes(page_bytes):
    with pytest.raises(InvalidInput, match="power of two"):
        HostBackend(page_bytes)


@pytest.mark.parametrize("capacity", [-1, 1.5, "1G"])
def test_bad_capacities(capacity):
    with pytest.raises(InvalidInput, match="capacity_bytes"):
        HostBackend(capacity_bytes=capacity)


def test_unknown_memory():
    with pytest.raises(InvalidInput, match=r"'file'[\s\S]*anonymous"):
        HostBackend(memory="file")


def test_capacity_is_a_hard_limit():
    backend = HostBackend(PAGE, capacity_bytes=4 * PAGE)
    handle = backend.create(3)
    assert backend.available() == PAGE
    with pytest.raises(OutOfPages, match=r"128\.0 KiB: 192\.0 KiB of the capacity of 256\.0 KiB"):
        backend.create(2)
    backend.release(handle)
    backend.release(backend.create(4))
    backend.shutdown()


def test_reserving_costs_no_memory_and_any_size_fits(backend):
    reservation = backend.reserve(1 << 42)
    assert backend.resident_bytes() == 0
    assert maps_of(reservation) == [((1 << 42) // PAGE, "---p")]
    backend.close(reservation)


def test_reservation_beyond_the_address_space(backend):
    with pytest.raises(OutOfPages, match="ENOMEM"):
        backend.reserve(1 << 60)
    with pytest.raises(OutOfPages):
        backend.reserve((1 << 62) + PAGE)
    backend.check()


def test_kernel_counts_what_was_touched_and_released(backend):
    reservation, handle = backend.reserve(8 * PAGE), backend.create(2)
    backend.map(reservation, 3, handle)
    assert backend.resident_bytes() == 0  # committed at the first touch
    ctypes.memset(reservation.address + 3 * PAGE, 0xAB, 2 * PAGE)
    assert backend.resident_bytes() == 2 * PAGE
    backend.check()
    backend.unmap(reservation, 3, handle)
    assert backend.resident_bytes() == 2 * PAGE  # the handle keeps its contents
    assert maps_of(reservation) == [(8, "---p")]
    backend.release(handle)
    assert backend.resident_bytes() == rss_of(reservation) == 0
    backend.close(reservation)


def test_neighbours_become_one_mapping_in_any_order(backend):
    reservation = backend.reserve(16 * PAGE)
    handles = {i: backend.create(2) for i in (6, 2, 0, 4)}
    for page_index, handle in handles.items():
        backend.map(reservation, page_index, handle)
    mapped = "rw-s" if backend.can_alias else "rw-p"
    assert maps_of(reservation) == [(8, mapped), (8, "---p")]
    assert lines_of(reservation) == 2
    backend.unmap(reservation, 2, handles[2])
    backend.release(handles[2])
    handles[2] = backend.create(2)
    backend.map(reservation, 2, handles[2])
    assert maps_of(reservation) == [(8, mapped), (8, "---p")]
    for page_index, handle in handles.items():
        backend.unmap(reservation, page_index, handle)
        backend.release(handle)
    assert maps_of(reservation) == [(16, "---p")]
    assert lines_of(reservation) == 1
    backend.close(reservation)


def test_a_place_is_never_shared_by_two_handles(backend):
    """A handle first mapped at page 0 lives on elsewhere; the next one at page 0 is another."""
    reservation, moved = backend.reserve(4 * PAGE), backend.create(1)
    backend.map(reservation, 0, moved)
    backend.unmap(reservation, 0, moved)
    backend.map(reservation, 3, moved)
    second = backend.create(2)
    backend.map(reservation, 0, second)
    ctypes.memset(reservation.address, 1, 2 * PAGE)
    assert ctypes.string_at(reservation.address + 3 * PAGE, 1) == b"\0"
    ctypes.memset(reservation.address + 3 * PAGE, 2, PAGE)
    assert ctypes.string_at(reservation.address, 1) == b"\1"
    for page_index, handle in ((3, moved), (0, second)):
        backend.unmap(reservation, page_index, handle)
        backend.release(handle)
        assert backend.resident_bytes() <= 2 * PAGE
    assert backend.resident_bytes() == 0
    backend.close(reservation)


def test_the_memfd_is_sealed_and_not_inherited():
    backend = HostBackend(PAGE, memory="memfd")
    fd = backend._memory.fd
    assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    with pytest.raises(PermissionError):
        os.ftruncate(fd, PAGE)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 1 << 62 | PAGE)
    with pytest.raises(PermissionError):
        fcntl.fcntl(fd, 1033, 8)  # F_ADD_SEALS: nobody can seal it against us
    backend.shutdown()


def test_use_after_shutdown(memory):
    backend = HostBackend(PAGE, memory=memory)
    backend.shutdown()
    for call in (
        lambda: backend.map(None, 0, None),
        lambda: backend.release(Handle(1, 1)),
        lambda: backend.copy(0, 0, 0),
        backend.resident_bytes,
        backend.check,
    ):
        with pytest.raises(ClosedError, match="shut down"):
            call()


def test_shutdown_names_what_is_open(backend):
    handle = backend.create(2)
    with pytest.raises(InvalidInput, match=r"1 handles \(131072 bytes\) and 0 reservations"):
        backend.shutdown()
    backend.release(handle)


TOUCH = """
import ctypes
from kvcached.memory.host import HostBackend
backend = HostBackend({page}, memory="{memory}")
reservation, handle = backend.reserve(4 * {page}), backend.create(1)
backend.map(reservation, 1, handle)
ctypes.memset(reservation.address + {page}, 1, {page})
print("mapped is fine", flush=True)
if {unmap}:
    backend.unmap(reservation, 1, handle)
ctypes.string_at(reservation.address + {offset}, 1)
"""


@pytest.mark.parametrize(
    ("unmap", "offset"), [(False, 0), (False, 2 * PAGE), (True, PAGE), (False, 3 * PAGE)]
)
def test_touching_what_is_not_mapped_is_sigsegv(unmap, offset, memory):
    script = TOUCH.format(page=PAGE, unmap=unmap, offset=offset, memory=memory)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.stdout == b"mapped is fine\n"
    assert done.returncode == -signal.SIGSEGV


# --- over time ------------------------------------------------------------------------------------


def test_ten_thousand_cycles_leave_nothing_behind(backend):
    """F14: fds, mappings and resident memory are where they began."""
    reservation = backend.reserve(64 * PAGE)

    def cycle(i):
        page_index, num_pages = i * 7 % 61, 1 + i % 3
        handle = backend.create(num_pages)
        backend.map(reservation, page_index, handle)
        ctypes.memset(reservation.address + page_index * PAGE, i & 255, 1)
        backend.unmap(reservation, page_index, handle)
        backend.release(handle)

    def footprint():
        fds = len(os.listdir("/proc/self/fd"))
        return fds, maps_of(reservation), backend.resident_bytes(), rss_of(reservation)

    cycle(0)
    before = footprint()
    for i in range(10_000):
        cycle(i)
    assert footprint() == before
    backend.check()
    backend.close(reservation)
