"""Compiled kernels, kept by what they were compiled for, and launched by the CUDA driver.

Triton's own launch looks at every argument to find the kernel, asks the driver about every tensor,
and compiles a C function for every signature, so it needs a C compiler where the program runs.
Here the caller knows: a kernel is compiled for explicit types, constants and a named GPU, the same
that the ahead-of-time tests compile; its code is loaded and launched through ``cuda.bindings``
(``memory.cuda``), and its arguments are integers. So the base of a cache may be unmapped, and
nothing but Triton's compiler, which comes with its own assembler, is needed.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvcached.errors import BackendUnavailable, InvalidInput
from kvcached.kernels._fit import HOPPER, LEAST_CAPABILITY, Target
from kvcached.kernels._packet import Layout, Packet
from kvcached.memory.cuda import load_driver
from kvcached.memory.driver import Calls

TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}
"""Triton's names of element types."""
GLUON = (3, 6)
"""The version of Triton whose Gluon our kernels are written in."""
_DEFAULT_SHARED = 48 << 10
"""Bytes of shared memory of a program that need not be asked for."""


def interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU (``TRITON_INTERPRET=1`` before its import)."""
    return bool(triton.knobs.runtime.interpret)


def starts_early(device: torch.device) -> bool:
    """Whether kernels can begin before the one in front has ended, and run in clusters.

    (Programmatic dependent launch of CUDA, from compute capability 9 on.) Kernels launched so wait
    for the end of the one in front before they touch memory.
    """
    return device.type == "cuda" and bool(torch.cuda.get_device_capability(device)[0] >= 9)


@functools.cache
def runs_gluon(device: torch.device) -> bool:
    """Whether kernels in Gluon run here: they are for Hopper's instructions and one Triton."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return (
        version == GLUON
        and device.type == "cuda"
        and bool(torch.cuda.get_device_capability(device) == (9, 0))
    )


def capability_of(device: int) -> tuple[int, int]:
    """The compute capability of device number ...; ``BackendUnavailable`` if it is too low."""
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < LEAST_CAPABILITY:
        raise BackendUnavailable(
            "the kernels need a GPU of compute capability "
            f"{LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]} or more (Ampere); this one has "
            f"{major}.{minor}",
            hint="Use a newer GPU, or CPU tensors.",
        )
    return major, minor


@functools.cache
def target_of(device: torch.device) -> Target:
    """What tiles are chosen for; an H100 where a CPU stands in for the GPU.

    Raises ``BackendUnavailable`` for a GPU that is too old.
    """
    if device.type != "cuda":
        return HOPPER
    major, minor = capability_of(device.index)
    calls = driver_calls()
    calls.init()
    return Target(_most_shared(calls, device.index), major, minor)


def signature_of(kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any]) -> Any:
    """What Triton compiles; arguments without a type or a value are ``i32``."""
    return {
        name: "constexpr" if name in constants else types.get(name, "i32")
        for name in kernel.arg_names
    }


def attributes_of(kernel: Any, aligned: tuple[str, ...]) -> dict[tuple[int], list[list[Any]]]:
    """What Triton is told of arguments that are multiples of 16."""
    return {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}


def source_of(
    kernel: Any, signature: Mapping[str, str], constants: Mapping[str, Any], attributes: Any
) -> ASTSource:
    """What Triton compiles, of a kernel in Triton or in Gluon."""
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        return GluonASTSource(kernel, dict(signature), dict(constants), attributes)
    return ASTSource(kernel, dict(signature), dict(constants), attributes)


stream_of: Callable[[int], int]
"""Torch's current stream of device number ..., as the driver's handle."""
device_here: Callable[[], int]
"""The number of torch's current device."""
capturing: Callable[[], bool]
"""Whether torch's current stream is being captured."""
try:  # what torch's own functions call, in a third of their time
    stream_of = torch._C._cuda_getCurrentRawStream  # noqa: SLF001
    device_here = torch._C._cuda_getDevice  # noqa: SLF001
    capturing = torch._C._cuda_isCurrentStreamCapturing  # noqa: SLF001
except AttributeError:  # a torch without CUDA, or one of another kind

    def stream_of(device: int) -> int:
        return int(torch.cuda.current_stream(device).cuda_stream)

    device_here, capturing = torch.cuda.current_device, torch.cuda.is_current_stream_capturing


@functools.cache
def driver_calls() -> Calls:
    """The driver's functions; ``BackendUnavailable`` without ``cuda.bindings``."""
    return Calls(load_driver())


@functools.cache
def _context(device: int) -> Any:
    """The primary context of a device, the one that torch uses; kept for the process."""
    calls = driver_calls()
    calls.init()
    return calls("cuDevicePrimaryCtxRetain", *calls("cuDeviceGet", device))[0]


class Handle:
    """A compiled kernel on one device: ``handle(grid, stream, *arguments)``.

    ``grid`` are the programs in x, y and z, ``stream`` a handle of the driver. Arguments are those
    that are no constants, in order; integers for pointers, bytes for tensor maps. The device must
    be the current one. Raises ``DriverError`` if the driver refuses the launch. May be called by
    several threads.
    """

    __slots__ = ("_attributes", "_calls", "_function", "_idle", "_pack", "compiled", "device",
                 "layout", "name", "shared", "streams", "success", "threads")  # fmt: skip

    def __init__(
        self, compiled: Any, types: Mapping[str, str], device: int, *, cluster: int = 1,
        least_shared: int = 0,
    ) -> None:  # fmt: skip
        needs = compiled.metadata
        if needs.global_scratch_size or needs.profile_scratch_size:
            raise InvalidInput(f"{needs.name} needs scratch memory, which no caller brings")
        if needs.num_ctas != 1:
            raise InvalidInput(f"{needs.name} is for clusters, which are not launched here")
        self._calls = calls = driver_calls()
        self.compiled, self.device, self.name = compiled, device, needs.name
        self.threads, self.shared = 32 * needs.num_warps, max(needs.shared, least_shared)
        self.layout = Layout.of(kind for kind in types.values() if kind != "constexpr")
        self._pack = struct.Struct(self.layout.format).pack_into
        self._idle: list[Packet] = []
        self.streams: dict[int, Any] = {}
        self.success = calls.success
        driver = _functions(calls)
        self._attributes = [_early_start(driver)] if needs.launch_pdl else []
        if cluster > 1:
            self._attributes.append(_cluster_of(driver, cluster))
        with calls.in_context(_context(device)):
            image = compiled.asm["cubin"]
            self._function = _loaded(calls, image, needs.name, self.shared, device)

    def __call__(self, grid: Sequence[int], stream: int, *arguments: Any) -> None:
        try:
            packet = self._idle.pop()
        except IndexError:
            packet = Packet(self.layout)
        self.write(packet, *arguments)
        if 0 not in grid:
            start, on = self.starter(grid), self.stream(stream)
            result = start(on, packet.address, 0)
            if result[0] is not self.success:
                self.failed(result, start, on, packet.address)
        self._idle.append(packet)

    def write(self, packet: Packet, *arguments: Any) -> None:
        """Write all arguments to a packet; raises ``InvalidInput`` if one does not fit its type."""
        try:
            self._pack(packet.values, 0, *arguments)
        except struct.error as error:
            raise InvalidInput(f"{self.name} cannot take its arguments: {error}") from error

    def starter(self, grid: Sequence[int]) -> Callable[[Any, int, int], tuple[Any, ...]]:
        """The driver's launch of ``grid``: takes a ``stream``, a ``Packet``'s address and 0."""
        x, y, z = (*grid, 1, 1)[:3]
        if self._attributes:
            return self._starter_with(x, y, z)
        run = _functions(self._calls).cuLaunchKernel
        return functools.partial(run, self._function, x, y, z, self.threads, 1, 1, self.shared)

    def _starter_with(self, x: int, y: int, z: int) -> Callable[[Any, int, int], tuple[Any, ...]]:
        """The same with attributes: early, in clusters."""
        driver = _functions(self._calls)
        configs: dict[int, Any] = {}  # by the number of a stream, whose object is kept

        def start(stream: Any, arguments: int, extra: int) -> tuple[Any, ...]:
            config = configs.get(id(stream))
            if config is None:
                config = driver.CUlaunchConfig()
                config.gridDimX, config.gridDimY, config.gridDimZ = x, y, z
                config.blockDimX, config.blockDimY, config.blockDimZ = self.threads, 1, 1
                config.sharedMemBytes, config.hStream = self.shared, stream
                config.attrs, config.numAttrs = self._attributes, len(self._attributes)
                configs[id(stream)] = config
            result: tuple[Any, ...] = driver.cuLaunchKernelEx(
                config, self._function, arguments, extra
            )
            return result

        return start

    def stream(self, handle: int) -> Any:
        """What the driver takes for a stream: kept, since making one takes longer than a launch."""
        on = self.streams.get(handle)
        if on is None:
            on = self.streams.setdefault(handle, _functions(self._calls).CUstream(handle))
        return on

    def failed(
        self, result: tuple[Any, ...], start: Callable[..., tuple[Any, ...]], stream: Any,
        arguments: int,
    ) -> None:  # fmt: skip
        """Raise what ``result`` says, unless the thread had no context: then it gets torch's."""
        if _status(result) == "CUDA_ERROR_INVALID_CONTEXT" and _give_context(self):
            result = start(stream, arguments, 0)
        self._calls.check(result, f"cuLaunchKernel of {self.name}")


def _functions(calls: Calls) -> Any:
    """The driver, of which ``Driver`` names only what the memory backend calls."""
    return calls.driver


def _status(result: tuple[Any, ...]) -> str:
    return str(getattr(result[0], "name", result[0]))


def _give_context(handle: Handle) -> bool:
    """Give a thread that never used a GPU the context of torch; whether it had none."""
    calls = driver_calls()
    (context,) = calls("cuCtxGetCurrent")
    if int(context):
        return False
    calls("cuCtxSetCurrent", _context(handle.device))
    return True


def _early_start(driver: Any) -> Any:
    """Before the kernel in front has ended; this one waits for it by itself."""
    attribute = driver.CUlaunchAttribute()
    kinds = driver.CUlaunchAttributeID
    attribute.id = kinds.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    return attribute


def _cluster_of(driver: Any, programs: int) -> Any:
    """Programs that lie one after another in x run at the same time."""
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    size = attribute.value.clusterDim
    size.x, size.y, size.z = programs, 1, 1
    return attribute


def _loaded(calls: Calls, cubin: bytes, name: str, shared: int, device: int) -> Any:
    """The function of a cubin on the current context, with the shared memory that it needs."""
    driver = _functions(calls)
    module = calls("cuModuleLoadData", cubin)[0]
    (function,) = calls("cuModuleGetFunction", module, name.encode())
    if shared <= _DEFAULT_SHARED:
        return function
    limit = _most_shared(calls, device)
    if shared > limit:
        raise BackendUnavailable(
            f"{name} needs {shared} bytes of shared memory, but the GPU has {limit}",
            hint="Smaller head dims or float16 need less.",
        )
    calls("cuFuncSetCacheConfig", function, driver.CUfunc_cache.CU_FUNC_CACHE_PREFER_SHARED)
    dynamic = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    calls("cuFuncSetAttribute", function, dynamic, shared)
    return function


def _most_shared(calls: Calls, device: int) -> int:
    """Bytes of shared memory that a program may ask for."""
    kinds = _functions(calls).CUdevice_attribute
    most = kinds.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    (limit,) = calls("cuDeviceGetAttribute", most, *calls("cuDeviceGet", device))
    return int(limit)


_handles: dict[tuple[Any, ...], Handle] = {}


def handle_of(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    device: int,
    aligned: tuple[str, ...] = (),
    cluster: int = 1,
    least_shared: int = 0,
    **options: int,
) -> Handle:
    """The compiled kernel for ``types`` of pointers and scalars and for ``constants``.

    Arguments named by ``aligned`` are multiples of 16; ``options`` (``num_warps``, ``launch_pdl``)
    are the compiler's. ``cluster`` programs that lie one after another in x run at the same time;
    each has ``least_shared`` bytes of shared memory, if it needs no more. Compiles at the first
    call, for device number ``device``; raises ``BackendUnavailable`` for a GPU that is too old.
    """
    key = (kernel, device, aligned, cluster, least_shared, tuple(types.items()),
           tuple(constants.items()), tuple(options.items()))  # fmt: skip
    handle = _handles.get(key)
    if handle is None:
        major, minor = capability_of(device)
        signature = signature_of(kernel, types, constants)
        source = source_of(kernel, signature, constants, attributes_of(kernel, aligned))
        # Named, because Triton would build a C library to ask the driver what GPU there is.
        target = GPUTarget("cuda", 10 * major + minor, 32)
        compiled = triton.compile(source, target=target, options=options)
        handle = _handles[key] = Handle(
            compiled, signature, device, cluster=cluster, least_shared=least_shared
        )
    return handle


def run(
    kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any], constants: Mapping[str, Any],
    types: Mapping[str, str], device: torch.device, num_warps: int = 4,
) -> None:  # fmt: skip
    """Launch on the current stream of ``device``, compiled for what the arguments are.

    ``arguments`` are those that are no constants, in order: tensors, or numbers. What is a multiple
    of 16 is compiled as such, unless the kernel says ``do_not_specialize``, and numbers that need
    64 bits get them. For kernels that run seldom: a launch that is known costs less.
    """
    if interpreted():
        kernel[grid](*arguments, **constants, num_warps=num_warps)
        return
    given = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments]
    params = [param for param in kernel.params if param.name not in constants]
    aligned = tuple(
        param.name for param, x in zip(params, given, strict=True)
        if x % 16 == 0 and not param.do_not_specialize
    )  # fmt: skip
    wide = {param.name: "i64" for param, x in zip(params, given, strict=True) if x >> 31}
    handle = handle_of(kernel, wide | dict(types), constants, device=device.index, aligned=aligned,
                       num_warps=num_warps)  # fmt: skip
    handle(grid, stream_of(device.index), *given)
