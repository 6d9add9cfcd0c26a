"""``FakeDevice``: the state behind ``FakeCudaDriver``, and how tests steer and read it."""

from __future__ import annotations

import enum
import functools
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

Result = tuple[Any, ...]


PROHIBITED = 2
"""``CU_COMPUTEMODE_PROHIBITED``."""


class CUresult(enum.IntEnum):
    """The statuses that the fake returns, with the driver's own numbers."""

    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NOT_INITIALIZED = 3
    CUDA_ERROR_DEVICE_UNAVAILABLE = 46
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_INVALID_DEVICE = 101
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_INVALID_HANDLE = 400
    CUDA_ERROR_NOT_READY = 600
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_NOT_PERMITTED = 800
    CUDA_ERROR_NOT_SUPPORTED = 801
    CUDA_ERROR_SYSTEM_DRIVER_MISMATCH = 803
    CUDA_ERROR_UNKNOWN = 999


class Refused(Exception):  # noqa: N818 - a status on its way, not an error of ours
    """Makes the driver function under way return ``status``."""

    def __init__(self, status: CUresult) -> None:
        super().__init__(status.name)
        self.status = status


INVALID = Refused(CUresult.CUDA_ERROR_INVALID_VALUE)
UNSUPPORTED = Refused(CUresult.CUDA_ERROR_NOT_SUPPORTED)


def driver_call(
    *, context: bool = False
) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Count the call, inject failures, put the status in front of the result."""

    def wrap(function: Callable[..., Result]) -> Callable[..., Result]:
        @functools.wraps(function)
        def call(self: FakeDevice, *args: object) -> Result:
            try:
                with self.lock:
                    self.enter(function.__name__, needs_context=context)
                    return (CUresult.CUDA_SUCCESS, *function(self, *args))
            except Refused as refused:
                return (refused.status, None)

        return call

    return wrap


class Memory:
    """One physical allocation."""

    def __init__(self, nbytes: int, dirt: int = 0) -> None:
        self.contents = bytearray([dirt]) * nbytes


class Mapping:
    """One mapping of a whole allocation."""

    def __init__(self, address: int, memory: Memory) -> None:
        self.address, self.memory = address, memory
        self.end = address + len(memory.contents)
        self.accessible = False


class FakeDevice:
    """See ``FakeCudaDriver`` for the parameters."""

    def __init__(
        self,
        granularity: int = 64,
        *,
        capacity: int = 1 << 20,
        num_devices: int = 1,
        vmm: bool = True,
        exportable: bool = True,
        compute_mode: int = 0,
        version: int = 13_000,
        dirt: int = 0,
    ) -> None:
        self.lock = threading.RLock()  # the driver takes calls of many threads, so this does
        self.granularity, self.capacity, self.num_devices = granularity, capacity, num_devices
        self.vmm, self.exportable = vmm, exportable
        self.compute_mode, self.version, self.dirt = compute_mode, version, dirt
        self.calls: Counter[str] = Counter()
        self.contexts: list[int] = []
        self.retained = 0
        self.work_pending = False
        self.reservations: dict[int, int] = {}
        self.memories: dict[int, Memory] = {}
        self.mappings: dict[int, Mapping] = {}
        self.streams: set[int] = set()
        self.events: dict[int, bool] = {}
        self.last_failed = ""
        self._failures: dict[str, tuple[int, CUresult, bool]] = {}
        self.initialized = False
        self.entries: dict[str, Any] = {}  # C functions that call ours, by name
        self.next_id = 1
        self.next_address = granularity << 32

    # --- for the tests ------------------------------------------------------------------------

    def fail(
        self, call: str, at: int = 1, *, status: str = "CUDA_ERROR_UNKNOWN", sticky: bool = False
    ) -> None:
        """Make the ``at``-th call of ``call`` from now on return ``status``, before any effect.

        ``call`` may be ``"*"`` for any. ``sticky`` fails all the calls after it, too.
        """
        self._failures[call] = (at, CUresult[status], sticky)

    def heal(self) -> None:
        """Forget all failures that were asked for."""
        self._failures.clear()

    def finish(self) -> None:
        """Let the device get past everything that is queued: all events pass."""
        self.work_pending = False
        self.events = dict.fromkeys(self.events, True)

    @property
    def used(self) -> int:
        """Bytes of physical memory that are not back with the device."""
        alive = set(self.memories.values()) | {m.memory for m in self.mappings.values()}
        return sum(len(memory.contents) for memory in alive)

    def open_resources(self) -> dict[str, int]:
        """What has not been given back, by kind; all zero after a clean shutdown."""
        return {
            "reservations": len(self.reservations),
            "handles": len(self.memories),
            "mappings": len(self.mappings),
            "streams": len(self.streams),
            "events": len(self.events),
            "contexts": self.retained + len(self.contexts),
            "bytes": self.used,
        }

    def read(self, address: int, nbytes: int) -> bytes:
        """The bytes at ``address``; ``MemoryError`` where a kernel would fault."""
        try:
            with self.lock:
                return b"".join(bytes(piece) for piece in self.pieces(address, nbytes))
        except Refused as refused:
            raise MemoryError(f"{address:#x}: {refused}") from refused

    def write(self, address: int, data: bytes) -> None:
        """Store ``data`` at ``address``; ``MemoryError`` where a kernel would fault."""
        try:
            with self.lock:
                self.store(address, data)
        except Refused as refused:
            raise MemoryError(f"{address:#x}: {refused}") from refused

    # --- internals ------------------------------------------------------------------------------

    def enter(self, name: str, *, needs_context: bool) -> None:
        """Count a call; refuse it if a failure was asked for, or the driver is not ready for it."""
        self.calls[name] += 1
        for key in (name, "*"):
            if key in self._failures:
                self._maybe_fail(key, name)
        if not self.initialized and name != "cuInit":
            raise Refused(CUresult.CUDA_ERROR_NOT_INITIALIZED)
        if needs_context and not self.contexts:
            raise Refused(CUresult.CUDA_ERROR_INVALID_CONTEXT)

    def _maybe_fail(self, key: str, name: str) -> None:
        at, status, sticky = self._failures[key]
        if at > 1:
            self._failures[key] = (at - 1, status, sticky)
            return
        if not sticky:
            del self._failures[key]
        self.last_failed = name
        raise Refused(status)

    def new_id(self) -> int:
        """A number that no handle, stream or event had before."""
        self.next_id += 1
        return self.next_id - 1

    def require(self, condition: bool) -> None:  # noqa: FBT001
        """Refuse with INVALID_VALUE unless ``condition`` holds."""
        if not condition:
            raise INVALID

    def require_handle(self, condition: bool) -> None:  # noqa: FBT001
        """Refuse with INVALID_HANDLE unless ``condition`` holds."""
        if not condition:
            raise Refused(CUresult.CUDA_ERROR_INVALID_HANDLE)

    def overlapping(self, address: int, end: int) -> list[Mapping]:
        """The mappings that share a byte with ``[address, end)``."""
        return [m for m in self.mappings.values() if m.address < end and address < m.end]

    def whole(self, address: int, size: int) -> list[Mapping]:
        """The mappings that fill ``[address, address + size)`` exactly."""
        found = self.overlapping(address, address + size)
        whole = all(address <= m.address and m.end <= address + size for m in found)
        self.require(whole and bool(found) and sum(m.end - m.address for m in found) == size)
        return found

    def store(self, address: int, data: bytes) -> None:
        """Write through accessible mappings, all or nothing."""
        done = 0
        for piece in self.pieces(address, len(data)):
            piece[:] = data[done : done + len(piece)]
            done += len(piece)

    def pieces(self, address: int, nbytes: int) -> list[memoryview]:
        """The accessible bytes as writable views; all of them or a fault."""
        pieces, end = [], address + nbytes
        while address < end:
            found = [m for m in self.overlapping(address, address + 1) if m.accessible]
            if not found:
                raise Refused(CUresult.CUDA_ERROR_ILLEGAL_ADDRESS)
            mapping, start = found[0], address - found[0].address
            stop = min(end, mapping.end) - mapping.address
            pieces.append(memoryview(mapping.memory.contents)[start:stop])
            address = mapping.address + stop
        return pieces
