"""Host memory, anonymous and memfd: create, map, first touch, unmap and release, per handle.

One handle of 2, 64 or 256 MiB in pages of 2 MiB, untouched and touched. ``give back`` is unmap and
release together, what a tenant does when a peer asks for memory. ``small`` is a handle of two
pages of 4 KiB, touched. Last, 256 MiB in neighbouring handles of 360 KiB (a block of SmolLM2-135M),
which are too small for huge pages: the worst that a cache can do to itself. Times are CPU time of
the calling thread, which does all the work, so other load of the machine shows less.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Any

from common import row, write

from kvcached.config import HOST_MEMORY
from kvcached.memory.host import HostBackend

MIB = 1 << 20
STEPS = ("create", "map", "touch", "unmap", "release")


class Life:
    """One handle from ``create`` to ``release``, each step timed."""

    def __init__(self, memory: str, page_bytes: int, num_pages: int, *, touch: bool) -> None:
        self.backend = HostBackend(page_bytes, memory=memory)
        self.num_pages, self.touch = num_pages, touch
        self.reservation = self.backend.reserve(num_pages * page_bytes)
        self.seconds: dict[str, list[float]] = {step: [] for step in (*STEPS, "give back")}

    def run(self) -> None:
        """Live once."""
        handle: Any = self._timed("create", lambda: self.backend.create(self.num_pages))
        self._timed("map", lambda: self.backend.map(self.reservation, 0, handle))
        if self.touch:
            start, nbytes = self.reservation.address, self.reservation.nbytes
            self._timed("touch", lambda: ctypes.memset(start, 1, nbytes))
        self._timed("unmap", lambda: self.backend.unmap(self.reservation, 0, handle))
        self._timed("release", lambda: self.backend.release(handle))
        last = self.seconds["unmap"][-1] + self.seconds["release"][-1]
        self.seconds["give back"].append(last)

    def end(self) -> None:
        """Close everything."""
        self.backend.close(self.reservation)
        self.backend.shutdown()

    def _timed(self, step: str, call: Callable[[], object]) -> object:
        start = time.thread_time_ns()
        result = call()
        self.seconds[step].append((time.thread_time_ns() - start) / 1e9)
        return result


def lives(page_bytes: int, num_pages: int, label: str, repeats: int, *, touch: bool) -> list[Any]:
    """Rows of both kinds, which take turns so that the machine's mood hits both."""
    pair = {m: Life(m, page_bytes, num_pages, touch=touch) for m in HOST_MEMORY}
    for index in range(repeats + 2):
        for life in pair.values():
            life.run()
            if index < 2:  # warm-up
                life.seconds = {step: [] for step in life.seconds}
    rows = []
    for memory, life in pair.items():
        life.end()
        big = touch and num_pages * page_bytes >= 64 * MIB
        for step, samples in life.seconds.items():
            if samples:
                unit = "ms" if big and step in {"touch", "unmap", "release", "give back"} else "us"
                rows.append(row(f"{memory}: {label}: {step}", samples, unit=unit))
    return rows


def small_handles(memory: str, repeats: int) -> list[Any]:
    """Touch and give back 256 MiB in handles of 360 KiB."""
    pages, page_bytes = 45, 8192
    count = 256 * MIB // (pages * page_bytes)
    backend = HostBackend(page_bytes, memory=memory)
    reservation = backend.reserve(count * pages * page_bytes)
    touched, given = [], []
    for _ in range(repeats + 1):
        handles = [backend.create(pages) for _ in range(count)]
        for index, handle in enumerate(handles):
            backend.map(reservation, index * pages, handle)
        start = time.thread_time()
        ctypes.memset(reservation.address, 1, reservation.nbytes)
        touched.append(time.thread_time() - start)
        start = time.thread_time()
        for index, handle in enumerate(handles):
            backend.unmap(reservation, index * pages, handle)
            backend.release(handle)
        given.append(time.thread_time() - start)
    backend.close(reservation)
    backend.shutdown()
    label = f"{memory}: 256 MiB in handles of 360 KiB"
    return [row(f"{label}: touch", touched[1:], unit="ms"),
            row(f"{label}: give back", given[1:], unit="ms")]  # fmt: skip


def main() -> None:
    """Measure and write ``host_memory.json``."""
    rows = lives(4096, 2, "small, touched", 200, touch=True)
    for nbytes, repeats in ((2 * MIB, 100), (64 * MIB, 15), (256 * MIB, 9)):
        label, pages = f"{nbytes // MIB} MiB", nbytes // (2 * MIB)
        if nbytes < 256 * MIB:
            rows += lives(2 * MIB, pages, f"{label}, untouched", 100, touch=False)
        rows += lives(2 * MIB, pages, f"{label}, touched", repeats, touch=True)
    for memory in HOST_MEMORY:
        rows += small_handles(memory, 5)
    write("host_memory", "host memory: one handle's life", rows)


if __name__ == "__main__":
    main()
