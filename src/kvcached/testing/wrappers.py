"""Wrappers around a ``MemoryBackend``: count its calls, make one fail, limit its memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

from kvcached.errors import DriverError, InvalidInput, KvcachedError, OutOfPages
from kvcached.memory.base import Copy, Handle, MemoryBackend, Reservation

OPERATIONS = ("reserve", "create", "map", "unmap", "release", "close", "available", "copy",
              "copy_many")  # fmt: skip
"""The methods that a wrapper sees; ``shutdown`` goes straight through."""


class BackendWrapper:
    """Passes everything on to ``inner``; ``before(name)`` is called ahead of each operation.

    Attributes that are not part of the protocol (``read``, ``check``, ``fence``, ...) are those of
    ``inner``.
    """

    def __init__(self, inner: MemoryBackend) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        # ``inner`` is not set yet in a half-made or unpickled wrapper; with its ``back``, or its
        # ``direct_calls``, handles would be created and mapped past us.
        if name in {"inner", "back", "direct_calls"}:
            raise AttributeError(name)
        return getattr(self.inner, name)

    def before(self, name: str) -> None:
        """Called with the operation's name before it starts. May raise."""

    @property
    def device(self) -> str:
        """See ``MemoryBackend.device``."""
        return self.inner.device

    @property
    def can_alias(self) -> bool:
        """See ``MemoryBackend.can_alias``."""
        return self.inner.can_alias

    @property
    def page_bytes(self) -> int:
        """See ``MemoryBackend.page_bytes``."""
        return self.inner.page_bytes

    def reserve(self, nbytes: int) -> Reservation:
        """See ``MemoryBackend.reserve``."""
        self.before("reserve")
        return self.inner.reserve(nbytes)

    def create(self, num_pages: int) -> Handle:
        """See ``MemoryBackend.create``."""
        self.before("create")
        return self.inner.create(num_pages)

    def map(self, reservation: Reservation, page_index: int, handle: Handle) -> None:
        """See ``MemoryBackend.map``."""
        self.before("map")
        self.inner.map(reservation, page_index, handle)

    def unmap(self, reservation: Reservation, page_index: int, handle: Handle) -> None:
        """See ``MemoryBackend.unmap``."""
        self.before("unmap")
        self.inner.unmap(reservation, page_index, handle)

    def release(self, handle: Handle) -> None:
        """See ``MemoryBackend.release``."""
        self.before("release")
        self.inner.release(handle)

    def close(self, reservation: Reservation) -> None:
        """See ``MemoryBackend.close``."""
        self.before("close")
        self.inner.close(reservation)

    def available(self) -> int:
        """See ``MemoryBackend.available``."""
        self.before("available")
        return self.inner.available()

    def copy(self, dst: int, src: int, nbytes: int) -> None:
        """See ``MemoryBackend.copy``."""
        self.before("copy")
        self.inner.copy(dst, src, nbytes)

    def copy_many(self, copies: Sequence[Copy]) -> None:
        """See ``MemoryBackend.copy_many``."""
        self.before("copy_many")
        self.inner.copy_many(copies)

    def shutdown(self) -> None:
        """See ``MemoryBackend.shutdown``."""
        self.inner.shutdown()


class CountingBackend(BackendWrapper):
    """Counts the operations: ``backend.calls["map"]``, ``backend.calls.total()``."""

    def __init__(self, inner: MemoryBackend) -> None:
        super().__init__(inner)
        self.calls: Counter[str] = Counter()

    def before(self, name: str) -> None:
        """Count."""
        self.calls[name] += 1


class FailingBackend(BackendWrapper):
    """Raises at the ``fail_at``-th operation, before it has any effect.

    Parameters
    ----------
    inner:
        The backend to wrap.
    fail_at:
        Which operation fails, counted from 1; ``None`` for none (then ``seen`` says how many there
        were, for the sweep).
    sticky:
        Fail at every operation from then on, not only once.
    error:
        Makes the error from the operation's name; the default is ``OutOfPages`` for what takes
        memory or addresses and ``DriverError`` for the rest.
    only:
        The operations that count and may fail; the default is all.
    """

    def __init__(
        self,
        inner: MemoryBackend,
        fail_at: int | None = None,
        *,
        sticky: bool = False,
        error: Callable[[str], Exception] | None = None,
        only: Collection[str] = OPERATIONS,
    ) -> None:
        super().__init__(inner)
        unknown = set(only) - set(OPERATIONS)
        if unknown:
            raise InvalidInput(f"{sorted(unknown)} are not operations", hint=f"Use {OPERATIONS}.")
        self.fail_at, self.sticky, self.only = fail_at, sticky, frozenset(only)
        self.error = injected_error if error is None else error
        self.seen = 0
        self.raised = 0

    def before(self, name: str) -> None:
        """Count, and raise if it is this one's turn."""
        if name not in self.only:
            return
        self.seen += 1
        if self.fail_at is None or self.seen < self.fail_at:
            return
        if self.seen == self.fail_at or self.sticky:
            self.raised += 1
            raise self.error(name)


def injected_error(name: str) -> KvcachedError:
    """The error that a real backend would most likely raise from the operation ``name``."""
    if name in {"reserve", "create", "map"}:
        return OutOfPages(f"injected: {name} failed")
    return DriverError(f"injected: {name} failed", status="INJECTED", call=name)


class LimitedBackend(BackendWrapper):
    """Lets ``inner`` create at most ``capacity_bytes`` at a time."""

    def __init__(self, inner: MemoryBackend, capacity_bytes: int) -> None:
        super().__init__(inner)
        self.capacity_bytes = capacity_bytes
        self.created_bytes = 0

    def create(self, num_pages: int) -> Handle:
        """See ``MemoryBackend.create``; ``OutOfPages`` above the capacity."""
        nbytes = max(0, num_pages) * self.page_bytes
        if self.created_bytes + nbytes > self.capacity_bytes:
            raise OutOfPages(
                f"cannot create {nbytes} bytes: {self.created_bytes} of {self.capacity_bytes} taken"
            )
        handle = self.inner.create(num_pages)
        self.created_bytes += nbytes
        return handle

    def release(self, handle: Handle) -> None:
        """See ``MemoryBackend.release``."""
        self.inner.release(handle)
        self.created_bytes -= handle.num_pages * self.page_bytes

    def available(self) -> int:
        """What is left of the capacity, if ``inner`` has it."""
        return min(self.inner.available(), self.capacity_bytes - self.created_bytes)
