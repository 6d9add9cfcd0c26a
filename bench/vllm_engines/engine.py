"""One vLLM engine in this process: offline workloads, their speed, tokens and memory, as JSON.

    python engine.py --shape llama-3.1-8b --phases 64,512 --out run.json [--elastic] ...

Whether it is elastic is a matter of the environment (``KVCACHED=1``), set before vLLM is imported.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import models
import prompts

GIB = 1 << 30


def prompts_of(count: int, length: int, vocab: int, seed: int) -> list[dict[str, Any]]:
    """Random prompts, each of its own."""
    rng = random.Random(seed)
    return [{"prompt_token_ids": [rng.randrange(2, vocab) for _ in range(length)]}
            for _ in range(count)]  # fmt: skip


def workload(options: argparse.Namespace, model: str, seed: int, count: int) -> list[Any]:
    """The prompts of a phase: language for a model that knows one, else random tokens."""
    if options.shape == "smollm2":  # about 16 tokens a sentence, after 180 that all begin with
        return prompts.as_ids(Path(model), count, max(1, (options.prompt - 180) // 16), seed)
    vocab = 512 if options.shape in models.HYBRID else models.SHAPES[options.shape][-1]
    made = prompts_of(count, options.prompt, vocab, seed)
    prefix = prompts_of(1, options.repeat_prefix, vocab, 7)[0]["prompt_token_ids"]
    for prompt in made:
        prompt["prompt_token_ids"][: len(prefix)] = prefix
    return made


def used_gib() -> float:
    """Device memory in use, by all processes."""
    import torch

    if not torch.cuda.is_available():
        return 0.0
    free, total = torch.cuda.mem_get_info()
    return round((total - free) / GIB, 2)


def wait_for_turn(options: argparse.Namespace, name: str) -> None:
    """Where engines share a device and are not to run at once: say so, and wait to be told."""
    if not options.turns:
        return
    folder, own = Path(options.turns), Path(options.out).stem
    (folder / f"{own}.{name}.ready").touch()
    while not (folder / f"{own}.{name}.go").exists():
        time.sleep(0.01)


def tenants() -> list[dict[str, Any]]:
    """What ``kvcached ps`` knows."""
    done = subprocess.run([sys.executable, "-m", "kvcached", "ps", "--json"], check=False,
                          capture_output=True, text=True)  # fmt: skip
    if done.returncode:
        return [{"error": done.stderr[-500:]}]
    return [t for d in json.loads(done.stdout)["devices"] for t in d["tenants"]]


def latencies(outs: list[Any]) -> dict[str, float]:
    """Time to first token, and per later token: median and 99th percentile, milliseconds."""
    first, later = [], []
    for out in outs:
        m = out.metrics
        if m is None or not m.first_token_latency:
            continue
        first.append(m.first_token_latency * 1e3)
        n = len(out.outputs[0].token_ids)
        if n > 1:
            later.append((m.last_token_ts - m.first_token_ts) / (n - 1) * 1e3)
    found = {}
    for name, values in (("ttft_ms", first), ("tpot_ms", later)):
        if values:
            ordered = sorted(values)
            found[f"{name}_p50"] = round(statistics.median(ordered), 3)
            found[f"{name}_p99"] = round(ordered[math.ceil(0.99 * len(ordered)) - 1], 3)
    return found


def hash_of(out: Any) -> str:
    """Of a request's tokens."""
    text = json.dumps(list(out.outputs[0].token_ids))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def time_cache() -> dict[str, float]:
    """Have the parts of the elastic cache timed that an engine makes at its start, in this process.

    What comes back is filled meanwhile: milliseconds of the worker's part, and of the scheduler's.
    """
    from kvcached.engines.vllm import allocation, steps

    found: dict[str, float] = {}
    for module, name in ((allocation, "_open"), (steps, "attach")):
        setattr(module, name, timed(getattr(module, name), name.strip("_"), found))
    return found


def timed(call: Any, name: str, found: dict[str, float]) -> Any:
    """``call``, whose milliseconds are added to ``found[name]``."""

    def run(*args: Any, **more: Any) -> Any:
        began = time.perf_counter()
        try:
            return call(*args, **more)
        finally:
            found[name] = round(found.get(name, 0.0) + (time.perf_counter() - began) * 1e3, 3)

    return run


def nap(llm: Any, level: int, given: list[Any], sampling: Any) -> dict[str, Any]:
    """Sleep and wake: times, memory meanwhile, and one request's tokens before and after."""
    before = hash_of(llm.generate(given, sampling, use_tqdm=False)[0])
    times = [time.perf_counter()]
    llm.sleep(level=level)
    times.append(time.perf_counter())
    asleep = {"used_gib": used_gib(), "tenants": tenants()}
    times.append(time.perf_counter())
    llm.wake_up()
    times.append(time.perf_counter())
    after = hash_of(llm.generate(given, sampling, use_tqdm=False)[0])
    return asleep | {"sleep_ms": round(1e3 * (times[1] - times[0]), 1),
                     "wake_ms": round(1e3 * (times[3] - times[2]), 1),
                     "hashes": [[before, after]]}  # fmt: skip


def main() -> int:
    """Run the phases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="tiny")
    parser.add_argument("--phases", default="2,32,4,48,1", help="requests of each phase")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--output", type=int, default=128)
    parser.add_argument("--repeat-prefix", type=int, default=0, help="tokens that all begin with")
    parser.add_argument("--sleep", type=int, default=0, help="level of a nap after all phases")
    parser.add_argument("--settle", type=float, default=1.5, help="seconds before memory is read")
    parser.add_argument("--turns", help="a folder in which each phase waits for leave to begin")
    parser.add_argument("--out", required=True)
    parser.add_argument("--engine", default="{}", help="more arguments of vllm.LLM, as JSON")
    options = parser.parse_args()
    from vllm import LLM, SamplingParams

    alone = os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0"
    cache_ms = time_cache() if alone and os.environ.get("KVCACHED", "0") != "0" else {}
    with tempfile.TemporaryDirectory() as folder:
        arguments = models.make(options.shape, Path(folder))
        started = time.perf_counter()
        llm = LLM(**arguments | {"disable_log_stats": False} | json.loads(options.engine))
        took = time.perf_counter() - started
    result: dict[str, Any] = {
        "shape": options.shape, "start_s": round(took, 2), "used_gib_after_start": used_gib(),
        "cache_ms": dict(cache_ms), "phases": [], "engine": json.loads(options.engine),
        "env": {k: v for k, v in os.environ.items() if k.startswith(("KVCACHED", "VLLM_"))},
    }  # fmt: skip
    greedy = SamplingParams(temperature=0, max_tokens=options.output, ignore_eos=True,
                            detokenize=False)  # fmt: skip
    try:
        for number, count in enumerate(map(int, options.phases.split(","))):
            given = workload(options, arguments["model"], number, count)
            wait_for_turn(options, str(number))
            began = time.perf_counter()
            outs = llm.generate(given, greedy, use_tqdm=False)
            seconds = time.perf_counter() - began
            busy = used_gib()
            time.sleep(options.settle)
            result["phases"].append({
                "requests": count, "seconds": round(seconds, 3),
                "requests_per_s": round(count / seconds, 3), "used_gib": busy,
                "used_gib_idle": used_gib(),
                "tokens": sum(len(out.outputs[0].token_ids) for out in outs),
                "hashes": [hash_of(out) for out in outs],
                "tenants": tenants() if "KVCACHED" in os.environ else [],
            } | latencies(outs))  # fmt: skip
        if options.sleep:
            result["nap"] = nap(llm, options.sleep, given[:1], greedy)
        wait_for_turn(options, "end")
    finally:
        Path(options.out).write_text(json.dumps(result, indent=1), encoding="utf-8")
        llm.llm_engine.engine_core.shutdown()  # left to the exit it can hang
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
