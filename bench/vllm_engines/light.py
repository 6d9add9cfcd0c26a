"""A fixed and an elastic engine under the same light load, one at a time: time to first token.

    python light.py --out light.json [--shape ...] [--rate 6] [--requests 45] [--rounds 2]

Both have the same memory and more than they need; of the elastic one all of it is full of cached
prefixes after a while, as that of a server which has been up for long.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

from burst import GIB, Fleet


def arrivals(rate: float, count: int, seed: int) -> list[float]:
    """Seconds of ``count`` requests, evenly spread but for a jitter of half a gap."""
    rng = random.Random(seed)
    return [(n + rng.random() / 2) / rate for n in range(count)]


def run(options: argparse.Namespace, modes: tuple[str, ...] = ("static", "elastic")) -> Any:
    """The requests of each round and engine."""
    fleets: dict[str, Fleet] = {}
    found: dict[str, Any] = {"rate": options.rate, "total_bytes": options.total, "rounds": []}
    try:
        for mode in modes:
            given = vars(options) | {"mode": mode, "engines": 1, "out": f"{options.out}.{mode}"}
            fleets[mode] = Fleet(argparse.Namespace(**given))
        for fleet in fleets.values():
            fleet.ready()
        for number in range(options.rounds):
            rows = {}
            for mode, fleet in fleets.items():
                fleet.tell(0, begin=time.time() + 0.3,
                           times=arrivals(options.rate, options.requests, number))  # fmt: skip
                rows[mode] = fleet.answers()[0]["rows"]
            found["rounds"].append(rows)
            Path(options.out).write_text(json.dumps(found, indent=1), encoding="utf-8")
    finally:
        for fleet in fleets.values():
            fleet.close()
    return found


def main() -> int:
    """Both engines, all rounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="tiny")
    parser.add_argument("--rate", type=float, default=6, help="requests a second")
    parser.add_argument("--requests", type=int, default=45)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--output", type=int, default=256)
    parser.add_argument("--total", type=int, default=3 * GIB)
    parser.add_argument("--engine", default="{}", help="arguments of vLLM's engine, as JSON")
    parser.add_argument("--out", required=True)
    run(parser.parse_args())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
