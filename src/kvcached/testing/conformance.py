"""``check_memory_backend``: the contract of ``memory/base.py``, clause by clause, as a test.

Every backend must pass it: the fake, the host, CUDA on a fake driver and CUDA on a real one. It
uses no test runner: a broken clause is an ``AssertionError`` that names it.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvcached.errors import ClosedError, DriverError, InvalidInput, OutOfPages
from kvcached.memory.base import Handle, MemoryBackend, Reservation

Read = Callable[[MemoryBackend, int, int], bytes]
Write = Callable[[MemoryBackend, int, bytes], None]


@dataclass(frozen=True)
class Case:
    """One fresh backend under test, and how to see into its memory."""

    backend: MemoryBackend
    make: Callable[[], MemoryBackend]
    read: Read
    write: Write
    zeroed: bool
    too_many_pages: int

    def reserve(self, num_pages: int) -> Reservation:
        """Reserve a number of pages."""
        return self.backend.reserve(num_pages * self.backend.page_bytes)

    def address(self, reservation: Reservation, page_index: int) -> int:
        """The address of a page."""
        return reservation.address + page_index * self.backend.page_bytes

    def fill(self, reservation: Reservation, page_index: int, pattern: bytes) -> None:
        """Write ``pattern`` at both ends of a page."""
        start = self.address(reservation, page_index)
        self.write(self.backend, start, pattern)
        self.write(self.backend, start + self.backend.page_bytes - len(pattern), pattern)

    def holds(self, reservation: Reservation, page_index: int, pattern: bytes) -> bool:
        """Whether ``fill`` of this pattern is still there."""
        start, size = self.address(reservation, page_index), len(pattern)
        end = start + self.backend.page_bytes - size
        return pattern == self.read(self.backend, start, size) == self.read(self.backend, end, size)

    def mistake(self, call: Callable[[], object], what: str) -> None:
        """``call`` must raise ``InvalidInput`` and leave the books in order."""
        _raises(InvalidInput, call, what)
        self.check()

    def check(self) -> None:
        """The backend's own ``check``, where it has one."""
        check = getattr(self.backend, "check", None)
        if check is not None:
            check()

    def drop(self, reservation: Reservation, mapped: dict[int, Handle]) -> None:
        """Unmap and release every handle, close the reservation."""
        for page_index, handle in mapped.items():
            self.backend.unmap(reservation, page_index, handle)
        for handle in set(mapped.values()):
            self.backend.release(handle)
        self.backend.close(reservation)


def check_memory_backend(
    make: Callable[[], MemoryBackend],
    *,
    read: Read | None = None,
    write: Write | None = None,
    zeroed: bool = True,
    too_many_pages: int | None = None,
) -> tuple[str, ...]:
    """Run every clause of the contract on fresh backends; the names of the clauses that ran.

    Parameters
    ----------
    make:
        Makes a backend with room for at least 16 pages.
    read, write:
        ``read(backend, address, nbytes)`` and ``write(backend, address, data)``; by default the
        backend's own methods of these names, else plain loads and stores (host memory).
    zeroed:
        Whether fresh memory must read as zero.
    too_many_pages:
        More pages than the backend has; by default 64 TiB worth of them.
    """
    for name, clause in CLAUSES.items():
        backend = make()
        pages = (64 << 40) // backend.page_bytes if too_many_pages is None else too_many_pages
        case = Case(backend, make, read or _read, write or _write, zeroed, pages)
        try:
            clause(case)
            case.check()
            backend.shutdown()
        except Exception as error:
            # Whatever went wrong, the reader must learn in which clause.
            raise AssertionError(f"{name}: {error}") from error
    return tuple(CLAUSES)


def _read(backend: Any, address: int, nbytes: int) -> bytes:
    if hasattr(backend, "read"):
        return bytes(backend.read(address, nbytes))
    return ctypes.string_at(address, nbytes)


def _write(backend: Any, address: int, data: bytes) -> None:
    if hasattr(backend, "write"):
        backend.write(address, data)
    else:
        ctypes.memmove(address, data, len(data))


def _raises(kind: type[Exception], call: Callable[[], object], what: str) -> None:
    try:
        call()
    except kind:
        return
    raise AssertionError(f"{what} must raise {kind.__name__}")


# --- the clauses ------------------------------------------------------------------------------


def _sizes(c: Case) -> None:
    page = c.backend.page_bytes
    assert isinstance(page, int), "page_bytes is an int"
    assert page > 0, "page_bytes is positive"
    assert c.backend.device, "device has a name"
    for nbytes in (0, -page, page + 1, page - 1):
        c.mistake(lambda n=nbytes: c.backend.reserve(n), f"reserve({nbytes})")  # type: ignore[misc]
    for num_pages in (0, -1):
        c.mistake(lambda n=num_pages: c.backend.create(n), f"create({num_pages})")  # type: ignore[misc]


def _reservations(c: Case) -> None:
    ranges = [c.reserve(n) for n in (1, 7, 1 << 12)]
    for rng, num_pages in zip(ranges, (1, 7, 1 << 12), strict=True):
        assert rng.nbytes == num_pages * c.backend.page_bytes, "a reservation has the size asked"
        assert rng.address % c.backend.page_bytes == 0, "addresses are aligned to the page"
    ordered = sorted(ranges, key=lambda r: r.address)
    for low, high in itertools.pairwise(ordered):
        assert low.address + low.nbytes <= high.address, "reservations do not overlap"
    for rng in ranges:
        c.backend.close(rng)
    c.mistake(lambda: c.backend.close(ranges[0]), "a second close")
    rng = c.reserve(2)
    half = Reservation(rng.address, c.backend.page_bytes)
    c.mistake(lambda: c.backend.close(half), "close with another size")
    beyond = Reservation(rng.address + c.backend.page_bytes, c.backend.page_bytes)
    c.mistake(lambda: c.backend.close(beyond), "close with another address")
    c.backend.close(rng)


def _contents(c: Case) -> None:
    rng, handle = c.reserve(8), c.backend.create(2)
    c.backend.map(rng, 3, handle)
    if c.zeroed:
        fresh = c.read(c.backend, c.address(rng, 3), 2 * c.backend.page_bytes)
        assert not any(fresh), "fresh memory reads as zero"
    c.fill(rng, 3, b"first")
    c.fill(rng, 4, b"other")
    assert c.holds(rng, 3, b"first"), "what was written is read"
    c.backend.unmap(rng, 3, handle)
    c.backend.map(rng, 6, handle)
    assert c.holds(rng, 6, b"first"), "contents belong to the handle, not to the address"
    assert c.holds(rng, 7, b"other"), "contents belong to the handle, not to the address"
    c.drop(rng, {6: handle})


def _aliases(c: Case) -> None:
    if not c.backend.can_alias:
        _no_aliases(c)
        return
    rng, other, handle = c.reserve(4), c.reserve(2), c.backend.create(1)
    for page_index in (0, 3):
        c.backend.map(rng, page_index, handle)
    c.backend.map(other, 1, handle)
    c.fill(rng, 3, b"alias")
    assert c.holds(rng, 0, b"alias"), "a handle mapped twice is one memory"
    assert c.holds(other, 1, b"alias"), "a handle mapped in two reservations is one memory"
    c.backend.unmap(rng, 0, handle)
    c.mistake(lambda: c.backend.release(handle), "release while one mapping is left")
    assert c.holds(rng, 3, b"alias"), "one unmap undoes one map"
    c.backend.unmap(other, 1, handle)
    c.backend.close(other)
    c.drop(rng, {3: handle})


def _no_aliases(c: Case) -> None:
    rng, other, handle = c.reserve(4), c.reserve(2), c.backend.create(1)
    c.backend.map(rng, 0, handle)
    c.fill(rng, 0, b"alone")
    for where, page_index in ((rng, 3), (other, 1)):
        status = _driver_status(lambda r=where, i=page_index: c.backend.map(r, i, handle))  # type: ignore[misc]
        assert status == "ENOTSUP", "a second mapping is refused with ENOTSUP"
        c.check()
    assert c.holds(rng, 0, b"alone"), "a refused map changes nothing"
    spare = c.backend.create(1)
    c.backend.map(other, 1, spare)  # what was refused took no place
    c.drop(other, {1: spare})
    c.drop(rng, {0: handle})


def _driver_status(call: Callable[[], object]) -> str:
    try:
        call()
    except DriverError as error:
        return error.status
    return "no error"


def _map_mistakes(c: Case) -> None:
    rng, big, small = c.reserve(8), c.backend.create(3), c.backend.create(1)
    c.backend.map(rng, 2, big)
    c.fill(rng, 2, b"keeps")
    c.fill(rng, 4, b"going")
    for page_index in (2, 3, 4):
        c.mistake(lambda i=page_index: c.backend.map(rng, i, small), "map over a mapping")  # type: ignore[misc]
    spare = c.backend.create(3)
    for page_index in (0, 1, 3, 4):
        c.mistake(lambda i=page_index: c.backend.map(rng, i, spare), "map over part of one")  # type: ignore[misc]
    for page_index in (-1, 6, 8, 1 << 40):
        c.mistake(lambda i=page_index: c.backend.map(rng, i, spare), "map outside")  # type: ignore[misc]
    assert c.holds(rng, 2, b"keeps"), "a refused map changes nothing"
    assert c.holds(rng, 4, b"going"), "a refused map changes nothing"
    c.backend.map(rng, 5, spare)  # the neighbours are free
    c.backend.map(rng, 1, small)
    c.drop(rng, {1: small, 2: big, 5: spare})


def _unmap_mistakes(c: Case) -> None:
    rng, handle, other = c.reserve(8), c.backend.create(2), c.backend.create(2)
    c.mistake(lambda: c.backend.unmap(rng, 2, handle), "unmap of what was never mapped")
    c.backend.map(rng, 2, handle)
    c.fill(rng, 2, b"whole")
    for page_index in (1, 3, 4):
        c.mistake(lambda i=page_index: c.backend.unmap(rng, i, handle), "unmap elsewhere")  # type: ignore[misc]
    c.mistake(lambda: c.backend.unmap(rng, 2, other), "unmap of another handle")
    half = Handle(handle.key, 1)
    c.mistake(lambda: c.backend.unmap(rng, 2, half), "unmap in part")
    c.mistake(lambda: c.backend.close(rng), "close with a mapping left")
    assert c.holds(rng, 2, b"whole"), "a refused unmap changes nothing"
    c.backend.unmap(rng, 2, handle)
    c.mistake(lambda: c.backend.unmap(rng, 2, handle), "a second unmap")
    c.backend.release(handle)
    c.backend.release(other)
    c.backend.close(rng)


def _stale_and_foreign(c: Case) -> None:
    rng, handle = c.reserve(4), c.backend.create(1)
    c.backend.release(handle)
    c.mistake(lambda: c.backend.release(handle), "a second release")
    c.mistake(lambda: c.backend.map(rng, 0, handle), "map of a released handle")
    fresh = c.backend.create(1)
    assert fresh.key != handle.key, "keys are not used twice"
    c.backend.close(rng)
    c.mistake(lambda: c.backend.map(rng, 0, fresh), "map into a closed reservation")
    c.backend.release(fresh)
    stranger = c.make()
    elsewhere = stranger.reserve(4 * stranger.page_bytes)
    ghost = Handle(fresh.key + 1000, 1)
    c.mistake(lambda: c.backend.release(ghost), "release of a handle that never was")
    if elsewhere.address != rng.address:  # on a fake they can be equal
        c.mistake(lambda: c.backend.close(elsewhere), "close of another backend's range")
    stranger.close(elsewhere)
    stranger.shutdown()


def _split_in_place(c: Case) -> None:
    rng, big = c.reserve(4), c.backend.create(4)
    c.backend.map(rng, 0, big)
    c.fill(rng, 2, b"large")
    c.backend.unmap(rng, 0, big)
    small = {i: c.backend.create(1) for i in (3, 1, 0, 2)}
    for page_index, handle in small.items():
        c.backend.map(rng, page_index, handle)
        c.fill(rng, page_index, b"tiny%d" % page_index)
    for page_index in small:
        assert c.holds(rng, page_index, b"tiny%d" % page_index), "small handles at old addresses"
    other = c.reserve(4)
    c.backend.map(other, 0, big)
    assert c.holds(other, 2, b"large"), "the large handle kept its contents"
    c.drop(other, {0: big})
    c.drop(rng, small)


def _memory_returns(c: Case) -> None:
    num_pages = min(c.backend.available() // c.backend.page_bytes, 64)
    rng = c.reserve(num_pages)
    for _ in range(4):
        handles = {i: c.backend.create(1) for i in range(num_pages)}
        for page_index, handle in handles.items():
            c.backend.map(rng, page_index, handle)
            if c.zeroed:
                assert not any(c.read(c.backend, c.address(rng, page_index), 16)), "fresh is zero"
            c.fill(rng, page_index, b"dirty")
        for page_index, handle in handles.items():
            c.backend.unmap(rng, page_index, handle)
            c.backend.release(handle)
    resident = getattr(c.backend, "resident_bytes", None)
    assert resident is None or resident() == 0, "released memory is back with the device"
    c.backend.close(rng)


def _out_of_pages(c: Case) -> None:
    _raises(OutOfPages, lambda: c.backend.create(c.too_many_pages), "create of too many pages")
    _raises(MemoryError, lambda: c.backend.create(c.too_many_pages), "create of too many pages")
    c.check()
    c.backend.release(c.backend.create(1))
    assert c.backend.available() >= c.backend.page_bytes, "available says that pages are left"


def _copies(c: Case) -> None:
    rng, first, second = c.reserve(4), c.backend.create(1), c.backend.create(2)
    c.backend.map(rng, 0, first)
    c.backend.map(rng, 2, second)
    page = c.backend.page_bytes
    data = bytes(i * 7 % 251 for i in range(page))
    c.write(c.backend, c.address(rng, 0), data)
    c.backend.copy(c.address(rng, 2), c.address(rng, 0), page)
    assert c.read(c.backend, c.address(rng, 2), page) == data, "a page is copied whole"
    c.backend.copy(c.address(rng, 3) - 5, c.address(rng, 0) + 1, 10)
    assert c.read(c.backend, c.address(rng, 3) - 5, 10) == data[1:11], "copies cross pages"
    c.backend.copy(c.address(rng, 2), c.address(rng, 0), 0)
    c.backend.copy_many([(c.address(rng, 2) + 9, c.address(rng, 0), 5),
                         (c.address(rng, 3), c.address(rng, 0) + 7, 3)])  # fmt: skip
    assert c.read(c.backend, c.address(rng, 2) + 9, 5) == data[:5], "the first of two copies"
    assert c.read(c.backend, c.address(rng, 3), 3) == data[7:10], "the second of two copies"
    c.mistake(lambda: c.backend.copy(c.address(rng, 2), c.address(rng, 0), -1), "copy of -1")
    c.drop(rng, {0: first, 2: second})


def _shutdown(c: Case) -> None:
    backend = c.make()
    handle = backend.create(1)
    _raises(InvalidInput, backend.shutdown, "shutdown with a handle")
    backend.release(handle)
    rng = backend.reserve(backend.page_bytes)
    _raises(InvalidInput, backend.shutdown, "shutdown with a reservation")
    backend.close(rng)
    backend.shutdown()
    backend.shutdown()
    _raises(ClosedError, lambda: backend.create(1), "create after shutdown")
    _raises(ClosedError, lambda: backend.reserve(backend.page_bytes), "reserve after shutdown")
    _raises(ClosedError, backend.available, "available after shutdown")


def _threads(c: Case) -> None:
    rng = c.reserve(8)
    errors: list[BaseException] = []

    def churn(start: int) -> None:
        try:
            for _ in range(50):
                handle = c.backend.create(2)
                c.backend.map(rng, start, handle)
                c.backend.unmap(rng, start, handle)
                c.backend.release(handle)
        except BaseException as error:  # noqa: BLE001 - handed to the main thread below
            errors.append(error)

    threads = [threading.Thread(target=churn, args=(start,)) for start in (0, 2, 4, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, f"calls on different ranges are thread-safe: {errors[0]!r}"
    c.backend.close(rng)


CLAUSES: dict[str, Callable[[Case], None]] = {
    "sizes are whole pages": _sizes,
    "reservations are closed by their own address and size": _reservations,
    "contents belong to handles": _contents,
    "a handle may be mapped at several addresses, or not, as can_alias says": _aliases,
    "map refuses overlaps and what lies outside": _map_mistakes,
    "unmap undoes exactly one map": _unmap_mistakes,
    "stale and foreign names are refused": _stale_and_foreign,
    "a large handle can make way for small ones": _split_in_place,
    "released memory goes back": _memory_returns,
    "no memory is OutOfPages": _out_of_pages,
    "copy copies": _copies,
    "shutdown refuses leaks and is idempotent": _shutdown,
    "calls are thread-safe": _threads,
}
"""The clauses by name, in the order in which they run."""
