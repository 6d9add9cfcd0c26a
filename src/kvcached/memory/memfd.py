"""``MemfdMemory``: pages of one memfd, mapped at fixed addresses. They can be mapped twice.

A handle is a range of the file; ``release`` punches it out, which frees the pages and makes them
read as zero. It gets its place when it is first mapped: the place that corresponds to its address,
so neighbours in address space are neighbours in the file and the kernel keeps them as one mapping.
The file is sparse and far larger than any machine's memory, so places in it cost nothing and need
no allocator.
"""

from __future__ import annotations

import os

from kvcached.config import format_size
from kvcached.errors import BackendUnavailable, OutOfPages
from kvcached.memory import os_calls
from kvcached.memory.addresses import Addresses
from kvcached.memory.base import Reservation
from kvcached.memory.mappings import Spans
from kvcached.memory.os_calls import errno_name, retry, translate

_FILE_BYTES = 1 << 62
_SHARED_FIXED = os_calls.MAP_SHARED | os_calls.MAP_FIXED


class _Place:
    """Where in the memfd a handle lives; ``home`` is the table that the place is taken from."""

    __slots__ = ("home", "offset", "start")

    def __init__(self, offset: int, home: Spans | None, start: int) -> None:
        self.offset, self.home, self.start = offset, home, start


class _Home:
    """The part of the memfd that corresponds to one reservation, and what of it is taken."""

    __slots__ = ("offset", "spans")

    def __init__(self, offset: int) -> None:
        self.offset, self.spans = offset, Spans()


class MemfdMemory:
    """See ``HostMemory`` for the methods. Raises ``BackendUnavailable`` where there is no memfd."""

    can_alias = True
    mappings_per_map = 2

    def __init__(self, addresses: Addresses) -> None:
        self._addresses, self._calls = addresses, addresses.calls
        self._places: dict[int, _Place] = {}
        self._homes: dict[int, _Home] = {}
        self._next_offset = 0
        try:
            self.fd = self._calls.memfd("kvcached", _FILE_BYTES)
        except OSError as error:
            raise BackendUnavailable(
                f"cannot make a memfd: {error.strerror} ({errno_name(error)})",
                hint="Needs Linux with memfd sealing, a free file descriptor and no ulimit -f.",
            ) from error

    def reserve(self, nbytes: int) -> int:
        """See ``HostMemory``."""
        if self._next_offset + nbytes > _FILE_BYTES:
            raise OutOfPages(f"cannot reserve {format_size(nbytes)}: no address space is left")
        address = self._addresses.reserve(nbytes)
        self._homes[address] = _Home(self._take_offset(nbytes))
        return address

    def close(self, reservation: Reservation) -> None:
        """See ``HostMemory``."""
        self._addresses.close(reservation)
        del self._homes[reservation.address]

    def map(self, key: int, reservation: Reservation, offset: int, nbytes: int) -> None:
        """See ``HostMemory``."""
        known = self._places.get(key)
        place = known or self._find_place(reservation, offset, nbytes)
        self._map_shared(reservation.address + offset, nbytes, place.offset)
        if known is None:
            self._places[key] = place
            if place.home is not None:
                place.home.add(place.start, place.start + nbytes)

    def unmap(self, key: int, reservation: Reservation, offset: int, nbytes: int) -> None:  # noqa: ARG002
        """See ``HostMemory``. The file keeps the contents."""
        self._addresses.drop(reservation.address + offset, nbytes, "cannot unmap pages")

    def release(self, key: int, nbytes: int) -> None:
        """See ``HostMemory``."""
        place = self._places.get(key)
        if place is None:
            return
        try:
            retry(lambda: self._calls.punch_hole(self.fd, place.offset, nbytes))
        except OSError as error:
            what = f"cannot release {format_size(nbytes)}"
            raise translate(error, "fallocate", what) from error
        del self._places[key]
        if place.home is not None:
            place.home.remove(place.start)

    def resident_bytes(self) -> int:
        """See ``HostMemory``: the blocks of the file."""
        return os.fstat(self.fd).st_blocks * 512

    def check(self, keys: set[int], ranges: set[int]) -> None:
        """See ``HostMemory``."""
        assert set(self._homes) == ranges, "I5: homes and ranges differ"
        assert set(self._places) <= keys, "I4: a place without a handle"

    def disown(self) -> None:
        """See ``HostMemory``."""
        self.shutdown()

    def shutdown(self) -> None:
        """See ``HostMemory``."""
        fd, self.fd = self.fd, -1
        os.close(fd)

    def _take_offset(self, nbytes: int) -> int:
        offset = self._next_offset
        self._next_offset += nbytes
        return offset

    def _find_place(self, reservation: Reservation, offset: int, nbytes: int) -> _Place:
        home = self._homes[reservation.address]
        if home.spans.is_free(offset, offset + nbytes):
            return _Place(home.offset + offset, home.spans, offset)
        # Some other handle was first mapped here and lives on at another address.
        return _Place(self._take_offset(nbytes), None, 0)

    def _map_shared(self, address: int, nbytes: int, offset: int) -> None:
        prot, what = os_calls.PROT_READ_WRITE, f"cannot map {format_size(nbytes)}"
        try:
            self._calls.mmap(address, nbytes, prot, _SHARED_FIXED, self.fd, offset)
        except OSError as error:
            self._addresses.mend(address, nbytes, error)
            raise translate(error, "mmap", what) from error
        try:
            self._calls.madvise(address, nbytes, os_calls.MADV_DONTFORK)
        except OSError as error:
            self._addresses.cover_or_break(address, nbytes, error)
            raise translate(error, "madvise", what) from error
