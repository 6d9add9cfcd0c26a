"""Tensor maps: what tells the copy engine of a GPU (TMA) how a cache is laid out.

A map names an address, sizes, strides and the box that one copy brings. The driver makes it and
looks at none of the memory, so the base of a cache may be unmapped; a copy touches its box only.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch

from kvcached.kernels._launch import driver_calls

BOX_BYTES = 128
"""Columns of a box in bytes, whose rows are swizzled over all banks of shared memory."""
_MAX_STRIDE = 1 << 40
_MAP_BYTES = 128


def can_map(addresses: Sequence[int], strides: Sequence[int], itemsize: int) -> bool:
    """Whether addresses, and strides in elements, are such as a map can have."""
    sizes = [stride * itemsize for stride in strides]
    return all(at % 16 == 0 for at in addresses) and all(
        n % 16 == 0 and 0 < n < _MAX_STRIDE for n in sizes
    )


class TensorMap(bytes):
    """The 128 bytes of a map, and what they were made of."""

    address: int
    form: tuple[Any, ...]

    def at(self, address: int) -> TensorMap:
        """The same at another address."""
        return tensor_map(address, *self.form)


@functools.lru_cache(maxsize=4096)
def tensor_map(
    address: int, dtype: torch.dtype, sizes: tuple[int, int, int], strides: tuple[int, int],
    rows: int,
) -> TensorMap:  # fmt: skip
    """The map of a 16-bit tensor of ``sizes``, the last dimension of which is consecutive.

    ``strides`` are those of the first two in elements; a box is ``rows`` of the second dimension by
    ``BOX_BYTES``. Raises ``DriverError``.
    """
    calls = driver_calls()
    driver: Any = calls.driver
    wide, narrow = driver.cuuint64_t, driver.cuuint32_t
    kinds = driver.CUtensorMapDataType
    kind = {torch.bfloat16: kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            torch.float16: kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16}[dtype]  # fmt: skip
    (made,) = calls(
        "cuTensorMapEncodeTiled", kind, 3, address,
        [wide(n) for n in reversed(sizes)],
        [wide(dtype.itemsize * n) for n in reversed(strides)],
        [narrow(n) for n in (BOX_BYTES // dtype.itemsize, rows, 1)], [narrow(1)] * 3,
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )  # fmt: skip
    found = TensorMap(ctypes.string_at(made.getPtr(), _MAP_BYTES))
    found.address, found.form = address, (dtype, sizes, strides, rows)
    return found
