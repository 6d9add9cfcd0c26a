"""NVML's function table as ctypes would call it, and a card above it: for tests without a GPU."""

from __future__ import annotations

import ctypes

from kvcached.broker.probe import CardError, CardMemory

GIB = 1 << 30
UUID = "00000000-0000-fa4e-0000-000000000000"
UNKNOWN = (1 << 64) - 1
"""Bytes of a process that NVML does not tell."""
NO_FUNCTION, TOO_SMALL, NOT_FOUND, NOT_SUPPORTED, LOST = 13, 7, 6, 3, 15


class FakeNvml:
    """Pass it where ``load_library()`` is expected. Fills structures by their addresses."""

    def __init__(self, *, total=80 * GIB, reserved=GIB // 2, names=(f"GPU-{UUID}",)):
        self.total, self.reserved, self.names = total, reserved, names
        self.in_use = {}
        self.failing = {}
        self.opened = 0
        self.mig = None

    def __getattr__(self, name):
        """The functions by their names in ``nvml.h``; one that fails with 13 is not there."""
        function = type(self).__dict__.get("_" + name)
        if function is None or self.failing.get(name) == NO_FUNCTION:
            raise AttributeError(name)
        return lambda *arguments: self.failing.get(name) or function(self, *arguments) or 0

    @property
    def used(self):
        return sum(nbytes for nbytes in self.in_use.values() if nbytes != UNKNOWN)

    def _nvmlInit_v2(self):  # noqa: N802
        self.opened += 1

    def _nvmlShutdown(self):  # noqa: N802
        self.opened -= 1

    def _nvmlDeviceGetHandleByUUID(self, name, handle):  # noqa: N802
        if name.decode() not in self.names:
            return NOT_FOUND
        ctypes.c_void_p.from_address(ctypes.addressof(handle._obj)).value = 0xD0
        return 0

    def _nvmlDeviceGetMemoryInfo(self, device, info):  # noqa: N802
        assert device.value == 0xD0
        used = self.used + self.reserved
        _store(info, ctypes.c_ulonglong, 24, 0, self.total, self.total - used, used)

    def _nvmlDeviceGetMemoryInfo_v2(self, device, info):  # noqa: N802
        version = ctypes.c_uint.from_address(ctypes.addressof(info._obj)).value
        assert version == 0x02000028
        free = self.total - self.reserved - self.used
        values = self.total, self.reserved, free, self.used
        _store(info, ctypes.c_ulonglong, 40, 8, *values)

    def _nvmlDeviceGetComputeRunningProcesses_v3(self, device, count, records):  # noqa: N802
        room, count._obj.value = count._obj.value, len(self.in_use)
        if room < len(self.in_use):
            return TOO_SMALL
        for index, (pid, nbytes) in enumerate(self.in_use.items()):
            place = ctypes.addressof(records._obj) + 24 * index
            ctypes.c_uint.from_address(place).value = pid
            ctypes.c_ulonglong.from_address(place + 8).value = nbytes
            ctypes.c_ulonglong.from_address(place + 16).value = (1 << 64) - 1  # no instance
        return 0

    _nvmlDeviceGetComputeRunningProcesses_v2 = _nvmlDeviceGetComputeRunningProcesses_v3  # noqa: N815

    def _nvmlDeviceGetMigMode(self, device, now, later):  # noqa: N802
        if self.mig is None:
            return NOT_SUPPORTED
        now._obj.value = later._obj.value = self.mig
        return 0

    def _nvmlSystemGetDriverVersion(self, text, length):  # noqa: N802
        assert length.value >= 80
        text.value = b"580.159.03"


def _store(reference, kind, nbytes, offset, *values):
    """Write ``values`` from ``offset`` on into the structure, which must have the C size."""
    assert ctypes.sizeof(reference._obj) == nbytes
    place = ctypes.addressof(reference._obj) + offset
    for index, value in enumerate(values):
        kind.from_address(place + index * ctypes.sizeof(kind)).value = value


class FakeCard:
    """A ``Card`` of ``total`` bytes, set by hand."""

    def __init__(self, total, *, used=0):
        self.total, self.used = total, used
        self.pids = {}
        self.silent = False
        self.looks = 0

    def memory(self):
        self._speak()
        self.looks += 1
        return CardMemory(self.total - self.used, self.used)

    def processes(self):
        self._speak()
        return dict(self.pids)

    def _speak(self):
        if self.silent:
            raise CardError("the GPU is lost")
