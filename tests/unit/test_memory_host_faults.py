"""HostBackend: what happens when an operating-system call fails."""

import ctypes
import errno
import itertools
import os
import subprocess
import sys

import pytest
from host_maps import PAGE, maps_of

from kvcached.config import HOST_MEMORY
from kvcached.errors import BackendUnavailable, DriverError, OutOfPages, PoolBroken
from kvcached.memory.host import HostBackend
from kvcached.memory.os_calls import OsCalls, translate

every_memory = pytest.mark.parametrize("memory", HOST_MEMORY)
WITH_CONTENTS = (2, 3, 4)


class FailingCalls(OsCalls):
    """Fails the ``fail_at``-th call, or all from there on, before it reaches the kernel."""

    def __init__(self, number=errno.ENOMEM):
        self.number, self.fail_at, self.sticky, self.seen = number, None, False, 0

    def arm(self, fail_at, *, sticky=False):
        self.fail_at, self.sticky, self.seen = fail_at, sticky, 0

    def _step(self):
        self.seen += 1
        if self.fail_at and (
            self.seen == self.fail_at or (self.sticky and self.seen > self.fail_at)
        ):
            raise OSError(self.number, os.strerror(self.number))


for _name in ("mmap", "munmap", "madvise", "mprotect", "move", "punch_hole"):

    def _failing(self, *args, _name=_name):
        self._step()
        return getattr(OsCalls, _name)(self, *args)

    setattr(FailingCalls, _name, _failing)


def snapshot(backend):
    books = backend._books
    return (
        sorted((r.reservation.address, sorted(r.handles)) for r in books.ranges.values()),
        sorted((key, state.mapped) for key, state in books.handles.items()),
        sorted(backend._memory._places),
        books.handle_bytes,
    )


def operations(backend):
    """Each public operation, on a backend with something mapped; returns them by name."""
    reservation, other = backend.reserve(8 * PAGE), backend.reserve(2 * PAGE)
    mapped, (used, rested, parked) = backend.create(2), (backend.create(1) for _ in range(3))
    assert (used.key, rested.key, parked.key) == WITH_CONTENTS
    loose, fresh = backend.create(1), backend.create(1)
    backend.map(reservation, 0, mapped)
    for where, page_index, handle in (
        (reservation, 4, used), (other, 0, rested), (reservation, 5, parked),
    ):  # fmt: skip
        backend.map(where, page_index, handle)
        ctypes.memset(where.address + page_index * PAGE, 0x77, PAGE)
        backend.unmap(where, page_index, handle)
    backend.map(reservation, 5, loose)  # in the way of what rests there
    backend.unmap(reservation, 5, loose)
    steps = {
        "reserve": lambda: backend.close(backend.reserve(2 * PAGE)),
        "map": lambda: backend.map(reservation, 3, fresh),
        "map again": lambda: backend.map(reservation, 4, used),
        "map elsewhere": lambda: backend.map(reservation, 3, used),
        "map in the way": lambda: backend.map(reservation, 4, loose),
        "map what is parked": lambda: backend.map(reservation, 3, parked),
        "unmap": lambda: backend.unmap(reservation, 0, mapped),
        "release": lambda: backend.release(used),
        "release what is parked": lambda: backend.release(parked),
        "close": lambda: backend.close(other),
    }

    def clean():
        for state in list(backend._books.ranges.values()):
            for page_index, handle_state in list(state.handles.items()):
                backend.unmap(state.reservation, page_index, handle_state.handle)
            backend.close(state.reservation)
        for handle_state in list(backend._books.handles.values()):
            backend.release(handle_state.handle)
        backend.shutdown()

    return steps, reservation, clean


def contents(backend, handles):
    """A byte of each handle that is mapped nowhere, found by mapping it."""
    place, found = backend.reserve(PAGE), []
    for state in handles:
        if not state.mapped and state.handle.num_pages == 1:
            backend.map(place, 0, state.handle)
            found.append(ctypes.string_at(place.address + PAGE - 1, 1))
            backend.unmap(place, 0, state.handle)
    backend.close(place)
    return found


def gone(backend):
    """How many of the three handles with contents are released, or mapped now."""
    states = [backend._books.handles.get(key) for key in WITH_CONTENTS]
    return sum(state is None or state.mapped > 0 for state in states)


def attempt(step):
    try:
        step()
    except (OutOfPages, DriverError):
        return True
    return False


STEPS = ("map", "map again", "map elsewhere", "map in the way", "map what is parked",
         "unmap", "release", "release what is parked", "close")  # fmt: skip


@every_memory
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EAGAIN, errno.EINTR, errno.EPERM])
def test_nth_os_call_fails_once(name, number, memory):
    """F7: an exception of ours, books unchanged, contents unchanged, and the retry works."""
    calls, failures, reached = FailingCalls(number), 0, True
    for fail_at in itertools.count(1):
        calls.arm(None)
        backend = HostBackend(PAGE, calls=calls, memory=memory)
        steps, reservation, clean = operations(backend)
        ctypes.memset(reservation.address, 0x5A, 2 * PAGE)
        before, lines = snapshot(backend), maps_of(reservation)
        calls.arm(fail_at)
        failed = attempt(steps[name])
        reached = calls.seen >= fail_at
        calls.arm(None)
        if failed:
            failures += 1
            assert snapshot(backend) == before
            assert maps_of(reservation) == lines
            assert ctypes.string_at(reservation.address, 2 * PAGE) == b"\x5a" * 2 * PAGE
            if fail_at % 2:  # or else: whether the contents are still there without a retry
                assert not attempt(steps[name])
        backend.check()
        held = contents(backend, backend._books.handles.values())
        assert held.count(b"\x77") == 3 - gone(backend), name
        clean()
        if not reached:
            break
    # An interrupted fallocate is retried by the backend itself.
    assert failures or (memory, number) == ("memfd", errno.EINTR)


@pytest.mark.parametrize("sticky", [False, True])
def test_nth_os_call_of_reserve_fails(sticky):
    """The page is larger than the system's, so both ends are cut off: up to three calls."""
    calls, failures = FailingCalls(), 0
    backend = HostBackend(2 << 20, calls=calls)
    for fail_at in (1, 2, 3):
        calls.arm(fail_at, sticky=sticky)
        made = []
        failures += attempt(lambda made=made: made.append(backend.reserve(2 << 20)))
        calls.arm(None)
        for reservation in made:
            backend.close(reservation)
        assert snapshot(backend) == ([], [], [], 0)
        backend.check()
    assert failures >= 2
    backend.shutdown()


@every_memory
@pytest.mark.parametrize("name", ["reserve", *STEPS])
def test_every_os_call_from_the_nth_on_fails(name, memory):
    calls = FailingCalls(errno.EPERM)
    backend = HostBackend(PAGE, calls=calls, memory=memory)
    steps, _, clean = operations(backend)
    before = snapshot(backend)
    calls.arm(1, sticky=True)
    with pytest.raises(DriverError, match="EPERM") as caught:
        steps[name]()
    assert caught.value.status == "EPERM"
    calls.arm(None)
    assert snapshot(backend) == before
    backend.check()
    clean()


@every_memory
def test_a_map_that_cannot_be_undone_says_so(memory):
    calls = FailingCalls(errno.EPERM)
    backend = HostBackend(PAGE, calls=calls, memory=memory)
    steps, _, clean = operations(backend)
    calls.arm(2, sticky=True)  # mmap works; madvise and everything after it fails
    with pytest.raises(PoolBroken, match="could not be undone"):
        steps["map"]()
    calls.arm(None)
    clean()


@every_memory
def test_a_hole_left_by_a_failed_map_is_covered(memory):
    """Old kernels may drop the old mapping before MAP_FIXED fails."""

    class HoleCalls(OsCalls):
        armed = False

        def mmap(self, address, nbytes, prot, flags, fd, offset):
            if self.armed and prot:
                self.munmap(address, nbytes)
                raise OSError(errno.ENOMEM, "no memory")
            return super().mmap(address, nbytes, prot, flags, fd, offset)

    calls = HoleCalls()
    backend = HostBackend(PAGE, calls=calls, memory=memory)
    reservation, handle = backend.reserve(8 * PAGE), backend.create(1)
    calls.armed = True
    with pytest.raises(OutOfPages):
        backend.map(reservation, 3, handle)
    assert maps_of(reservation) == [(8, "---p")]
    backend.release(handle)
    backend.close(reservation)
    backend.shutdown()


def test_no_memfd_is_backend_unavailable():
    class NoMemfd(OsCalls):
        def memfd(self, name, nbytes):
            raise OSError(errno.EMFILE, "Too many open files")

    with pytest.raises(BackendUnavailable, match="EMFILE"):
        HostBackend(PAGE, calls=NoMemfd(), memory="memfd")


def test_interrupted_punch_is_retried_a_bounded_number_of_times():
    calls = FailingCalls(errno.EINTR)
    backend = HostBackend(PAGE, calls=calls, memory="memfd")
    reservation, handle = backend.reserve(PAGE), backend.create(1)
    backend.map(reservation, 0, handle)
    backend.unmap(reservation, 0, handle)
    calls.arm(1, sticky=True)
    with pytest.raises(DriverError, match="EINTR"):
        backend.release(handle)
    assert calls.seen < 50
    calls.arm(1)
    backend.release(handle)
    assert calls.seen == 2
    calls.arm(None)
    backend.close(reservation)
    backend.shutdown()


def test_out_of_mappings_names_the_sysctl(monkeypatch, tmp_path):
    error = OSError(errno.ENOMEM, "Cannot allocate memory")
    assert "vm.max_map_count" not in str(translate(error, "mmap", "cannot map"))
    fake = tmp_path / "max_map_count"
    fake.write_text("10\n")
    monkeypatch.setattr("kvcached.memory.os_calls.MAX_MAP_COUNT", str(fake))
    assert "raise sysctl vm.max_map_count" in str(translate(error, "mmap", "cannot map"))


EXHAUST = """
from kvcached.errors import OutOfPages
from kvcached.memory.host import HostBackend

def lines():
    with open("/proc/self/maps") as maps:
        return sum(1 for _ in maps)

backend = HostBackend(4096, memory="{memory}")
reservation, mapped, before = backend.reserve(4096 * {most}), [], lines()
other = backend.create(1)
try:
    for page_index in range(0, {most}, 2):  # no two neighbours: each is a mapping of its own
        handle = backend.create(1)
        backend.map(reservation, page_index, handle)
        mapped.append((page_index, handle))
except OutOfPages as error:
    print("vm.max_map_count" in str(error))
backend.check()
backend.release(handle)
print(lines() < {most} * 0.92)
for page_index, handle in mapped:
    backend.unmap(reservation, page_index, handle)
    backend.release(handle)
print(lines() < before + 500)  # Python itself maps some memory meanwhile
backend.map(reservation, 0, other)
backend.unmap(reservation, 0, other)
backend.release(other)
backend.close(reservation)
backend.shutdown()
"""


def max_map_count():
    with open("/proc/sys/vm/max_map_count") as file:
        return int(file.read())


@pytest.mark.skipif(max_map_count() > 100_000, reason="would take very many mappings")
@every_memory
@pytest.mark.slow
def test_mappings_run_out_before_those_of_the_process_do(memory):
    """At vm.max_map_count malloc fails too, so we stop short of it, and can still unmap."""
    script = EXHAUST.format(most=max_map_count() + 10, memory=memory)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "True\n" * 3
