"""Starts, freezes, kills and looks at engines and their broker. Only processes of its own."""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import kvcached
from kvcached.broker import protocol as p
from kvcached.broker.admin import list_tenants
from kvcached.broker.protocol import Message, Op
from kvcached.config import Config
from kvcached.errors import KvcachedError

PACKAGE = str(Path(kvcached.__file__).parent.parent)
SCRIPT = str(Path(__file__).with_name("broker_engine.py"))
TINY = [sys.executable, "-I", "-S", SCRIPT]
CACHE = [sys.executable, str(Path(__file__).with_name("cache_engine.py"))]
"""Engines: of memfd pages and nothing more, so that it starts soon; and a ``KVCache``."""


def until(condition, seconds=10.0, pause=0.005):
    """Wait for a condition; returns whether it came true, and its last value."""
    end = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < end:
        time.sleep(pause)
    return value


def connect(runtime_dir):
    """A socket to the broker of ``cpu``, for tests that write the messages themselves."""
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        peer.connect(f"{runtime_dir}/cpu.sock")
        peer.settimeout(5)
    except OSError:
        peer.close()
        raise
    return peer


def broker_fds():
    (device,) = list_tenants("cpu")
    return len(os.listdir(f"/proc/{device.broker_pid}/fd"))


def ping_seconds(runtime_dir, count=300):
    """What 95 of 100 round trips to the broker stay below, and not less than a millisecond.

    Compare it with another of the same machine and minute; by itself it says little.
    """
    times, ping = [], p.encode(Message(Op.PING, 1))
    with connect(runtime_dir) as peer:
        for _ in range(count):
            started = time.perf_counter()
            peer.send(ping)
            assert p.decode(peer.recv(p.MAX_MESSAGE)).op is Op.DONE
            times.append(time.perf_counter() - started)
    return max(0.001, sorted(times)[count * 95 // 100])


class Rig:
    def __init__(self, runtime_dir, slots=8, engine=TINY):
        self.engine = engine
        self.runtime_dir = str(runtime_dir)
        self.config = Config(runtime_dir=self.runtime_dir)
        self.truth_file = f"{Path(runtime_dir).parent}/truth"
        Path(self.truth_file).write_bytes(bytes(4096))
        fd = os.open(self.truth_file, os.O_RDWR)
        self._map = mmap.mmap(fd, 4096)
        os.close(fd)
        self.truth = memoryview(self._map).cast("q")
        self.engines = [None] * slots
        self.started = 0
        self.unready = set()

    def start(self, slot, mode="random", *, wait=True):
        self.truth[slot] = 0
        self.started += 1
        arguments = [PACKAGE, self.runtime_dir, f"e{slot}", self.truth_file]
        arguments += [str(slot), str(self.started), mode]
        environ = {**os.environ, "KVCACHED_RUNTIME_DIR": self.runtime_dir}
        self.engines[slot] = process = subprocess.Popen(
            [*self.engine, *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ,
        )  # fmt: skip
        self.unready.add(slot)
        if wait:
            self.expect(slot, "ready")
        return process

    def expect(self, slot, word):
        line = self.engines[slot].stdout.readline().strip()
        assert line == word, (line, self.engines[slot].stderr.read())
        self.unready.discard(slot)

    def kill(self, slot):
        """Returns what it held when it died, and what it had written to stderr."""
        process, self.engines[slot] = self.engines[slot], None
        process.kill()
        _, errors = process.communicate()
        held, self.truth[slot] = self.truth[slot], 0
        return held, errors

    def end(self, slot):
        """Ask an engine to close in order; returns what it wrote, to stdout and to stderr."""
        if slot in self.unready:  # before that, SIGTERM would just end it
            self.expect(slot, "ready")
        process, self.engines[slot] = self.engines[slot], None
        process.terminate()
        output, errors = process.communicate(timeout=20)
        assert process.returncode == 0, (process.returncode, errors)
        return output, errors

    def device(self):
        with contextlib.suppress(KvcachedError):
            for device in list_tenants("cpu", config=self.config):
                return device
        return None

    def broker_pid(self):
        device = until(self.device)
        assert device is not None, "no broker answers"
        return device.broker_pid

    def kill_broker(self):
        """Kill the broker that answers, and see it dead."""
        while True:
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                pid = self.broker_pid()
                pidfd = os.pidfd_open(pid)
                try:
                    command = Path(f"/proc/{pid}/cmdline").read_bytes()
                    assert self.runtime_dir.encode() in command, "not our broker"
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                    assert select.select([pidfd], [], [], 10)[0]
                finally:
                    os.close(pidfd)
                return

    @contextlib.contextmanager
    def frozen(self):
        alive = [process for process in self.engines if process is not None]
        for process in alive:
            process.send_signal(signal.SIGSTOP)
        try:
            for process in alive:
                until(lambda pid=process.pid: state_of(pid) in "TZX", 2.0, 0.001)
            yield
        finally:
            for process in alive:
                process.send_signal(signal.SIGCONT)

    def leftovers(self):
        return sorted(set(os.listdir(self.runtime_dir)) - {"cpu.log", "cpu.log.1"})

    def close(self):
        for slot, process in enumerate(self.engines):
            if process is not None:
                process.send_signal(signal.SIGCONT)
                self.kill(slot)
        device = self.device()
        if device is not None and not until(lambda: self.device() is None, 7.0):
            with contextlib.suppress(ProcessLookupError):
                os.kill(device.broker_pid, signal.SIGKILL)
        self.truth.release()
        self._map.close()


def state_of(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"
