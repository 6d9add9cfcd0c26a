"""What the benches share: one JSON schema, the machine, medians and tails."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1
RESULTS = Path(__file__).parent / "results"


def measure(
    run: Callable[[], Any],
    *,
    repeats: int,
    warm_up: int = 3,
    inner: int = 1,
    before: Callable[[], Any] | None = None,
) -> list[float]:
    """Seconds of one ``run``, ``repeats`` times, each the mean of ``inner``; after a warm-up."""
    samples = []
    for index in range(warm_up + repeats):
        if before is not None:
            before()
        start = time.perf_counter_ns()
        for _ in range(inner):
            run()
        taken = (time.perf_counter_ns() - start) / inner / 1e9
        if index >= warm_up:
            samples.append(taken)
    return samples


def row(case: str, samples: Sequence[float], *, unit: str, per: float = 1.0) -> dict[str, Any]:
    """One line of a result: seconds / ``per`` in ``unit``."""
    scale = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}[unit] / per
    ordered = sorted(samples)
    p99 = ordered[min(len(ordered) - 1, math.ceil(0.99 * len(ordered)) - 1)]
    return {
        "case": case,
        "unit": unit,
        "repeats": len(ordered),
        "median": round(statistics.median(ordered) * scale, 4),
        "p99": round(p99 * scale, 4),
        "min": round(ordered[0] * scale, 4),
    }


def write(name: str, title: str, rows: Sequence[dict[str, Any]]) -> Path:
    """Write ``bench/results/NAME.json`` and say where it is."""
    document = {
        "schema_version": SCHEMA_VERSION,
        "bench": name,
        "title": title,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": machine(),
        "rows": list(rows),
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    for line in rows:
        print(f"{line['case']:<44} {line['median']:>10} {line['unit']}  p99 {line['p99']}")
    return path


def commit() -> str:
    """The commit that was measured, with ``+`` if the tree had changes."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], capture_output=True, text=True, check=False)  # noqa: S607
        return done.stdout.strip()

    return (git("rev-parse", "--short", "HEAD") or "unknown") + (
        "+" if git("status", "-s", "-uno") else ""
    )


def machine() -> dict[str, Any]:
    """What a reader needs to know to compare."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "arch": platform.machine(),
        "cpus": os.cpu_count(),
        "memory_gib": round(memory / (1 << 30), 1),
        "python": platform.python_version(),
        "implementation": sys.implementation.name,
    }
