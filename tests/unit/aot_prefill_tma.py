"""Compile the prefill kernel of Hopper for sm_90 without a GPU; print what it needs, as JSON.

A program of its own: ahead-of-time compilation needs a Triton that does not interpret.
"""

import triton
from ahead_of_time import needs_of, print_reports, serialized
from triton.backends.compiler import GPUTarget

from kvcached.kernels._launch import TYPES, attributes_of, signature_of, source_of
from kvcached.kernels._prefill_gluon import prefill_tma_kernel as kernel
from kvcached.kernels._prefill_parts import ALIGNED
from kvcached.kernels._prefill_tma import (
    GROUP_WARPS,
    SHORT_SIZES,
    SIZES,
    constants_of,
    types_of,
)

ARCHS = [90]
DTYPES = {name: dtype for dtype, name in TYPES.items()}


def prefill(dtype, dim, dim_v=None, *, group=4, block_size=16, varlen=True, short=False, **more):
    """(q's dtype, constants, registers at the start)."""
    dims = dim, dim_v or dim
    sizes = SHORT_SIZES[dims] if short else SIZES[dims]
    options = {"varlen": varlen, "sinks": False} | more
    return dtype, constants_of(sizes, group, *dims, block_size, **options), sizes.start


def configurations(_arch):
    """Name -> what ``report`` takes, on every architecture."""
    rows = {f"prefill TMA bf16 {dim}": prefill("bf16", dim, group=group)
            for dim, group in ((64, 8), (128, 4), (256, 2))}  # fmt: skip
    return rows | {
        "prefill TMA fp16 128": prefill("fp16", 128),
        "prefill TMA bf16 128 sinks": prefill("bf16", 128, sinks=True),
        "prefill TMA bf16 128 short": prefill("bf16", 128, short=True),
        "prefill TMA bf16 128 mixed": prefill("bf16", 128, short=True, mixed=True),
        "prefill TMA bf16 128 even": prefill("bf16", 128, varlen=False),
        "prefill TMA bf16 128 MHA": prefill("bf16", 128, group=1, varlen=False),
        "prefill TMA bf16 128 page 48": prefill("bf16", 128, block_size=48),
        "prefill TMA bf16 128 page 256": prefill("bf16", 128, block_size=256),
        "prefill TMA bf16 192/128 MHA": prefill("bf16", 192, 128, group=1),
    }


def report(dtype, constants, registers, *, arch=90):
    """Registers, stack and shared bytes; instructions that matter."""
    signature = signature_of(kernel, types_of(DTYPES[dtype], constants), constants)
    aligned = attributes_of(kernel, tuple(x for x in kernel.arg_names if x in ALIGNED))
    compiled = triton.compile(
        source_of(kernel, signature, constants, aligned), target=GPUTarget("cuda", arch, 32),
        options={"num_warps": GROUP_WARPS, "maxnreg": registers},
    )  # fmt: skip
    ptx = compiled.asm["ptx"]
    return needs_of(compiled) | {
        "threads": 32 * compiled.metadata.num_warps,
        "scratch": compiled.metadata.global_scratch_size,
        "boxes": ptx.count("cp.async.bulk.tensor.3d"),
        "warpgroup_products": ptx.count("wgmma.mma_async"),
        "register_changes": ptx.count("setmaxnreg"),
        "serialized": serialized(ptx, arch),
    }


if __name__ == "__main__":
    print_reports(configurations, report)
