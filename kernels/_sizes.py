"""Tiles of split-KV attention: by shape and dtypes, and by how full they leave the GPU.

All were tuned on an H100 (``docs/kernels.md``); ``_fit.py`` makes them smaller for other GPUs.
"""

from __future__ import annotations

import torch

from kvcached.kernels._fit import HOPPER, Target, fitted, row_bytes
from kvcached.kernels.quant import INT4

MAX_ROWS = 64
"""Rows (query tokens x heads of one KV head) of a tile, unless one token has more; half as many
of 4-byte elements or of more than 128, since a tile of them has twice the registers."""
TILE_BYTES = 32 << 10
"""Of a tile of K and one of V together."""
AHEAD_BYTES = 96 << 10
"""Of tiles in flight in one program; two programs fit on an SM then."""
MAX_QUANTISED_STAGES = 4
"""More copies ahead only wait: what is short of bytes is long on arithmetic."""
LONE_STAGES = 3
"""Of programs that have an SM each: with more copies ahead they read more slowly."""
SHORT_PART_TOKENS = 64
"""Parts of one tile have nothing to overlap; fewer warps wait less for each other."""
SHORT_WARPS = 2
MAX_CLUSTER = 8
"""Programs of a cluster, on every GPU that has them."""
CLUSTER_TILE = 128
"""Keys of a part whose cluster merges it: its only tile."""
LONE_TILE = 128
"""Keys of a tile of 32 rows in programs that have an SM each."""
CROWD = 4
"""Programs that an SM has room for, if tiles are small."""
CROWD_SIZES = {"BN": 32, "STAGES": 3}
"""Of head dim 128: 32 KiB in flight in each."""
INT4_SIZES = {"BN": 256, "STAGES": 2}
"""Of int4 with head dim 128 and 16 rows: half the tiles, of which each costs more than its bytes.
Of 32 rows they would not fit the registers."""
INT4_PART_TOKENS = 512
"""Of shorter parts a wide tile would be empty in good part."""
MAX_MERGED = 8
"""Parts that are merged at a time."""
MERGED_ELEMENTS = 8192
"""Of partial results that are merged at a time, 64 registers a thread; half as many beside large
tiles, which would spill."""


def power_of_2(least: int) -> int:
    """The smallest that is ``least`` or more."""
    return 1 << (least - 1).bit_length()


def tile_config(
    group: int, dim: int, dim_v: int, max_q: int, dtype: torch.dtype, stored: torch.dtype,
    target: Target = HOPPER,
) -> dict[str, int]:  # fmt: skip
    """Compile-time sizes of ``attend_kernel`` for a shape and the dtypes of q and of the cache.

    With ids of blocks fetched a tile ahead, STAGES - 1 pairs of K and V tiles are in flight.
    """
    dp = max(16, power_of_2(dim // (2 if stored == INT4 else 1)))
    dvp = max(
        32 if stored == INT4 else 16,
        power_of_2(dim_v // (2 if stored.itemsize == 1 else 1)),
    )
    most = MAX_ROWS if dtype.itemsize < 4 and max(dim, dim_v) <= 128 else MAX_ROWS // 2
    tokens = max(1, min(max_q, most // group))
    rows = max(16, power_of_2(tokens * group))
    tokens = 1 if max_q == 1 else rows // group  # full tiles: one kernel for many ``max_q``
    row = row_bytes(dp, dvp, stored)
    bn = power_of_2(TILE_BYTES // row + 1) // 2
    bn = max(32 if stored.itemsize == 1 else 16, min(128 if rows < MAX_ROWS else 64, bn))
    stages = 1 + max(1, AHEAD_BYTES // (bn * row))
    if stored.itemsize == 1:
        stages = min(stages, MAX_QUANTISED_STAGES)
    real = power_of_2(tokens * group)
    width = dvp * (2 if stored.itemsize == 1 else 1)
    merged = MERGED_ELEMENTS // (2 if real >= MAX_ROWS or width > 128 else 1)
    sizes = {
        "G": group, "D": dim, "DV": dim_v, "DP": dp, "DVP": dvp, "BM": rows, "BN": bn,
        "ROWS": real, "TOKENS": tokens,
        "GROUP": max(1, min(MAX_MERGED, merged // (real * width))),
        "STAGES": stages,
    }  # fmt: skip
    return fitted(sizes, dtype.itemsize, stored, target)


def num_warps(config: dict[str, int], itemsize: int) -> int:
    """Warps of a program: more where products are exact, which keeps their operands in registers.

    With 4 warps a tile of 32 rows or 128 columns of float32 may spill by kilobytes a thread, and
    one of 64 rows does where parts are merged.
    """
    exact = itemsize == 4 and (config["BM"] > 16 or config["DP"] > 64)
    return 8 if exact or config["BM"] >= 64 else 4


def alone(
    config: dict[str, int], itemsize: int, *, short: bool, early: bool = False
) -> tuple[dict[str, int], int]:
    """(sizes, warps) of programs that have an SM each; ``short``: with one tile of keys or so."""
    config = config | {"STAGES": min(config["STAGES"], LONE_STAGES)}
    narrow = max(config["DP"], config["DVP"]) <= 128 and itemsize < 4
    if early and narrow and config["BM"] == 32:
        config["BN"] = LONE_TILE
    small = config["BM"] == 16 and narrow
    return config, SHORT_WARPS if short and small else num_warps(config, itemsize)


def crowded(config: dict[str, int], programs: int, sms: int) -> bool:
    """Whether so many programs fill a GPU all at once if their tiles are small, but not else.

    Then none waits for another's end, which would leave SMs idle during the last ones. Only sizes
    that were measured: 16 rows, head dim 128, 16 bits.
    """
    sizes = config["DP"], config["DVP"], config["BM"], config["BN"], config["STAGES"]
    return sizes == (128, 128, 16, 64, 4) and 7 * CROWD * sms <= 8 * programs <= 8 * CROWD * sms


def wide_int4(config: dict[str, int], stored: torch.dtype, tokens: int) -> bool:
    """Whether programs that share an SM, with parts of ``tokens``, take ``INT4_SIZES``."""
    sizes = config["DP"], config["DVP"], config["BM"]
    return stored == INT4 and sizes == (64, 64, 16) and tokens >= INT4_PART_TOKENS


def together(
    config: dict[str, int], itemsize: int, parts: int, longest: int
) -> tuple[dict[str, int], int]:
    """(sizes, parts) of short sequences, of up to ``longest`` tokens, whose clusters merge them.

    The parts are one tile each and at most ``parts``; 0 where that is not enough. A barrier of the
    cluster takes less time than the counter, and each program merges a share of the columns.
    """
    size = min(MAX_CLUSTER, 1 << (parts.bit_length() - 1))
    small = config["BM"] == 16 and max(config["DP"], config["DVP"]) <= 128 and itemsize < 4
    if size < 2 or not small or longest > size * CLUSTER_TILE:
        return config, 0
    return config | {"BN": CLUSTER_TILE, "STAGES": 2}, size
