"""What a run of the demo measured: events in, figures out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvcached.demo.workload import Request

Event = dict[str, Any]
Stats = dict[str, int]
SAMPLE_SECONDS = 0.05
"""An engine says what it holds at whole multiples of this, by the clock that all share."""


@dataclass(slots=True)
class Outcome:
    """One request: seconds since the run's start, ``None`` until it happened."""

    request: Request
    first_s: float | None = None
    done_s: float | None = None
    tokens: list[int] = field(default_factory=list)
    preemptions: int = 0
    queued: bool = False


@dataclass(frozen=True, slots=True)
class Point:
    """What each engine held at ``t`` seconds since the run's start."""

    t: float
    engines: dict[str, Stats]

    def total(self, key: str) -> int:
        """The sum of ``key`` over the engines."""
        return sum(stats.get(key, 0) for stats in self.engines.values())


@dataclass(frozen=True, slots=True)
class Mark:
    """Something that happened at ``t``: a burst, a limit, a kill."""

    t: float
    text: str


class Recording:
    """One run, static or elastic: outcomes of its requests, and memory over time."""

    def __init__(self, name: str, requests: tuple[Request, ...], start: float) -> None:
        self.name, self.start = name, start
        self.outcomes = {r.id: Outcome(r) for r in requests}
        self.timeline: list[Point] = []
        self.marks: list[Mark] = []
        self.measured_until = 0.0
        self.settled: dict[str, Event] = {}
        self._latest: dict[str, Stats] = {}

    @property
    def done(self) -> int:
        """Requests finished."""
        return sum(o.done_s is not None for o in self.outcomes.values())

    def latest(self, engine: str) -> Stats:
        """The last sample of an engine; empty before the first, and after its end."""
        return self._latest.get(engine, {})

    def mark(self, t: float, text: str) -> None:
        """Note what happened at monotonic time ``t``."""
        self.marks.append(Mark(t - self.start, text))

    def on_event(self, event: Event) -> None:
        """Take in one event of an engine; those it does not know are left alone."""
        kind, engine = event["event"], event["engine"]
        if kind == "sample":
            self._sample(event["t"], engine, event["stats"])
        elif kind == "settled":
            self.settled[engine] = event
        elif kind == "exit":
            self._latest.pop(engine, None)
        elif kind in {"first", "done"} and event["id"] in self.outcomes:
            self._progress(self.outcomes[event["id"]], event)

    def _sample(self, t: float, engine: str, stats: Stats) -> None:
        """Engines sample at the same moments; each moment becomes one point."""
        self._latest[engine] = stats
        point = Point(t - self.start, dict(self._latest))
        if self.timeline and point.t - self.timeline[-1].t < SAMPLE_SECONDS / 2:
            self.timeline[-1] = point
        else:
            self.timeline.append(point)

    def _progress(self, outcome: Outcome, event: Event) -> None:
        since = event["t"] - self.start
        if event["event"] == "first":
            outcome.first_s = since
            return
        outcome.done_s = since
        outcome.tokens = event["tokens"]
        outcome.preemptions, outcome.queued = event["preemptions"], event["queued"]

    def figures(self) -> dict[str, Any]:
        """The figures of the measured workload; bytes, milliseconds, tokens a second."""
        outcomes = list(self.outcomes.values())
        waits = [1e3 * (o.first_s - o.request.at_s) for o in outcomes if o.first_s is not None]
        ends = [o.done_s for o in outcomes if o.done_s is not None]
        tokens = sum(len(o.tokens) for o in outcomes)
        span = max(ends, default=0.0) - min((o.request.at_s for o in outcomes), default=0.0)
        measured = [p for p in self.timeline if 0 <= p.t <= self.measured_until]
        settled = [event["stats"] for event in self.settled.values()]
        return {
            "requests_done": len(ends),
            "requests_queued": sum(o.queued for o in outcomes),
            "preemptions": sum(o.preemptions for o in outcomes),
            "ttft_ms": _summary(waits),
            "output_tokens": tokens,
            "tokens_per_s": round(tokens / span, 2) if span > 0 else 0.0,
            "seconds": round(span, 3),
            "peak_backed_bytes": max((p.total("backed") for p in measured), default=0),
            "mean_backed_bytes": _mean_over_time(measured),
            "idle_backed_bytes": sum(s["backed"] for s in settled),
            "idle_cached_bytes": sum(e["cached_bytes"] for e in self.settled.values()),
            "packed_floor_bytes": sum(s["floor"] for s in settled),
            **_kernel_figures(measured, settled),
        }


def _kernel_figures(measured: list[Point], settled: list[Stats]) -> dict[str, int]:
    """What the kernel counted, where it counts memory by process (not on a GPU)."""
    if not all("kernel" in stats for stats in settled):
        return {}
    return {
        "peak_kernel_bytes": max((p.total("kernel") for p in measured), default=0),
        "idle_kernel_bytes": sum(stats["kernel"] for stats in settled),
    }


def _summary(values: list[float]) -> dict[str, float]:
    if not values:
        return {"mean": 0.0, "p50": 0.0, "p99": 0.0}
    p50, p99 = np.percentile(values, [50, 99])
    return {"mean": round(float(np.mean(values)), 2), "p50": round(float(p50), 2),
            "p99": round(float(p99), 2)}  # fmt: skip


def _mean_over_time(points: list[Point]) -> int:
    """The mean of what was backed, each sample weighted by how long it held."""
    if len(points) < 2:
        return points[0].total("backed") if points else 0
    times = np.array([p.t for p in points])
    backed = np.array([p.total("backed") for p in points], dtype=float)
    held = np.diff(times)
    return int((backed[:-1] * held).sum() / max(held.sum(), 1e-9))
