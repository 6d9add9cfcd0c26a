"""What a GPU gives a program, and tiles that fit into it.

Tiles are tuned on an H100. A GPU with less shared memory for a program takes fewer tiles on their
way, then smaller ones; one whose matrix instructions are those of a warp, not of four, takes
shapes of which the accumulators do not spill.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from kvcached.kernels.quant import INT4

LEAST_CAPABILITY = (8, 0)
"""Of GPUs that the kernels run on: asynchronous copies and bfloat16."""
WARPGROUP_ROWS = 64
"""Rows of the matrix instructions of a warpgroup, in 16 bits."""
EXTRAS = 2048
"""Bytes at most of what Triton keeps in shared memory beside tiles: barriers, reductions."""


class Target(NamedTuple):
    """What tiles depend on."""

    shared: int
    """Bytes of shared memory that a program may ask for."""
    major: int
    """Of the compute capability."""
    minor: int = 0

    @property
    def warpgroups(self) -> bool:
        """Whether products can be those of four warps (``wgmma``)."""
        return self.major == 9

    @property
    def by_warp(self) -> bool:
        """Whether all products are those of a warp (``mma.sync``).

        If not, those of 64 rows of 16 bits read shared memory: ``wgmma``, or ``tcgen05``, whose
        results lie in a memory of their own.
        """
        return self.major not in (9, 10, 11)


HOPPER = Target(232_448, 9)
"""An H100, on which tiles are tuned; also what the interpreter stands in for."""


def tile_bytes(
    sizes: Mapping[str, int], target: Target, *, row: int, dim: int, itemsize: int
) -> int:
    """Shared memory of a program of attention: tiles on their way, queries, weights.

    ``row`` bytes of K, V and scales a key, ``dim`` (padded) columns of a query; products are made
    of elements of ``itemsize`` bytes. Larger ones than a warp's may still read a tile when the next
    is on its way, so there is one more, and leave no copy of the weights.
    """
    rows, keys = sizes["BM"], sizes["BN"]
    wide = rows >= WARPGROUP_ROWS and itemsize == 2 and not target.by_warp
    tiles = sizes["STAGES"] if wide else sizes["STAGES"] - 1
    weights = 0 if wide else rows * keys * itemsize
    return tiles * keys * row + rows * dim * itemsize + weights + EXTRAS


def fit_tiles(
    sizes: Mapping[str, int], target: Target, least: Mapping[str, int], *, row: int, dim: int,
    itemsize: int,
) -> dict[str, int]:  # fmt: skip
    """``sizes`` whose ``tile_bytes`` ``target`` has, if there are any.

    Reduced are those named by ``least``, in this order, each until it is enough or at its least:
    ``STAGES`` by one, others by half.
    """
    made = dict(sizes)
    for name, floor in least.items():
        while made[name] > floor and target.shared < tile_bytes(
            made, target, row=row, dim=dim, itemsize=itemsize
        ):
            made[name] = made[name] - 1 if name == "STAGES" else max(floor, made[name] // 2)
    return made


def fitted(
    config: dict[str, int], itemsize: int, stored: torch.dtype, target: Target
) -> dict[str, int]:
    """The sizes of ``attend_kernel`` with as many and as large tiles as fit shared memory."""
    scales, least = (8, 32) if stored.itemsize == 1 else (0, 16)
    row = row_bytes(config["DP"], config["DVP"], stored) + scales
    dim = config["DP"] * (2 if stored == INT4 else 1)
    return fit_tiles(config, target, {"STAGES": 2, "BN": least}, row=row, dim=dim,
                     itemsize=itemsize)  # fmt: skip


def row_bytes(dp: int, dvp: int, stored: torch.dtype) -> int:
    """Bytes in a tile of a row of K and one of V; V of one byte an element is read by pairs."""
    pairs = stored.itemsize == 1 and stored != INT4
    return int(dp * stored.itemsize + dvp * (2 if pairs else stored.itemsize))
