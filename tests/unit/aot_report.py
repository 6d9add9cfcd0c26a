"""Compile the Triton kernels for sm_90 without a GPU and print what they need, as JSON.

A program of its own: ahead-of-time compilation needs a Triton that does not interpret.
"""

import json
import re
import subprocess
import sys
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvcached.kernels.decode import append_kernel, attend_kernel, num_warps, tile_config

NAMES = {"fp16": 2, "bf16": 2, "fp32": 4}
ATTEND_POINTERS = {"TABLE": "*i32", "LENS": "*i32", "Q_STARTS": "*i32", "SINKS": "*fp32",
                   "SLOPES": "*fp32", "PARTIAL": "*fp32", "STATE": "*fp32", "FINISHED": "*i32",
                   "LSE": "*fp32", "scale": "fp32", "softcap": "fp32"}  # fmt: skip


def attend(dtype, dim, *, max_q, splits, extras):
    """(kernel, signature, constants) of one configuration of ``attend_kernel``."""
    constants = tile_config(4, dim, dim, max_q, NAMES[dtype]) | {
        "SPLITS": splits, "BLOCK_SIZE": 16, "PAGED": True, "VARLEN": max_q > 1,
        "HAS_SINKS": extras, "HAS_SLOPES": extras, "HAS_CAP": extras, "ALIGN": 16,
        "UPCAST": False,
    }  # fmt: skip
    pointers = ATTEND_POINTERS | {"Q": f"*{dtype}", "OUT": f"*{dtype}", "K": "i64", "V": "i64"}
    return attend_kernel, pointers, constants


def append(dtype, dim):
    """(kernel, signature, constants) of ``append_kernel``."""
    constants = {"D": dim, "DV": dim, "WIDTH": 1024, "BLOCK_SIZE": 16}
    return append_kernel, {"KEY": f"*{dtype}", "VALUE": f"*{dtype}", "SLOTS": "*i32",
                           "K": "i64", "V": "i64"}, constants  # fmt: skip


def tiles_ahead(constants, itemsize):
    """Bytes of the (STAGES - 1) // 2 pairs of K and V tiles that are to be in flight."""
    if "STAGES" not in constants:
        return 0
    pair = itemsize * constants["BN"] * (constants["DP"] + constants["DVP"])
    return (constants["STAGES"] - 1) // 2 * pair


def report(kernel, types, constants, itemsize):
    """What the sm_90 code needs: registers, stack and shared bytes, copies ahead of use."""
    signature = {n: types.get(n, "constexpr" if n in constants else "i32")
                 for n in kernel.arg_names}  # fmt: skip
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names)
               if signature[n][0] == "*" or n in {"K", "V"} or n.startswith("stride")}  # fmt: skip
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": num_warps(constants, itemsize) if kernel is attend_kernel else 4},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return {
        "registers": registers, "stack": stack, "shared": compiled.metadata.shared,
        # 16-byte copies of K and V; narrower ones fetch the block table
        "wide_copies": len(re.findall(r"cp\.async\.c[ga][^;]*, 0x10", compiled.asm["ptx"])),
        "tiles_ahead": tiles_ahead(constants, itemsize),
    }  # fmt: skip


def main():
    rows = {}
    for dtype, itemsize in NAMES.items():
        for dim in (64, 128) if itemsize < 4 else (64,):  # float32 is for comparisons
            shapes = {"decode": (1, 8, False), "verify": (4, 1, False), "prefill": (99, 1, False),
                      "extras": (1, 8, True)}  # fmt: skip
            for name, (max_q, splits, extras) in shapes.items():
                one = attend(dtype, dim, max_q=max_q, splits=splits, extras=extras)
                rows[f"attend {dtype} {dim} {name}"] = report(*one, itemsize)
            rows[f"append {dtype} {dim}"] = report(*append(dtype, dim), itemsize)
    json.dump(rows, sys.stdout)


if __name__ == "__main__":
    main()
