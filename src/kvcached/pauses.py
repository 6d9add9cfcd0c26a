"""``Pauses``: when no kernel runs on a cache, as its engine says, and who waits for that.

Extents that hold blocks in use may be split only then. An engine that pauses between its steps
gives way to a peer at the next pause; one that never says anything is never split.
"""

from __future__ import annotations

import threading
import time

from kvcached.memory.base import Fence

_HABIT_SECONDS = 1.0
"""An engine that has paused within this time is expected to do so again soon."""
_PATIENCE_SECONDS = 0.25
"""Longest wait for the next pause: less than a tenant may take to answer the broker."""


class Pauses:
    """The pauses of one engine. ``lock`` is its cache's, and held in all calls but ``enter``."""

    def __init__(self, lock: threading.RLock) -> None:
        self._begun = threading.Condition(lock)
        self._fence: Fence | None = None  # behind it no kernel runs; None: none is promised
        self._last = -_HABIT_SECONDS

    def enter(self, fence: Fence) -> Fence | None:
        """No kernel runs once ``fence`` has passed. Returns what to hand to ``leave``."""
        with self._begun:
            before, self._fence = self._fence, fence
            self._begun.notify_all()
            return before

    def leave(self, before: Fence | None) -> None:
        """Kernels may run again, unless an outer pause goes on."""
        with self._begun:
            self._fence, self._last = before, time.monotonic()

    def now(self) -> bool:
        """Whether no kernel runs now."""
        return self._fence is not None and self._fence.passed()

    def expected(self) -> bool:
        """Whether there is a pause now, or there will be one soon."""
        return self._fence is not None or time.monotonic() - self._last < _HABIT_SECONDS

    def wait(self) -> bool:
        """Wait for a pause if one is expected, without the lock; whether there is one now."""
        return self.expected() and self._begun.wait_for(self.now, _PATIENCE_SECONDS)
