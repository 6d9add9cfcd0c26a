"""A small engine for the fault tests: real memory, a lease, random growth and shrinkage.

Run as a process: ``broker_engine.py PACKAGE_PATH RUNTIME_DIR NAME TRUTH_FILE SLOT SEED MODE``.
``MODE``: ``random`` (until killed, or SIGTERM, then it closes in order), or ``hold:BYTES``.
SIGUSR1: rest, and keep what is held. Field SLOT of TRUTH_FILE is what this process has created.
Each page is filled with a number of its own, and looked at before it is given back.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import signal
import struct
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

    def __init__(
        self, runtime_dir, name, *, capacity=CAPACITY, limit=None, truth=None, slot=0, seed=0
    ):
        self.lock = threading.RLock()
        self.backend = HostBackend(PAGE, capacity_bytes=1 << 40, memory="memfd")
        self.reservation = self.backend.reserve(capacity)
        self.free = list(range(capacity // PAGE))
        self.held = []
        self.pinned = self.verified = 0
        self.number = seed << 32
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
                self.number += 1
                self.held.append((index, handle, self.number))
                self.note()
                ctypes.memmove(self.address(index), pattern(self.number, PAGE), PAGE)

    def address(self, index):
        return self.reservation.address + index * PAGE

    def shrink(self, pages):
        with self.lock:
            for _ in range(pages):
                index, handle, number = self.held.pop(0)
                found = ctypes.string_at(self.address(index), PAGE)
                assert found == pattern(number, PAGE), "somebody else wrote to our memory"
                self.verified += 1
                self.backend.unmap(self.reservation, index, handle)
                self.backend.release(handle)
                self.free.append(index)
            self.note()
            self.budget.give_back(pages * PAGE)

    def reclaim(self, nbytes, *, patient):
        pages = min(-(-nbytes // PAGE), max(0, len(self.held) - self.pinned))
        self.shrink(pages)
        return pages * PAGE

    def report(self):
        held = len(self.held) * PAGE
        pinned = min(self.pinned, len(self.held)) * PAGE
        return TenantReport(
            backed_bytes=held, in_use_bytes=pinned, cached_bytes=held - pinned,
            split_floor_bytes=pinned, oldest_cached_age_s=1.0 if held > pinned else 0.0,
        )  # fmt: skip

    def close(self):
        with self.lock:
            if self.held:
                self.shrink(len(self.held))
        self.budget.close()
        self.backend.close(self.reservation)
        self.backend.shutdown()


def pattern(number, nbytes):
    return struct.pack("<q", number) * (nbytes // 8)


class Signals:
    """``ended`` by SIGTERM, ``resting`` by SIGUSR1."""

    def __init__(self):
        self.ended, self.resting = threading.Event(), threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: self.ended.set())
        signal.signal(signal.SIGUSR1, lambda *_: self.resting.set())


def open_truth(path):
    fd = os.open(path, os.O_RDWR)
    return memoryview(mmap.mmap(fd, 4096)).cast("q")


def say(text):
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def churn(engine, rng, signals):
    """Random load until the end; refusals are part of it."""
    refused = 0
    while not signals.ended.is_set():
        if signals.resting.is_set() and engine.held:
            time.sleep(0.01)
            continue
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
        time.sleep(0.003)  # so that eight of them leave two cores time to start others
    return refused


def main():
    _, _, runtime_dir, name, truth_file, slot, seed, mode = sys.argv
    signals = Signals()
    engine = Engine(runtime_dir, name, truth=open_truth(truth_file), slot=int(slot), seed=int(seed))
    say("ready")
    if mode == "random":
        churn(engine, random.Random(int(seed)), signals)
    else:
        engine.grow(int(mode.partition(":")[2]) // PAGE)
        say("held")
        signals.ended.wait()
    engine.close()
    say(engine.verified)


if __name__ == "__main__":
    main()
