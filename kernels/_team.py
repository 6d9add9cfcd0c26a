"""Runs a compiled C function on several threads at once, without the GIL.

Torch's own OpenMP team is used when it can be found, so that attention and the matrix products
around it do not fight for cores (OpenMP threads spin for a while after each parallel region).
Numba's threading layers are not used: their work queue ends the process when two threads enter.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch


@functools.cache
def _openmp() -> Callable[[int, int, int, int], None] | None:
    """``GOMP_parallel`` of the library that torch itself runs on, if it ships one."""
    root = Path(torch.__file__).parent
    for path in sorted([*root.glob("lib/libgomp*"), *root.parent.glob("torch.libs/libgomp*")]):
        try:
            run = ctypes.CDLL(str(path)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        run.restype = None
        return run
    return None


def run(function: Any, argument: int, threads: int) -> None:
    """Call the Numba C function ``function(argument)`` on ``threads`` threads, and wait for all."""
    if threads <= 1:
        function.ctypes(argument)
        return
    openmp = _openmp()
    if openmp is not None:
        openmp(function.address, argument, threads, 0)
        return
    with ThreadPoolExecutor(threads - 1, thread_name_prefix="kvcached-attn") as pool:
        others = [pool.submit(function.ctypes, argument) for _ in range(threads - 1)]
        function.ctypes(argument)
        for other in others:
            other.result()
