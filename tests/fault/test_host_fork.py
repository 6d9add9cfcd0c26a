"""Fork without exec (F5): the child may not use the memory, and keeps none of it."""

import json
import subprocess
import sys

import pytest

# Runs in a process of its own, so that nothing of pytest is forked.
SCRIPT = """
import ctypes, json, os, sys, time
from kvcached.errors import ForkedProcessError
from kvcached.memory.host import HostBackend

PAGE = 1 << 20
MODE = sys.argv[1]
backend = HostBackend(PAGE, memory="memfd")
if MODE == "race":  # the fork falls between the mmap and the madvise of another thread
    backend._calls.madvise = lambda address, nbytes, advice: None
reservation = backend.reserve(64 * PAGE)
handles = [backend.create(8) for _ in range(8)]
for i, handle in enumerate(handles):
    backend.map(reservation, 8 * i, handle)
ctypes.memset(reservation.address, 0xAB, 64 * PAGE)

def refused(call):
    try:
        call()
    except ForkedProcessError:
        return True
    return False

def in_child():
    calls = [
        lambda: backend.reserve(PAGE), lambda: backend.create(1), lambda: backend.available(),
        lambda: backend.map(reservation, 0, handles[0]), lambda: backend.check(),
        lambda: backend.unmap(reservation, 0, handles[0]), lambda: backend.release(handles[0]),
        lambda: backend.close(reservation), lambda: backend.copy(0, 0, 0),
        lambda: backend.resident_bytes(),
    ]
    memfds = [fd for fd in os.listdir("/proc/self/fd")
              if os.path.islink(f"/proc/self/fd/{fd}")
              and "kvcached" in os.readlink(f"/proc/self/fd/{fd}")]
    with open("/proc/self/maps") as maps:
        mapped = sum("memfd:kvcached" in line for line in maps)
    backend.shutdown()
    own = HostBackend(PAGE)  # a backend made after the fork works
    rng, handle = own.reserve(PAGE), own.create(1)
    own.map(rng, 0, handle)
    ctypes.memset(rng.address, 1, PAGE)
    own.unmap(rng, 0, handle); own.release(handle); own.close(rng); own.shutdown()
    return {"refused": sum(map(refused, calls)), "calls": len(calls),
            "memfds": len(memfds), "mapped": mapped}

def shmem():
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("Shmem:"))

to_parent, from_child = os.pipe()
to_child, from_parent = os.pipe()
pid = os.fork()
if pid == 0:
    try:
        os.write(from_child, json.dumps(in_child()).encode() + b"\\n")
        if MODE == "touch":
            ctypes.string_at(reservation.address, 1)
        os.read(to_child, 1)  # live on until the parent has looked
    finally:
        os._exit(0)
report = json.loads(os.read(to_parent, 1 << 16))
report["parent_reads"] = ctypes.string_at(reservation.address, 1) == b"\\xab"
if MODE == "touch":
    report["child_signal"] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
before = shmem()
for i, handle in enumerate(handles):
    backend.unmap(reservation, 8 * i, handle)
    if MODE != "fd":
        backend.release(handle)
if MODE == "fd":
    # The parent lets go of everything at once, as when it is killed: the memory is gone with the
    # last reference to the file, so the child must hold none.
    os.close(backend._memory.fd)
# Other processes of the machine move Shmem too, so wait a little for most of it.
end = time.monotonic() + 5
while before - shmem() < 48 * PAGE and time.monotonic() < end:
    time.sleep(0.02)
report["returned"] = before - shmem()
if MODE != "touch":
    os.write(from_parent, b"x")
    os.waitpid(pid, 0)
if MODE != "fd":
    backend.check()
    backend.close(reservation)
    backend.shutdown()
print(json.dumps(report))
"""


# Private memory: 64 MiB mapped, 32 at rest, 32 parked. The kernel gives none of it to a child.
PRIVATE = """
import ctypes, json, os, sys
from kvcached.errors import ForkedProcessError
from kvcached.memory import forks
from kvcached.memory.host import HostBackend

PAGE, MODE = 1 << 20, sys.argv[1]
backend = HostBackend(PAGE)
reservation, handles = backend.reserve(128 * PAGE), [backend.create(32) for _ in range(4)]
for i, page in enumerate((0, 32, 64, 64)):
    if MODE == "race" and i == 3:  # the fork falls between its mmap and its madvise
        backend._calls.madvise = lambda address, nbytes, advice: None
    backend.map(reservation, page, handles[i])
    ctypes.memset(reservation.address + page * PAGE, 1 + i, 32 * PAGE)
    if i == 2:
        backend.unmap(reservation, page, handles[i])  # the next one parks it
backend.unmap(reservation, 0, handles[0])

def rss():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

def refused():
    try:
        backend.create(1)
    except ForkedProcessError:
        return True
    return False

if MODE == "plain":  # a child that knows nothing of us: C code that calls fork()
    forks._LIVE.clear()
before = rss()
read, write = os.pipe()
pid = os.fork()
if pid == 0:
    try:
        ours = MODE == "plain" or refused()
        os.write(write, json.dumps({"child": rss(), "parent": before, "refused": ours}).encode())
        ctypes.string_at(reservation.address + 33 * PAGE, 1)
    finally:
        os._exit(0)
report = json.loads(os.read(read, 1 << 16))
report["signal"] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
backend.unmap(reservation, 64, handles[3])
backend.map(reservation, 96, handles[2])
backend.map(reservation, 0, handles[0])
report["kept"] = [ctypes.string_at(reservation.address + page * PAGE, 1)[0]
                  for page in (0, 32, 96)]
backend.check()
for page, handle in ((0, 0), (32, 1), (96, 2)):
    backend.unmap(reservation, page, handles[handle])
for handle in handles:
    backend.release(handle)
report["left"] = rss()
backend.close(reservation)
backend.shutdown()
print(json.dumps(report))
"""


def run(mode, script=SCRIPT):
    command = [sys.executable, "-W", "ignore", "-c", script, mode]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("mode", ["release", "fd", "race"])
def test_child_holds_nothing_and_memory_comes_back_while_it_lives(mode):
    report = run(mode)
    assert report["refused"] == report["calls"]
    assert report["memfds"] == 0
    assert report["mapped"] == 0
    assert report["parent_reads"]
    assert report["returned"] > 48 << 20


def test_child_that_touches_the_memory_is_stopped_and_the_parent_is_unharmed():
    report = run("touch")
    assert report["child_signal"] == -11
    assert report["parent_reads"]


@pytest.mark.parametrize("mode", ["hooks", "plain", "race"])
def test_private_memory_is_not_given_to_a_child(mode):
    report = run(mode, PRIVATE)
    assert report["parent"] > 128 << 20
    assert report["child"] < 32 << 20
    assert report["refused"]
    assert report["signal"] == -11
    assert report["kept"] == [1, 2, 3]
    assert report["left"] < 32 << 20
