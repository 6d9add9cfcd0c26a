"""A small engine for the fault tests: real memory, a lease, random growth and shrinkage.

Run as a process: ``broker_engine.py PACKAGE_PATH RUNTIME_DIR NAME TRUTH_FILE SLOT SEED MODE``.
``MODE``: ``random`` (until killed, or SIGTERM, then it closes in order), or ``hold:BYTES``.
Field SLOT of TRUTH_FILE always is at least the bytes of memory that this process has created.
"""

from __future__ import annotations

import mmap
import os
import random
import signal
import sys
import threading
import time

if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])

from kvcached.broker.client import BrokerBudget
from kvcached.config import Config
from kvcached.memory.host import HostBackend
from kvcached.stats import TenantReport

PAGE = 64 << 10
CAPACITY = 48 << 20


class Engine:
    """Handles of one page each; the older half counts as cached prefixes and may be reclaimed."""

    def __init__(self, runtime_dir, name, *, capacity=CAPACITY, limit=None, truth=None, slot=0):
        self.lock = threading.RLock()
        self.backend = HostBackend(PAGE, capacity_bytes=1 << 40, memory="memfd")
        self.reservation = self.backend.reserve(capacity)
        self.free = list(range(capacity // PAGE))
        self.held = []
        self.pinned = 0
        self.truth, self.slot = truth, slot
        self.budget = BrokerBudget(
            name, device="cpu", limit_bytes=limit, capacity_bytes=capacity,
            config=Config(runtime_dir=runtime_dir), meta={"slot": slot},
        )  # fmt: skip
        self.budget.attach(self, self.lock)

    def note(self):
        if self.truth is not None:
            self.truth[self.slot] = len(self.held) * PAGE

    def grow(self, pages):
        with self.lock:
            self.budget.claim(pages * PAGE)
            for _ in range(pages):
                index = self.free.pop()
                handle = self.backend.create(1)
                self.backend.map(self.reservation, index, handle)
                address = self.reservation.address + index * PAGE
                self.held.append((index, handle))
                self.note()
                self.backend.copy(address, self.backend_zeros(), PAGE)

    def backend_zeros(self):
        """An address to copy from: touching is what commits host memory."""
        return _ZEROS

    def shrink(self, pages):
        with self.lock:
            for _ in range(pages):
                index, handle = self.held.pop(0)
                self.backend.unmap(self.reservation, index, handle)
                self.backend.release(handle)
                self.free.append(index)
            self.note()
            self.budget.give_back(pages * PAGE)

    def reclaim(self, nbytes):
        pages = min(-(-nbytes // PAGE), max(0, len(self.held) - self.pinned))
        self.shrink(pages)
        return pages * PAGE

    def report(self):
        held = len(self.held) * PAGE
        pinned = min(self.pinned, len(self.held)) * PAGE
        return TenantReport(
            backed_bytes=held, in_use_bytes=pinned, cached_bytes=held - pinned,
            packed_floor_bytes=pinned, oldest_cached_age_s=1.0 if held > pinned else 0.0,
        )  # fmt: skip

    def close(self):
        with self.lock:
            if self.held:
                self.shrink(len(self.held))
        self.budget.close()
        self.backend.close(self.reservation)
        self.backend.shutdown()


def _zeros():
    import ctypes

    buffer = ctypes.create_string_buffer(b"\x01" * PAGE, PAGE)
    return buffer, ctypes.addressof(buffer)


_BUFFER, _ZEROS = _zeros()


def churn(engine, rng, ended):
    """Random load until ``ended``; refusals are part of it."""
    refused = 0
    while not ended.is_set():
        with engine.lock:
            held = len(engine.held)
            engine.pinned = held // 3
        try:
            if rng.random() < 0.6 or not held:
                engine.grow(rng.randint(1, 24))
            else:
                with engine.lock:
                    engine.shrink(min(rng.randint(1, 24), len(engine.held)))
        except MemoryError:
            refused += 1
            time.sleep(0.002)
        engine.budget.check()
        time.sleep(0.001)
    return refused


def main():
    _, _, runtime_dir, name, truth_file, slot, seed, mode = sys.argv
    fd = os.open(truth_file, os.O_RDWR)
    truth = memoryview(mmap.mmap(fd, 4096)).cast("q")
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    engine = Engine(runtime_dir, name, truth=truth, slot=int(slot))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    if mode == "random":
        churn(engine, random.Random(int(seed)), ended)
    else:
        engine.grow(int(mode.partition(":")[2]) // PAGE)
        sys.stdout.write("held\n")
        sys.stdout.flush()
        ended.wait()
    engine.close()


if __name__ == "__main__":
    main()
