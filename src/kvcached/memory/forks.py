"""What ``fork()`` without ``exec`` does to a backend: the child lets go, the parent goes on."""

from __future__ import annotations

import os
import weakref
from typing import Protocol

from kvcached.errors import ForkedProcessError


class Forkable(Protocol):
    """Something that a forked child must not use."""

    def disown(self) -> None:
        """Called in the child: drop what belongs to the parent, and refuse further use."""
        ...


_LIVE: weakref.WeakSet[Forkable] = weakref.WeakSet()


def watch(owner: Forkable) -> None:
    """Call ``owner.disown()`` in every child that Python forks, as long as ``owner`` lives."""
    _LIVE.add(owner)


def unwatch(owner: Forkable) -> None:
    """Undo ``watch``."""
    _LIVE.discard(owner)


def forked_error() -> ForkedProcessError:
    """The error of every call in the child."""
    return ForkedProcessError(
        "this memory belongs to the process that forked this one",
        hint="Start workers with the 'spawn' method, or make the cache after the fork.",
    )


def _disown_all() -> None:
    for owner in list(_LIVE):
        owner.disown()
    _LIVE.clear()


os.register_at_fork(after_in_child=_disown_all)
