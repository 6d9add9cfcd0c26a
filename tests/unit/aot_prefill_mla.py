"""Compile the kernels of prefill and MLA for sm_90 without a GPU; print what they need, as JSON.

A program of its own: ahead-of-time compilation needs a Triton that does not interpret.
"""

import functools

from ahead_of_time import compile_for, print_reports, serialized, target_for, wide_copies

from kvcached.kernels._launch import TYPES, attributes_of, signature_of
from kvcached.kernels._mla_bytes import mla_bytes_kernel
from kvcached.kernels._mla_kernels import mla_kernel
from kvcached.kernels._prefill_parts import ALIGNED, merge_config, merge_kernel, types_of
from kvcached.kernels.mla import bytes_constants, is_fused, mla_config
from kvcached.kernels.prefill import prefill_kernel, tile_config, warps_of

BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}
DTYPES = {name: dtype for dtype, name in TYPES.items()}


def prefill_for(dtype, dim, dim_v=None, *, group=4, splits=1, block_size=16, paged=True,
                varlen=True, extras=False, longest=1 << 20, arch=90):  # fmt: skip
    """(kernel, q's dtype, constants, bytes of its buffers of K and V, warps)."""
    itemsize, dim_v, target = BYTES[dtype], dim_v or dim, target_for(arch)
    constants = tile_config(
        group, dim, dim_v, itemsize, varlen=varlen, plain=not extras, longest=longest,
        target=target,
    )  # fmt: skip
    warps = warps_of(constants, itemsize, plain=not extras, target=target)
    width = sum(constants[name] for name in ("DA", "DB", "VA", "VB"))
    # A matrix instruction may still read a buffer when the next is filled: one more than ahead.
    buffers = constants["STAGES"] - (itemsize == 4 or target.by_warp)
    constants |= {
        "SPLITS": splits, "BLOCK_SIZE": block_size, "PAGED": paged, "VARLEN": varlen,
        "TWINS": True, "WINDOW": extras, "HAS_SINKS": extras, "HAS_SLOPES": extras,
        "HAS_CAP": extras, "ALIGN": 16, "UPCAST": False,
    }  # fmt: skip
    return prefill_kernel, dtype, constants, buffers * constants["BN"] * width * itemsize, warps


def mla_for(dtype, heads, *, splits=4, block_size=64, arch=90):
    """The same of absorbed attention with DeepSeek's sizes."""
    constants = mla_config(heads, 576, 512, BYTES[dtype], target_for(arch))
    buffers = constants["STAGES"] - (constants["BM"] < 64)
    constants |= {
        "H": heads, "SPLITS": splits, "FUSED": is_fused(constants, splits),
        "BLOCK_SIZE": block_size, "ALIGN": 16, "UPCAST": False,
    }  # fmt: skip
    return mla_kernel, dtype, constants, buffers * constants["BN"] * 576 * BYTES[dtype], 8


def mla_bytes(stored, heads, *, splits=4, block_size=64, arch=90):
    """The same over latents of one byte an element, with queries in bfloat16."""
    constants = mla_config(heads, 576, 512, 2, target_for(arch), in_bytes=True)
    buffered = (constants["STAGES"] - 1) * constants["BN"] * 576
    constants |= bytes_constants(DTYPES["bf16"], DTYPES[stored]) | {
        "H": heads, "SPLITS": splits, "FUSED": splits == 1 or is_fused(constants, splits),
        "BLOCK_SIZE": block_size, "ALIGN": 16, "EXACT": False,
    }  # fmt: skip
    return mla_bytes_kernel, "bf16", constants, buffered, 8


def configurations(arch):
    """Name -> what ``report`` takes."""
    prefill, mla, stored = (
        functools.partial(kind, arch=arch) for kind in (prefill_for, mla_for, mla_bytes)
    )
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
        "prefill bf16 128 short": prefill("bf16", 128, longest=1024, **plain),
        "prefill bf16 64 even": prefill("bf16", 64, group=8, **plain),
        "prefill bf16 192/128 MHA": prefill("bf16", 192, 128, group=1),
        "prefill bf16 192/128 extras": prefill("bf16", 192, 128, group=1, extras=True),
        "mla bf16 16 heads": mla("bf16", 16),
        "mla bf16 16 heads page 16": mla("bf16", 16, block_size=16),
        "mla bf16 16 heads 2 parts": mla("bf16", 16, splits=2),
        "mla bf16 32 heads": mla("bf16", 32),
        "mla fp16 64 heads": mla("fp16", 64),
        "mla bf16 128 heads page 16": mla("bf16", 128, splits=1, block_size=16),
        "mla bf16 128 heads": mla("bf16", 128),
        "mla bf16 128 heads whole": mla("bf16", 128, splits=1),
        "mla bf16 128 heads 64 parts": mla("bf16", 128, splits=64),
        "mla fp32 16 heads": mla("fp32", 16),
        "mla e4m3 16 heads": stored("fp8e4nv", 16),
        "mla e4m3 16 heads page 16": stored("fp8e4nv", 16, block_size=16),
        "mla e4m3 32 heads": stored("fp8e4nv", 32),
        "mla e4m3 128 heads": stored("fp8e4nv", 128),
        "mla e4m3 128 heads page 16": stored("fp8e4nv", 128, splits=1, block_size=16),
        "mla e4m3 128 heads whole": stored("fp8e4nv", 128, splits=1),
        "mla int8 16 heads": stored("i8", 16),
        "mla int8 128 heads": stored("i8", 128),
        "mla e5m2 64 heads": stored("fp8e5", 64),
    }
    merge = merge_config(512, 64, 512) | {"HAS_SINKS": False}
    return rows | {"merge bf16 64 parts": (merge_kernel, "bf16", merge, 0, 4)}


def report(kernel, dtype, constants, buffered, warps, *, arch=90):
    """Registers, stack and shared bytes; instructions that matter."""
    if kernel is mla_bytes_kernel and constants["BM"] == 64 and arch != 90:
        raise NotImplementedError("error: tiles of 64 rows are for the instructions of sm_90")
    signature = signature_of(kernel, types_of(DTYPES[dtype]), constants)
    aligned = attributes_of(kernel, tuple(x for x in kernel.arg_names if x in ALIGNED))
    ptx, needs = compile_for(arch, kernel, signature, constants, aligned, warps)
    return needs | {
        "buffered": buffered,
        "wide_copies": wide_copies(ptx),
        "warpgroup_products": ptx.count("wgmma.mma_async"),
        "serialized": "wgmma" in ptx and serialized(ptx, arch),
        "rows": constants.get("BM", 1), "itemsize": BYTES[dtype],
    }  # fmt: skip


if __name__ == "__main__":
    print_reports(configurations, report)
