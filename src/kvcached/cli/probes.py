"""Facts about the machine, read without importing anything heavy: for ``kvcached doctor``."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any

from kvcached.hostinfo import meminfo_bytes

# CUdevice_attribute of the CUDA driver API: CU_DEVICE_ATTRIBUTE_...
_COMPUTE_MODE = 20
_VMM_SUPPORTED = 102  # VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
_FD_SUPPORTED = 103  # HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED


def version_of(distribution: str) -> str | None:
    """The installed version of a distribution, without importing it."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def owners_of(package: str) -> list[str]:
    """The distributions that say they install the import package ``package``."""
    return sorted(set(metadata.packages_distributions().get(package, [])))


# --- the NVIDIA driver ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Gpu:
    """One device as the driver describes it. Sizes in bytes."""

    index: int
    name: str
    uuid: str
    memory_bytes: int
    virtual_memory: bool
    page_bytes: int
    fd_handles: bool = False
    """Whether handles can be shared as file descriptors."""
    compute_mode: int = 0
    """0: default, 2: prohibited, 3: exclusive process."""


@dataclass(frozen=True, slots=True)
class DriverFacts:
    """What ``libcuda`` says; ``problem`` is empty if it can be used."""

    problem: str = ""
    cuda_version: str = ""
    gpus: list[Gpu] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """A plain dict, ready for JSON."""
        return asdict(self)


class _AllocationProp(ctypes.Structure):
    """CUmemAllocationProp: pinned memory of one device; all else zero."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location_type", ctypes.c_int),
        ("location_id", ctypes.c_int),
        ("win32", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    )


def probe_driver(library: str = "libcuda.so.1") -> DriverFacts:
    """Ask the driver itself, by ctypes: works without torch and without cuda-python."""
    try:
        cuda = ctypes.CDLL(library)
    except OSError:
        return DriverFacts(problem=f"no NVIDIA driver on this machine ({library} not found)")
    status = cuda.cuInit(0)
    if status:
        return DriverFacts(problem=f"the NVIDIA driver refuses to start (cuInit returned {status})")
    version, count = ctypes.c_int(), ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(version))
    cuda.cuDeviceGetCount(ctypes.byref(count))
    gpus = [_probe_gpu(cuda, index) for index in range(count.value)]
    major, minor = version.value // 1000, version.value % 1000 // 10
    problem = "" if gpus else "the NVIDIA driver shows no GPU (CUDA_VISIBLE_DEVICES?)"
    return DriverFacts(problem, f"{major}.{minor}", gpus)


def _probe_gpu(cuda: ctypes.CDLL, index: int) -> Gpu:
    device, total = ctypes.c_int(), ctypes.c_size_t()
    name, uuid, page = ctypes.create_string_buffer(128), (ctypes.c_ubyte * 16)(), ctypes.c_size_t()
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceGetUuid_v2(uuid, device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(total), device)
    modes = [_attribute(cuda, kind, device) for kind in (_FD_SUPPORTED, _COMPUTE_MODE)]
    prop = _AllocationProp(type=1, location_type=1, location_id=device.value)
    cuda.cuMemGetAllocationGranularity(ctypes.byref(page), ctypes.byref(prop), 0)
    return Gpu(index, name.value.decode(errors="replace"), _format_uuid(bytes(uuid)), total.value,
               bool(_attribute(cuda, _VMM_SUPPORTED, device)), page.value, bool(modes[0]),
               modes[1])  # fmt: skip


def _attribute(cuda: ctypes.CDLL, kind: int, device: ctypes.c_int) -> int:
    value = ctypes.c_int()
    cuda.cuDeviceGetAttribute(ctypes.byref(value), kind, device)
    return value.value


def _format_uuid(raw: bytes) -> str:
    text = raw.hex()
    cuts = (0, 8, 12, 16, 20, 32)
    return "GPU-" + "-".join(text[a:b] for a, b in itertools.pairwise(cuts))


# --- memory limits of the system --------------------------------------------------------------


def read_text(path: str) -> str | None:
    """A small file of /proc or /sys, stripped; ``None`` if it cannot be read."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().strip()
    except OSError:
        return None


def max_map_count() -> int | None:
    """Most mappings that a process may have (``vm.max_map_count``)."""
    with contextlib.suppress(ValueError):
        return int(read_text("/proc/sys/vm/max_map_count") or "")
    return None


def memory_bytes() -> tuple[int, int]:
    """The machine's memory and what of it is available now."""
    return meminfo_bytes("MemTotal"), meminfo_bytes("MemAvailable")
