"""``MemoryBackend``: the narrow waist between bookkeeping and physical memory.

A backend knows address ranges (reservations), physical allocations (handles) and the mapping of
one onto the other. It knows nothing of blocks, sequences, budgets or tenants; limits, counters and
injected faults are wrappers around it (``kvcached.testing``).

The contract, checked for every backend by ``kvcached.testing.check_memory_backend``:

* All sizes are multiples of ``page_bytes``, which is asked from the device and never assumed.
* A handle is mapped and unmapped whole, and keeps its contents from one mapping to the next.
* Where ``can_alias`` it may be mapped at several addresses at once. Elsewhere a second ``map``
  raises ``DriverError`` with the status ``ENOTSUP`` and changes nothing.
* ``map`` onto a range that is already mapped (in part or whole), or outside the reservation,
  raises ``InvalidInput`` and changes nothing. So does ``unmap`` of something that is not mapped.
* ``release`` of a handle that is still mapped, or was released before, raises ``InvalidInput``.
* ``close`` of a reservation that still has mappings raises ``InvalidInput``.
* Physical memory goes back to the device once the handle is unmapped everywhere and released.
* Fresh memory reads as zero on the host backend; on CUDA see ``docs/security.md``.
* A backend may have ``back``, which creates handles and maps them in one go, all or nothing, and
  ``unback``, which unmaps and releases them. These are attributes of their own (``Backing``), so
  that a backend without them is complete.
* No physical memory: ``OutOfPages``. Any other refusal: ``DriverError`` with the status' name.
  A failed call leaves the backend as it was.
* Calls are thread-safe against each other, except two calls on the same reservation range or the
  same handle, which the caller orders.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

Copy = tuple[int, int, int]
"""``(destination address, source address, bytes)``."""

Place = tuple[int, int]
"""``(page index in a reservation, number of pages)``."""


@dataclass(frozen=True, slots=True)
class Reservation:
    """A range of address space: ``nbytes`` from ``address``; closed by its own address and size."""

    address: int
    nbytes: int


class Handle(NamedTuple):  # a tuple: one is made at every growth, and a dataclass takes longer
    """One physical allocation of ``num_pages`` pages; ``key`` is the backend's own name for it."""

    key: int
    num_pages: int


Made = tuple[int, int, int]
"""``(page index in a reservation, number of pages, what the driver calls the handle there)``."""

Mapped = tuple[int, Handle]
"""``(page index in a reservation, the handle that is mapped there)``."""


class Unbacked(NamedTuple):
    """How far ``unback`` came, and why not further.

    The first ``gone`` handles are released. Those after them are as they were, but for the first
    ``adrift`` of these: unmapped, not released, and could not be mapped again (``PoolBroken``).
    """

    gone: int
    adrift: int
    error: BaseException | None


@runtime_checkable
class Fence(Protocol):
    """A point in a device's work after which freed blocks can no longer be read."""

    def passed(self) -> bool:
        """Whether the point lies behind us. Never blocks; once true, stays true."""
        ...


@runtime_checkable
class MemoryBackend(Protocol):
    """Reserve, create, map, unmap, release: see the module's docstring for the contract."""

    @property
    def device(self) -> str:
        """``"cpu"`` or ``"cuda:0"``: where tensors over this memory live."""
        ...

    @property
    def can_alias(self) -> bool:
        """Whether a handle may be mapped at several addresses at once."""
        ...

    @property
    def page_bytes(self) -> int:
        """The unit of physical memory in bytes."""
        ...

    def reserve(self, nbytes: int) -> Reservation:
        """Reserve ``nbytes`` of address space, backed by nothing. ``OutOfPages`` if it is full."""
        ...

    def create(self, num_pages: int) -> Handle:
        """Allocate ``num_pages`` of physical memory, mapped nowhere. ``OutOfPages`` if none."""
        ...

    def map(self, reservation: Reservation, page_index: int, handle: Handle) -> None:
        """Map ``handle`` at page ``page_index`` of ``reservation``, readable and writable."""
        ...

    def unmap(self, reservation: Reservation, page_index: int, handle: Handle) -> None:
        """Undo exactly one ``map``. Touching the range afterwards faults."""
        ...

    def release(self, handle: Handle) -> None:
        """Give the handle's physical memory back to the device."""
        ...

    def close(self, reservation: Reservation) -> None:
        """Give the address range back."""
        ...

    def available(self) -> int:
        """Bytes of physical memory that the device could still give, as it reports them now."""
        ...

    def copy(self, dst: int, src: int, nbytes: int) -> None:
        """Copy ``nbytes`` between mapped addresses, complete (for the device) on return."""
        ...

    def copy_many(self, copies: Sequence[Copy]) -> None:
        """As ``copy``, for several that do not overlap: all are complete on return."""
        ...

    def shutdown(self) -> None:
        """Free what the backend itself holds. Idempotent; open handles and ranges are an error."""
        ...


@runtime_checkable
class Backing(Protocol):
    """A backend for which one call for many handles is cheaper than two for each."""

    def back(self, reservation: Reservation, places: Sequence[Place]) -> list[Handle]:
        """A new handle for each place, mapped there. All or nothing.

        ``PoolBroken`` if what was done could not be undone: the backend then keeps what is left,
        and gives it back when the reservation is closed.
        """
        ...

    def unback(self, reservation: Reservation, mapped: Sequence[Mapped]) -> Unbacked:
        """Unmap and release handles that are mapped nowhere else, each all or nothing, in order."""
        ...


@runtime_checkable
class Direct(Protocol):
    """A backend whose memory a pool's own machine code may back, and tell it of afterwards."""

    def direct_calls(self) -> int:
        """Address of six words that live as long as the backend; 0 if it must be asked instead.

        1 (0: call no more), the addresses of ``cuMemCreate``, ``cuMemMap`` and ``cuMemSetAccess``,
        and those of the handles' properties and of the access to them.
        """
        ...

    def adopt(self, reservation: Reservation, made: Sequence[Made]) -> list[Handle]:
        """What was made and mapped, each where the one before ends: from here on as if by ``back``.

        ``InvalidInput`` if that cannot be so.
        """
        ...

    def undo_direct(
        self, reservation: Reservation, made: Sequence[Made], mapped: int, cause: BaseException
    ) -> None:
        """Give back handles, the first ``mapped`` of which were; errors as ``Backing.back``."""
        ...

    def raise_direct(self, status: int, call: int, reservation: Reservation, place: Place) -> None:
        """Raise what the status of one of the three calls stands for, or one below 0."""
        ...
