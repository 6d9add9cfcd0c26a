"""Several engines on one device in bursts, elastic against a static split: time to first token.

    python burst.py run --out burst.json [--modes static,elastic] [--shape ...] [--peaks 16,24@1,32]
    python burst.py engine ...                       (started by ``run``: one engine)

Each engine gets its load in a triangle: the rate rises from 0 to the peak by ``--slope`` requests a
second each second, and falls to 1 again. The engines start 2.25 ramps apart, so that their peaks
overlap little. A static split gives each engine an equal part of ``--total`` for its cache; elastic
engines share all of it. All are up from the beginning, and take each peak in turns, so that what
else the machine does in one minute meets both. Elastic ones are then asked for all that they keep
by a neighbour, and one of them is killed under load (``after.py``). ``burst_static.json`` and
``burst_elastic.json`` are left.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import after
import models
from engine import tenants, used_gib

GIB = 1 << 30
STARTS_APART = 2.25
"""Ramps between the starts of two engines' loads."""


def arrivals(peak: float, slope: float, seed: int) -> list[float]:
    """Seconds of the requests: a Poisson process under a triangle of rates."""
    rng, times, now = random.Random(seed), [], 0.0
    ramp = peak / slope
    while now < 2 * ramp:
        rate = max(1.0, peak - abs(now - ramp) * slope)
        now += rng.expovariate(rate)
        times.append(now)
    return times


class Engine:
    """One engine, and the loads that it is told to take: a line of JSON each."""

    def __init__(self, options: argparse.Namespace) -> None:
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self._options = options
        with tempfile.TemporaryDirectory() as folder:
            arguments = models.make(options.shape, Path(folder)) | json.loads(options.engine)
            started = time.perf_counter()
            self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
            self.start_s = round(time.perf_counter() - started, 2)
        self._rng = random.Random(options.index)
        self._sent = 0

    async def serve(self) -> None:
        """Say that the engine is ready, take loads until there are no more lines, and end."""
        await self.take(0.0, [0.0])  # the first request compiles what is left to compile
        print("ready", flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            order = json.loads(line)
            if order.get("reset"):
                found: Any = await self._llm.reset_prefix_cache()
            else:
                found = await self.take(order["begin"], order["times"])
            print(json.dumps({"index": self._options.index, "start_s": self.start_s,
                              "rows": found}), flush=True)  # fmt: skip
        self._llm.shutdown()

    async def take(self, begin: float, times: list[float]) -> list[dict[str, Any]]:
        """Send a request at each of ``times`` after ``begin``; what became of them."""
        tasks = []
        for at in times:
            await asyncio.sleep(max(0.0, begin + at - time.time()))
            tasks.append(asyncio.create_task(self._one(at)))
        return list(await asyncio.gather(*tasks))

    async def _one(self, at: float) -> dict[str, Any]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        vocab = models.SHAPES[self._options.shape][-1]
        prompt = [self._rng.randrange(2, vocab) for _ in range(self._options.prompt)]
        sampling = SamplingParams(
            temperature=0, max_tokens=self._options.output, ignore_eos=True, detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )  # fmt: skip
        self._sent += 1
        sent, last, first, tokens, gap = time.time(), 0.0, 0.0, 0, 0.0
        row: dict[str, Any] = {"at": round(at, 4), "sent": sent}
        try:
            async for out in self._llm.generate({"prompt_token_ids": prompt}, sampling,
                                                f"{self._options.index}-{self._sent}"):  # fmt: skip
                now = time.time()
                gap = max(gap, now - last) if last else 0.0
                first, last = first or now, now
                tokens += len(out.outputs[0].token_ids)
        except Exception as error:  # noqa: BLE001 - an engine that was killed is part of the test
            row["failed"] = f"{type(error).__name__}: {error}"[:200]
        return row | {"ttft_s": round(first - sent, 5), "total_s": round(time.time() - sent, 5),
                      "tokens": tokens, "gap_s": round(gap, 5)}  # fmt: skip


class Fleet:
    """The engines of one mode, each a process."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        engine, env = json.loads(options.engine), dict(os.environ)
        if options.mode == "elastic":
            env |= {"KVCACHED": "strict", "KVCACHED_BUDGET": str(options.total)}
        else:
            env["KVCACHED"] = "0"
            engine["kv_cache_memory_bytes"] = options.total // options.engines
        self.children = [self._start(index, engine, env) for index in range(options.engines)]

    def _start(self, index: int, engine: dict[str, Any], env: dict[str, str]) -> Any:
        command = [sys.executable, __file__, "engine", "--index", str(index), "--engine",
                   json.dumps(engine)]  # fmt: skip
        for name in ("shape", "prompt", "output"):
            command += [f"--{name}", str(getattr(self.options, name))]
        with Path(f"{self.options.out}.{index}.log").open("w", encoding="utf-8") as log:
            return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                    stderr=log, text=True,
                                    env=env | {"KVCACHED_NAME": f"engine-{index}",
                                           "VLLM_LOGGING_STREAM": "ext://sys.stderr"})  # fmt: skip

    def ready(self) -> None:
        """Wait until each can serve."""
        for child in self.children:
            wait_for_line(child, "ready")

    def tell(self, index: int, **order: Any) -> None:
        """Give one engine an order."""
        pipe = self.children[index].stdin
        pipe.write(json.dumps(order) + "\n")
        pipe.flush()

    def answers(self, watch: Callable[[], None] = lambda: None) -> list[dict[str, Any]]:
        """What each has to say to the order that it was given; ``watch`` is called meanwhile."""
        while not all(select.select([c.stdout], [], [], 0)[0] for c in self.children):
            watch()
            time.sleep(0.02)
        return [json.loads(wait_for_line(child, "{")) for child in self.children]

    def close(self) -> None:
        """End them; one that was killed has ended already."""
        for child in self.children:
            child.stdin.close()
        for child in self.children:
            try:
                child.wait(20)
            except subprocess.TimeoutExpired:
                child.terminate()
                child.wait(20)


def burst(fleet: Fleet, peak: float, slope: float) -> dict[str, Any]:
    """One triangle of load for each engine; the times, and what the device held."""
    begin, ramp = time.time() + 1, peak / slope
    for index in range(len(fleet.children)):
        fleet.tell(index, begin=begin + index * STARTS_APART * ramp,
                   times=arrivals(peak, slope, index))  # fmt: skip
    samples: list[dict[str, Any]] = []

    def watch() -> None:
        if samples and time.time() - begin < samples[-1]["t"] + 0.5:
            return
        row: dict[str, Any] = {"t": round(time.time() - begin, 2), "used_gib": used_gib()}
        if fleet.options.mode == "elastic":
            row["tenants"] = after.reports()
        samples.append(row)

    engines = fleet.answers(watch)
    return {"peak_rps": peak, "slope": slope, "begin": begin, "engines": engines,
            "samples": samples}  # fmt: skip


def peaks(text: str, slope: float) -> list[tuple[float, float]]:
    """Each peak and its slope: ``24,32@1`` has a slope of its own for the second one."""
    pairs = [part.partition("@") for part in text.split(",")]
    return [(float(peak), float(own or slope)) for peak, _, own in pairs]


class Modes:
    """A fleet of each mode, and what was found of it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._out = Path(options.out)
        self.fleets, self.found = {}, {}
        for mode in options.modes.split(","):
            own = argparse.Namespace(**vars(options) | {"mode": mode, "out": str(self._path(mode))})
            self.fleets[mode] = Fleet(own)
            self.found[mode] = {"mode": mode, "total_bytes": options.total,
                                "shape": options.shape, "bursts": []}  # fmt: skip

    def _path(self, mode: str) -> Path:
        return self._out.with_name(f"{self._out.stem}_{mode}.json")

    def write(self) -> None:
        """What there is so far."""
        for mode, found in self.found.items():
            self._path(mode).write_text(json.dumps(found, indent=1), encoding="utf-8")

    def close(self) -> None:
        """End all; how long a step waited at most is in their logs then."""
        for mode, fleet in self.fleets.items():
            fleet.close()
            logs = [Path(f"{self._path(mode)}.{index}.log") for index in range(len(fleet.children))]
            self.found[mode]["step_waited_ms"] = after.waited(logs)
        self.write()


def run(options: argparse.Namespace) -> None:
    """All engines through all peaks, the modes in turns; results are written as they come."""
    modes = Modes(options)
    try:
        for fleet in modes.fleets.values():
            fleet.ready()
        order = list(modes.fleets)
        for peak, slope in peaks(options.peaks, options.slope):
            for mode in order:
                modes.found[mode]["bursts"].append(burst(modes.fleets[mode], peak, slope))
                modes.write()
            order.reverse()
        if "elastic" in modes.fleets:
            fleet, found = modes.fleets["elastic"], modes.found["elastic"]
            time.sleep(1.5)
            found["tenants"] = tenants()
            found["reclaim"] = after.reclaim(options.total)
            modes.write()
            found["under_load"] = after.under_load(fleet, options.total)
            modes.write()
            found["kill"] = after.kill(fleet, victim=len(fleet.children) - 1)
    finally:
        modes.close()


def wait_for_line(child: subprocess.Popen[str], start: str) -> str:
    """The next line of a child that begins so."""
    assert child.stdout is not None, "a pipe was asked for"
    for line in child.stdout:
        if line.startswith(start):
            return line
    raise RuntimeError(f"an engine ended with {child.wait()}: see its log")


def main() -> int:
    """Either role."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("role", choices=["run", "engine"])
    parser.add_argument("--modes", default="static,elastic", help="each of its own engines")
    parser.add_argument("--index", type=int, default=0)
    parser.add_argument("--engines", type=int, default=3)
    parser.add_argument("--shape", default="tiny")
    parser.add_argument(
        "--peaks", default="24", help="requests a second, one burst each; 24@2: by 2 a second"
    )
    parser.add_argument("--slope", type=float, default=1)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--output", type=int, default=256)
    parser.add_argument("--total", type=int, default=6 * GIB)
    parser.add_argument("--out", default="burst.json")
    parser.add_argument("--engine", default="{}", help="arguments of vLLM's engine, as JSON")
    options = parser.parse_args()
    if options.role == "engine":
        engine = Engine(options)
        asyncio.run(engine.serve())
        return 0
    run(options)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
