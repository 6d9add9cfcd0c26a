"""``FakeLaunches``: the part of the CUDA driver that loads and launches kernels; it keeps them."""

# ruff: noqa: N802 - the functions bear the driver's names
from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass
from types import SimpleNamespace

from kvcached.memory.driver import Calls
from kvcached.testing.fake_device import CUresult


@dataclass(frozen=True)
class Launched:
    """What a kernel was launched with; ``others`` are parameters that nobody gives.

    ``early`` is before the launch in front has ended; ``cluster`` programs run at the same time.
    """

    function: tuple
    grid: tuple[int, ...]
    threads: int
    shared: int
    stream: int
    arguments: tuple
    others: tuple
    early: bool = False
    cluster: int = 1


class FakeLaunches:
    """Stands in for ``cuda.bindings.driver``.

    Functions are ``(name, number)``; ``layout_of(function)`` is the ``Layout`` of what one takes.
    """

    CUresult = CUresult
    CUdevice_attribute = SimpleNamespace(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN=97)
    CUfunc_cache = SimpleNamespace(CU_FUNC_CACHE_PREFER_SHARED=1)
    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8)
    CUlaunchAttributeID = SimpleNamespace(
        CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION=4,
        CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION=6,
    )
    CUstream = int
    CUlaunchConfig = SimpleNamespace

    def __init__(self, layout_of, shared_limit=232_448):
        self.layout_of = layout_of
        self.shared_limit = shared_limit
        self.launches = []
        self.images = []
        self.dynamic = {}
        self.contexts = []
        self.fail_with = []
        """Statuses of the next launches."""

    def __getattr__(self, name):
        if name in {"cuFuncSetCacheConfig", "cuInit"}:
            return lambda *_: (CUresult.CUDA_SUCCESS,)
        raise AttributeError(name)

    def CUlaunchAttribute(self):
        return SimpleNamespace(value=SimpleNamespace(clusterDim=SimpleNamespace()))

    def cuDriverGetVersion(self):
        return CUresult.CUDA_SUCCESS, 13_000

    def cuDeviceGet(self, ordinal):
        return CUresult.CUDA_SUCCESS, ordinal

    def cuDeviceGetAttribute(self, attribute, _device):
        assert attribute == 97
        return CUresult.CUDA_SUCCESS, self.shared_limit

    def cuDevicePrimaryCtxRetain(self, device):
        return CUresult.CUDA_SUCCESS, 1000 + (device or 0)

    def cuCtxPushCurrent(self, context):
        self.contexts.append(context)
        return (CUresult.CUDA_SUCCESS,)

    def cuCtxPopCurrent(self):
        return CUresult.CUDA_SUCCESS, self.contexts.pop()

    def cuCtxGetCurrent(self):
        return CUresult.CUDA_SUCCESS, self.contexts[-1] if self.contexts else 0

    def cuCtxSetCurrent(self, context):
        self.contexts[-1:] = [context]
        return (CUresult.CUDA_SUCCESS,)

    def cuModuleLoadData(self, image):
        assert self.contexts, "no context is current"
        self.images.append(image)
        return CUresult.CUDA_SUCCESS, image

    def cuModuleGetFunction(self, image, name):
        assert name in image, "the code has no such kernel"
        return CUresult.CUDA_SUCCESS, (name.decode(), len(self.images))

    def cuFuncSetAttribute(self, function, attribute, value):
        assert attribute == 8
        self.dynamic[function] = value
        return (CUresult.CUDA_SUCCESS,)

    def cuLaunchKernel(self, function, x, y, z, bx, by, bz, shared, stream, places, extra):
        assert (by, bz, extra) == (1, 1, 0)
        status = self.fail_with.pop(0) if self.fail_with else CUresult.CUDA_SUCCESS
        if status is CUresult.CUDA_SUCCESS:
            self._record(function, (x, y, z), bx, shared, stream, places, early=False)
        return (status,)

    def cuLaunchKernelEx(self, config, function, places, extra):
        assert extra == 0
        values = {one.id: one.value for one in config.attrs[: config.numAttrs]}
        assert values
        assert values.keys() <= {4, 6}
        size = values[4].clusterDim if 4 in values else SimpleNamespace(x=1, y=1, z=1)
        assert (size.y, size.z, config.gridDimX % size.x) == (1, 1, 0)
        early = 6 in values and values[6].programmaticStreamSerializationAllowed == 1
        grid = config.gridDimX, config.gridDimY, config.gridDimZ
        self._record(function, grid, config.blockDimX, config.sharedMemBytes, config.hStream,
                     places, early=early, cluster=size.x)  # fmt: skip
        return (CUresult.CUDA_SUCCESS,)

    def _record(
        self, function, grid, threads, shared, stream, places, *, early, cluster=1
    ):  # fmt: skip
        layout = self.layout_of(function)
        addresses = (ctypes.c_void_p * layout.parameters).from_address(places)
        codes = dict(zip(layout.at, layout.codes, strict=True))
        values = [_read(addresses[i], codes.get(i, "Q")) for i in range(layout.parameters)]
        taken = tuple(values[i] for i in layout.at)
        others = tuple(x for i, x in enumerate(values) if i not in codes)
        self.launches.append(
            Launched(function, grid, threads, shared, int(stream), taken, others, early, cluster)
        )


def _read(address, code):
    (value,) = struct.unpack("@" + code, ctypes.string_at(address, struct.calcsize("@" + code)))
    return value


def launch_nothing(monkeypatch):
    """A driver that keeps what is launched for CPU tensors, on stream 77; nothing is compiled.

    Its ``taken(launched)`` names the arguments.
    """
    from kvcached.kernels import _bound, _launch, _write_triton

    names, layouts = {}, {}
    driver = FakeLaunches(layouts.__getitem__)
    driver.taken = lambda one: dict(zip(names[one.function], one.arguments, strict=True))

    def handle_of(
        kernel,
        types,
        constants,
        *,
        device,
        num_warps,
        aligned=(),
        launch_pdl=False,
        maxnreg=0,
        **starts,
    ):
        needs = SimpleNamespace(name=kernel.__name__, num_warps=num_warps, num_ctas=1, shared=0,
                                launch_pdl=launch_pdl, global_scratch_size=0,
                                profile_scratch_size=0)  # fmt: skip
        compiled = SimpleNamespace(metadata=needs, asm={"cubin": kernel.__name__.encode()})
        kinds = _launch.signature_of(kernel, types, constants)
        handle = _launch.Handle(compiled, kinds, device, **starts)
        names[handle._function] = [name for name, kind in kinds.items() if kind != "constexpr"]
        layouts[handle._function] = handle.layout
        driver.aligned[kernel.__name__] = aligned
        return handle

    driver.aligned = {}
    monkeypatch.setattr(_launch, "driver_calls", lambda: Calls(driver))
    monkeypatch.setattr(_launch, "_context", lambda _: 1)
    monkeypatch.setattr(_launch, "stream_of", lambda _: 77)
    monkeypatch.setattr(_bound, "handle_of", handle_of)
    monkeypatch.setattr(_write_triton, "handle_of", handle_of)
    monkeypatch.setattr(_launch, "device_here", lambda: -1)  # the index of CPU tensors
    _write_triton._prepared.cache_clear()
    return driver
