"""What keeps a sequence of backend calls all or nothing: a record, and a stack of inverses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvcached.errors import PoolBroken
from kvcached.memory.base import Backing, Handle, Made, Mapped, MemoryBackend, Place, Reservation


class Ledger:
    """The backend, with a record of every handle and mapping (I4, I5)."""

    def __init__(self, backend: MemoryBackend) -> None:
        self.backend = backend
        self._back = backend.back if isinstance(backend, Backing) else self._back_one_by_one
        self._unback = backend.unback if isinstance(backend, Backing) else None
        self.handles: dict[int, Handle] = {}
        self.mappings: dict[tuple[int, int], Handle] = {}
        self.reservations: dict[int, Reservation] = {}

    def reserve(self, nbytes: int) -> Reservation:
        """As the backend's, recorded; so are the others."""
        reservation = self.backend.reserve(nbytes)
        self.reservations[reservation.address] = reservation
        return reservation

    def create(self, num_pages: int) -> Handle:
        """Recorded."""
        handle = self.backend.create(num_pages)
        self.handles[handle.key] = handle
        return handle

    def map(self, reservation: Reservation, page: int, handle: Handle) -> None:
        """Recorded."""
        self.backend.map(reservation, page, handle)
        self.mappings[reservation.address, page] = handle

    def back(self, reservation: Reservation, places: Sequence[Place]) -> list[Handle]:
        """A new handle for each place, mapped there and recorded. All or nothing.

        ``PoolBroken`` if what was done could not be undone.
        """
        handles = self._back(reservation, places)
        address = reservation.address
        for (page, _), handle in zip(places, handles):  # noqa: B905 (one each)
            self.handles[handle.key] = self.mappings[address, page] = handle
        return handles

    def _back_one_by_one(self, reservation: Reservation, places: Sequence[Place]) -> list[Handle]:
        handles, undo = list[Handle](), Undo()
        try:
            for page, num_pages in places:
                handle = self.create(num_pages)
                undo.push(self.release, handle)
                self.map(reservation, page, handle)
                undo.push(self.unmap, reservation, page, handle)
                handles.append(handle)
        except BaseException as cause:  # KeyboardInterrupt too must leave nothing behind
            undo.unwind(cause)
            raise
        return handles

    def adopt(self, reservation: Reservation, made: Sequence[Made]) -> list[Handle]:
        """Handles that machine code has made and mapped (``Direct``): recorded."""
        handles: list[Handle] = self.backend.adopt(reservation, made)  # type: ignore[attr-defined]
        for (page, _, _), handle in zip(made, handles):  # noqa: B905 (one each)
            self.handles[handle.key] = self.mappings[reservation.address, page] = handle
        return handles

    def unback(
        self, reservation: Reservation, mapped: Sequence[Mapped]
    ) -> tuple[int, BaseException | None]:
        """Unmap and release handles, each all or nothing, in order, and strike them.

        Returns how many are gone, and what stopped it; ``PoolBroken`` if it could not be undone.
        """
        if self._unback is None:
            return self._unback_one_by_one(reservation, mapped)
        try:
            gone, adrift, error = self._unback(reservation, mapped)
        except BaseException as refusal:  # noqa: BLE001 - as below; and nothing was done
            return 0, refusal
        for page, handle in mapped[:gone]:
            del self.mappings[reservation.address, page], self.handles[handle.key]
        for page, _ in mapped[gone : gone + adrift]:
            del self.mappings[reservation.address, page]
        return gone, error

    def _unback_one_by_one(
        self, reservation: Reservation, mapped: Sequence[Mapped]
    ) -> tuple[int, BaseException | None]:
        for gone, (page, handle) in enumerate(mapped):
            undo = Undo()
            try:
                self.unmap(reservation, page, handle)
                undo.push(self.map, reservation, page, handle)
                self.release(handle)
            except BaseException as cause:  # noqa: BLE001 - the caller raises it, whatever it was
                try:
                    undo.unwind(cause)
                except PoolBroken as broken:
                    return gone, broken
                return gone, cause
        return len(mapped), None

    def unmap(self, reservation: Reservation, page: int, handle: Handle) -> None:
        """Recorded."""
        self.backend.unmap(reservation, page, handle)
        del self.mappings[reservation.address, page]

    def release(self, handle: Handle) -> None:
        """Recorded."""
        self.backend.release(handle)
        del self.handles[handle.key]

    def close(self, reservation: Reservation) -> None:
        """Recorded."""
        self.backend.close(reservation)
        del self.reservations[reservation.address]

    @property
    def nbytes(self) -> int:
        """Physical bytes held."""
        handles = list(self.handles.values())  # in one step: another thread may be growing
        return sum(handle.num_pages for handle in handles) * self.backend.page_bytes

    def close_all(self) -> None:
        """Unmap, release and close whatever is left. Stops at the first failure; call again."""
        for (address, page), handle in list(self.mappings.items()):
            self.unmap(self.reservations[address], page, handle)
        for handle in list(self.handles.values()):
            self.release(handle)
        for reservation in list(self.reservations.values()):
            self.close(reservation)


class Undo:
    """Inverses of the steps done so far; run in reverse order unless committed."""

    __slots__ = ("_steps",)

    def __init__(self) -> None:
        self._steps: list[tuple[Callable[..., object], tuple[object, ...]]] = []

    def push(self, step: Callable[..., object], *args: object) -> None:
        """Register the inverse of a step that has just succeeded."""
        self._steps.append((step, args))

    def pop(self) -> None:
        """Forget the newest inverse: its step has been undone in the ordinary course."""
        self._steps.pop()

    def unwind(self, cause: BaseException) -> None:
        """Undo everything, newest first; ``PoolBroken`` if that fails: the state is unknown."""
        try:
            while self._steps:
                step, args = self._steps.pop()
                step(*args)
        except BaseException as error:  # noqa: BLE001 - whatever it was, a step is not undone
            raise PoolBroken(
                f"{cause!r}, and undoing it failed: {error!r}", hint="Close the cache."
            ) from cause
