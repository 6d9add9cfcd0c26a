"""Compile the decode kernel of Hopper for sm_90 without a GPU; print what it needs, as JSON.

A program of its own: ahead-of-time compilation needs a Triton that does not interpret.
"""

import triton
from ahead_of_time import needs_of, print_reports
from triton.backends.compiler import GPUTarget

from kvcached.kernels._decode_gluon import decode_tma_kernel as kernel
from kvcached.kernels._decode_tma import ALIGNED, REGISTERS, WARPS, constants_of, types_of
from kvcached.kernels._launch import TYPES, attributes_of, signature_of, source_of

ARCHS = [90]
DTYPES = {name: dtype for dtype, name in TYPES.items()}


def decode(dtype, *, batch=64, heads=8, group=4, block_size=16, **options):
    """(q's dtype, constants)."""
    return dtype, constants_of(batch, heads, group, block_size, **options)


def configurations():
    """Name -> what ``report`` takes."""
    return {
        "decode TMA bf16": decode("bf16"),
        "decode TMA bf16 one sequence": decode("bf16", batch=1),
        "decode TMA bf16 256 sequences": decode("bf16", batch=256),
        "decode TMA bf16 MHA": decode("bf16", heads=32, group=1),
        "decode TMA bf16 groups of 7": decode("bf16", heads=4, group=7),
        "decode TMA bf16 groups of 8": decode("bf16", group=8),
        "decode TMA bf16 page 48": decode("bf16", block_size=48),
        "decode TMA bf16 page 256": decode("bf16", block_size=256),
        "decode TMA bf16 sinks": decode("bf16", sinks=True),
        "decode TMA fp16": decode("fp16"),
    }


def report(dtype, constants, *, arch=90):
    """Registers, stack and shared bytes; instructions that matter."""
    signature = signature_of(kernel, types_of(DTYPES[dtype], constants), constants)
    aligned = attributes_of(kernel, tuple(x for x in kernel.arg_names if x in ALIGNED))
    compiled = triton.compile(
        source_of(kernel, signature, constants, aligned), target=GPUTarget("cuda", arch, 32),
        options={"num_warps": WARPS, "maxnreg": REGISTERS, "launch_pdl": True},
    )  # fmt: skip
    ptx = compiled.asm["ptx"]
    return needs_of(compiled) | {
        "threads": 32 * compiled.metadata.num_warps,
        "scratch": compiled.metadata.global_scratch_size,
        "boxes": ptx.count("cp.async.bulk.tensor.3d"),
        "early": "griddepcontrol.wait" in ptx,
    }


if __name__ == "__main__":
    print_reports(configurations, report)
