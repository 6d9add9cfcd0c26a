"""How much of a time to first token is the speed of the core that launches the kernels.

    python core_speed.py --out core_speed.json [--shape ...] [--rounds 3]

A fixed and an elastic engine under the same light load, in turns, from empty and again when all
their memory holds prefixes. Beside the times: what passes with a prompt took to launch, how long
they waited meanwhile (wall less CPU time), and a fixed loop of Python, timed before each pass.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from burst import GIB, Fleet
from light import arrivals

HERE = Path(__file__).resolve().parent
MODES = ("static", "elastic")


@contextmanager
def environment(**more: str) -> Iterator[None]:
    """With these variables."""
    before = dict(os.environ)
    os.environ.update(more)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def start(options: argparse.Namespace, mode: str) -> Fleet:
    """An engine whose passes are noted."""
    given = vars(options) | {"mode": mode, "engines": 1, "out": f"{options.out}.{mode}"}
    paths = [str(HERE / "watched"), os.environ.get("PYTHONPATH", "")]
    with environment(WATCH=f"{options.out}.{mode}.passes", PYTHONPATH=os.pathsep.join(paths)):
        return Fleet(argparse.Namespace(**given))


def passes(options: argparse.Namespace, mode: str, begin: float, end: float) -> list[list[float]]:
    """The passes of an engine between two times."""
    place = Path(options.out)
    rows = [json.loads(line) for path in place.parent.glob(f"{place.name}.{mode}.passes.*")
            for line in path.read_text("utf-8").splitlines()]  # fmt: skip
    return [row for row in rows if begin <= row[0] <= end]


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each load."""
    fleets = {mode: start(options, mode) for mode in MODES}
    loads: list[dict[str, Any]] = []
    try:
        for fleet in fleets.values():
            fleet.ready()
        for number in range(options.rounds):
            for mode in MODES if number % 2 == 0 else MODES[::-1]:
                fleets[mode].tell(0, reset=True)
                fleets[mode].answers()
                for phase in ("empty", "full"):
                    times = arrivals(options.rate, options.requests, 2 * number + (phase == "full"))
                    begin = time.time() + 0.3
                    fleets[mode].tell(0, begin=begin, times=times)
                    rows = fleets[mode].answers()[0]["rows"]
                    mean = statistics.mean(row["ttft_s"] for row in rows) * 1e3
                    loads.append({"mode": mode, "phase": phase, "round": number, "begin": begin,
                                  "end": time.time(), "ttft_ms": round(mean, 2)})  # fmt: skip
    finally:
        for fleet in fleets.values():
            fleet.close()
    return loads


def describe(options: argparse.Namespace, load: dict[str, Any]) -> dict[str, Any]:
    """A load, with what its passes took."""
    begin, end = load.pop("begin"), load.pop("end")
    rows = passes(options, load["mode"], begin, end)
    prompts = [row for row in rows if row[4] > 0]
    return load | {
        "loop_us": round(statistics.mean(row[5] for row in rows), 1),
        "launch_ms": round(statistics.mean(row[1] for row in prompts) * 1e3, 2),
        "waited_ms": round(statistics.mean(row[1] - row[2] for row in prompts) * 1e3, 2),
    }


def main() -> int:
    """All loads, and their figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="tiny")
    parser.add_argument("--rate", type=float, default=10, help="requests a second")
    parser.add_argument("--requests", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--output", type=int, default=256)
    parser.add_argument("--total", type=int, default=GIB)
    parser.add_argument("--engine", default="{}", help="arguments of vLLM's engine, as JSON")
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    loads = [describe(options, load) for load in run(options)]
    Path(options.out).write_text(json.dumps({"loads": loads}, indent=1), encoding="utf-8")
    for load in loads:
        print(load)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
