"""``HostBackend``: elastic memory on any Linux machine, mapped at fixed addresses.

A reservation is PROT_NONE address space; ``map`` puts memory over it and ``release`` gives the
memory back to the machine at once. Where it comes from is a choice (docs/adr/0006):

* ``"anonymous"`` (``anonymous.py``, the default): private memory in huge pages.
* ``"memfd"`` (``memfd.py``): pages of a file, which can be mapped at several addresses at once.

Memory is committed when it is first touched, as everywhere on Linux, so ``create`` counts against
``capacity_bytes`` and the budget above guards the machine.

Fork (docs/broker.md, rule 4): what is mapped is MADV_DONTFORK, and a child that Python forks
closes the memfd and covers the reservations, so the parent's memory comes back when the parent
gives it back. In the child the backend raises ``ForkedProcessError``.
"""

from __future__ import annotations

import ctypes
import mmap as os_mmap
import threading
from collections.abc import Sequence

from kvcached.config import HOST_MEMORY, format_size
from kvcached.errors import ClosedError, DriverError, InvalidInput, OutOfPages
from kvcached.hostinfo import available_bytes, total_bytes
from kvcached.memory import forks
from kvcached.memory.addresses import Addresses, HostMemory
from kvcached.memory.anonymous import AnonymousMemory
from kvcached.memory.base import Copy, Handle, Reservation
from kvcached.memory.mappings import HandleState, Mappings
from kvcached.memory.memfd import MemfdMemory
from kvcached.memory.os_calls import MappingCredit, OsCalls


class HostBackend:
    """The machine's memory, mapped at fixed addresses. See the module's docstring.

    Parameters
    ----------
    page_bytes:
        Any power of two that is at least the operating system's page.
    capacity_bytes:
        Most bytes of all handles together; ``None`` means the machine's memory, or what a
        control group allows of it.
    device:
        What tensors over this memory name as their device.
    memory:
        ``"anonymous"`` or ``"memfd"``.
    calls:
        The operating-system calls; tests inject failures here.

    Raises ``InvalidInput`` for a bad size and ``BackendUnavailable`` where the kernel lacks what
    ``memory`` needs.
    """

    def __init__(
        self,
        page_bytes: int = 2 << 20,
        *,
        capacity_bytes: int | None = None,
        device: str = "cpu",
        memory: str = "anonymous",
        calls: OsCalls | None = None,
    ) -> None:
        self._page_bytes = _checked_page_bytes(page_bytes)
        self._capacity = _checked_capacity(capacity_bytes)
        self._device = device
        self._calls = OsCalls() if calls is None else calls
        self._addresses = Addresses(self._calls, page_bytes)
        self._lock = threading.Lock()
        self._books = Mappings(page_bytes)
        self._credit = MappingCredit()
        self._closed = self._forked = False
        self._memory = _make_memory(memory, self._addresses)
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
    def can_alias(self) -> bool:
        """Whether a handle can be mapped twice: with ``memory="memfd"``."""
        return self._memory.can_alias

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
            return self._books.add_range(self._memory.reserve(nbytes), nbytes).reservation

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
            return self._books.add_handle(num_pages).handle

    def map(self, reservation: Reservation, page_index: int, handle: Handle) -> None:
        """See ``MemoryBackend.map``."""
        with self._lock:
            self._require_usable()
            rng, state = self._books.map_plan(reservation, page_index, handle)
            self._require_single(state)
            self._credit.spend(self._memory.mappings_per_map, refusable=True)
            self._memory.map(handle.key, reservation, *self._span(page_index, handle))
            self._books.add_map(rng, page_index, state)

    def unmap(self, reservation: Reservation, page_index: int, handle: Handle) -> None:
        """See ``MemoryBackend.unmap``. Touching the range afterwards is SIGSEGV."""
        with self._lock:
            self._require_usable()
            rng, state = self._books.unmap_plan(reservation, page_index, handle)
            self._memory.unmap(handle.key, reservation, *self._span(page_index, handle))
            self._credit.spend(2, refusable=False)
            self._books.drop_map(rng, page_index, state)

    def release(self, handle: Handle) -> None:
        """See ``MemoryBackend.release``. The pages are free on return."""
        with self._lock:
            self._require_usable()
            state = self._books.release_plan(handle)
            self._memory.release(handle.key, handle.num_pages * self._page_bytes)
            self._books.drop_handle(state)

    def close(self, reservation: Reservation) -> None:
        """See ``MemoryBackend.close``."""
        with self._lock:
            self._require_usable()
            rng = self._books.close_plan(reservation)
            self._memory.close(reservation)
            self._books.drop_range(rng)

    def available(self) -> int:
        """Bytes that ``create`` could still give: of the machine, the container, the capacity."""
        self._require_usable()
        return min(available_bytes(), self._capacity - self._books.handle_bytes)

    def copy(self, dst: int, src: int, nbytes: int) -> None:
        """See ``MemoryBackend.copy``. An address that is not mapped is SIGSEGV."""
        self._require_usable()
        if nbytes < 0:
            raise InvalidInput(f"cannot copy {nbytes} bytes")
        ctypes.memmove(dst, src, nbytes)

    def copy_many(self, copies: Sequence[Copy]) -> None:
        """See ``MemoryBackend.copy_many``."""
        for dst, src, nbytes in copies:
            self.copy(dst, src, nbytes)

    def shutdown(self) -> None:
        """See ``MemoryBackend.shutdown``."""
        with self._lock:
            if self._closed:
                return
            self._books.shutdown_plan()
            self._memory.shutdown()
            self._closed = True
            forks.unwatch(self)

    # --- what only this backend has -----------------------------------------------------------

    def resident_bytes(self) -> int:
        """Bytes of physical memory behind the handles, by the kernel's own count."""
        with self._lock:
            self._require_usable()
            return self._memory.resident_bytes()

    def check(self) -> None:
        """Assert that the books are sound and that the kernel holds no more than they say."""
        with self._lock:
            self._require_usable()
            self._books.check()
            self._memory.check(set(self._books.handles), set(self._books.ranges))
            assert self._books.handle_bytes <= self._capacity, "I7: handles above the capacity"
            resident = self._memory.resident_bytes()
            assert resident <= self._books.handle_bytes, "I4: the kernel holds released memory"

    def disown(self) -> None:
        """After a fork, in the child: let go of the parent's memory."""
        # The lock may be held by a thread that does not exist here.
        self._closed, self._forked, self._lock = True, True, threading.Lock()
        self._memory.disown()
        for rng in list(self._books.ranges.values()):
            # Covers what a thread was mapping at the moment of the fork, before its madvise.
            self._addresses.cover(rng.reservation.address, rng.reservation.nbytes)

    # --- internals ------------------------------------------------------------------------------

    def _require_usable(self) -> None:
        if self._closed:
            raise forks.forked_error() if self._forked else ClosedError("the backend is shut down")

    def _require_single(self, state: HandleState) -> None:
        if state.mapped and not self._memory.can_alias:
            raise DriverError(
                f"handle {state.handle.key} is mapped already, and private memory cannot be mapped "
                "twice",
                status="ENOTSUP",
                call="map",
                hint="Unmap it first, or use KVCACHED_HOST_MEMORY=memfd.",
            )

    def _span(self, page_index: int, handle: Handle) -> tuple[int, int]:
        """Offset and size of a mapping in bytes."""
        return page_index * self._page_bytes, handle.num_pages * self._page_bytes


def _make_memory(memory: str, addresses: Addresses) -> HostMemory:
    if memory not in HOST_MEMORY:
        raise InvalidInput(f"no host memory is called {memory!r}", hint=f"Use {HOST_MEMORY}.")
    return AnonymousMemory(addresses) if memory == "anonymous" else MemfdMemory(addresses)


def _checked_page_bytes(page_bytes: int) -> int:
    is_int = isinstance(page_bytes, int) and not isinstance(page_bytes, bool)
    if not is_int or page_bytes < os_mmap.PAGESIZE or page_bytes & (page_bytes - 1):
        raise InvalidInput(
            f"page_bytes is {page_bytes!r}, but must be a power of two >= {os_mmap.PAGESIZE}"
        )
    return page_bytes


def _checked_capacity(capacity_bytes: int | None) -> int:
    if capacity_bytes is None:
        return total_bytes()
    if not isinstance(capacity_bytes, int) or capacity_bytes < 0:
        raise InvalidInput(f"capacity_bytes is {capacity_bytes!r}, but must be an int >= 0")
    return capacity_bytes
