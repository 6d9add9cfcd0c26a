"""Compile the latent attention of Hopper for sm_90 without a GPU; print what it needs, as JSON.

A program of its own: ahead-of-time compilation needs a Triton that does not interpret.
"""

from ahead_of_time import compile_for, print_reports, serialized, wide_copies

from kvcached.kernels._launch import TYPES, attributes_of, signature_of
from kvcached.kernels._mla_gluon import BN, HALF, REST, STAGES, mla_wide_kernel
from kvcached.kernels._mla_merge import mla_merge_kernel
from kvcached.kernels._prefill_parts import ALIGNED, types_of
from kvcached.kernels.mla import merge_constants, wide_constants

DTYPES = {name: dtype for dtype, name in TYPES.items()}
IN_FLIGHT = 2 * STAGES.value * BN.value * (2 * HALF.value + REST.value)


def wide(dtype, heads, *, splits, block_size=64):
    """(kernel, q's dtype, constants, warps)."""
    return mla_wide_kernel, dtype, wide_constants(heads, splits, block_size, rests=heads <= 32), 4


def configurations(_arch):
    """Name -> what ``report`` takes, on every architecture."""
    return {
        "mla warpgroups bf16 16 heads 2 parts": wide("bf16", 16, splits=2),
        "mla warpgroups bf16 128 heads": wide("bf16", 128, splits=1),
        "mla warpgroups bf16 128 heads 64 parts": wide("bf16", 128, splits=64),
        "mla warpgroups bf16 128 heads page 256": wide("bf16", 128, splits=4, block_size=256),
        "mla warpgroups fp16 64 heads page 16": wide("fp16", 64, splits=4, block_size=16),
        "mla warpgroups fp16 20 heads page 1": wide("fp16", 20, splits=2, block_size=1),
        "merge of 16 bits 4 parts": (mla_merge_kernel, "bf16", merge_constants(512, 4), 4),
        "merge of 16 bits 64 parts": (mla_merge_kernel, "bf16", merge_constants(512, 64), 4),
    }


def report(kernel, dtype, constants, warps, *, arch=90):
    """Registers, stack and shared bytes; instructions that matter."""
    gluon = kernel is mla_wide_kernel
    if gluon and arch != 90:
        raise NotImplementedError("error: written for the instructions of sm_90")
    signature = signature_of(kernel, types_of(DTYPES[dtype]), constants)
    aligned = attributes_of(kernel, tuple(x for x in kernel.arg_names if x in ALIGNED))
    ptx, needs = compile_for(arch, kernel, signature, constants, aligned, warps)
    return needs | {
        "buffered": IN_FLIGHT if gluon else 0,
        "wide_copies": wide_copies(ptx),
        "wide_stores": ptx.count("st.global.v4.b32"),
        "warpgroup_products": ptx.count("wgmma.mma_async"),
        "register_changes": ptx.count("setmaxnreg"),
        "serialized": gluon and serialized(ptx, arch),
    }


if __name__ == "__main__":
    print_reports(configurations, report)
