"""NVML, the library behind ``nvidia-smi``, by ctypes: a GPU's memory and processes, no context.

Structures and numbers as in ``nvml.h``. Standard library only: the broker uses this.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_uint, c_ulonglong, c_void_p
from typing import Any

from kvcached.broker.probe import CardError, CardMemory

LIBRARY = "libnvidia-ml.so.1"
_NOT_SUPPORTED, _TOO_SMALL, _NO_FUNCTION = 3, 7, 13
_STATUS = {
    1: "NVML is not initialized", 2: "invalid argument", 3: "not supported", 4: "no permission",
    6: "not found", 9: "the driver is not loaded", 13: "this driver is too old for it",
    15: "the GPU is lost", 18: "driver and library are of different versions: reboot",
    999: "unknown error",
}  # fmt: skip
_UNKNOWN_BYTES = (1 << 64) - 1
_TRIES = 4


class _Memory(ctypes.Structure):
    """nvmlMemory_t."""

    _fields_ = (("total", c_ulonglong), ("free", c_ulonglong), ("used", c_ulonglong))


class _MemoryV2(ctypes.Structure):
    """nvmlMemory_v2_t: ``used`` without ``reserved``, what the driver keeps for itself."""

    _fields_ = (
        ("version", c_uint),
        ("total", c_ulonglong),
        ("reserved", c_ulonglong),
        ("free", c_ulonglong),
        ("used", c_ulonglong),
    )


class _Process(ctypes.Structure):
    """nvmlProcessInfo_t, the same for version 2 and 3 of the function."""

    _fields_ = (
        ("pid", c_uint),
        ("used", c_ulonglong),
        ("gpu_instance", c_uint),
        ("compute_instance", c_uint),
    )


class NvmlError(CardError):
    """A function of NVML failed; ``status`` is its ``nvmlReturn_t``."""

    def __init__(self, call: str, status: int) -> None:
        super().__init__(f"{call}: {_STATUS.get(status, f'status {status}')}")
        self.call, self.status = call, status


def load_library() -> Any:
    """NVML itself; ``CardError`` if the driver has not brought it."""
    try:
        return ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise CardError(f"no {LIBRARY}: {error}") from error


class NvmlCard:
    """One GPU, or one MIG slice of it. ``close`` it.

    Parameters
    ----------
    library:
        The functions of NVML, by name.
    uuid:
        With or without ``GPU-`` in front, in any case.
    """

    def __init__(self, library: Any, uuid: str) -> None:
        self._library = library
        self._handle = c_void_p()
        self.is_slice = False
        """Whether this is a MIG slice."""
        self._call("nvmlInit_v2")
        try:
            self._find(uuid.lower().removeprefix("gpu-").removeprefix("mig-"))
        except BaseException:  # whatever it was, what was opened does not stay open
            self.close()
            raise

    def memory(self) -> CardMemory:
        """See ``Card.memory``."""
        new = _MemoryV2(version=ctypes.sizeof(_MemoryV2) | 2 << 24)
        try:
            self._ask("nvmlDeviceGetMemoryInfo_v2", new)
        except NvmlError:  # an old driver: there "used" contains what it keeps for itself
            old = _Memory()
            self._ask("nvmlDeviceGetMemoryInfo", old)
            return CardMemory(old.free, old.used)
        return CardMemory(new.free, new.used)

    def processes(self) -> dict[int, int | None]:
        """See ``Card.processes``. Those with a compute context, in our pid namespace."""
        try:
            return self._processes("nvmlDeviceGetComputeRunningProcesses_v3")
        except NvmlError as error:
            if error.status != _NO_FUNCTION:
                raise
        return self._processes("nvmlDeviceGetComputeRunningProcesses_v2")

    def has_mig(self) -> bool:
        """Whether the GPU is cut into slices now."""
        now, later = c_uint(), c_uint()
        try:
            self._ask("nvmlDeviceGetMigMode", now, later)
        except NvmlError:  # a card that cannot be cut, or a slice
            return self.is_slice
        return bool(now.value)

    def driver_version(self) -> str:
        """As ``nvidia-smi`` shows it."""
        text = ctypes.create_string_buffer(96)
        self._call("nvmlSystemGetDriverVersion", text, c_uint(len(text)))
        return text.value.decode(errors="replace")

    def close(self) -> None:
        """Let go of the library."""
        self._call("nvmlShutdown")

    def _find(self, uuid: str) -> None:
        name = "nvmlDeviceGetHandleByUUID"
        try:
            self._call(name, f"GPU-{uuid}".encode(), ctypes.byref(self._handle))
        except NvmlError as error:
            try:
                self._call(name, f"MIG-{uuid}".encode(), ctypes.byref(self._handle))
            except NvmlError:
                raise error from None
            self.is_slice = True

    def _processes(self, function: str) -> dict[int, int | None]:
        room = 64
        for _ in range(_TRIES):
            count = c_uint(room)
            # Twice the room that we admit to: some drivers of the 535 series write longer records.
            records = (_Process * (2 * room))()
            try:
                self._ask(function, count, records)
            except NvmlError as error:
                if error.status != _TOO_SMALL:
                    raise
                room = max(2 * room, 2 * count.value)
                continue
            return _by_pid(records[: count.value])
        raise NvmlError(function, _TOO_SMALL)

    def _ask(self, function: str, *results: Any) -> None:
        self._call(function, self._handle, *map(ctypes.byref, results))

    def _call(self, function: str, *arguments: Any) -> None:
        found = getattr(self._library, function, None)
        status = _NO_FUNCTION if found is None else found(*arguments)
        if status:
            raise NvmlError(function, status)


def _by_pid(records: list[_Process]) -> dict[int, int | None]:
    """A process can be there several times, once a slice."""
    found: dict[int, int | None] = {}
    for record in records:
        known = found.get(record.pid) or 0
        found[record.pid] = None if record.used == _UNKNOWN_BYTES else known + record.used
    return found


def open_card(uuid: str, load: Callable[[], Any] = load_library) -> NvmlCard:
    """The GPU of this UUID (or ``gpu-<uuid>``). Raises ``CardError``; makes no context."""
    return NvmlCard(load(), uuid)
