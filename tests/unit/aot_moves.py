"""Compile the kernels that write, move and merge for sm_90 without a GPU; JSON of their needs.

A program of its own: ahead-of-time compilation needs a Triton that does not interpret.
"""

import re

import torch
from ahead_of_time import compile_for, print_reports

from kvcached.kernels import _gather_triton as gathering
from kvcached.kernels import _move_triton as move
from kvcached.kernels._launch import signature_of
from kvcached.kernels._merge_triton import MERGE_TYPES, merge_config, merge_kernel
from kvcached.kernels._write_triton import (
    APPEND_TYPES,
    append_config,
    append_kernel,
    append_quant_kernel,
    quant_config,
)
from kvcached.kernels.quant import INT4

FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
STORED = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "int8": torch.int8, "int4": INT4}
BASES = dict.fromkeys(("K", "V", "A", "B", "DST", "SRC", "K_SCALE", "V_SCALE"), "i64")
IDS = dict.fromkeys(("SLOTS", "TO", "FROM", "SOURCES", "TARGETS", "TABLE", "STARTS"), "*i32")


def rows(dtype, *names):
    """Types of pointers to elements."""
    return dict.fromkeys(names, f"*{dtype}")


def append(dtype, heads, dim, *, apart=False):
    """(kernel, types, constants, 0): heads side by side, or with gaps between them."""
    strides = (heads * dim, dim), (16 * heads * dim, heads * dim, dim)
    if apart:  # as slices of wider rows
        strides = (3 * heads * dim, 2 * dim), (32 * heads * dim, 2 * heads * dim, 2 * dim)
    dims = (16, heads, dim, dim)
    constants = append_config(dtype.itemsize, False, dims, 2 * strides[0], 2 * strides[1],
                              16)  # fmt: skip
    return append_kernel, APPEND_TYPES, constants, 0


def quantised(name, *, by_row, dim=128):
    """The same of writes that quantise."""
    constants = quant_config(8, dim, dim, STORED[name]) | {"BLOCK_SIZE": 16, "PER_ROW": by_row}
    return append_quant_kernel, rows("bf16", "KEY", "VALUE"), constants, 0


def widened(name, to, *, dim=128):
    """The same of gathering what quantised rows mean."""
    constants = gathering.wide_config(8, dim, dim, STORED[name], FLOATS[to]) | {
        "BLOCK_SIZE": 16, "ALIGN": 16, "ASM": True}  # fmt: skip
    return gathering.gather_wide_kernel, rows(to, "OUT_K", "OUT_V"), constants, 0


def pieces(prefix=""):
    """An entry of one run: a block of keys and values."""
    return {f"{prefix}RUN": 8192, f"{prefix}INNER": 1, f"{prefix}NESTED": False}


def configurations(_arch):
    """Name -> what ``report`` takes, on every architecture."""
    settings = move._settings(16)
    both = {"BY_TO": True, "BY_FROM": True}
    gather = {"D": 128, "DV": 128, "ROWS": 4, "WIDTH": 1024, "BLOCK_SIZE": 16, "ALIGN": 16}
    two = pieces("A_") | pieces("B_") | {"TWO": True, "ENTRIES": move.ENTRIES}
    found = {f"append {name} 128": append(dtype, 8, 128) for name, dtype in FLOATS.items()}
    found |= {
        "append bf16 128 apart": append(torch.bfloat16, 8, 128, apart=True),
        "append bf16 80 apart": append(torch.bfloat16, 8, 80, apart=True),
        "copy": (move.copy_kernel, {}, pieces() | both | settings, 0),
        "copy nested": (move.copy_kernel, {}, pieces() | both | settings | {
            "RUN": 64, "INNER": 8, "NESTED": True}, 0),
        "compact": (move.compact_kernel, {}, two | settings, 0),
        "gather rows": (gathering.gather_kernel, rows("i16", "OUT_K", "OUT_V"), gather, 0),
    }  # fmt: skip
    for name in STORED:
        for by_row in (True, False) if name != "int4" else (True,):
            kind = "by row" if by_row else "given"
            found[f"append {name} 128 {kind}"] = quantised(name, by_row=by_row)
        for to in ("bf16", "fp32"):
            found[f"gather {name} 128 as {to}"] = widened(name, to)
    for dim in (64, 128, 512):
        for parts in (2, 4):
            kinds = [torch.bfloat16] * parts
            constants = merge_config(dim, kinds, torch.bfloat16)
            constants |= {"HAS_SINKS": True, "ALIGN": 16}
            found[f"merge {parts} of {dim}"] = (merge_kernel, MERGE_TYPES, constants, 0)
    return found


def report(kernel, types, constants, ahead, *, arch=90):
    """What the code needs: registers, stack and shared bytes, accesses of 16 bytes."""
    signature = signature_of(kernel, BASES | IDS | types, constants)
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names)
               if name not in constants and (name.isupper() or "stride" in name)}  # fmt: skip
    if kernel in {append_kernel, merge_kernel}:  # compiled for explicit types: no such hints
        aligned = {}
    ptx, needs = compile_for(arch, kernel, signature, constants, aligned, 4)
    return needs | {
        "wide_loads": len(re.findall(r"ld\.global[.\w:]*\.v4\.b32", ptx)),
        "wide_stores": len(re.findall(r"st\.global[.\w:]*\.v4\.b32", ptx)),
        "tiles_ahead": ahead,
    }  # fmt: skip


if __name__ == "__main__":
    print_reports(configurations, report)
