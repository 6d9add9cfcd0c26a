"""``Driver``: the functions of the CUDA driver that ``CudaBackend`` calls, as a protocol.

``cuda.bindings.driver`` (the module) is one; ``kvcached.testing.FakeCudaDriver`` is another. Names,
arguments and results are the driver's own: every function returns a tuple that begins with a
``CUresult``. The types are ``Any``, because the bindings ship no stubs.

``Calls`` makes a failed status an exception; ``find_device`` reads what users call a device.
"""

# ruff: noqa: N802, D102 - the functions bear the driver's names; its manual describes them
from __future__ import annotations

import uuid as uuids
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from kvcached.config import format_size
from kvcached.errors import (
    BackendUnavailable,
    DriverError,
    InvalidInput,
    OutOfPages,
    UnknownName,
)

Result = tuple[Any, ...]
_OLDEST_DRIVER = 12_000
_NO_DRIVER_HINT = "Install the NVIDIA driver (nvidia-smi must work), or use device='cpu'."
_INIT_HINTS = {
    "CUDA_ERROR_NO_DEVICE": "nvidia-smi -L lists the GPUs; CUDA_VISIBLE_DEVICES may hide them, "
    "and with MIG on an instance must have been made.",
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "The driver's library and kernel module differ: reboot, "
    "or use the library that came with the module.",
}
_LOCKED_OUT = {"CUDA_ERROR_DEVICE_UNAVAILABLE", "CUDA_ERROR_DEVICE_NOT_LICENSED"}


class Driver(Protocol):
    """See https://docs.nvidia.com/cuda/cuda-driver-api/ for what each function does."""

    # The enums and structs that the calls use.
    CUresult: Any
    CUmemAllocationProp: Any
    CUmemAccessDesc: Any
    CUmemAllocationType: Any
    CUmemAllocationHandleType: Any
    CUmemLocationType: Any
    CUmemAccess_flags: Any
    CUmemAllocationGranularity_flags: Any
    CUdevice_attribute: Any
    CUevent_flags: Any
    CUstream_flags: Any

    # Device and context.
    def cuInit(self, flags: int) -> Result: ...
    def cuDriverGetVersion(self) -> Result: ...
    def cuDeviceGetCount(self) -> Result: ...
    def cuDeviceGet(self, ordinal: int) -> Result: ...
    def cuDeviceGetUuid(self, device: Any) -> Result: ...
    def cuDeviceGetName(self, length: int, device: Any) -> Result: ...
    def cuDeviceTotalMem(self, device: Any) -> Result: ...
    def cuDeviceGetAttribute(self, attribute: Any, device: Any) -> Result: ...
    def cuDevicePrimaryCtxRetain(self, device: Any) -> Result: ...
    def cuDevicePrimaryCtxRelease(self, device: Any) -> Result: ...
    def cuCtxPushCurrent(self, context: Any) -> Result: ...
    def cuCtxPopCurrent(self) -> Result: ...

    # Virtual memory.
    def cuMemGetAllocationGranularity(self, prop: Any, option: Any) -> Result: ...
    def cuMemAddressReserve(
        self, size: int, alignment: int, address: int, flags: int
    ) -> Result: ...
    def cuMemAddressFree(self, address: int, size: int) -> Result: ...
    def cuMemCreate(self, size: int, prop: Any, flags: int) -> Result: ...
    def cuMemRelease(self, handle: Any) -> Result: ...
    def cuMemMap(self, address: int, size: int, offset: int, handle: Any, flags: int) -> Result: ...
    def cuMemUnmap(self, address: int, size: int) -> Result: ...
    def cuMemSetAccess(self, address: int, size: int, descriptors: Any, count: int) -> Result: ...
    def cuMemGetInfo(self) -> Result: ...

    # Copies, streams, events.
    def cuMemcpyDtoDAsync(self, dst: int, src: int, nbytes: int, stream: Any) -> Result: ...
    def cuMemsetD8Async(self, dst: int, value: int, nbytes: int, stream: Any) -> Result: ...
    def cuStreamCreate(self, flags: int) -> Result: ...
    def cuStreamSynchronize(self, stream: Any) -> Result: ...
    def cuStreamDestroy(self, stream: Any) -> Result: ...
    def cuEventCreate(self, flags: int) -> Result: ...
    def cuEventRecord(self, event: Any, stream: Any) -> Result: ...
    def cuEventQuery(self, event: Any) -> Result: ...
    def cuEventDestroy(self, event: Any) -> Result: ...


class Calls:
    """Calls a driver by function name: ``(free, total) = calls("cuMemGetInfo")``."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.success = driver.CUresult.CUDA_SUCCESS

    def __call__(self, name: str, *args: Any) -> Result:
        """The results after the status. ``OutOfPages`` or ``DriverError`` if the call failed."""
        return self.bound(name)(*args)

    def bound(self, name: str) -> Callable[..., Result]:
        """The function ``name``, called as ``__call__`` does: for what is called often."""
        function, success, check = getattr(self.driver, name), self.success, self.check

        def call(*args: Any) -> Result:
            try:
                result: Result = function(*args)
            except RuntimeError as error:  # cuda.bindings did not find it in the driver
                raise BackendUnavailable(
                    f"the NVIDIA driver is older than cuda-bindings: {error}",
                    hint="Update the driver, or pip install 'cuda-bindings==12.*'.",
                ) from error
            return result[1:] if result[0] is success else check(result, name, args)

        return call

    def check(self, result: Result, call: str, args: tuple[Any, ...] = ()) -> Result:
        """Strip the status off ``result``, or raise what it stands for.

        The name comes from the enum: without a driver even ``cuGetErrorName`` fails.
        """
        status = result[0]
        if status == self.driver.CUresult.CUDA_SUCCESS:
            return result[1:]
        name = getattr(status, "name", str(status))
        if status == self.driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            size = f" for {format_size(args[0])}" if call == "cuMemCreate" else ""
            raise OutOfPages(
                f"{call} says {name}{size}",
                hint="Free sequences, lower a limit, or see with nvidia-smi who holds the memory.",
            )
        shown = ", ".join(hex(arg) for arg in args if type(arg) is int)
        raise DriverError(f"{call}({shown}) says {name}", status=name, call=call)

    @contextmanager
    def in_context(self, context: Any) -> Iterator[None]:
        """Run with ``context`` current, and leave the thread's own as it was."""
        self("cuCtxPushCurrent", context)
        try:
            yield
        finally:
            self("cuCtxPopCurrent")

    def init(self) -> None:
        """``cuInit``; ``BackendUnavailable`` without a usable driver."""
        try:
            self("cuInit", 0)
        except BackendUnavailable as error:  # of this call: the bindings found no library
            raise BackendUnavailable(
                f"no NVIDIA driver was found: {error.__cause__}", hint=_NO_DRIVER_HINT
            ) from error.__cause__
        except DriverError as error:
            raise BackendUnavailable(
                f"no usable CUDA driver: {error.message}",
                hint=_INIT_HINTS.get(error.status, _NO_DRIVER_HINT),
            ) from error
        (version,) = self("cuDriverGetVersion")
        if version < _OLDEST_DRIVER:
            raise BackendUnavailable(
                f"the NVIDIA driver knows CUDA up to {version // 1000}.{version % 1000 // 10}",
                hint="Update the driver: 525 (CUDA 12.0) or newer is needed.",
            )


def find_device(calls: Calls, device: str | int) -> tuple[int, Any]:
    """The ordinal and the driver's device for ``"cuda:0"``, an ordinal or a UUID."""
    wanted = _parse_device(device)
    (count,) = calls("cuDeviceGetCount")
    for ordinal in range(count):
        (cu_device,) = calls("cuDeviceGet", ordinal)
        if wanted in {ordinal, uuid_of(calls, cu_device)}:
            return ordinal, cu_device
    raise UnknownName(
        f"there is no CUDA device {device!r}: this process sees {count}",
        hint="List them with nvidia-smi -L; CUDA_VISIBLE_DEVICES hides devices.",
    )


def open_context(calls: Calls, cu_device: Any, name: str) -> Any:
    """Retain the device's primary context; ``BackendUnavailable`` if it cannot serve us."""
    attribute = calls.driver.CUdevice_attribute
    vmm = attribute.CU_DEVICE_ATTRIBUTE_VIRTUAL_ADDRESS_MANAGEMENT_SUPPORTED
    if not calls("cuDeviceGetAttribute", vmm, cu_device)[0]:
        raise BackendUnavailable(
            f"the driver has no virtual memory management for {name}",
            hint="Virtual GPUs often lack it; use the whole device, or device='cpu'.",
        )
    try:
        return calls("cuDevicePrimaryCtxRetain", cu_device)[0]
    except DriverError as error:
        if error.status not in _LOCKED_OUT:
            raise
        raise BackendUnavailable(
            f"{name} lets this process in no more: {error.message}",
            hint="`nvidia-smi -q -d COMPUTE` shows the compute mode: 'Prohibited' lets nobody in, "
            "'Exclusive_Process' one process at a time.",
        ) from error


def uuid_of(calls: Calls, cu_device: Any) -> str:
    """The UUID of a device, in lower case, without the ``GPU-`` in front."""
    # Before CUDA 13 the first version names a MIG instance's parent; the second does not.
    has_v2 = hasattr(calls.driver, "cuDeviceGetUuid_v2")
    (value,) = calls("cuDeviceGetUuid_v2" if has_v2 else "cuDeviceGetUuid", cu_device)
    return str(uuids.UUID(bytes=bytes(value.bytes)))


def _parse_device(device: str | int) -> int | str:
    text = str(device).removeprefix("cuda").removeprefix(":") or "0"
    if text.isdecimal() and not isinstance(device, bool):
        return int(text)
    try:
        return str(uuids.UUID(text.upper().removeprefix("GPU-").removeprefix("MIG-")))
    except ValueError:
        raise InvalidInput(
            f"{device!r} is not a CUDA device", hint="Use 'cuda:0', an ordinal, or a UUID."
        ) from None
