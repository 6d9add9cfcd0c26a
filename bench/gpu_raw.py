"""The driver's own calls, for ``gpu.py``: what a pool without any bookkeeping would cost."""

from __future__ import annotations

import statistics
import time
from functools import cache
from typing import Any

HANDLE_SIZES = (256 << 20, 64 << 20)


@cache
def _driver() -> Any:
    from cuda.bindings import driver  # only where there is one

    return driver


@cache
def _props() -> tuple[Any, Any]:
    """Allocation properties and access of device 0."""
    cu = _driver()
    prop = cu.CUmemAllocationProp()
    prop.type = cu.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    prop.location.type = cu.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    prop.location.id = 0
    access = cu.CUmemAccessDesc()
    access.location = prop.location
    access.flags = cu.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
    return prop, [access]


@cache
def _reserved(nbytes: int) -> int:
    return int(checked(_driver().cuMemAddressReserve(nbytes, 0, 0, 0)))


def checked(result: Any) -> Any:
    """The value of a driver call, which must have succeeded."""
    assert int(result[0]) == 0, result[0]
    return result[1] if len(result) > 1 else None


def one_handle_s(nbytes: int) -> float:
    """Seconds of create, map and access of one handle, as short as Python allows."""
    cu, (prop, access), base = _driver(), _props(), _reserved(nbytes)
    start = time.perf_counter()
    status, handle = cu.cuMemCreate(nbytes, prop, 0)
    cu.cuMemMap(base, nbytes, 0, handle, 0)
    cu.cuMemSetAccess(base, nbytes, access, 1)
    taken = time.perf_counter() - start
    assert int(status) == 0, status
    checked(cu.cuMemUnmap(base, nbytes))
    checked(cu.cuMemRelease(handle))
    return taken


def settle(pause_s: float) -> None:
    """Let the driver finish with what was released, then wake it and this core again.

    The driver clears freed memory in the background, and what is created meanwhile waits for it.
    After a pause its calls take three times as long at first; an engine at work does not pause.
    """
    time.sleep(pause_s)
    for _ in range(30):
        one_handle_s(2 << 20)


def up_and_down_s(nbytes: int, handle_bytes: int) -> tuple[float, float]:
    """Seconds to back ``nbytes``, one access call over all, and to give them back."""
    cu, (prop, access), base = _driver(), _props(), _reserved(nbytes)
    start = time.perf_counter()
    handles = []
    for offset in range(0, nbytes, handle_bytes):
        handles.append(checked(cu.cuMemCreate(handle_bytes, prop, 0)))
        checked(cu.cuMemMap(base + offset, handle_bytes, 0, handles[-1], 0))
    checked(cu.cuMemSetAccess(base, nbytes, access, 1))
    middle = time.perf_counter()
    checked(cu.cuMemUnmap(base, nbytes))
    for handle in handles:
        checked(cu.cuMemRelease(handle))
    return middle - start, time.perf_counter() - middle


def _median_ms(nbytes: int, repeats: int, which: int, pause_s: float) -> dict[str, float]:
    figures = {}
    for size in HANDLE_SIZES:
        samples = []
        for _ in range(repeats + 1):
            samples.append(up_and_down_s(nbytes, size)[which])
            settle(pause_s)
        samples = samples[1:]
        name = f"raw driver, {size >> 20} MiB handles"
        figures[name] = round(statistics.median(samples) * 1e3, 4)
    return figures


def grow_ms(nbytes: int, *, repeats: int, pause_s: float) -> dict[str, float]:
    """Median milliseconds to back ``nbytes``, by size of handle."""
    return _median_ms(nbytes, repeats, 0, pause_s)


def shrink_ms(nbytes: int, *, repeats: int, pause_s: float) -> dict[str, float]:
    """Median milliseconds to give ``nbytes`` back, by size of handle."""
    return _median_ms(nbytes, repeats, 1, pause_s)
