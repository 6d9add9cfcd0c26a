"""In an engine's process: what its passes take, and how fast its core is at the time.

On ``PYTHONPATH`` with ``WATCH`` set to a file's name: lines of JSON go to ``$WATCH.<pid>``. A pass
is [begin, seconds, seconds of CPU, tokens, of these of prompts, microseconds of a fixed loop just
before]. See ``core_speed.py``.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import json
import os
import sys
import time
from typing import Any

FILE = os.environ.get("WATCH")
RUNNERS = "vllm.v1.worker.gpu.model_runner", "vllm.v1.worker.gpu_model_runner"
ROWS: list[list[float]] = []


def loop_us() -> float:
    """Microseconds of a fixed loop: of the same code, the speed of the core."""
    began, total = time.perf_counter(), 0
    for number in range(1000):
        total += number
    return round((time.perf_counter() - began) * 1e6, 1)


def watch(module: Any) -> None:
    """Have the runner's passes noted."""
    call = module.GPUModelRunner.execute_model

    @functools.wraps(call)
    def noted(self: Any, output: Any, *args: Any, **more: Any) -> Any:
        if more.get("dummy_run"):
            return call(self, output, *args, **more)
        loop, began, cpu = loop_us(), time.time(), time.thread_time()
        try:
            return call(self, output, *args, **more)
        finally:
            counts = output.num_scheduled_tokens.values()
            prompts = sum(n for n in counts if n > 1)
            ROWS.append([began, time.time() - began, time.thread_time() - cpu, sum(counts),
                         prompts, loop])  # fmt: skip
            if len(ROWS) >= 200:
                with open(f"{FILE}.{os.getpid()}", "a", encoding="utf-8") as file:
                    file.writelines(json.dumps(row) + "\n" for row in ROWS)
                ROWS.clear()

    module.GPUModelRunner.execute_model = noted


class Watcher(importlib.abc.MetaPathFinder):
    """Calls ``watch`` with a runner's module once it has been executed."""

    busy = False

    def find_spec(self, name: str, _path: Any, _target: Any = None) -> Any:
        """See ``MetaPathFinder``."""
        if name not in RUNNERS or self.busy:
            return None
        self.busy = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.busy = False
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            watch(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if FILE:
    sys.meta_path.insert(0, Watcher())
