"""Compile the Triton kernels for sm_90 without a GPU and print what they need, as JSON.

A program of its own: ahead-of-time compilation needs a Triton that does not interpret.
"""

import functools

import torch
from ahead_of_time import compile_for, print_reports, target_for, wide_copies

from kvcached.kernels import _fit, _sizes, decode
from kvcached.kernels._decode import attend_kernel
from kvcached.kernels._launch import signature_of
from kvcached.kernels.checks import UNBOUNDED, AttentionCall
from kvcached.kernels.plan import plan_kernel
from kvcached.kernels.quant import INT4
from kvcached.kernels.view import KVView

NAMES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
QUANTIZED = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "int8": torch.int8,
             "int4": INT4}  # fmt: skip
BLOCKS = 64


def shaped(dtype, dim, *, stored=None, block_size=16, paged=True, max_q=1, heads=8, group=4,
           by_row=True, extras=False, left=UNBOUNDED, tree=False):  # fmt: skip
    """A checked call of this shape, whose tensors nobody reads."""
    stored = stored or dtype
    width = dim // 2 if stored == INT4 else dim
    strides = (block_size * heads * width, heads * width, width)
    kv = KVView(16 << 20, 32 << 20, stored, torch.device("cpu"), BLOCKS, block_size, heads, dim,
                dim, *strides, *strides)  # fmt: skip
    q, ints = torch.empty(max_q, heads * group, dim, dtype=dtype), torch.empty(1, 1).int()
    scale = None
    if kv.quantized:
        scale = torch.empty(BLOCKS, block_size, heads) if by_row else torch.empty(heads)
    per_head = torch.empty(heads * group) if extras else None
    return AttentionCall(
        q=q, kv=kv, out=q, lse=torch.empty(q.shape[:2]), lens=ints[0],
        table=ints if paged else None, starts=None if paged else ints[0],
        q_starts=ints[0] if max_q > 1 else None, max_q=max_q, scale=1.0,
        softcap=5.0 if extras else 0.0, left=left, right=0, slopes=per_head, sinks=per_head,
        masks=torch.empty(max_q).long() if tree else None, k_scale=scale, v_scale=scale,
    )  # fmt: skip


def attend_for(
    call, *, split=True, planned=False, alone=False, crowd=False, early=False, parts=0, wide=False,
    arch=90,
):  # fmt: skip
    """(kernel, types, constants, warps, bytes of tiles that are to be in flight)."""
    kv, target = call.kv, target_for(arch)
    short = alone and not early and not kv.quantized
    if target.major < 9:  # no early starts, no clusters
        early, parts = False, 0
    config = _sizes.tile_config(call.q.shape[1] // kv.num_kv_heads, kv.head_dim, kv.head_dim_v,
                                call.max_q, call.q.dtype, kv.dtype, target)  # fmt: skip
    warps = _sizes.num_warps(config, call.q.element_size())
    if alone:
        config, warps = _sizes.alone(config, call.q.element_size(), early=early, short=short)
    if crowd and early and config["STAGES"] == 4:
        config = config | _sizes.CROWD_SIZES
    if wide:
        config = config | _sizes.INT4_SIZES
    config, cluster = _sizes.together(config, call.q.element_size(), max(1, parts), 64 * parts)
    config = _fit.fitted(config, call.q.element_size(), kv.dtype, target)
    constants = decode.constants_of(call, config, split=split, planned=planned, early=early,
                                    cluster=cluster)  # fmt: skip
    pair = config["BN"] * _fit.row_bytes(config["DP"], config["DVP"], kv.dtype)
    ahead = (config["STAGES"] - 1) * pair
    return attend_kernel, decode.types_of(call.q.dtype), constants, warps, ahead


def plans(sequences):
    """The same of ``plan_kernel``."""
    constants = {"B": sequences, "E": 8192 // sequences, "BN": 64, "LEFT": True, "VARLEN": True,
                 "ORDERS": 8}  # fmt: skip
    return plan_kernel, dict.fromkeys(("LENS", "Q_STARTS", "WORK"), "*i32"), constants, 8, 0


def configurations(arch):
    """Name -> what ``report`` takes."""
    rows, attend = {}, functools.partial(attend_for, arch=arch)
    shapes = {
        "decode": {}, "verify": {"max_q": 4}, "tree": {"max_q": 8, "tree": True},
        "prefill": {"max_q": 99}, "extras": {"extras": True, "left": 100},
        "MQA": {"heads": 1, "group": 32}, "MHA": {"group": 1},
    }  # fmt: skip
    for dim in (64, 128, 256):
        for shape, options in shapes.items():
            rows[f"attend bf16 {dim} {shape}"] = attend(shaped(torch.bfloat16, dim, **options))
    for name in ("fp16", "fp32"):  # float32 is for comparisons
        for shape in ("decode", "prefill"):
            rows[f"attend {name} 64 {shape}"] = attend(shaped(NAMES[name], 64, **shapes[shape]))
    for dim in (80, 96, 192):
        rows[f"attend bf16 {dim} decode"] = attend(shaped(torch.bfloat16, dim))
    places = {"page 1": {"block_size": 1}, "page 256": {"block_size": 256},
              "consecutive": {"paged": False}}  # fmt: skip
    for place, options in places.items():
        rows[f"attend bf16 128 {place}"] = attend(shaped(torch.bfloat16, 128, **options))
    plain = shaped(torch.bfloat16, 128)
    rows["attend bf16 128 whole"] = attend(plain, split=False)
    rows["attend bf16 128 alone"] = attend(plain, alone=True)
    rows["attend int8 128 alone"] = attend(
        shaped(torch.bfloat16, 128, stored=torch.int8), alone=True
    )
    rows["attend bf16 128 early"] = attend(plain, alone=True, early=True)
    rows["attend bf16 128 MQA early"] = attend(
        shaped(torch.bfloat16, 128, heads=1, group=32), alone=True, early=True
    )
    for dim in (64, 128):
        rows[f"attend bf16 {dim} cluster"] = attend(
            shaped(torch.bfloat16, dim), early=True, parts=16
        )
    rows["attend int8 128 cluster"] = attend(
        shaped(torch.bfloat16, 128, stored=torch.int8), early=True, parts=16
    )
    rows["attend bf16 128 crowd early"] = attend(plain, split=False, crowd=True, early=True)
    rows["attend bf16 128 planned"] = attend(plain, planned=True)
    for name, stored in QUANTIZED.items():
        for by_row in (True,) if stored == INT4 else (True, False):
            call = shaped(torch.bfloat16, 128, stored=stored, by_row=by_row)
            rows[f"attend {name} 128 {'by row' if by_row else 'by head'}"] = attend(call)
    rows["attend int4 128 in wide tiles"] = attend(
        shaped(torch.bfloat16, 128, stored=INT4), wide=True
    )
    for sequences in (16, 256, 1024):
        rows[f"plan {sequences}"] = plans(sequences)
    return rows


def report(kernel, types, constants, warps, ahead, *, arch=90):
    """What the code needs: registers, stack and shared bytes, copies ahead of use."""
    signature = signature_of(kernel, types, constants)
    ptx, needs = compile_for(arch, kernel, signature, constants, {}, warps)
    early = ptx.count("griddepcontrol.wait"), ptx.count("griddepcontrol.launch_dependents")
    return needs | {
        "early": early == (1, 1), "cluster": ptx.count("barrier.cluster") == 2,
        # 16-byte copies of K and V; narrower ones fetch scales, and V of one byte an element
        "wide_copies": wide_copies(ptx),
        "tiles_ahead": ahead,
    }  # fmt: skip


if __name__ == "__main__":
    print_reports(configurations, report)
