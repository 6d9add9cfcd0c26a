"""``FakeCudaDriver``: the CUDA driver's virtual memory functions, modelled in plain Python.

Names, statuses and rules are the driver's, as measured on an H100: a handle is mapped at offset
0 and whole, unmapped whole, may be mapped at many addresses, and its memory is free once it is
released *and* unmapped everywhere. Contents are real, so copies can be checked.
"""

# ruff: noqa: N802, D102 - the functions bear the driver's names; its manual describes them
from __future__ import annotations

import uuid as uuids
from types import SimpleNamespace
from typing import Any

from kvcached.testing.fake_device import (
    PROHIBITED,
    UNSUPPORTED,
    CUresult,
    Mapping,
    Memory,
    Refused,
    Result,
    driver_call,
)
from kvcached.testing.fake_entry import FakeEntry, FakeStruct


class FakeCudaDriver(FakeEntry):
    """Pass it as ``CudaBackend(driver=FakeCudaDriver())``.

    Parameters
    ----------
    granularity:
        Bytes of a page; small by default, because contents are kept.
    capacity:
        Bytes of memory of each device.
    num_devices:
        Devices; the UUID of device ``i`` ends in ``i``.
    vmm, exportable:
        Whether the devices have virtual memory management, and allow POSIX file descriptors.
    compute_mode:
        0 lets all processes in, 2 none ("prohibited"), 3 one ("exclusive").
    version:
        What ``cuDriverGetVersion`` says: 1000 * major + 10 * minor.
    dirt:
        What fresh memory reads as, byte for byte: 0 as on the driver that clears.
    """

    CUresult = CUresult
    CUmemAllocationType = SimpleNamespace(CU_MEM_ALLOCATION_TYPE_PINNED=1)
    CUmemAllocationHandleType = SimpleNamespace(
        CU_MEM_HANDLE_TYPE_NONE=0, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR=1
    )
    CUmemLocationType = SimpleNamespace(CU_MEM_LOCATION_TYPE_DEVICE=1)
    CUmemAccess_flags = SimpleNamespace(CU_MEM_ACCESS_FLAGS_PROT_READWRITE=3)
    CUmemAllocationGranularity_flags = SimpleNamespace(CU_MEM_ALLOC_GRANULARITY_MINIMUM=0)
    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_MODE=20,
        CU_DEVICE_ATTRIBUTE_VIRTUAL_ADDRESS_MANAGEMENT_SUPPORTED=102,
        CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED=103,
    )
    CUevent_flags = SimpleNamespace(CU_EVENT_DISABLE_TIMING=2)
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)

    def CUmemAllocationProp(self) -> Any:
        """A struct with the fields that the backend sets."""
        return FakeStruct(type=0, location=SimpleNamespace(type=0, id=0), requestedHandleTypes=0)

    def CUmemAccessDesc(self) -> Any:
        """A struct with the fields that the backend sets."""
        return FakeStruct(location=None, flags=0)

    # --- device and context -------------------------------------------------------------------

    @driver_call()
    def cuInit(self, flags: int) -> Result:  # noqa: ARG002
        self.initialized = True
        return ()

    @driver_call()
    def cuDriverGetVersion(self) -> Result:
        return (self.version,)

    @driver_call()
    def cuDeviceGetCount(self) -> Result:
        return (self.num_devices,)

    @driver_call()
    def cuDeviceGet(self, ordinal: int) -> Result:
        if not 0 <= ordinal < self.num_devices:
            raise Refused(CUresult.CUDA_ERROR_INVALID_DEVICE)
        return (ordinal,)

    @driver_call()
    def cuDeviceGetUuid(self, device: int) -> Result:
        return (SimpleNamespace(bytes=uuids.UUID(int=(0xFA4E << 64) + device).bytes),)

    @driver_call()
    def cuDeviceGetName(self, length: int, device: int) -> Result:  # noqa: ARG002
        return (b"Fake GPU".ljust(length, b"\0"),)

    @driver_call()
    def cuDeviceTotalMem(self, device: int) -> Result:  # noqa: ARG002
        return (self.capacity,)

    @driver_call()
    def cuDeviceGetAttribute(self, attribute: int, device: int) -> Result:  # noqa: ARG002
        return (int({20: self.compute_mode, 102: self.vmm, 103: self.exportable}[attribute]),)

    @driver_call()
    def cuDevicePrimaryCtxRetain(self, device: int) -> Result:
        if self.compute_mode == PROHIBITED:
            raise Refused(CUresult.CUDA_ERROR_DEVICE_UNAVAILABLE)
        self.retained += 1
        return (0xC0 + device,)

    @driver_call()
    def cuDevicePrimaryCtxRelease(self, device: int) -> Result:  # noqa: ARG002
        self.retained -= 1
        return ()

    @driver_call()
    def cuCtxPushCurrent(self, context: int) -> Result:
        self.contexts.append(context)
        return ()

    @driver_call(context=True)
    def cuCtxPopCurrent(self) -> Result:
        return (self.contexts.pop(),)

    # --- virtual memory -------------------------------------------------------------------------

    @driver_call()
    def cuMemGetAllocationGranularity(self, prop: Any, option: int) -> Result:  # noqa: ARG002
        return (self.granularity,)

    @driver_call()
    def cuMemAddressReserve(self, size: int, alignment: int, address: int, flags: int) -> Result:
        self.require(size > 0 and size % self.granularity == 0 and not address and not flags)
        self.require(alignment % self.granularity == 0)
        start, self.next_address = self.next_address, self.next_address + size
        self.reservations[start] = size
        return (start,)

    @driver_call()
    def cuMemAddressFree(self, address: int, size: int) -> Result:
        self.require(self.reservations.get(address) == size)
        self.require(not self.overlapping(address, address + size))
        del self.reservations[address]
        return ()

    @driver_call()
    def cuMemCreate(self, size: int, prop: Any, flags: int) -> Result:
        self.require(size > 0 and size % self.granularity == 0 and not flags)
        self.require(prop.type == 1 and prop.location.type == 1)
        self.require(0 <= prop.location.id < self.num_devices)
        if prop.requestedHandleTypes and not self.exportable:
            raise UNSUPPORTED
        if self.used + size > self.capacity:
            raise Refused(CUresult.CUDA_ERROR_OUT_OF_MEMORY)
        handle = self.new_id()
        self.memories[handle] = Memory(size, self.dirt)
        return (handle,)

    @driver_call()
    def cuMemRelease(self, handle: int) -> Result:
        self.require(handle in self.memories)
        del self.memories[handle]
        return ()

    @driver_call()
    def cuMemMap(self, address: int, size: int, offset: int, handle: int, flags: int) -> Result:
        self.require(handle in self.memories and not flags)
        memory = self.memories[handle]
        if offset or size != len(memory.contents):
            raise UNSUPPORTED
        end = address + size
        inside = any(a <= address and end <= a + n for a, n in self.reservations.items())
        self.require(inside and address % self.granularity == 0)
        self.require(not self.overlapping(address, end))
        self.mappings[address] = Mapping(address, memory)
        return ()

    @driver_call()
    def cuMemUnmap(self, address: int, size: int) -> Result:
        for mapping in self.whole(address, size):
            del self.mappings[mapping.address]
        return ()

    @driver_call()
    def cuMemSetAccess(self, address: int, size: int, descriptors: Any, count: int) -> Result:
        self.require(len(descriptors) == count and all(d.flags == 3 for d in descriptors))
        for mapping in self.whole(address, size):
            mapping.accessible = True
        return ()

    @driver_call(context=True)
    def cuMemGetInfo(self) -> Result:
        return (self.capacity - self.used, self.capacity)

    # --- copies, streams, events ----------------------------------------------------------------

    @driver_call(context=True)
    def cuMemcpyDtoDAsync(self, dst: int, src: int, nbytes: int, stream: int) -> Result:
        self.require_handle(stream in self.streams)
        self.store(dst, b"".join(bytes(piece) for piece in self.pieces(src, nbytes)))
        return ()

    @driver_call(context=True)
    def cuMemsetD8Async(self, dst: int, value: int, nbytes: int, stream: int) -> Result:
        self.require_handle(stream in self.streams)
        self.store(dst, bytes([value]) * nbytes)
        return ()

    @driver_call(context=True)
    def cuStreamCreate(self, flags: int) -> Result:  # noqa: ARG002
        self.streams.add(self.next_id)
        return (self.new_id(),)

    @driver_call(context=True)
    def cuStreamSynchronize(self, stream: int) -> Result:
        self.require_handle(stream in self.streams)
        return ()

    @driver_call(context=True)
    def cuStreamDestroy(self, stream: int) -> Result:
        self.require_handle(stream in self.streams)
        self.streams.remove(stream)
        return ()

    @driver_call(context=True)
    def cuEventCreate(self, flags: int) -> Result:  # noqa: ARG002
        self.events[self.next_id] = True
        return (self.new_id(),)

    @driver_call(context=True)
    def cuEventRecord(self, event: int, stream: int) -> Result:
        self.require_handle(event in self.events and (stream == 0 or stream in self.streams))
        self.events[event] = not self.work_pending
        return ()

    @driver_call()
    def cuEventQuery(self, event: int) -> Result:
        self.require_handle(event in self.events)
        if not self.events[event]:
            raise Refused(CUresult.CUDA_ERROR_NOT_READY)
        return ()

    @driver_call()
    def cuEventDestroy(self, event: int) -> Result:
        self.require_handle(event in self.events)
        del self.events[event]
        return ()
