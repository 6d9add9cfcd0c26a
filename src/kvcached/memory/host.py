"""``HostBackend``: elastic memory on any Linux machine, from one memfd and fixed-address mappings.

A reservation is PROT_NONE address space; a handle is a range of the memfd; ``map`` puts the range
over the reservation, ``release`` punches it out of the file, which frees the pages and makes them
read as zero. Memory is committed when it is first touched, as everywhere on Linux, so ``create``
counts against ``capacity_bytes`` and the budget above guards the machine.

A handle gets its place in the file when it is first mapped: the place that corresponds to its
address, so neighbours in address space are neighbours in the file and the kernel keeps them as one
mapping (``vm.max_map_count`` bounds the number of mappings of a process). The file is sparse and
far larger than any machine's memory, so places in it cost nothing and need no allocator.

Fork (docs/broker.md, rule 4): what is mapped is MADV_DONTFORK, and a child that Python forks
closes the memfd and covers the reservations, so the parent's memory comes back when the parent
gives it back. In the child the backend raises ``ForkedProcessError``.
"""

from __future__ import annotations

import ctypes
import mmap as os_mmap
import os
import threading

from kvcached.config import format_size
from kvcached.errors import (
    BackendUnavailable,
    ClosedError,
    InvalidInput,
    OutOfPages,
    PoolBroken,
)
from kvcached.memory import forks, os_calls
from kvcached.memory.base import Handle, Reservation
from kvcached.memory.mappings import Mappings, RangeState, Spans
from kvcached.memory.os_calls import (
    MappingCredit,
    OsCalls,
    errno_name,
    meminfo_bytes,
    retry,
    translate,
)

_FILE_BYTES = 1 << 62
_ANON = os_calls.MAP_PRIVATE | os_calls.MAP_ANONYMOUS | os_calls.MAP_NORESERVE
_ANON_FIXED = _ANON | os_calls.MAP_FIXED
_SHARED_FIXED = os_calls.MAP_SHARED | os_calls.MAP_FIXED


class _Place:
    """Where in the memfd a handle lives; ``homes`` is the table that the place is taken from."""

    __slots__ = ("homes", "offset", "page_index")

    def __init__(self, offset: int, homes: Spans | None, page_index: int) -> None:
        self.offset, self.homes, self.page_index = offset, homes, page_index


class _Homes:
    """The part of the memfd that corresponds to one reservation, and what of it is taken."""

    __slots__ = ("offset", "spans")

    def __init__(self, offset: int) -> None:
        self.offset, self.spans = offset, Spans()


class HostBackend:
    """Physical memory from a memfd, mapped at fixed addresses. See the module's docstring.

    Parameters
    ----------
    page_bytes:
        Any power of two that is at least the operating system's page.
    capacity_bytes:
        Most bytes of all handles together; ``None`` means the machine's memory.
    device:
        What tensors over this memory name as their device.
    calls:
        The operating-system calls; tests inject failures here.

    Raises ``InvalidInput`` for a bad size and ``BackendUnavailable`` where there is no memfd.
    """

    def __init__(
        self,
        page_bytes: int = 2 << 20,
        *,
        capacity_bytes: int | None = None,
        device: str = "cpu",
        calls: OsCalls | None = None,
    ) -> None:
        self._page_bytes = _checked_page_bytes(page_bytes)
        total = meminfo_bytes("MemTotal")
        self._capacity = total if capacity_bytes is None else _checked_capacity(capacity_bytes)
        self._device = device
        self._calls = OsCalls() if calls is None else calls
        self._lock = threading.Lock()
        self._books = Mappings(page_bytes)
        self._places: dict[int, _Place] = {}
        self._homes: dict[int, _Homes] = {}
        self._next_offset = 0
        self._forked = False
        self._credit = MappingCredit()
        try:
            self._fd = self._calls.memfd("kvcached", _FILE_BYTES)
        except OSError as error:
            raise BackendUnavailable(
                f"cannot make a memfd: {error.strerror} ({errno_name(error)})",
                hint="Needs Linux with memfd sealing, a free file descriptor and no ulimit -f.",
            ) from error
        forks.watch(self)

    @property
    def device(self) -> str:
        """Where tensors over this memory live."""
        return self._device

    @property
    def page_bytes(self) -> int:
        """The unit of physical memory in bytes."""
        return self._page_bytes

    @property
    def capacity_bytes(self) -> int:
        """Most bytes of all handles together."""
        return self._capacity

    # --- the contract of MemoryBackend --------------------------------------------------------

    def reserve(self, nbytes: int) -> Reservation:
        """See ``MemoryBackend.reserve``. The address is aligned to ``page_bytes``."""
        with self._lock:
            self._require_usable()
            self._books.reserve_plan(nbytes)
            if self._next_offset + nbytes > _FILE_BYTES:
                raise OutOfPages(f"cannot reserve {format_size(nbytes)}: no address space is left")
            address = self._reserve_aligned(nbytes)
            self._homes[address] = _Homes(self._take_offset(nbytes))
            return self._books.add_range(address, nbytes).reservation

    def create(self, num_pages: int) -> Handle:
        """See ``MemoryBackend.create``. The pages are committed when they are first touched."""
        with self._lock:
            self._require_usable()
            self._books.create_plan(num_pages)
            nbytes = num_pages * self._page_bytes
            if self._books.handle_bytes + nbytes > self._capacity:
                raise OutOfPages(
                    f"cannot create {format_size(nbytes)}: {format_size(self._books.handle_bytes)} "
                    f"of the capacity of {format_size(self._capacity)} are taken",
                    hint="Release handles, or give the backend more capacity_bytes.",
                )
            return self._books.add_handle(num_pages)

    def map(self, reservation: Reservation, page_index: int, handle: Handle) -> None:
        """See ``MemoryBackend.map``."""
        with self._lock:
            self._require_usable()
            rng, state = self._books.map_plan(reservation, page_index, handle)
            self._credit.spend(refusable=True)
            known = self._places.get(handle.key)
            place = known or self._find_place(rng, page_index, handle)
            self._map_shared(
                reservation.address + page_index * self._page_bytes,
                handle.num_pages * self._page_bytes,
                place.offset,
            )
            if known is None:
                self._keep_place(place, handle)
            self._books.add_map(rng, page_index, state)

    def unmap(self, reservation: Reservation, page_index: int, handle: Handle) -> None:
        """See ``MemoryBackend.unmap``. Touching the range afterwards is SIGSEGV."""
        with self._lock:
            self._require_usable()
            rng, state = self._books.unmap_plan(reservation, page_index, handle)
            address = reservation.address + page_index * self._page_bytes
            try:
                self._cover(address, handle.num_pages * self._page_bytes)
            except OSError as error:
                raise translate(error, "mmap", "cannot unmap pages") from error
            self._credit.spend(refusable=False)
            self._books.drop_map(rng, page_index, state)

    def release(self, handle: Handle) -> None:
        """See ``MemoryBackend.release``. The pages are free on return."""
        with self._lock:
            self._require_usable()
            state = self._books.release_plan(handle)
            place = self._places.get(handle.key)
        if place is not None:
            self._punch(place, handle)  # may take milliseconds, so without the lock
        with self._lock:
            self._books.drop_handle(state)
            self._drop_place(handle)

    def close(self, reservation: Reservation) -> None:
        """See ``MemoryBackend.close``."""
        with self._lock:
            self._require_usable()
            rng = self._books.close_plan(reservation)
            try:
                self._calls.munmap(reservation.address, reservation.nbytes)
            except OSError as error:
                raise translate(error, "munmap", "cannot close a reservation") from error
            self._books.drop_range(rng)
            del self._homes[reservation.address]

    def available(self) -> int:
        """Bytes that ``create`` could still give: MemAvailable, or less if the capacity says so."""
        self._require_usable()
        return min(meminfo_bytes("MemAvailable"), self._capacity - self._books.handle_bytes)

    def copy(self, dst: int, src: int, nbytes: int) -> None:
        """See ``MemoryBackend.copy``. An address that is not mapped is SIGSEGV."""
        self._require_usable()
        if nbytes < 0:
            raise InvalidInput(f"cannot copy {nbytes} bytes")
        ctypes.memmove(dst, src, nbytes)

    def shutdown(self) -> None:
        """See ``MemoryBackend.shutdown``."""
        with self._lock:
            if self._fd < 0:
                return
            self._books.shutdown_plan()
            os.close(self._fd)
            self._fd = -1
            forks.unwatch(self)

    # --- what only this backend has -----------------------------------------------------------

    def resident_bytes(self) -> int:
        """Bytes of physical memory behind the memfd, by the kernel's own count."""
        self._require_usable()
        return os.fstat(self._fd).st_blocks * 512

    def check(self) -> None:
        """Assert that the books are sound and that the kernel holds no more than they say."""
        with self._lock:
            self._require_usable()
            self._books.check()
            assert set(self._homes) == set(self._books.ranges), "I5: homes and ranges differ"
            assert set(self._places) <= set(self._books.handles), "I4: a place without a handle"
            assert self._books.handle_bytes <= self._capacity, "I7: handles above the capacity"
            resident = os.fstat(self._fd).st_blocks * 512
            assert resident <= self._books.handle_bytes, "I4: the kernel holds released memory"

    def disown(self) -> None:
        """After a fork, in the child: let go of the parent's memory."""
        # The lock may be held by a thread that does not exist here.
        self._forked, self._lock = True, threading.Lock()
        fd, self._fd = self._fd, -1
        os.close(fd)
        for rng in list(self._books.ranges.values()):
            # Covers what a thread was mapping at the moment of the fork, before its madvise.
            self._cover(rng.reservation.address, rng.reservation.nbytes)

    # --- internals ------------------------------------------------------------------------------

    def _require_usable(self) -> None:
        if self._fd < 0:
            raise forks.forked_error() if self._forked else ClosedError("the backend is shut down")

    def _take_offset(self, nbytes: int) -> int:
        offset = self._next_offset
        self._next_offset += nbytes
        return offset

    def _reserve_aligned(self, nbytes: int) -> int:
        """Address space of ``nbytes`` aligned to the page: reserve more, cut both ends off."""
        slack = self._page_bytes - os_mmap.PAGESIZE
        try:
            start = self._calls.mmap(0, nbytes + slack, os_calls.PROT_NONE, _ANON, -1, 0)
        except OSError as error:
            raise translate(error, "mmap", f"cannot reserve {format_size(nbytes)}") from error
        address = -(-start // self._page_bytes) * self._page_bytes
        head, end = address - start, start + nbytes + slack
        try:
            self._cut(start, head)
            start += head
            self._cut(address + nbytes, end - address - nbytes)
        except OSError as error:
            translated = translate(error, "munmap", f"cannot reserve {format_size(nbytes)}")
            try:
                self._calls.munmap(start, end - start)
            except OSError as second:  # addresses are lost, but no memory
                translated.add_note(f"and {end - start} bytes of addresses stay taken: {second}")
            raise translated from error
        return address

    def _cut(self, address: int, nbytes: int) -> None:
        if nbytes:
            self._calls.munmap(address, nbytes)

    def _cover(self, address: int, nbytes: int) -> None:
        """Put PROT_NONE address space over a range, as it was when it was reserved."""
        self._calls.mmap(address, nbytes, os_calls.PROT_NONE, _ANON_FIXED, -1, 0)

    def _map_shared(self, address: int, nbytes: int, offset: int) -> None:
        prot, flags = os_calls.PROT_READ_WRITE, _SHARED_FIXED
        try:
            self._calls.mmap(address, nbytes, prot, flags, self._fd, offset)
        except OSError as error:
            self._mend(address, nbytes, error)
            raise translate(error, "mmap", f"cannot map {format_size(nbytes)}") from error
        try:
            self._calls.madvise(address, nbytes, os_calls.MADV_DONTFORK)
        except OSError as error:
            self._cover_or_break(address, nbytes, error)
            raise translate(error, "madvise", f"cannot map {format_size(nbytes)}") from error

    def _mend(self, address: int, nbytes: int, cause: OSError) -> None:
        """After a failed MAP_FIXED, which on old kernels may have left a hole: never leave one."""
        try:
            self._calls.madvise(address, nbytes, os_calls.MADV_NORMAL)  # ENOMEM: there is a hole
        except OSError:
            self._cover_or_break(address, nbytes, cause)

    def _cover_or_break(self, address: int, nbytes: int, cause: OSError) -> None:
        try:
            self._cover(address, nbytes)
        except OSError as error:
            raise PoolBroken(
                f"a mapping of {format_size(nbytes)} at {address:#x} could not be undone: {error}; "
                f"it was undone because of {cause}",
                hint="Close the cache; the kernel frees the memory when the process ends.",
            ) from cause

    def _find_place(self, rng: RangeState, page_index: int, handle: Handle) -> _Place:
        homes = self._homes[rng.reservation.address]
        if homes.spans.is_free(page_index, page_index + handle.num_pages):
            offset = homes.offset + page_index * self._page_bytes
            return _Place(offset, homes.spans, page_index)
        # Some other handle was first mapped here and lives on at another address.
        return _Place(self._take_offset(handle.num_pages * self._page_bytes), None, 0)

    def _keep_place(self, place: _Place, handle: Handle) -> None:
        if place.homes is not None:
            place.homes.add(place.page_index, place.page_index + handle.num_pages)
        self._places[handle.key] = place

    def _drop_place(self, handle: Handle) -> None:
        place = self._places.pop(handle.key, None)
        if place is not None and place.homes is not None:
            place.homes.remove(place.page_index)

    def _punch(self, place: _Place, handle: Handle) -> None:
        nbytes = handle.num_pages * self._page_bytes
        try:
            retry(lambda: self._calls.punch_hole(self._fd, place.offset, nbytes))
        except OSError as error:
            what = f"cannot release {format_size(nbytes)}"
            raise translate(error, "fallocate", what) from error


def _checked_page_bytes(page_bytes: int) -> int:
    is_int = isinstance(page_bytes, int) and not isinstance(page_bytes, bool)
    if not is_int or page_bytes < os_mmap.PAGESIZE or page_bytes & (page_bytes - 1):
        raise InvalidInput(
            f"page_bytes is {page_bytes!r}, but must be a power of two >= {os_mmap.PAGESIZE}"
        )
    return page_bytes


def _checked_capacity(capacity_bytes: int) -> int:
    if not isinstance(capacity_bytes, int) or capacity_bytes < 0:
        raise InvalidInput(f"capacity_bytes is {capacity_bytes!r}, but must be an int >= 0")
    return capacity_bytes
