"""Claims of one tenant that wait for the broker's answer."""

from __future__ import annotations

from kvcached.broker.protocol import Message

LOST = -1
"""Status of a claim whose connection ended before the answer came."""


class Answer:
    """What became of a claim of ``nbytes``. ``done``: it is on the books already."""

    __slots__ = ("awaited", "done", "nbytes", "request", "status", "transient")

    def __init__(self, request: int, nbytes: int, *, transient: bool) -> None:
        self.request, self.nbytes, self.transient = request, nbytes, transient
        self.status: int | None = None
        self.done, self.awaited = False, True

    @property
    def outcome(self) -> int | None:
        """``None``: the claim is met; else the broker's status, or ``LOST``."""
        if self.done:
            return None
        return LOST if self.status is None else self.status


class Waiting:
    """All waiting claims, by request. The caller holds the owner's lock.

    A claim that its owner gave up on stays with the broker for a while. Whoever claims as much, or
    less, meanwhile waits for that one, or the broker would collect for both.
    """

    def __init__(self) -> None:
        self._answers: dict[int, Answer] = {}
        self._next = 1

    def add(self, nbytes: int, *, transient: bool) -> tuple[Answer, bool]:
        """A claim to wait for, and whether it is new: then the broker is to be asked."""
        for answer in self._answers.values():
            if not (answer.awaited or transient) and answer.nbytes >= nbytes:
                answer.nbytes, answer.awaited = nbytes, True
                return answer, False
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
        return None

    def lose(self) -> None:
        """The connection has ended: no answer will come."""
        for answer in self._answers.values():
            answer.status = LOST
        self._answers = {n: answer for n, answer in self._answers.items() if answer.awaited}
