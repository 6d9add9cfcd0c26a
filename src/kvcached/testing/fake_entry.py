"""Addresses of the fake driver's functions, for callers in machine code (``memory/native.py``)."""

# ruff: noqa: N802 - the function bears the driver's name
from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

from kvcached.testing.fake_device import CUresult, FakeDevice, Result

_ARGUMENTS = {
    "cuMemCreate": 4, "cuMemMap": 5, "cuMemSetAccess": 4, "cuMemUnmap": 2, "cuMemRelease": 1,
}  # fmt: skip


class FakeStruct(SimpleNamespace):
    """A struct of the driver's; its pointer leads back to the object."""

    def getPtr(self) -> int:
        """As ``cuda.bindings`` calls it."""
        return id(self)


def struct_at(pointer: int) -> FakeStruct:
    """The struct that has this pointer."""
    struct = ctypes.cast(pointer, ctypes.py_object).value
    assert isinstance(struct, FakeStruct)
    return struct


class FakeEntry(FakeDevice):
    """``cuGetProcAddress``, for the functions that need no more than numbers and a struct.

    ``has_addresses`` says whether it finds them.
    """

    has_addresses = True

    def cuGetProcAddress(self, symbol: bytes, version: int, flags: int) -> Result:
        """``(status, address, found)``; 0 is no address."""
        name = symbol.decode()
        if not self.has_addresses or version > self.version or flags:
            return CUresult.CUDA_SUCCESS, 0, 2
        if name not in self.entries:
            kind = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_uint64] * _ARGUMENTS[name])
            self.entries[name] = kind(getattr(self, f"_{name}"))
        return CUresult.CUDA_SUCCESS, ctypes.cast(self.entries[name], ctypes.c_void_p).value, 0

    def _cuMemCreate(self, out: int, size: int, prop: int, flags: int) -> int:
        status, handle = self._driver().cuMemCreate(size, struct_at(prop), flags)
        if handle is not None:
            ctypes.c_uint64.from_address(out).value = handle
        return int(status)

    def _cuMemMap(self, *args: int) -> int:
        return int(self._driver().cuMemMap(*args)[0])

    def _cuMemSetAccess(self, address: int, size: int, rights: int, count: int) -> int:
        return int(self._driver().cuMemSetAccess(address, size, [struct_at(rights)], count)[0])

    def _cuMemUnmap(self, address: int, size: int) -> int:
        return int(self._driver().cuMemUnmap(address, size)[0])

    def _cuMemRelease(self, handle: int) -> int:
        return int(self._driver().cuMemRelease(handle)[0])

    def _driver(self) -> Any:
        return self
