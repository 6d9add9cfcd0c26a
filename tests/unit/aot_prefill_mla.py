"""Compile the kernels of prefill and MLA for sm_90 without a GPU; print what they need, as JSON.

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

from kvcached.kernels._mla_kernels import mla_kernel
from kvcached.kernels._prefill_parts import merge_kernel
from kvcached.kernels.mla import is_fused, mla_config
from kvcached.kernels.prefill import prefill_kernel, tile_config

BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}
TYPES = dict.fromkeys(("TABLE", "LENS", "Q_STARTS", "FINISHED"), "*i32")
TYPES |= dict.fromkeys(("SINKS", "SLOPES", "PARTIAL", "STATE", "LSE"), "*fp32")
TYPES |= dict.fromkeys(("K", "V", "KV"), "i64") | dict.fromkeys(("scale", "softcap"), "fp32")


def prefill(dtype, dim, dim_v=None, *, group=4, splits=1, block_size=16, paged=True, varlen=True,
            extras=False):  # fmt: skip
    """(kernel, q's dtype, constants, bytes of its buffers of K and V)."""
    itemsize = BYTES[dtype]
    constants = tile_config(group, dim, dim_v or dim, itemsize, varlen=varlen, plain=not extras)
    width = sum(constants[name] for name in ("DA", "DB", "VA", "VB"))
    # A matrix instruction may still read a buffer when the next is filled: one more than ahead.
    buffers = constants["STAGES"] - (itemsize == 4)
    constants |= {
        "SPLITS": splits, "BLOCK_SIZE": block_size, "PAGED": paged, "VARLEN": varlen,
        "TWINS": True, "WINDOW": extras, "HAS_SINKS": extras, "HAS_SLOPES": extras,
        "HAS_CAP": extras, "ALIGN": 16, "UPCAST": False,
    }  # fmt: skip
    return prefill_kernel, dtype, constants, buffers * constants["BN"] * width * itemsize


def mla(dtype, heads, *, splits=4, block_size=64):
    """The same of absorbed attention with DeepSeek's sizes."""
    constants = mla_config(heads, 576, 512, BYTES[dtype])
    buffers = constants["STAGES"] - (constants["BM"] < 64)
    constants |= {
        "H": heads, "SPLITS": splits, "FUSED": is_fused(constants, splits),
        "BLOCK_SIZE": block_size, "ALIGN": 16, "UPCAST": False,
    }  # fmt: skip
    return mla_kernel, dtype, constants, buffers * constants["BN"] * 576 * BYTES[dtype]


def configurations():
    """Name -> what ``report`` takes."""
    rows = {f"prefill bf16 {dim}": prefill("bf16", dim) for dim in (64, 80, 96, 128, 192, 256)}
    for dim in (64, 128, 256):
        rows[f"prefill bf16 {dim} extras"] = prefill("bf16", dim, extras=True)
        rows[f"prefill bf16 {dim} split"] = prefill("bf16", dim, splits=4, extras=True)
        rows[f"prefill bf16 {dim} plain split"] = prefill("bf16", dim, splits=4)
    plain = {"varlen": False}
    rows |= {
        "prefill fp16 128": prefill("fp16", 128),
        "prefill fp32 128": prefill("fp32", 128),
        "prefill bf16 128 even": prefill("bf16", 128, **plain),
        "prefill bf16 128 MHA": prefill("bf16", 128, group=1, **plain),
        "prefill bf16 128 page 1": prefill("bf16", 128, block_size=1, **plain),
        "prefill bf16 128 page 256": prefill("bf16", 128, block_size=256, **plain),
        "prefill bf16 128 consecutive": prefill("bf16", 128, block_size=1, paged=False, **plain),
        "prefill bf16 192/128 MHA": prefill("bf16", 192, 128, group=1),
        "mla bf16 16 heads": mla("bf16", 16),
        "mla bf16 16 heads page 16": mla("bf16", 16, block_size=16),
        "mla fp16 64 heads": mla("fp16", 64),
        "mla bf16 128 heads": mla("bf16", 128),
        "mla bf16 128 heads whole": mla("bf16", 128, splits=1),
        "mla bf16 128 heads 64 parts": mla("bf16", 128, splits=64),
        "mla fp32 16 heads": mla("fp32", 16),
    }
    merge = {"DV": 512, "WIDTH": 512, "COLUMNS": 512, "SPLITS": 64, "PADDED": 64, "AT_ONCE": 16,
             "HAS_SINKS": False}  # fmt: skip
    return rows | {"merge bf16 64 parts": (merge_kernel, "bf16", merge, 0)}


def report(kernel, dtype, constants, buffered):
    """Registers, stack and shared bytes; instructions that matter."""
    types = TYPES | {"Q": f"*{dtype}", "OUT": f"*{dtype}"}
    signature = {name: types.get(name, "constexpr" if name in constants else "i32")
                 for name in kernel.arg_names}  # fmt: skip
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names)
               if signature[name][0] == "*" or name in {"K", "V", "KV"}
               or name.startswith("stride")}  # fmt: skip
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, aligned), target=GPUTarget("cuda", 90, 32),
        options={"num_warps": 4 if kernel is merge_kernel else 8},
    )  # fmt: skip
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    ptx = compiled.asm["ptx"]
    return {
        "registers": registers, "stack": stack, "shared": compiled.metadata.shared,
        "buffered": buffered,
        "wide_copies": len(re.findall(r"cp\.async\.c[ga][^;]*, 0x10", ptx)),
        "warpgroup_products": ptx.count("wgmma.mma_async"),
        "rows": constants.get("BM", 1), "itemsize": BYTES[dtype],
    }  # fmt: skip


if __name__ == "__main__":
    json.dump({name: report(*row) for name, row in configurations().items()}, sys.stdout)
