"""``Leftovers``: what ``CudaBackend.back`` had done when a call failed, undone now or later."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from kvcached.config import format_size
from kvcached.errors import KvcachedError, PoolBroken
from kvcached.memory.base import Place, Reservation
from kvcached.memory.driver import Calls


class Leftover(NamedTuple):
    """A driver handle that is nobody's; ``mapped``: at ``address``."""

    address: int
    nbytes: int
    native: Any
    mapped: bool


class Leftovers:
    """Handles that could be neither used nor given back, by the address of their reservation."""

    def __init__(self, calls: Calls) -> None:
        self._call = calls
        self._kept: dict[int, list[Leftover]] = {}

    def undo(
        self, reservation: Reservation, page_bytes: int, places: Sequence[Place],
        natives: Sequence[Any], mapped: int, cause: BaseException,
    ) -> None:  # fmt: skip
        """Give back the new handles ``natives``, the first ``mapped`` of which are at ``places``.

        ``PoolBroken`` if the driver refuses: what is left waits for ``give_back``.
        """
        self._kept.setdefault(reservation.address, []).extend(
            Leftover(
                reservation.address + first * page_bytes, pages * page_bytes, native, i < mapped
            )
            for i, ((first, pages), native) in enumerate(zip(places, natives, strict=False))
        )
        try:
            self.give_back(reservation)
        except KvcachedError as error:
            nbytes = sum(left.nbytes for left in self._kept[reservation.address])
            raise PoolBroken(
                f"{format_size(nbytes)} at {reservation.address:#x} could not be given back: "
                f"{error.message}; that was needed because {cause}",
                hint="Close the cache; the driver frees the memory when the process ends.",
            ) from cause

    def give_back(self, reservation: Reservation) -> None:
        """Unmap and release what is left in a reservation, newest first; stops where it fails."""
        kept = self._kept.get(reservation.address, [])
        while kept:
            left = kept[-1]
            if left.mapped:
                self._call("cuMemUnmap", left.address, left.nbytes)
                kept[-1] = left._replace(mapped=False)
            self._call("cuMemRelease", left.native)
            kept.pop()
        self._kept.pop(reservation.address, None)
