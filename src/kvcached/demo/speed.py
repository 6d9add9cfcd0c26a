"""How fast a model is on this machine: measured once, so that bursts lie far enough apart.

On a GPU the same passes compile the Triton kernels and load cuBLAS's, so that neither happens in a
run that is measured. They go through an engine with a cache of its own, outside of the budget.
"""

from __future__ import annotations

import time
from typing import Any

from kvcached.cache import KVCache
from kvcached.config import Config
from kvcached.demo.engine import Engine, Task
from kvcached.demo.model import DTYPE
from kvcached.demo.workload import Scale
from kvcached.layout import CacheSpec

_PROMPT = 64
_STEPS = 16
_TILES = (1, 6, 12, 24)
"""Prompts of so many tokens, each alone in its step: one for each height of a kernel's tile."""


def measure(model: Any, device: str, scale: Scale) -> dict[str, float]:
    """Seconds to compute one token of a prompt, and one step of a burst of requests."""
    return _plain(model, scale.burst) if device == "cpu" else through_engine(model, device, scale)


def _plain(model: Any, burst: int) -> dict[str, float]:
    import torch

    def timed(rows: int, columns: int) -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            model(torch.zeros(rows, columns, dtype=torch.long), logits_to_keep=1)
        return time.perf_counter() - start

    timed(burst, 1)  # the first pass of a model is slower
    return {"prompt_token": timed(1, 128) / 128, "step": timed(burst, 1)}


def through_engine(model: Any, device: str, scale: Scale) -> dict[str, float]:
    """As ``measure``, by bursts through an ``Engine``; the first ones only warm up."""
    spec = CacheSpec.from_hf(model.config, dtype=DTYPE)
    tokens = 2 * scale.burst * (_PROMPT + _STEPS + spec.block_size)
    with KVCache(spec, device=device, max_tokens=tokens, prefix_caching=False,
                 config=Config(broker=False)) as cache:  # fmt: skip
        engine = Engine(model, cache, max_batch=scale.max_batch, step_tokens=scale.step_tokens)
        for length in _TILES:
            _burst(engine, [[1] * length])
        prompts = [[(i + 7 * j) % 251 for j in range(_PROMPT)] for i in range(scale.burst)]
        _burst(engine, prompts)
        return _burst(engine, prompts)


def _burst(engine: Engine, prompts: list[list[int]]) -> dict[str, float]:
    for number, prompt in enumerate(prompts):
        engine.submit(Task(number, list(prompt), _STEPS))
    start = time.perf_counter()
    while engine.waiting:
        engine.step()  # ends when its tokens are on the host, so this is the device's time too
    middle, steps = time.perf_counter(), 0
    while engine.busy:
        engine.step()
        steps += 1
    end = time.perf_counter()
    tokens = sum(map(len, prompts))
    return {"prompt_token": (middle - start) / tokens, "step": (end - middle) / max(1, steps)}
