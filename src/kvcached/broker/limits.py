"""``EngineLimit``: the engine's copy of its limit record.

The broker's record is the truth (docs/broker.md, rule 10). A change of one's own holds at once, so
that lowering needs no broker; what the broker says about the limit then counts in the order in
which it comes. Both sides agree as soon as nothing is under way.
"""

from __future__ import annotations

from typing import Any

from kvcached.broker.protocol import MAX_BYTES, field
from kvcached.errors import InvalidInput


class EngineLimit:
    """Bytes and revision. The caller holds the owner's lock."""

    __slots__ = ("_own", "_unanswered", "ceiling", "nbytes", "revision", "unsaid")

    def __init__(self, nbytes: int | None) -> None:
        self.nbytes = MAX_BYTES if nbytes is None else checked_size("limit", nbytes)
        self.ceiling, self.revision = MAX_BYTES, 0
        self.unsaid: int | None = None
        """A change of one's own that no broker has been told yet."""
        self._own = self._unanswered = 0

    def set_own(self, nbytes: int) -> None:
        """Change it oneself: not above what the administrator allows, as far as that is known."""
        self.nbytes, self._own, self.unsaid = min(nbytes, self.ceiling), nbytes, nbytes
        self.revision += 1

    def to_change(self) -> dict[str, int] | None:
        """What the broker is to be told now. A revision is never given back, so it goes along."""
        return None if self.unsaid is None else {"limit": self.unsaid, "revision": self.revision}

    def said(self) -> None:
        """The broker has been sent ``to_change``, and will answer."""
        self.unsaid = None
        self._unanswered += 1

    @property
    def _pending(self) -> bool:
        return self._unanswered > 0 or self.unsaid is not None

    def to_hello(self) -> dict[str, int | bool]:
        """What a broker has to know, one that is new too. ``own``: it may not have heard of it."""
        said = {"limit": self.nbytes, "ceiling": self.ceiling, "revision": self.revision}
        pending = self._pending
        if self.unsaid is not None:  # should this hello be lost, the next one has to say it again
            self.said()
        return {**said, "own": pending}

    def welcomed(self, nbytes: int, ceiling: int, revision: int) -> None:
        """A broker has answered the hello; nothing that its predecessor was told is under way.

        What was changed since the hello stays ``unsaid``, and holds.
        """
        self._unanswered, self.ceiling = 0, ceiling
        if self.unsaid is not None:
            nbytes, revision = min(self.unsaid, ceiling), max(revision + 1, self.revision)
        self.nbytes, self.revision = nbytes, revision

    def answered(self, body: dict[str, Any]) -> None:
        """The broker's word on a change of one's own; only the last one counts."""
        self._unanswered -= 1
        if self._unanswered == 0:
            self.nbytes, self.revision = field(body, "limit"), field(body, "revision")

    def set_by_admin(self, nbytes: int, revision: int) -> None:
        """An administrator has changed it: before whatever of our own is not answered yet."""
        self.ceiling = nbytes
        if self._pending:
            nbytes, revision = min(nbytes, self._own), max(revision, self.revision)
        self.nbytes, self.revision = nbytes, revision


def checked_size(what: str, nbytes: int) -> int:
    """``nbytes`` if a message can carry it; ``InvalidInput`` otherwise."""
    if isinstance(nbytes, bool) or not isinstance(nbytes, int) or not 0 <= nbytes <= MAX_BYTES:
        raise InvalidInput(f"{what} is {nbytes!r}, but must be a number of bytes >= 0")
    return nbytes
