"""Compile, load and launch every kind of kernel with a fake driver, and say what was launched.

A program of its own, for a Triton that does not interpret and an environment without a compiler of
C: ``PATH`` leads to one that only leaves a note.
"""

import json
import re
import sys

import torch
import triton
from fake_launches import FakeLaunches

from kvcached.kernels import _gather_triton, _launch, _move_triton, _write_triton
from kvcached.kernels._merge_triton import merge_triton
from kvcached.kernels.checks import check_call
from kvcached.kernels.decode import attend_triton
from kvcached.kernels.mla import attend_mla, check_mla
from kvcached.kernels.plan import plan_attention
from kvcached.kernels.prefill import attend_prefill

STREAM = 77
WIDTHS = {"Q": 64, "q": 64, "i": 32, "f": 32}


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def caches(dim=64):
    return [torch.zeros(4, 16, 2, dim, dtype=torch.bfloat16) for _ in range(2)]


def call(tokens, **options):
    """A checked call of one sequence of 40 tokens."""
    q = torch.zeros(tokens, 8, 64, dtype=torch.bfloat16)
    return check_call(q, *caches(), cache_seqlens=ints(40), page_table=ints(0, 1, 2)[None],
                      max_seqlen_q=tokens, **options)  # fmt: skip


def decode():
    attend_triton(call(1), num_splits=2)


def prefill():
    attend_prefill(call(40), num_splits=2)  # and a merge


def mla():
    q, latents = torch.zeros(1, 4, 96).bfloat16(), torch.zeros(4, 16, 96).bfloat16()
    attend_mla(check_mla(q, latents, ints(0, 1, 2)[None], ints(40), 64, 1.0), num_splits=2)


def plan():
    made = plan_attention(2, 64, 8, 2, 64, torch.bfloat16, device="cpu")
    made._launch(ints(3, 40), None, made._numbers(2))


def append():
    rows = torch.zeros(3, 2, 64, dtype=torch.bfloat16)
    for step in _write_triton.append_launches(rows, rows, *caches(), ints(5, 6, 7)):
        step()


def append_quantised():
    rows, scale = torch.zeros(3, 2, 64, dtype=torch.bfloat16), torch.ones(())
    stored = [cache.char() for cache in caches()]
    for step in _write_triton.append_quant_launches(
        rows, rows, *stored, ints(5, 6, 7), scale, scale
    ):
        step()


def move():
    pool = torch.zeros(8, 1 << 12)
    _move_triton.copy_entries(pool, ints(1, 2), pool, ints(3, 4))
    _move_triton.compact([pool], ints(3, 4), ints(1, 2), ints(4, 3, 0)[None])


def gather():
    out = torch.zeros(40, 2, 64, dtype=torch.bfloat16)
    _gather_triton.gather_rows(*caches(), ints(0, 1, 2)[None], ints(0, 40), out, out.clone())
    stored, scale = [cache.char() for cache in caches()], torch.ones(())
    _gather_triton.gather_wide(
        *stored, scale, scale, ints(0, 1, 2)[None], ints(0, 40), out, out.clone()
    )


def merge():
    outs, lses = torch.zeros(2, 3, 8, 64), torch.zeros(2, 3, 8)
    merge_triton(list(outs), list(lses), None, torch.zeros(3, 8, 64))


def entry_widths(ptx):
    """Bits of each parameter of the kernel in ``ptx``."""
    head = ptx[ptx.index(".entry") :].split(")", 1)[0]
    return [int(bits) for bits in re.findall(r"\.param \.[a-z](\d+)", head)]


def report(handle, launches):
    """Whether the handle writes what the kernel takes, and how it was launched."""
    widths = [WIDTHS[code] for code in handle.layout.codes] + [64, 64]
    mine = [one for one in launches if one.function == handle._function]
    return {
        "name": handle.name, "takes": widths == entry_widths(handle.compiled.asm["ptx"]),
        "launches": len(mine), "scratch": [one.others for one in mine],
        "as_compiled": all((one.threads, one.shared) == (handle.threads, handle.shared)
                           for one in mine),
        "streams": [one.stream for one in mine],
    }  # fmt: skip


def main():
    handles = _launch._handles
    driver = FakeLaunches(lambda function: next(
        handle.layout for handle in handles.values() if handle._function == function
    ))  # fmt: skip
    _launch.load_driver = lambda: driver
    _launch.stream_of = lambda _: STREAM
    torch.cuda.get_device_capability = lambda _: (9, 0)
    for run in (decode, prefill, mla, plan, append, append_quantised, move, gather, merge):
        run()
    asked = triton.runtime.driver._active is not None
    dynamic = {handle.name: driver.dynamic.get(handle._function) for handle in handles.values()}
    json.dump({"kernels": [report(handle, driver.launches) for handle in handles.values()],
               "asked_triton": asked, "dynamic": dynamic}, sys.stdout)  # fmt: skip


if __name__ == "__main__":
    main()
