"""``FakeBackend``: a plain-Python memory backend with real contents."""

from __future__ import annotations

from collections.abc import Sequence

from kvcached.errors import ClosedError, DriverError, InvalidInput, OutOfPages
from kvcached.memory.base import Copy, Handle, Reservation
from kvcached.memory.mappings import Mappings

_FIRST_ADDRESS = 1 << 40


class FakeBackend:
    """Keeps a ``bytearray`` per handle, so tests can prove what is read where.

    ``page_bytes`` is any positive int, ``capacity_pages`` the pages of all handles together
    (default: 1 TiB), ``can_alias`` whether a handle can be mapped twice. Addresses are invented
    and never used twice; ``read``, ``write`` and ``copy`` raise ``InvalidInput`` for an address
    that is not mapped.
    """

    def __init__(
        self, page_bytes: int = 64, *, capacity_pages: int | None = None, can_alias: bool = True
    ) -> None:
        if not isinstance(page_bytes, int) or page_bytes <= 0:
            raise InvalidInput(f"page_bytes is {page_bytes!r}, but must be an int > 0")
        self._books = Mappings(page_bytes)
        self._can_alias = can_alias
        self._capacity = 1 << 40 if capacity_pages is None else capacity_pages * page_bytes
        self._contents: dict[int, bytearray] = {}
        self._pages: dict[int, tuple[int, int]] = {}  # page number -> (handle key, byte offset)
        self._next_address = -(-_FIRST_ADDRESS // page_bytes) * page_bytes
        self._closed = False

    @property
    def device(self) -> str:
        """Always ``"cpu"``."""
        return "cpu"

    @property
    def can_alias(self) -> bool:
        """As the parameter says."""
        return self._can_alias

    @property
    def page_bytes(self) -> int:
        """The unit of physical memory in bytes."""
        return self._books.page_bytes

    def reserve(self, nbytes: int) -> Reservation:
        """See ``MemoryBackend.reserve``."""
        self._require_open()
        self._books.reserve_plan(nbytes)
        address = self._next_address
        self._next_address += nbytes + self.page_bytes  # a guard page between two ranges
        return self._books.add_range(address, nbytes).reservation

    def create(self, num_pages: int) -> Handle:
        """See ``MemoryBackend.create``."""
        self._require_open()
        self._books.create_plan(num_pages)
        nbytes = num_pages * self.page_bytes
        if self._books.handle_bytes + nbytes > self._capacity:
            raise OutOfPages(f"the fake backend has no {num_pages} pages left")
        handle = self._books.add_handle(num_pages).handle
        self._contents[handle.key] = bytearray(nbytes)
        return handle

    def map(self, reservation: Reservation, page_index: int, handle: Handle) -> None:
        """See ``MemoryBackend.map``."""
        self._require_open()
        rng, state = self._books.map_plan(reservation, page_index, handle)
        if state.mapped and not self._can_alias:
            raise DriverError("the handle is mapped already", status="ENOTSUP", call="map")
        self._books.add_map(rng, page_index, state)
        first = reservation.address // self.page_bytes + page_index
        for i in range(handle.num_pages):
            self._pages[first + i] = (handle.key, i * self.page_bytes)

    def unmap(self, reservation: Reservation, page_index: int, handle: Handle) -> None:
        """See ``MemoryBackend.unmap``."""
        self._require_open()
        rng, state = self._books.unmap_plan(reservation, page_index, handle)
        self._books.drop_map(rng, page_index, state)
        first = reservation.address // self.page_bytes + page_index
        for i in range(handle.num_pages):
            del self._pages[first + i]

    def release(self, handle: Handle) -> None:
        """See ``MemoryBackend.release``."""
        self._require_open()
        self._books.drop_handle(self._books.release_plan(handle))
        del self._contents[handle.key]

    def close(self, reservation: Reservation) -> None:
        """See ``MemoryBackend.close``."""
        self._require_open()
        self._books.drop_range(self._books.close_plan(reservation))

    def available(self) -> int:
        """What is left of the capacity."""
        self._require_open()
        return self._capacity - self._books.handle_bytes

    def copy(self, dst: int, src: int, nbytes: int) -> None:
        """See ``MemoryBackend.copy``; raises where the real one would fault."""
        if nbytes < 0:
            raise InvalidInput(f"cannot copy {nbytes} bytes")
        self.write(dst, self.read(src, nbytes))

    def copy_many(self, copies: Sequence[Copy]) -> None:
        """See ``MemoryBackend.copy_many``."""
        for dst, src, nbytes in copies:
            self.copy(dst, src, nbytes)

    def shutdown(self) -> None:
        """See ``MemoryBackend.shutdown``."""
        if not self._closed:
            self._books.shutdown_plan()
            self._closed = True

    def read(self, address: int, nbytes: int) -> bytes:
        """The bytes at ``address``; ``InvalidInput`` if any of them is not mapped."""
        return b"".join(bytes(piece) for piece in self._pieces(address, nbytes))

    def write(self, address: int, data: bytes) -> None:
        """Store ``data`` at ``address``; ``InvalidInput`` and no change if it is not all mapped."""
        done = 0
        for piece in self._pieces(address, len(data)):
            piece[:] = data[done : done + len(piece)]
            done += len(piece)

    def resident_bytes(self) -> int:
        """Bytes of all handles."""
        return self._books.handle_bytes

    def check(self) -> None:
        """Assert the books, and that the page table and the contents agree with them."""
        self._books.check()
        assert set(self._contents) == set(self._books.handles), "I4: contents without a handle"
        mapped = sum(s.mapped * s.handle.num_pages for s in self._books.handles.values())
        assert len(self._pages) == mapped, "I5: page table and mappings differ"

    def _require_open(self) -> None:
        if self._closed:
            raise ClosedError("the fake backend was shut down")

    def _pieces(self, address: int, nbytes: int) -> list[memoryview]:
        """The mapped bytes as writable views, one a page; all of them or an error."""
        self._require_open()
        pieces, end = [], address + nbytes
        while address < end:
            page, skip = divmod(address, self.page_bytes)
            if page not in self._pages:
                raise InvalidInput(f"address {address:#x} is not mapped")
            key, start = self._pages[page]
            size = min(self.page_bytes - skip, end - address)
            pieces.append(memoryview(self._contents[key])[start + skip : start + skip + size])
            address += size
        return pieces


class ManualFence:
    """A fence that a test passes by hand: ``fence.done = True``."""

    def __init__(self, *, done: bool = False) -> None:
        self.done = done

    def passed(self) -> bool:
        """See ``Fence.passed``."""
        return self.done
