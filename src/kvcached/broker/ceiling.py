"""``Ceiling``: what the device itself allows to be leased, the capacity aside. Plain state."""

from __future__ import annotations

from kvcached.broker.protocol import MAX_BYTES

OOM_S = 5.0
"""How long less is handed out after the device refused memory that was leased."""


class Ceiling:
    """Two bounds on the sum of all leases; none of them at first.

    One is lowered for a while when the device ran out. The other is what a look at the device gave:
    the leases of that moment and what was free then. It is a number, not a formula with the leases
    of now: what is granted later comes out of what was free, and what is given back returns to it,
    so as long as nobody else takes or frees memory the number stays right.
    """

    def __init__(self) -> None:
        self._refused = MAX_BYTES
        self._refused_until = float("-inf")
        self._seen: int | None = None
        self.looked = False
        """Whether the device was looked at since a lease came or went in another way."""

    def ran_out(self, leased: int, now: float) -> None:
        """The device could back ``leased`` bytes and no more."""
        self._refused, self._refused_until = leased, now + OOM_S

    def saw(self, bound: int | None) -> None:
        """The device was looked at: it can back ``bound`` bytes; ``None``: it does not say."""
        self._seen, self.looked = bound, True

    def forget(self) -> None:
        """A lease came or went otherwise than by a grant or its return: the look is worthless."""
        self._seen, self.looked = None, False

    def at(self, now: float) -> int:
        """Bytes that may be leased by this; may be below zero."""
        refused = self._refused if now < self._refused_until else MAX_BYTES
        return min(refused, MAX_BYTES if self._seen is None else self._seen)
