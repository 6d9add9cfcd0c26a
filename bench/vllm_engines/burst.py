"""Several engines on one device in bursts, elastic against a static split: time to first token.

    python burst.py run --mode elastic|static --out run.json [--shape ...] [--peak ...]
    python burst.py engine ...                       (started by ``run``: one engine)

Each engine gets its load in a triangle: the rate rises from 0 to ``--peak`` requests a second by
``--slope`` a second, and falls to 1 again. The engines start 2.25 ramps apart, so that their peaks
overlap little. A static split gives each engine an equal part of ``--total`` for its cache; elastic
engines share all of it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import models
from engine import tenants, used_gib

GIB = 1 << 30


def arrivals(peak: float, slope: float, seed: int) -> list[float]:
    """Seconds of the requests: a Poisson process under a triangle of rates."""
    rng, times, now = random.Random(seed), [], 0.0
    ramp = peak / slope
    while now < 2 * ramp:
        rate = max(1.0, peak - abs(now - ramp) * slope)
        now += rng.expovariate(rate)
        times.append(now)
    return times


async def serve(options: argparse.Namespace) -> dict[str, Any]:
    """One engine: start, say so, wait for the word, and take the load."""
    from vllm import AsyncEngineArgs, SamplingParams
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    with tempfile.TemporaryDirectory() as folder:
        arguments = models.make(options.shape, Path(folder)) | json.loads(options.engine)
        started = time.perf_counter()
        llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        start_s = time.perf_counter() - started
    vocab = models.SHAPES[options.shape][-1]
    rng = random.Random(options.index)
    sampling = SamplingParams(temperature=0, max_tokens=options.output, ignore_eos=True,
                              detokenize=False, output_kind=RequestOutputKind.DELTA)  # fmt: skip
    rows: list[dict[str, float]] = []

    async def one(number: int, at: float) -> None:
        prompt = {"prompt_token_ids": [rng.randrange(2, vocab) for _ in range(options.prompt)]}
        sent, first, tokens = time.time(), 0.0, 0
        async for out in llm.generate(prompt, sampling, f"{options.index}-{number}"):
            first = first or time.time()
            tokens += len(out.outputs[0].token_ids)
        rows.append({"at": round(at, 4), "ttft_s": round(first - sent, 5),
                     "total_s": round(time.time() - sent, 5), "tokens": tokens})  # fmt: skip

    await one(-1, 0.0)  # the first request compiles what is left to compile
    rows.clear()
    print("ready", flush=True)
    begin = float((await asyncio.to_thread(sys.stdin.readline)).strip())
    times = arrivals(options.peak, options.slope, options.index)
    tasks = []
    for number, at in enumerate(times):
        await asyncio.sleep(max(0.0, begin + at - time.time()))
        tasks.append(asyncio.create_task(one(number, at)))
    await asyncio.gather(*tasks)
    llm.shutdown()
    return {"index": options.index, "start_s": round(start_s, 2), "begin": begin, "rows": rows,
            "sent": len(times)}  # fmt: skip


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All engines of one mode, and what the device holds meanwhile."""
    engine = json.loads(options.engine)
    env = dict(os.environ)
    if options.mode == "elastic":
        env |= {"KVCACHED": "strict", "KVCACHED_BUDGET": str(options.total)}
    else:
        env["KVCACHED"] = "0"
        engine["kv_cache_memory_bytes"] = options.total // options.engines
    children = []
    for index in range(options.engines):
        command = [sys.executable, __file__, "engine", "--index", str(index), "--engine",
                   json.dumps(engine)]  # fmt: skip
        for name in ("shape", "peak", "slope", "prompt", "output"):
            command += [f"--{name}", str(getattr(options, name))]
        log = Path(f"{options.out}.{index}.log").open("w", encoding="utf-8")  # noqa: SIM115
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                 stderr=log, text=True, env=env)  # fmt: skip
        children.append(child)
    try:
        for child in children:
            wait_for_line(child, "ready")
        begin, ramp = time.time() + 1, options.peak / options.slope
        for index, child in enumerate(children):
            assert child.stdin is not None, "a pipe was asked for"
            child.stdin.write(f"{begin + index * 2.25 * ramp}\n")
            child.stdin.flush()
        samples = watch(children, begin, options.mode)
        found = [json.loads(wait_for_line(child, "{")) for child in children]
    finally:
        for child in children:
            child.terminate()
            child.wait(30)
    return {"mode": options.mode, "total_bytes": options.total, "engines": found,
            "samples": samples, "peak_rps": options.peak, "slope": options.slope,
            "shape": options.shape}  # fmt: skip


def wait_for_line(child: subprocess.Popen[str], start: str) -> str:
    """The next line of a child that begins so."""
    assert child.stdout is not None, "a pipe was asked for"
    for line in child.stdout:
        if line.startswith(start):
            return line
    raise RuntimeError(f"an engine ended with {child.wait()}: see its log")


def watch(children: list[Any], begin: float, mode: str) -> list[dict[str, Any]]:
    """Every half second until the first engine has ended... or all have: the memory in use."""
    samples = []
    while any(child.poll() is None for child in children) and time.time() < begin + 600:
        row: dict[str, Any] = {"t": round(time.time() - begin, 2), "used_gib": used_gib()}
        if mode == "elastic":
            row["tenants"] = {t["name"]: t["report"] for t in tenants() if "report" in t}
        samples.append(row)
        time.sleep(0.5)
        if all(has_output(child) for child in children):
            break
    return samples


def has_output(child: subprocess.Popen[str]) -> bool:
    """Whether a child has written its result."""
    import select

    return bool(select.select([child.stdout], [], [], 0)[0])


def main() -> int:
    """Either role."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("role", choices=["run", "engine"])
    parser.add_argument("--mode", choices=["elastic", "static"], default="elastic")
    parser.add_argument("--index", type=int, default=0)
    parser.add_argument("--engines", type=int, default=3)
    parser.add_argument("--shape", default="tiny")
    parser.add_argument("--peak", type=float, default=24)
    parser.add_argument("--slope", type=float, default=1)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--output", type=int, default=256)
    parser.add_argument("--total", type=int, default=6 * GIB)
    parser.add_argument("--out", default="burst.json")
    parser.add_argument("--engine", default="{}", help="arguments of vLLM's engine, as JSON")
    options = parser.parse_args()
    if options.role == "engine":
        result = asyncio.run(serve(options))
        print(json.dumps(result), flush=True)
        return 0
    Path(options.out).write_text(json.dumps(run(options), indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
