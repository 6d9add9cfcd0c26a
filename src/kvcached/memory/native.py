"""The driver calls of a growth as machine code: one call from Python makes them all.

``cuda.bindings`` costs half a microsecond a call, and takes the GIL back after each, for which a
thread that grows ahead waits while the engine computes. Here compiled code (``_calls.py``) calls
the driver's functions by the addresses that ``cuGetProcAddress`` gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numba as nb
import numpy as np

from kvcached._calls import back_many, back_one
from kvcached.memory.base import Place
from kvcached.memory.driver import Calls
from kvcached.memory.mappings import joined

_ABI = 12_000  # the functions as CUDA 12.0 has them: no driver that is older is accepted
_BACKING = ("cuMemCreate", "cuMemMap", "cuMemSetAccess")


class Native:
    """Creates, maps and gives access to handles of one kind; ``find_native`` makes it.

    Parameters
    ----------
    calls:
        The driver; its failed statuses become exceptions there.
    functions:
        Addresses of ``cuMemCreate``, ``cuMemMap`` and ``cuMemSetAccess``.
    prop, rights:
        Structs of ``cuda.bindings``: the properties of the handles, and the access.
    """

    def __init__(self, calls: Calls, functions: Sequence[int], prop: Any, rights: Any) -> None:
        self._calls, self._structs = calls, (prop, rights)  # which must outlive their pointers
        fixed = (*functions, int(prop.getPtr()), int(rights.getPtr()))
        self._one, self._many = partial(back_one, *fixed), partial(back_many, *fixed)

    def back(
        self, base: int, page_bytes: int, places: Sequence[Place],
        natives: list[Any], mapped: list[Any],
    ) -> None:  # fmt: skip
        """Make and map a handle for each place, counted in pages from ``base``, and give access.

        ``natives`` and ``mapped`` get the handles that were created and mapped, whatever fails.
        """
        if len(places) > 1:
            self._back_many(base, page_bytes, places, natives, mapped)
            return
        ((first, count),) = places
        address, nbytes = base + first * page_bytes, count * page_bytes
        status, done, handle = self._one(address, nbytes)
        if done:
            natives.append(handle)
        if done > 1:
            mapped.append(handle)
        if status:
            self._fail(status, _BACKING[done], address, nbytes)

    def _back_many(
        self, base: int, page_bytes: int, places: Sequence[Place],
        natives: list[Any], mapped: list[Any],
    ) -> None:  # fmt: skip
        parts, runs = (
            np.array(pages, np.int64) * page_bytes + (base, 0) for pages in (places, joined(places))
        )
        handles = np.zeros(len(parts), np.uint64)
        status, done, created = self._many(parts, runs, handles)
        natives += handles[:created].tolist()
        mapped += natives[: done // 2]
        if status:
            name = _BACKING[done % 2] if done < 2 * len(parts) else _BACKING[2]
            where = parts[done // 2] if done < 2 * len(parts) else runs[done - 2 * len(parts)]
            self._fail(status, name, *where.tolist())

    def _fail(self, status: int, name: str, address: int, nbytes: int) -> None:
        results = (self._calls.driver.CUresult(status),)
        self._calls.check(results, name, (nbytes,) if name == "cuMemCreate" else (address, nbytes))


def find_native(calls: Calls, prop: Any, rights: Any) -> Native | None:
    """Machine code for this driver; ``None`` where the driver's functions have no address."""
    find = getattr(calls.driver, "cuGetProcAddress", None)
    if find is None or nb.config.DISABLE_JIT:
        return None
    found = [find(name.encode(), _ABI, 0) for name in _BACKING]
    if any(result[0] != calls.success or not int(result[1]) for result in found):
        return None
    return Native(calls, [int(result[1]) for result in found], prop, rights)
