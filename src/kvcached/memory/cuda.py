"""``CudaBackend``: elastic device memory from the CUDA driver's virtual memory functions.

The only module that imports ``cuda.bindings``, and only when a backend is made. All driver calls go
through one ``Calls`` object (``driver.py``), where a failed status becomes an exception.

Virtual memory calls need no current context. The others run with the device's primary context (the
one that torch uses) pushed and popped again, so a thread finds its own context as it left it.
Driver calls release the GIL, and no lock is held around them.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from kvcached.errors import (
    BackendUnavailable,
    InvalidInput,
    KvcachedError,
)
from kvcached.memory import forks
from kvcached.memory.base import Copy, Reservation
from kvcached.memory.driver import Calls, Driver, find_device, open_context, uuid_of
from kvcached.memory.fences import CudaFence
from kvcached.memory.handles import CudaHandles
from kvcached.memory.leftovers import Leftovers
from kvcached.memory.mappings import Mappings
from kvcached.memory.scrub import must_clear


class CudaBackend(CudaHandles):
    """Physical memory of one GPU. See the module's docstring.

    Parameters
    ----------
    device:
        ``"cuda:0"``, an ordinal, or a UUID (``"GPU-..."``, as ``nvidia-smi -L`` prints it).
    driver:
        The call boundary; ``None`` means ``cuda.bindings.driver``.
    exportable:
        Make handles that can be shared as POSIX file descriptors, where the driver allows it (the
        ``exportable`` property then says whether it did).
    zero:
        When fresh memory is cleared here: ``"never"``, ``"always"``, or ``"on-tenant-change"``,
        which leaves it to the driver where that is known to do it (``scrub.py``).

    Raises ``BackendUnavailable`` without a driver, a GPU or virtual memory support, or if the GPU
    lets no process in, and ``UnknownName`` if there is no such device.
    """

    def __init__(
        self,
        device: str | int = "cuda:0",
        *,
        driver: Driver | None = None,
        exportable: bool = False,
        zero: str = "on-tenant-change",
    ) -> None:
        self.clears = must_clear(zero)
        self._call = Calls(load_driver() if driver is None else driver)
        self._lock = threading.Lock()
        self._cu_create = self._call.bound("cuMemCreate")
        self._leftovers = Leftovers(self._call)
        self._fences: set[CudaFence] = set()
        self._fresh: set[int] = set()  # handles to be cleared when they are first mapped
        self._closed = self._forked = False
        self._call.init()
        self._ordinal, self._cu_device = find_device(self._call, device)
        self.device = f"cuda:{self._ordinal}"
        """Where tensors over this memory live."""
        self._context = open_context(self._call, self._cu_device, self.device)
        try:
            self._prop = self._make_prop(exportable=exportable)
            self.page_bytes = self._granularity()
            """The driver's minimum granularity in bytes."""
            self._books = Mappings(self.page_bytes)
            with self._call.in_context(self._context):
                flags = self._call.driver.CUstream_flags.CU_STREAM_NON_BLOCKING
                (self._stream,) = self._call("cuStreamCreate", int(flags))
        except BaseException:  # whatever it was, what was opened does not stay open
            self._call("cuDevicePrimaryCtxRelease", self._cu_device)
            raise
        forks.watch(self)

    @property
    def can_alias(self) -> bool:
        """Always: a handle is the driver's, and mappings refer to it."""
        return True

    @property
    def uuid(self) -> str:
        """The device's UUID, without the ``GPU-`` in front."""
        return uuid_of(self._call, self._cu_device)

    @property
    def name(self) -> str:
        """The device's product name."""
        (name,) = self._call("cuDeviceGetName", 256, self._cu_device)
        return str(name.split(b"\0")[0].decode())

    @property
    def total_bytes(self) -> int:
        """Bytes of memory of the whole device."""
        (total,) = self._call("cuDeviceTotalMem", self._cu_device)
        return int(total)

    # --- the contract of MemoryBackend --------------------------------------------------------

    def reserve(self, nbytes: int) -> Reservation:
        """See ``MemoryBackend.reserve``."""
        self._require_usable()
        self._books.reserve_plan(nbytes)
        (pointer,) = self._call("cuMemAddressReserve", nbytes, self.page_bytes, 0, 0)
        with self._lock:
            return self._books.add_range(int(pointer), nbytes).reservation

    def close(self, reservation: Reservation) -> None:
        """See ``MemoryBackend.close``."""
        with self._lock:
            self._require_usable()
            rng = self._books.close_plan(reservation)
            self._leftovers.give_back(reservation)
            # Out of the books first: once freed, another thread may get the same address.
            self._books.drop_range(rng)
        try:
            self._call("cuMemAddressFree", reservation.address, reservation.nbytes)
        except KvcachedError:
            with self._lock:
                self._books.keep_range(rng)
            raise

    def available(self) -> int:
        """Free bytes of the device, as the driver counts them now."""
        self._require_usable()
        with self._call.in_context(self._context):
            free, _total = self._call("cuMemGetInfo")
        return int(free)

    def copy(self, dst: int, src: int, nbytes: int) -> None:
        """See ``MemoryBackend.copy``."""
        self.copy_many([(dst, src, nbytes)])

    def copy_many(self, copies: Sequence[Copy]) -> None:
        """See ``MemoryBackend.copy_many``. Waits for the backend's own stream only.

        The caller orders it after the work that wrote the sources (a fence).
        """
        self._require_usable()
        for _, _, nbytes in copies:
            if nbytes < 0:
                raise InvalidInput(f"cannot copy {nbytes} bytes")
        with self._call.in_context(self._context):
            for dst, src, nbytes in copies:
                self._call("cuMemcpyDtoDAsync", dst, src, nbytes, self._stream)
            self._call("cuStreamSynchronize", self._stream)

    def shutdown(self) -> None:
        """See ``MemoryBackend.shutdown``. Fences that were never polled to their end go too."""
        with self._lock:
            if self._closed or self._forked:
                return
            self._books.shutdown_plan()
            self._closed = True
            if self._native is not None:
                self._native.forbid()
            fences = list(self._fences)
        forks.unwatch(self)
        with self._call.in_context(self._context):
            for fence in fences:
                fence.close()
            self._call("cuStreamDestroy", self._stream)
        self._call("cuDevicePrimaryCtxRelease", self._cu_device)

    # --- what only this backend has -----------------------------------------------------------

    def fence(self, stream: int = 0) -> CudaFence:
        """A fence behind all work that is queued on ``stream`` now (a ``cudaStream_t`` as an int).

        0 is the legacy default stream; pass ``torch.cuda.current_stream().cuda_stream``.
        """
        self._require_usable()
        with self._call.in_context(self._context):
            flags = self._call.driver.CUevent_flags.CU_EVENT_DISABLE_TIMING
            (event,) = self._call("cuEventCreate", int(flags))
            fence = CudaFence(self._call, event, self._require_usable, self._fences.discard)
            self._fences.add(fence)  # from here on shutdown destroys the event if nobody else does
            try:
                self._call("cuEventRecord", event, stream)
            except KvcachedError:
                fence.close()
                raise
        return fence

    def check(self) -> None:
        """Assert that the books are sound and that the driver has made each handle (I4)."""
        with self._lock:
            self._require_usable()
            self._books.check()
            natives = [state.native for state in self._books.handles.values()]
            assert None not in natives, "I4: a handle that the driver does not know"

    def disown(self) -> None:
        """After a fork, in the child: a CUDA context does not survive, so nothing is called."""
        self._forked, self._lock = True, threading.Lock()
        if self._native is not None:
            self._native.forbid()

    # --- internals ------------------------------------------------------------------------------

    def _granularity(self) -> int:
        option = self._call.driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        (granularity,) = self._call("cuMemGetAllocationGranularity", self._prop, option)
        return int(granularity)


def load_driver() -> Driver:
    """The module ``cuda.bindings.driver``; ``BackendUnavailable`` if it is not installed."""
    try:
        # Only when a backend is made, and only here.
        from cuda.bindings import driver  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise BackendUnavailable(
            f"cuda.bindings cannot be imported: {error}",
            hint="pip install 'kvcached-py[cuda]', or use device='cpu'.",
        ) from error
    return driver  # type: ignore[no-any-return]
