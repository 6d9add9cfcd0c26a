"""Reserved address space of the host backend, and the rule that it never has a hole.

A hole would be a trap: any thread's next ``mmap`` may land in it, and our next mapping over it
would take that thread's memory away. So ranges are only ever replaced, never unmapped, until they
are closed.
"""

from __future__ import annotations

import errno
import mmap as os_mmap
from typing import Protocol

from kvcached.config import format_size
from kvcached.errors import PoolBroken
from kvcached.memory import os_calls
from kvcached.memory.base import Reservation
from kvcached.memory.os_calls import OsCalls, translate

_ANON = os_calls.MAP_PRIVATE | os_calls.MAP_ANONYMOUS | os_calls.MAP_NORESERVE
_ANON_FIXED = _ANON | os_calls.MAP_FIXED


class HostMemory(Protocol):
    """Where the host backend's physical pages come from.

    ``HostBackend`` checks every call before it comes here and holds its lock; offsets and sizes
    are bytes, whole pages. A call that raises has changed nothing, but for ``PoolBroken``.
    """

    can_alias: bool
    """Whether a handle can be mapped at several addresses at once."""
    mappings_per_map: int
    """Most kernel mappings that one ``map`` adds to the process."""

    def reserve(self, nbytes: int) -> int:
        """Reserve addresses; returns the first."""
        ...

    def close(self, reservation: Reservation) -> None:
        """Give addresses back; no handle is mapped there."""
        ...

    def map(self, key: int, reservation: Reservation, offset: int, nbytes: int) -> None:
        """Map the handle ``key`` at ``offset``."""
        ...

    def unmap(self, key: int, reservation: Reservation, offset: int, nbytes: int) -> None:
        """Make the handle inaccessible at ``offset``; it keeps its contents."""
        ...

    def release(self, key: int, nbytes: int) -> None:
        """Free what belongs to a handle that is mapped nowhere."""
        ...

    def resident_bytes(self) -> int:
        """Physical memory behind all handles, by the kernel's count."""
        ...

    def check(self, keys: set[int], ranges: set[int]) -> None:
        """Assert agreement with the handles and (addresses of) reservations that exist."""
        ...

    def disown(self) -> None:
        """In a forked child: let go of the parent's memory."""
        ...

    def shutdown(self) -> None:
        """Free what is left once there are no handles and no reservations."""
        ...


class Addresses:
    """Reserving, covering and mending PROT_NONE address space, in units of ``page_bytes``."""

    def __init__(self, calls: OsCalls, page_bytes: int) -> None:
        self.calls, self.page_bytes = calls, page_bytes

    def reserve(self, nbytes: int) -> int:
        """Address space aligned to the page: reserve more, cut both ends off."""
        slack = self.page_bytes - os_mmap.PAGESIZE
        start = self.reserve_anywhere(nbytes + slack)
        address = -(-start // self.page_bytes) * self.page_bytes
        head, end = address - start, start + nbytes + slack
        try:
            self._cut(start, head)
            start += head
            self._cut(address + nbytes, end - address - nbytes)
        except OSError as error:
            translated = translate(error, "munmap", f"cannot reserve {format_size(nbytes)}")
            try:
                self.calls.munmap(start, end - start)
            except OSError as second:  # addresses are lost, but no memory
                translated.add_note(f"and {end - start} bytes of addresses stay taken: {second}")
            raise translated from error
        return address

    def reserve_anywhere(self, nbytes: int) -> int:
        """Address space aligned to the system's page."""
        try:
            return self.calls.mmap(0, nbytes, os_calls.PROT_NONE, _ANON, -1, 0)
        except OSError as error:
            raise translate(error, "mmap", f"cannot reserve {format_size(nbytes)}") from error

    def close(self, reservation: Reservation) -> None:
        """Give a reservation back."""
        try:
            self.calls.munmap(reservation.address, reservation.nbytes)
        except OSError as error:
            raise translate(error, "munmap", "cannot close a reservation") from error

    def _cut(self, address: int, nbytes: int) -> None:
        if nbytes:
            self.calls.munmap(address, nbytes)

    def cover(self, address: int, nbytes: int) -> None:
        """Put fresh PROT_NONE addresses over a range; frees private pages. Raises ``OSError``."""
        self.calls.mmap(address, nbytes, os_calls.PROT_NONE, _ANON_FIXED, -1, 0)

    def fill(self, address: int, nbytes: int) -> None:
        """Put fresh private memory over a range, all zero, committed at the first touch."""
        prot = os_calls.PROT_READ_WRITE
        self.calls.mmap(address, nbytes, prot, _ANON_FIXED, -1, 0)

    def drop(self, address: int, nbytes: int, what: str) -> None:
        """``cover``, in the ordinary course. On an error nothing has changed."""
        try:
            self.cover(address, nbytes)
        except OSError as error:
            if not self.mend(address, nbytes, error):
                raise translate(error, "mmap", what) from error

    def mend(self, address: int, nbytes: int, cause: OSError) -> bool:
        """After a failed MAP_FIXED, which on old kernels may have left a hole: never leave one.

        Returns whether there was one; the range is covered then, and what it held is gone.
        """
        try:
            self.calls.madvise(address, nbytes, os_calls.MADV_NORMAL)
        except OSError as error:
            if error.errno == errno.ENOMEM:  # how the kernel says that there is a hole
                self.cover_or_break(address, nbytes, cause)
                return True
        return False

    def cover_or_break(self, address: int, nbytes: int, cause: OSError) -> None:
        """``cover``, to undo what ``cause`` interrupted; ``PoolBroken`` if that fails too."""
        try:
            self.cover(address, nbytes)
        except OSError as error:
            raise PoolBroken(
                f"a mapping of {format_size(nbytes)} at {address:#x} could not be undone: {error}; "
                f"it was undone because of {cause}",
                hint="Close the cache; the kernel frees the memory when the process ends.",
            ) from cause
