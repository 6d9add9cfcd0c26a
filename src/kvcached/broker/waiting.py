"""Claims of one tenant that wait for the broker's answer, and those that need not be made."""

from __future__ import annotations

import time
from collections.abc import Callable

from kvcached.broker.mirror import MirrorState
from kvcached.broker.protocol import REFUSED, Message

LOST, PENDING = -1, -2
"""Status of a claim whose connection ended before the answer came; of one that still waits."""
_FRESH_S = 0.1
"""How long a refusal that nobody waited for answers the next claim."""
_SAME_S = 0.5
"""How long a refusal holds while no less is leased: what else uses the device may have changed."""


class Answer:
    """What became of a claim of ``nbytes``. ``done``: it is on the books already."""

    __slots__ = ("awaited", "done", "nbytes", "request", "status", "transient")

    def __init__(self, request: int, nbytes: int, *, transient: bool) -> None:
        self.request, self.nbytes, self.transient = request, nbytes, transient
        self.status: int | None = None
        self.done, self.awaited = False, True

    @property
    def outcome(self) -> int | None:
        """``None``: the claim is met; else the broker's status, ``LOST`` or ``PENDING``."""
        if self.done:
            return None
        return PENDING if self.status is None else self.status


class Waiting:
    """All waiting claims, by request. The caller holds the owner's lock.

    A claim that its owner gave up on stays with the broker for a while. Whoever claims as much, or
    less, meanwhile waits for that one, or the broker would collect for both. If it is refused
    meanwhile, whoever claims as much, or more, just then has the answer.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._answers: dict[int, Answer] = {}
        self._refusal: Answer | None = None
        self._refused_at = 0.0
        self._clock = clock
        self._next = 1

    def add(self, nbytes: int, *, transient: bool) -> tuple[Answer, bool]:
        """A claim to wait for, and whether it is new: then the broker is to be asked."""
        for answer in self._answers.values():
            if not (answer.awaited or transient) and answer.nbytes >= nbytes:
                answer.nbytes, answer.awaited = nbytes, True
                return answer, False
        refusal, self._refusal = self._refusal, None
        fresh = refusal is not None and self._clock() - self._refused_at < _FRESH_S
        if refusal is not None and fresh and not transient and nbytes >= refusal.nbytes:
            return refusal, False
        answer = Answer(self._next, nbytes, transient=transient)
        self._answers[answer.request] = answer
        self._next += 1
        return answer, True

    def remove(self, answer: Answer) -> None:
        """Nobody waits for this any more."""
        answer.awaited = False
        if answer.status is not None or answer.transient:
            self._answers.pop(answer.request, None)

    def granted(self, message: Message) -> Answer | None:
        """The claim that a GRANT answers; ``None`` if its owner has given up."""
        answer = self._answers.get(message.request)
        if answer is None:
            return None
        answer.status = message.status
        if answer.awaited:
            return answer
        del self._answers[message.request]
        if message.status == REFUSED:
            self._refusal, self._refused_at = answer, self._clock()
        return None

    def lose(self) -> None:
        """The connection has ended: no answer will come."""
        for answer in self._answers.values():
            answer.status = LOST
        self._answers = {n: answer for n, answer in self._answers.items() if answer.awaited}


class Vacancy:
    """Whether to ask for what nobody holds. The caller holds the owner's lock.

    A question costs the engine's thread a round trip, and the broker a look at the device; where
    all is leased the answer is no, again and again. ``mirrored`` says what the broker published.
    """

    def __init__(
        self,
        mirrored: Callable[[], MirrorState | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._mirrored, self._clock = mirrored, clock
        self._refused = 0, 0
        self._until = float("-inf")

    def asked(self, need: int, ask: Callable[[], int | None]) -> bool:
        """Whether ``ask()`` says ``None``; False unasked if ``need`` bytes cannot be there."""
        state = self._mirrored()
        if state is not None:
            if state.leased + need > state.capacity:
                return False
            leased, refused = self._refused
            if state.leased >= leased and need >= refused and self._clock() < self._until:
                return False
        if ask() is None:
            return True
        if state is not None:
            self._refused, self._until = (state.leased, need), self._clock() + _SAME_S
        return False
