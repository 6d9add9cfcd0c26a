from __future__ import annotations

import fcntl
import mmap
import os
import subprocess
import sys
import threading

import pytest

from kvcached.broker.mirror import NBYTES, SLOTS, MirrorReader, MirrorState, MirrorWriter
from kvcached.broker.probe import NoProbe, ShmemProbe, shmem_bytes


@pytest.fixture
def writer():
    writer = MirrorWriter()
    yield writer
    writer.close()


def test_what_is_written_is_read(writer):
    reader = MirrorReader(os.dup(writer.fd))
    writer.write(MirrorState(1 << 60, 5, 7, 1 << 63))
    writer.write_limit(SLOTS - 1, 99)
    assert reader.read() == MirrorState(1 << 60, 5, 7, 1 << 63)
    assert (reader.pressure, reader.limit(SLOTS - 1)) == (7, 99)
    reader.close()


def test_nobody_can_write_shrink_or_unseal_it(writer):
    with pytest.raises(PermissionError):
        mmap.mmap(writer.fd, NBYTES)
    with pytest.raises(PermissionError):
        os.pwrite(writer.fd, b"x", 0)
    for size in (0, 2 * NBYTES):
        with pytest.raises(PermissionError):
            os.ftruncate(writer.fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(writer.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_a_mixed_state_is_never_read(writer):
    """All fields of a state are equal here, so a mixture shows."""
    reader = MirrorReader(os.dup(writer.fd))
    ended = threading.Event()

    def write():
        value = 0
        while not ended.is_set():
            value += 1
            writer.write(MirrorState(value, value, value, value))

    thread = threading.Thread(target=write)
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread.start()
    try:
        for _ in range(20_000):
            state = reader.read()
            assert state is None or len(set(state)) == 1
    finally:
        ended.set()
        thread.join()
        sys.setswitchinterval(switch)
        reader.close()


def test_a_writer_killed_in_the_middle_leaves_no_mixed_state():
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from kvcached.broker.mirror import *\n"
        "import os, mmap\n"
        "w = MirrorWriter.__new__(MirrorWriter)\n"
        "w._fields = memoryview(mmap.mmap(int(sys.argv[2]), NBYTES)).cast('Q')\n"
        "v = w._fields[2]; os.write(1, b'.')\n"
        "while True:\n    v += 1; w.write(MirrorState(v, v, v, v))\n"
    )
    import kvcached

    package = os.path.dirname(os.path.dirname(kvcached.__file__))
    fd = os.memfd_create("mirror-of-a-test")
    os.ftruncate(fd, NBYTES)
    reader = MirrorReader(os.dup(fd))
    for _ in range(10):
        with subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", script, package, str(fd)],
            pass_fds=(fd,), stdout=subprocess.PIPE,
        ) as process:  # fmt: skip
            process.stdout.read(1)
            states = [reader.read() for _ in range(2000)]
            process.kill()
        states += [reader.read()]
        assert all(state is None or len(set(state)) == 1 for state in states)
        if reader._fields[0] % 2:  # as a new broker would begin: with a mirror of its own
            os.pwrite(fd, bytes(NBYTES), 0)
    reader.close()
    os.close(fd)


# --- the probe ----------------------------------------------------------------------------------


def test_shmem_counts_memfds():
    fd = os.memfd_create("probe")
    before = shmem_bytes()
    os.posix_fallocate(fd, 0, 64 << 20)
    during = shmem_bytes()
    os.close(fd)
    assert during - before > 48 << 20  # others use shared memory too


def test_bytes_are_back_when_the_rest_accounts_for_what_is_in_use():
    mib = 1 << 20
    used = [100 * mib]
    probe = ShmemProbe(used=lambda: used[0])
    used[0] += 300 * mib  # two tenants of 200 and 100
    probe.observe(300 * mib)
    assert not probe.is_back(200 * mib, 0)  # the one of 100 is dead, its bytes are still there
    used[0] -= 100 * mib
    assert probe.is_back(200 * mib, 0)


def test_untouched_leases_and_foreign_memory_do_not_delay():
    mib = 1 << 20
    used = [100 * mib]
    probe = ShmemProbe(used=lambda: used[0])
    assert probe.is_back(0, 0)  # claimed, never touched
    used[0] += 500 * mib  # another program's
    probe.observe(0)
    assert probe.is_back(0, 0)
    assert NoProbe().is_back(0, 0)
