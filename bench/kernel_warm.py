"""Compile what the rows of ``kernels.py`` run, several rows at a time, before any is timed.

Each process runs rows once, without timing or comparing, which leaves their kernels in Triton's
cache on disk; compiled one after another they would take longer than all measurements.
"""

from __future__ import annotations

import contextlib
import multiprocessing
from pathlib import Path

import attention_peers
import kernel_timing
import torch
from kernel_problems import Problem
from kernel_rows import measure
from kernel_timing import Limits


def run_once(ident: str, *, dry: bool) -> None:
    """One row, whose mistakes its measurement will tell."""
    with contextlib.suppress(Exception):
        measure(ident, Limits(1e12, 1e12, 1e15), dry=dry)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _begin(folders: list[Path], without: list[str]) -> None:
    attention_peers.use(folders, without)
    kernel_timing.pace.warming = True
    Problem.errors = lambda *_, **__: {"error": 0.0, "error_rms": 0.0}  # type: ignore[method-assign]


def _job(work: tuple[str, bool]) -> None:
    run_once(work[0], dry=work[1])


def compile_rows(rows: list[str], processes: int, *, dry: bool, limit_s: float) -> None:
    """Run each row once in one of ``processes``; stops waiting after ``limit_s``.

    Rows of host copies compile nothing.
    """
    work = [(ident, dry) for ident in rows if not ident.startswith("O1")]
    if not work:
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(
        min(processes, len(work)), _begin, (attention_peers.FOLDER, attention_peers.WITHOUT)
    ) as pool:
        found = pool.map_async(_job, work, chunksize=1)
        with contextlib.suppress(multiprocessing.TimeoutError):
            found.get(limit_s)
