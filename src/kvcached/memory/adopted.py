"""``Adopted``: a backend in which one range of addresses has been reserved before.

Whoever makes the tensors reserves the range, and keeps it; the page pool that comes later gets it
from ``reserve`` as if it were new, and its ``close`` leaves it alone.
"""

from __future__ import annotations

from typing import Any

from kvcached.errors import InvalidInput
from kvcached.memory.base import MemoryBackend, Reservation


class Adopted:
    """``backend``, with ``reservation`` for the first who asks for a range of its size."""

    def __init__(self, backend: MemoryBackend, reservation: Reservation) -> None:
        self._backend, self._reservation, self._taken = backend, reservation, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def reserve(self, nbytes: int) -> Reservation:
        """See ``MemoryBackend.reserve``."""
        if nbytes == self._reservation.nbytes and not self._taken:
            self._taken = True
            return self._reservation
        return self._backend.reserve(nbytes)

    def close(self, reservation: Reservation) -> None:
        """See ``MemoryBackend.close``; the adopted range stays reserved."""
        if reservation != self._reservation:
            self._backend.close(reservation)
        elif self._taken:
            self._taken = False
        else:
            raise InvalidInput("the adopted range has not been handed out")
