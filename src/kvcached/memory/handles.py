"""``CudaHandles``: the part of ``CudaBackend`` that makes handles, maps them, and back again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from kvcached.config import format_size
from kvcached.errors import ClosedError, DriverError, KvcachedError, PoolBroken
from kvcached.memory import forks
from kvcached.memory.base import Handle, Made, Mapped, Place, Reservation, Unbacked
from kvcached.memory.driver import Calls
from kvcached.memory.leftovers import Leftovers
from kvcached.memory.mappings import Mappings, joined

if TYPE_CHECKING:
    from kvcached.memory.native import Native


class CudaHandles:
    """Physical memory of one GPU. ``CudaBackend`` makes the state that is used here."""

    page_bytes: int
    clears: bool
    _call: Calls
    _lock: threading.Lock
    _books: Mappings
    _leftovers: Leftovers
    _context: Any
    _stream: Any
    _ordinal: int
    _cu_create: Callable[..., tuple[Any, ...]]
    _prop: Any
    _accesses: list[Any]
    _fresh: set[int]
    _closed: bool
    _forked: bool
    _native: Native | None = None

    @property
    def exportable(self) -> bool:
        """Whether handles are made with a POSIX file descriptor."""
        none = self._call.driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_NONE
        return bool(self._prop.requestedHandleTypes != none)

    def create(self, num_pages: int) -> Handle:
        """See ``MemoryBackend.create``."""
        self._require_usable()
        self._books.create_plan(num_pages)
        nbytes = num_pages * self.page_bytes
        native = self._create(nbytes)
        with self._lock:
            handle = self._books.add_handle(num_pages, native).handle
            if self.clears:
                self._fresh.add(handle.key)
            return handle

    def map(self, reservation: Reservation, page_index: int, handle: Handle) -> None:
        """See ``MemoryBackend.map``."""
        with self._lock:
            self._require_usable()
            rng, state = self._books.map_plan(reservation, page_index, handle)
        address = reservation.address + page_index * self.page_bytes
        nbytes = handle.num_pages * self.page_bytes
        self._call("cuMemMap", address, nbytes, 0, state.native, 0)
        try:
            self._call("cuMemSetAccess", address, nbytes, self._accesses, 1)
            if handle.key in self._fresh:
                self._clear(address, nbytes)
                self._fresh.discard(handle.key)
        except KvcachedError as error:
            self._undo_map(address, nbytes, error)
            raise
        with self._lock:
            self._books.add_map(rng, page_index, state)

    def unmap(self, reservation: Reservation, page_index: int, handle: Handle) -> None:
        """See ``MemoryBackend.unmap``. A kernel that touches the range afterwards faults."""
        with self._lock:
            self._require_usable()
            rng, state = self._books.unmap_plan(reservation, page_index, handle)
        address = reservation.address + page_index * self.page_bytes
        self._call("cuMemUnmap", address, handle.num_pages * self.page_bytes)
        with self._lock:
            self._books.drop_map(rng, page_index, state)

    def release(self, handle: Handle) -> None:
        """See ``MemoryBackend.release``."""
        with self._lock:
            self._require_usable()
            state = self._books.release_plan(handle)
        self._call("cuMemRelease", state.native)
        with self._lock:
            self._books.drop_handle(state)
            self._fresh.discard(handle.key)

    def back(self, reservation: Reservation, places: Sequence[Place]) -> list[Handle]:
        """See ``Backing.back``. What is adjacent gets its access in one call."""
        with self._lock:
            if self._closed or self._forked:
                self._require_usable()
            rng, handles, states = self._books.add_backed(reservation, places)
        natives: list[Any] = []
        mapped: list[Any] = []
        try:
            native = self._native or self._find_native()
            if native is not None:
                native.back(reservation.address, self.page_bytes, places, natives, mapped)
            else:
                self._back_by_calls(reservation.address, places, natives, mapped)
            if self.clears:
                for page_index, num_pages in joined(places):
                    address = reservation.address + page_index * self.page_bytes
                    self._clear(address, num_pages * self.page_bytes)
        except BaseException as cause:  # KeyboardInterrupt too must leave nothing behind
            with self._lock:
                self._books.drop_backed(rng, places, states)
            self._leftovers.undo(reservation, self.page_bytes, places, natives, len(mapped), cause)
            raise
        for state, made in zip(states, natives):  # noqa: B905 (one each)
            state.native = made
        return handles

    def unback(self, reservation: Reservation, mapped: Sequence[Mapped]) -> Unbacked:
        """See ``Backing.unback``: all are unmapped before the first is released.

        Neighbours in the list that are neighbours in memory are unmapped in one call.
        """
        with self._lock:
            self._require_usable()
            rng, states = self._books.unback_plan(reservation, mapped)
        done, error = [0, 0], None
        try:
            native = self._native or self._find_native()
            base, page_bytes = reservation.address, self.page_bytes
            rows: list[int] = []
            for (page_index, handle), state in zip(mapped, states):  # noqa: B905 (one each)
                address, nbytes = base + page_index * page_bytes, handle.num_pages * page_bytes
                rows += (address, nbytes, int(state.native))
            if native is not None:
                native.unback(rows, done)
            else:
                self._unback_by_calls(rows, done)
        except BaseException as cause:  # noqa: BLE001 - the caller raises it, whatever it was
            error = cause
        unmapped, released = done
        with self._lock:
            self._books.drop_backed(rng, mapped[:released], states)
            for (page_index, _), state in list(zip(mapped, states, strict=True))[released:unmapped]:
                self._books.drop_map(rng, page_index, state)
        if error is None:
            return Unbacked(released, 0, None)
        return self._map_again(reservation, mapped[:unmapped], released, error)

    def _map_again(
        self, reservation: Reservation, mapped: Sequence[Mapped], released: int,
        error: BaseException,
    ) -> Unbacked:  # fmt: skip
        """What was unmapped and could not be released goes back to its place, contents and all."""
        adrift = len(mapped) - released
        try:
            while adrift:
                self.map(reservation, *mapped[released + adrift - 1])
                adrift -= 1
        except BaseException as second:  # noqa: BLE001 - as above
            broken = PoolBroken(
                f"{error!r}, and undoing it failed: {second!r}", hint="Close the cache."
            )
            broken.__cause__ = error
            return Unbacked(released, adrift, broken)
        return Unbacked(released, 0, error)

    # --- growth by a pool's own machine code ------------------------------------------------------

    def direct_calls(self) -> int:
        """See ``Direct.direct_calls``: not where fresh memory is cleared, which is a copy more."""
        if self.clears or self._closed or self._forked:
            return 0
        native = self._native or self._find_native()
        return 0 if native is None else native.address

    def adopt(self, reservation: Reservation, made: Sequence[Made]) -> list[Handle]:
        """See ``Direct.adopt``."""
        with self._lock:
            return self._books.add_made(reservation, made)

    def undo_direct(
        self, reservation: Reservation, made: Sequence[Made], mapped: int, cause: BaseException
    ) -> None:
        """See ``Direct.undo_direct``."""
        places = [(page_index, num_pages) for page_index, num_pages, _ in made]
        natives = [native for _, _, native in made]
        self._leftovers.undo(reservation, self.page_bytes, places, natives, mapped, cause)

    def raise_direct(self, status: int, call: int, reservation: Reservation, place: Place) -> None:
        """See ``Direct.raise_direct``."""
        self._require_usable()
        assert self._native is not None
        address = reservation.address + place[0] * self.page_bytes
        self._native.fail(status, call, address, place[1] * self.page_bytes)

    # --- internals ------------------------------------------------------------------------------

    def _find_native(self) -> Native | None:
        """Machine code for ``back``; its import, at the first growth, takes as long as Numba's."""
        if self._native is None and not self.exportable:  # else a refusal may change the handles
            from kvcached.memory.native import find_native

            self._native = find_native(self._call, self._prop, self._accesses[0])
        return self._native

    def _back_by_calls(
        self, base: int, places: Sequence[Place], natives: list[Any], mapped: list[Any]
    ) -> None:
        """As ``Native.back``, call by call."""
        for page_index, num_pages in places:
            address, nbytes = base + page_index * self.page_bytes, num_pages * self.page_bytes
            natives.append(self._create(nbytes))
            self._call("cuMemMap", address, nbytes, 0, natives[-1], 0)
            mapped.append(natives[-1])
        for page_index, num_pages in joined(places):
            address, nbytes = base + page_index * self.page_bytes, num_pages * self.page_bytes
            self._call("cuMemSetAccess", address, nbytes, self._accesses, 1)

    def _unback_by_calls(self, rows: Sequence[int], done: list[int]) -> None:
        """As ``Native.unback``, call by call."""
        try:
            while done[0] < len(rows) // 3:
                i, address, nbytes = 3 * done[0], rows[3 * done[0]], 0
                while i < len(rows) and rows[i] == address + nbytes:
                    nbytes += rows[i + 1]
                    i += 3
                self._call("cuMemUnmap", address, nbytes)
                done[0] = i // 3
        finally:
            for native in rows[2 : 3 * done[0] : 3]:
                self._call("cuMemRelease", native)
                done[1] += 1

    def _require_usable(self) -> None:
        if self._closed or self._forked:
            raise forks.forked_error() if self._forked else ClosedError("the backend is shut down")

    def _clear(self, address: int, nbytes: int) -> None:
        with self._call.in_context(self._context):
            self._call("cuMemsetD8Async", address, 0, nbytes, self._stream)
            self._call("cuStreamSynchronize", self._stream)

    def _undo_map(self, address: int, nbytes: int, cause: KvcachedError) -> None:
        try:
            self._call("cuMemUnmap", address, nbytes)
        except KvcachedError as error:
            raise PoolBroken(
                f"a mapping of {format_size(nbytes)} at {address:#x} could not be undone: "
                f"{error.message}; it was undone because {cause.message}",
                hint="Close the cache; the driver frees the memory when the process ends.",
            ) from cause

    def _create(self, nbytes: int) -> Any:
        """``cuMemCreate``; drops the exportable type for good if the driver refuses it."""
        try:
            return self._cu_create(nbytes, self._prop, 0)[0]
        except DriverError as error:
            refused = {"CUDA_ERROR_NOT_PERMITTED", "CUDA_ERROR_NOT_SUPPORTED"}
            if not self.exportable or error.status not in refused:
                raise
        self._prop = self._make_prop(exportable=False)
        return self._cu_create(nbytes, self._prop, 0)[0]

    def _make_prop(self, *, exportable: bool) -> Any:
        d = self._call.driver
        prop = d.CUmemAllocationProp()
        prop.type = d.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        prop.location.type = d.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        prop.location.id = self._ordinal
        types = d.CUmemAllocationHandleType
        prop.requestedHandleTypes = (
            types.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
            if exportable
            else types.CU_MEM_HANDLE_TYPE_NONE
        )
        access = d.CUmemAccessDesc()
        access.location = prop.location
        access.flags = d.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        self._accesses = [access]
        return prop
