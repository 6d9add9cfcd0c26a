"""Time on the device for ``kernels.py``: captured graphs, and the limits of the machine.

A graph holds calls over rotated inputs, so that none finds its data in the L2 cache, and is
replayed behind a sleeping kernel, so that no launch of the host is on the clock. Without a GPU
(``--dry``) plain calls are timed: that shows that a script runs, and nothing else.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvcached import kernels

L2_BYTES = 50 << 20
GIB = 1 << 30
GRAPH_S = 400e-6
"""A graph takes at least this long, so that the gaps between replays do not count."""
SLEEP_CYCLES = 30_000_000

Call = Callable[[], Any]


@dataclass
class Pace:
    """How thorough measurements are. The seconds of a row bound repeats and which peers run."""

    warming: bool = False
    measurement_s: float = 1.5
    row_ends: float = math.inf

    def row(self, seconds: float) -> None:
        """A row begins that should take so long; what it measures itself is measured anyway."""
        self.row_ends = time.monotonic() + seconds
        self.measurement_s = min(1.5, max(0.05, seconds / 12))

    @property
    def late(self) -> bool:
        """Whether the row has had its time."""
        return time.monotonic() > self.row_ends


pace = Pace()


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call."""

    us: float
    p99: float
    repeats: int
    captured: bool


def rotations(nbytes: float) -> int:
    """How many copies of inputs of this size are more than twice the L2 cache."""
    if pace.warming:
        return 1
    return max(1, min(48, math.ceil(4 * L2_BYTES / max(nbytes, 1.0))))


def timed(calls: Sequence[Call], repeats: int = 40) -> Timing:
    """Median and 99th percentile over replays of a graph of ``calls``, in turn.

    What cannot be captured is called as it is, which counts the host's launches too if these are
    slower than the device.
    """
    if pace.warming:
        calls[0]()
        return Timing(1.0, 1.0, 1, captured=False)
    if not torch.cuda.is_available():
        return _summary([_host_seconds(calls) for _ in range(2)], len(calls), captured=False)
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    single = _device_seconds(lambda: [call() for call in calls], 2)[-1] / len(calls)
    rounds = max(1, math.ceil(GRAPH_S / max(single * len(calls), 1e-7)))
    rounds = min(rounds, max(1, 2000 // len(calls)))
    repeats = max(
        5, min(repeats, int(pace.measurement_s / max(single * len(calls) * rounds, 1e-6)))
    )

    def all_calls() -> None:
        for _ in range(rounds):
            for call in calls:
                call()

    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            all_calls()
    except RuntimeError:
        torch.cuda.synchronize()
        return _summary(_device_seconds(all_calls, repeats), rounds * len(calls), captured=False)
    samples = _device_seconds(graph.replay, repeats + 3)[3:]
    graph.reset()
    return _summary(samples, rounds * len(calls), captured=True)


def _summary(seconds: Sequence[float], calls: int, *, captured: bool) -> Timing:
    figures = sorted(s * 1e6 / calls for s in seconds)
    p99 = figures[min(len(figures) - 1, math.ceil(0.99 * len(figures)) - 1)]
    return Timing(round(statistics.median(figures), 3), round(p99, 3), len(figures), captured)


def _host_seconds(calls: Sequence[Call]) -> float:
    start = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - start


def _device_seconds(run: Call, repeats: int) -> list[float]:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP_CYCLES)  # noqa: SLF001 - the host gets ahead meanwhile
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def host_us(call: Call, repeats: int = 60) -> float:
    """Median microseconds that one call keeps the host."""
    call()
    if pace.warming:
        return 0.0
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    samples = []
    for _ in range(repeats if torch.cuda.is_available() else 2):
        start = time.perf_counter_ns()
        call()
        samples.append(time.perf_counter_ns() - start)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return round(statistics.median(samples) / 1e3, 2)


def host_costs(call: functools.partial[Any]) -> dict[str, float]:
    """Microseconds of the host: of the public call, and of the same one bound (``bind``)."""
    bound = kernels.bind(call.func, *call.args, **call.keywords)
    return {"host_us": host_us(call), "bound_us": host_us(bound)}


@dataclass(frozen=True)
class Limits:
    """What the machine can do, measured in the same run: bytes/s and FLOP/s."""

    read: float
    copy: float
    matrix: float

    def us(self, nbytes: float, flops: float) -> float:
        """The least time for reading so much and multiplying so much."""
        return max(nbytes / self.read, flops / self.matrix) * 1e6

    def copy_us(self, nbytes: float) -> float:
        """The least time for moving so much, read and written bytes together."""
        return nbytes / self.copy * 1e6


def measure_limits() -> Limits:
    """A sum over 8 GiB, a copy of 4 GiB by the faster of two ways, an 8192^3 bfloat16 product."""
    if not torch.cuda.is_available():
        return Limits(1e10, 1e10, 1e11)
    data = torch.empty(8 * GIB // 4, dtype=torch.float32, device="cuda").uniform_()
    half = data.numel() // 2
    read = data.nbytes / timed([data.sum], 12).us * 1e6
    ways = (lambda: data[:half].copy_(data[half:]),  # in a graph a copy by the driver's own means
            lambda: torch.mul(data[half:], 1.0, out=data[:half]))  # fmt: skip
    copy = data.nbytes / min(timed([way], 12).us for way in ways) * 1e6
    a, b, c = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(3))
    matrix = 2 * 8192**3 / timed([lambda: torch.mm(a, b, out=c)], 12).us * 1e6
    return Limits(read, copy, matrix)
