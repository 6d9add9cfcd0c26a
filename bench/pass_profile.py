"""Where the time of a forward pass goes: kernels on the GPU, and the host in attention and cache.

Most of a pass over few tokens is the host's work for the model itself, which differs from run to
run by more than attentions do: these parts tell them apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def device_ms(run: Callable[[], Any]) -> float:
    """All kernels and copies that ``run`` queues, added up."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    return sum(float(event.device_time_total) for event in seen.key_averages()) / 1e3


def host_us(model: Any, cache: Any, run: Callable[[], Any]) -> float:
    """A layer's share of what ``run`` spends in the attention and the cache, planning included."""
    spent: list[float] = []
    with _clocked(model, cache, spent):
        run()
    return 1e6 * sum(spent) / len(model.model.layers)


@contextmanager
def _clocked(model: Any, cache: Any, spent: list[float]) -> Iterator[None]:
    """Calls of the attention function and of the cache's layers add their seconds to ``spent``."""

    def clocked(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent.append(time.perf_counter() - start)

        return call

    name = model.config._attn_implementation  # noqa: SLF001 - it has no public name
    layer = type(cache.layers[0])
    before = ALL_ATTENTION_FUNCTIONS[name], layer.update
    ALL_ATTENTION_FUNCTIONS[name], layer.update = map(clocked, before)
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS[name], layer.update = before
