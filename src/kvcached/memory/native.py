"""The driver calls that back memory and give it back as machine code: one call from Python.

``cuda.bindings`` costs half a microsecond a call, and takes the GIL back after each, for which a
thread that grows ahead waits while the engine computes. Here compiled code (``_calls.py``) calls
the driver's functions by the addresses that ``cuGetProcAddress`` gives.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numba as nb
import numpy as np

from kvcached import _calls
from kvcached.memory.base import Place
from kvcached.memory.driver import Calls
from kvcached.memory.mappings import joined

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ABI = 12_000  # the functions as CUDA 12.0 has them: no driver that is older is accepted
_BACKING = ("cuMemCreate", "cuMemMap", "cuMemSetAccess")
_FREEING = ("cuMemUnmap", "cuMemRelease")


class Native:
    """Backs memory with handles of one kind, and gives it back; ``find_native`` makes it.

    What was done is written down as it happens, so that not even a ``KeyboardInterrupt``, which
    comes when the compiled code returns, hides it.

    Parameters
    ----------
    calls:
        The driver; its failed statuses become exceptions there.
    backing, freeing:
        Addresses of ``cuMemCreate``, ``cuMemMap`` and ``cuMemSetAccess``; of ``cuMemUnmap`` and
        ``cuMemRelease``.
    prop, rights:
        Structs of ``cuda.bindings``: the properties of the handles, and the access.
    """

    def __init__(
        self, calls: Calls, backing: Sequence[int], freeing: Sequence[int], prop: Any, rights: Any
    ) -> None:
        self._calls, self._structs = calls, (prop, rights)  # which must outlive their pointers
        fixed = (*backing, int(prop.getPtr()), int(rights.getPtr()))
        self._words = array("Q", (1, *fixed))
        self.address = self._words.buffer_info()[0]
        """Where ``Direct.direct_calls`` finds the driver."""
        self._one, self._many = partial(_calls.back_one, *fixed), partial(_calls.back_many, *fixed)
        self._unback = partial(_calls.unback, *freeing)
        self._records: list[tuple[array[int], int]] = []  # and their addresses, to be used again

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
        record, where = self._records.pop() if self._records else _new_record()
        record[0] = 0
        try:
            status = self._one(address, nbytes, where)
        finally:
            done = record[0]
            if done:
                natives.append(record[1])
            if done > 1:
                mapped.append(record[1])
            self._records.append((record, where))
        if status:
            self.fail(status, done, address, nbytes)

    def _back_many(
        self, base: int, page_bytes: int, places: Sequence[Place],
        natives: list[Any], mapped: list[Any],
    ) -> None:  # fmt: skip
        parts, runs = _table(base, page_bytes, places), _table(base, page_bytes, joined(places))
        record = np.zeros(2, np.int64)
        try:
            status = self._many(parts, runs, record)
        finally:
            done, count = int(record[0]), len(parts)
            natives += parts[: (done + 1) // 2, 2].tolist()
            mapped += natives[: done // 2]
        if status:
            made = done < 2 * count
            where = parts[done // 2] if made else runs[done - 2 * count]
            self._fail(status, _BACKING[done % 2 if made else 2], *where[:2].tolist())

    def forbid(self) -> None:
        """No machine code may call the driver any more: it is not ours, or not there."""
        self._words[0] = 0

    def fail(self, status: int, call: int, address: int, nbytes: int) -> None:
        """Raise what the status of one of the three calls that back memory stands for."""
        self._fail(status, _BACKING[call], address, nbytes)

    def unback(self, places: Sequence[int], done: list[int]) -> None:
        """Unmap ``places``, then release them, both in order: address, bytes and handle of each.

        Neighbours are unmapped in one call. The first that cannot be unmapped, and those after it,
        stay as they were. ``done`` becomes how many were unmapped, and how many of these released,
        whatever fails.
        """
        record = array("Q", (0, 0, *places))
        try:
            status = self._unback(len(places) // 3, record.buffer_info()[0])
        finally:
            done[:] = record[0], record[1]
        if status:
            unmapped, released = done
            at, call = (released, 1) if released < unmapped else (unmapped, 0)
            self._fail(status, _FREEING[call], *places[3 * at : 3 * at + 2])

    def _fail(self, status: int, name: str, address: int, nbytes: int) -> None:
        results = (self._calls.driver.CUresult(status),)
        self._calls.check(results, name, (nbytes,) if name == "cuMemCreate" else (address, nbytes))


def _new_record() -> tuple[array[int], int]:
    record = array("Q", (0, 0))
    return record, record.buffer_info()[0]


def _table(base: int, page_bytes: int, places: Sequence[Place]) -> NDArray[np.uint64]:
    """Rows of (address, bytes, 0)."""
    rows = [(base + first * page_bytes, count * page_bytes, 0) for first, count in places]
    return np.array(rows, np.uint64)


def find_native(calls: Calls, prop: Any, rights: Any) -> Native | None:
    """Machine code for this driver; ``None`` where the driver's functions have no address."""
    find = getattr(calls.driver, "cuGetProcAddress", None)
    if find is None or nb.config.DISABLE_JIT:
        return None
    found = [find(name.encode(), _ABI, 0) for name in (*_BACKING, *_FREEING)]
    if any(result[0] != calls.success or not int(result[1]) for result in found):
        return None
    addresses = [int(result[1]) for result in found]
    return Native(calls, addresses[:3], addresses[3:], prop, rights)
