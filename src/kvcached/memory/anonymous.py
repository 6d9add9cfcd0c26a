"""``AnonymousMemory``: private memory of this process, in huge pages where they fit.

``map`` puts fresh memory over the reservation. ``unmap`` takes the access away and leaves the pages
where they are (they *rest*), so that ``release``, which mostly follows, is one call that covers the
range. Only if something else needs the addresses, or the handle is mapped elsewhere, are the pages
moved, by page tables and not by bytes. A reader sees memory or PROT_NONE, never a third state.

Huge pages (docs/adr/0006): first touch and freeing cost several times less in pages of 2 MiB. A
huge page that two handles shared would not come back until both are released, so only the aligned
middle of a handle asks for them, and its ends refuse them. What khugepaged merges later stays
within such a middle as well, so the kernel may hold more than was touched, but never more than the
handle has.
"""

from __future__ import annotations

import errno
import itertools

from kvcached.config import format_size
from kvcached.errors import BackendUnavailable, PoolBroken
from kvcached.hostinfo import huge_page_bytes
from kvcached.memory import os_calls
from kvcached.memory.addresses import Addresses
from kvcached.memory.base import Reservation
from kvcached.memory.os_calls import PROT_NONE, PROT_READ_WRITE, errno_name, translate

Part = tuple[int, int, int]
"""``(offset in the handle, bytes, advice)``: one kernel mapping of a handle."""


class _Place:
    """Where a handle's pages are. ``parking``: the addresses made for them, if they are parked."""

    __slots__ = ("address", "nbytes", "parking", "parts")

    def __init__(self, address: int, nbytes: int, parts: list[Part]) -> None:
        self.address, self.nbytes, self.parts = address, nbytes, parts
        self.parking: tuple[int, int] | None = None

    def overlaps(self, address: int, nbytes: int) -> bool:
        return self.address < address + nbytes and address < self.address + self.nbytes


class AnonymousMemory:
    """See ``HostMemory`` for the methods. Raises ``BackendUnavailable`` before Linux 5.7."""

    can_alias = False
    mappings_per_map = 4

    def __init__(self, addresses: Addresses) -> None:
        self._addresses, self._calls = addresses, addresses.calls
        self._huge = huge_page_bytes()
        self._places: dict[int, _Place] = {}
        self._resting: dict[int, _Place] = {}
        self._empty: list[tuple[int, int]] = []  # parkings whose munmap failed: no memory in them
        self._try_a_move()

    def reserve(self, nbytes: int) -> int:
        """See ``HostMemory``."""
        return self._addresses.reserve(nbytes)

    def close(self, reservation: Reservation) -> None:
        """See ``HostMemory``. Handles that rest there keep their contents elsewhere."""
        self._evict(reservation.address, reservation.nbytes)
        self._addresses.close(reservation)

    def map(self, key: int, reservation: Reservation, offset: int, nbytes: int) -> None:
        """See ``HostMemory``."""
        address, place = reservation.address + offset, self._places.get(key)
        if place is None or place.address != address:
            self._evict(address, nbytes)
        if place is None:
            self._places[key] = self._map_fresh(address, nbytes)
            return
        if place.address != address:
            self._move(place, address)
        self._protect(place, PROT_READ_WRITE, "cannot map pages")
        del self._resting[key]

    def unmap(self, key: int, reservation: Reservation, offset: int, nbytes: int) -> None:  # noqa: ARG002
        """See ``HostMemory``."""
        place = self._places[key]
        self._protect(place, PROT_NONE, "cannot unmap pages")
        self._resting[key] = place

    def release(self, key: int, nbytes: int) -> None:
        """See ``HostMemory``."""
        place, what = self._places.get(key), f"cannot release {format_size(nbytes)}"
        if place is None:
            return
        if place.parking is None:
            self._addresses.drop(place.address, nbytes, what)
        else:
            try:
                self._calls.munmap(*place.parking)
            except OSError as error:
                raise translate(error, "munmap", what) from error
        del self._places[key], self._resting[key]

    def resident_bytes(self) -> int:
        """See ``HostMemory``. A page that was only read counts too."""
        places = self._places.values()
        return sum(self._calls.resident(place.address, place.nbytes) for place in places)

    def check(self, keys: set[int], ranges: set[int]) -> None:  # noqa: ARG002
        """See ``HostMemory``."""
        assert set(self._places) <= keys, "I4: a place without a handle"
        assert set(self._resting) <= set(self._places), "I4: a handle rests nowhere"
        spans = sorted((p.address, p.nbytes) for p in self._places.values())
        for (low, nbytes), (high, _) in itertools.pairwise(spans):
            assert low + nbytes <= high, "I5: two handles share addresses"
        for key, place in self._places.items():
            assert place.parking is None or key in self._resting, "I4: a mapped handle is parked"

    def disown(self) -> None:
        """See ``HostMemory``. The child was not given the pages in the first place."""

    def shutdown(self) -> None:
        """See ``HostMemory``."""
        self._unmap_empty()

    # --- fresh memory ---------------------------------------------------------------------------

    def _map_fresh(self, address: int, nbytes: int) -> _Place:
        place = _Place(address, nbytes, self._parts(address, nbytes))
        what = f"cannot map {format_size(nbytes)}"
        try:
            self._addresses.fill(address, nbytes)
        except OSError as error:
            self._addresses.mend(address, nbytes, error)
            raise translate(error, "mmap", what) from error
        try:
            self._calls.madvise(address, nbytes, os_calls.MADV_DONTFORK)
            for offset, size, advice in place.parts:
                self._advise_pages(address + offset, size, advice)
        except OSError as error:
            self._addresses.cover_or_break(address, nbytes, error)
            raise translate(error, "madvise", what) from error
        return place

    def _parts(self, address: int, nbytes: int) -> list[Part]:
        """The middle of whole huge pages, and the ends; or all of it, if it has no such middle."""
        start = -address % self._huge
        end = nbytes - (address + nbytes) % self._huge
        if start >= end:
            return [(0, nbytes, os_calls.MADV_NOHUGEPAGE)]
        parts = [
            (0, start, os_calls.MADV_NOHUGEPAGE),
            (start, end - start, os_calls.MADV_HUGEPAGE),
            (end, nbytes - end, os_calls.MADV_NOHUGEPAGE),
        ]
        return [part for part in parts if part[1]]

    def _advise_pages(self, address: int, nbytes: int, advice: int) -> None:
        try:
            self._calls.madvise(address, nbytes, advice)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a kernel without huge pages
                raise

    # --- resting and moving -----------------------------------------------------------------------

    def _protect(self, place: _Place, prot: int, what: str) -> None:
        """Give or take access, all or nothing."""
        try:
            self._calls.mprotect(place.address, place.nbytes, prot)
        except OSError as error:
            if len(place.parts) > 1:  # the first of them may have changed
                self._protect_or_break(place, PROT_NONE if prot else PROT_READ_WRITE, error)
            raise translate(error, "mprotect", what) from error

    def _protect_or_break(self, place: _Place, prot: int, cause: OSError) -> None:
        try:
            self._calls.mprotect(place.address, place.nbytes, prot)
        except OSError as error:
            raise PoolBroken(
                f"access to {format_size(place.nbytes)} at {place.address:#x} is half changed: "
                f"{cause}, and undoing it failed: {error}",
                hint="Close the cache; the kernel frees the memory when the process ends.",
            ) from cause

    def _evict(self, address: int, nbytes: int) -> None:
        """Park what rests in a range. Little rests at a time: it is mostly released at once."""
        if self._resting:
            for place in list(self._resting.values()):
                if place.parking is None and place.overlaps(address, nbytes):
                    self._park(place)

    def _park(self, place: _Place) -> None:
        self._unmap_empty()
        total = place.nbytes + self._huge
        start = self._addresses.reserve_anywhere(total)
        try:
            # As far from a border of huge pages as before, so that whole page tables move.
            self._move(place, start + (place.address - start) % self._huge)
        except BaseException:  # whatever it was, these addresses are free again
            self._empty.append((start, total))
            raise
        place.parking = (start, total)

    def _move(self, place: _Place, target: int) -> None:
        """Move pages that rest to ``target``, which is covered; they rest there. All or nothing."""
        source, moved = place.address, 0
        try:
            for offset, size, _ in place.parts:
                self._calls.move(source + offset, size, target + offset)
                moved += size
        except OSError as error:
            self._move_back(place, target, moved, error)
            raise translate(error, "mremap", "cannot move pages") from error
        place.address = target
        if place.parking is not None:
            self._empty.append(place.parking)
            place.parking = None
            self._unmap_empty()
        else:
            self._tidy(source, place.nbytes)

    def _move_back(self, place: _Place, target: int, moved: int, cause: OSError) -> None:
        try:
            for offset, size, _ in place.parts:
                if offset < moved:
                    self._calls.move(target + offset, size, place.address + offset)
        except OSError as error:
            raise PoolBroken(
                f"pages stay at {target:#x}, half moved, for {cause}; moving back fails: {error}",
                hint="Close the cache; the kernel frees the memory when the process ends.",
            ) from cause
        self._tidy(target, place.nbytes)

    def _tidy(self, address: int, nbytes: int) -> None:
        """Cover an empty PROT_NONE mapping with a plain one, which merges with its neighbours."""
        try:
            self._addresses.cover(address, nbytes)
        except OSError as error:  # then it does not merge yet; whatever is mapped here replaces it
            self._addresses.mend(address, nbytes, error)

    def _unmap_empty(self) -> None:
        while self._empty:
            try:
                self._calls.munmap(*self._empty[-1])
            except OSError:  # addresses only, no memory: the next time will do
                return
            self._empty.pop()

    def _try_a_move(self) -> None:
        start = self._addresses.reserve_anywhere(2 * self._addresses.page_bytes)
        try:
            self._addresses.fill(start, self._addresses.page_bytes)
            self._calls.move(start, self._addresses.page_bytes, start + self._addresses.page_bytes)
        except OSError as error:
            raise BackendUnavailable(
                f"this kernel cannot move memory: mremap says {errno_name(error)}",
                hint="Needs Linux 5.7 or newer; or set KVCACHED_HOST_MEMORY=memfd.",
            ) from error
        finally:
            self._calls.munmap(start, 2 * self._addresses.page_bytes)
