"""What the driver's calls cost on this GPU, timed one by one below a ``CudaBackend``."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from kvcached.config import format_size
from kvcached.memory.cuda import CudaBackend
from kvcached.memory.driver import Driver

HANDLE_BYTES = 64 << 20
CALLS = {
    "cuMemCreate": "create", "cuMemMap": "map", "cuMemSetAccess": "access",
    "cuMemUnmap": "unmap", "cuMemRelease": "release",
}  # fmt: skip
_GIB = 1 << 30
_WORTH_IT = 2.0


@dataclass(frozen=True, slots=True)
class Costs:
    """Median microseconds of each call, for one handle of ``nbytes``."""

    nbytes: int
    micros: dict[str, float]

    @property
    def up(self) -> float:
        """Microseconds until the handle can be used."""
        return sum(self.micros.get(name, 0.0) for name in ("create", "map", "access"))

    @property
    def grow_ms(self) -> float:
        """Milliseconds to grow by 1 GiB in such handles."""
        return self.up * _GIB / self.nbytes / 1000

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {micros:.0f}" for name, micros in self.micros.items())
        return f"{format_size(self.nbytes)}: {parts} us"


class TimedDriver:
    """A driver whose virtual memory calls are timed; everything else is passed on."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self.ns: defaultdict[str, list[int]] = defaultdict(list)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._driver, name)
        return self._timed(CALLS[name], found) if name in CALLS else found

    def _timed(self, label: str, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            started = time.perf_counter_ns()
            result = function(*arguments)
            self.ns[label].append(time.perf_counter_ns() - started)
            return result

        return call

    def take(self) -> dict[str, float]:
        """Median microseconds since the last time, in the order of ``CALLS``."""
        taken, self.ns = self.ns, defaultdict(list)
        return {label: statistics.median(taken[label]) / 1000 for label in CALLS.values()
                if taken[label]}  # fmt: skip


def measure(
    device: str, driver: Driver, *, seconds: float = 0.5, handle_bytes: int = HANDLE_BYTES
) -> list[Costs]:
    """Costs of a handle of one page, and of ``handle_bytes``. Makes a context while it runs.

    ``seconds`` are for each of the two. Raises as ``CudaBackend`` does.
    """
    timed = TimedDriver(driver)
    backend = CudaBackend(device, driver=timed)
    try:
        large = max(1, handle_bytes // backend.page_bytes)
        return [_measure(backend, timed, pages, seconds) for pages in (1, large)]
    finally:
        backend.shutdown()


def _measure(backend: CudaBackend, timed: TimedDriver, pages: int, seconds: float) -> Costs:
    room = backend.reserve(pages * backend.page_bytes)
    try:
        _once(backend, room, pages)
        timed.take()  # the first has work to do that is never done again
        end = time.monotonic() + seconds
        for _ in range(100):
            _once(backend, room, pages)
            if time.monotonic() >= end:
                break
    finally:
        backend.close(room)
    return Costs(pages * backend.page_bytes, timed.take())


def _once(backend: CudaBackend, room: Any, pages: int) -> None:
    handle = backend.create(pages)
    try:
        backend.map(room, 0, handle)
        backend.unmap(room, 0, handle)
    finally:
        backend.release(handle)


def advice(costs: list[Costs]) -> str:
    """One sentence on layout and size of handles."""
    small, large = costs
    times = (
        f"1 GiB more takes {small.grow_ms:.1f} ms in handles of {format_size(small.nbytes)} and "
        f"{large.grow_ms:.1f} ms in handles of {format_size(large.nbytes)}"
    )
    if small.grow_ms > _WORTH_IT * large.grow_ms:
        return (
            f"{times}: keep layout='cross_layer', whose blocks fill pages together, and "
            f"KVCACHED_MAX_HANDLE at {format_size(large.nbytes)} or more"
        )
    return f"{times}: small handles cost little here, so any layout and handle size will do"
