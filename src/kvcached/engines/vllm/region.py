"""``Region``: the address range under the KV tensors of one vLLM worker, and who maps it.

The worker reserves and makes the tensors; the scheduler's page pool decides what is backed: in the
same process it takes the range over, from another one it comes through a ``BackendServer``. Until
then the first blocks are backed for vLLM's warm-up, by few pages that appear many times.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from typing import Any

from kvcached.errors import KvcachedError
from kvcached.layout import Geometry
from kvcached.memory.adopted import Adopted
from kvcached.memory.base import Handle, MemoryBackend
from kvcached.memory.serving import BackendServer

_WARM_PAGES = 32  # physical pages behind all warm-up blocks, where one handle may appear often
_current: Region | None = None


@dataclass
class Facts:
    """What the scheduler must know of a worker; travels as JSON."""

    rank: int
    world_size: int
    model: str
    engine: str
    limit_bytes: int
    """Most physical bytes of this worker; 0: no rule of vLLM's says so."""
    request_bytes: int
    """Physical bytes of a request of full length."""
    runs_on: bool
    """Kernels may run on after a step's result is known (drafts, parts of pooled prompts)."""
    replica: int = 0
    """Which engine of several that serve one model (data parallelism)."""
    details: dict[str, Any] = field(default_factory=dict)


class Region:
    """Reserved addresses for ``geometry`` over ``backend``, which is owned.

    Parameters
    ----------
    backend:
        Physical memory of the worker's device.
    geometry:
        Blocks and planes.
    facts:
        See ``Facts``.
    stream:
        Where the worker queues its kernels (an integer handle; 0 on the CPU).
    more_pages:
        Address space beyond ``geometry``, for a scheduler whose smallest step is of many pages.
    """

    def __init__(
        self, backend: MemoryBackend, geometry: Geometry, facts: Facts, stream: int = 0, *,
        more_pages: int = 0,
    ) -> None:  # fmt: skip
        self.backend, self.geometry, self.facts, self.stream = backend, geometry, facts, stream
        self.reservation = backend.reserve(
            geometry.reserved_bytes + more_pages * geometry.page_bytes
        )
        self._warm: list[tuple[int, Handle]] = []
        self._handles: list[Handle] = []
        self._server: BackendServer | None = None
        self.taken = False
        """Whether a page pool of this process has the range."""

    def warm(self, num_blocks: int) -> None:
        """Back blocks 0 to ``num_blocks`` - 1 until ``cool``; their contents mean nothing.

        All or nothing. Raises ``OutOfPages`` or ``DriverError``.
        """
        g = self.geometry
        pages = g.pages_of(min(num_blocks, g.num_blocks) - 1).stop
        step = min(pages, _WARM_PAGES) if self.backend.can_alias else pages
        try:
            for plane in range(g.num_planes):
                if not self._handles or not self.backend.can_alias:
                    self._handles.append(self.backend.create(step))
                for page in range(0, pages, step):
                    self._map(plane * g.num_pages + page, self._fitting(min(step, pages - page)))
        except BaseException:  # whatever it was, nothing stays
            with contextlib.suppress(KvcachedError):  # what caused it matters more
                self.cool()
            raise

    def cool(self) -> None:
        """Give back what ``warm`` took. Idempotent."""
        while self._warm:
            page, handle = self._warm[-1]
            self.backend.unmap(self.reservation, page, handle)
            self._warm.pop()
        while self._handles:
            self.backend.release(self._handles[-1])
            self._handles.pop()

    def serve(self) -> None:
        """Let the scheduler, this process's parent, map and unmap."""
        facts = self.facts
        self._server = BackendServer(
            _Cooling(self), os.getppid(), facts.rank, self.describe, self._settle
        )

    def take_over(self) -> MemoryBackend:
        """The backend for a page pool of this very process; nobody else is served any more."""
        self.taken = True
        if self._server is not None:
            self._server.close()
            self._server = None
        return _Cooling(self)

    def describe(self) -> dict[str, Any]:
        """All that the scheduler needs, as JSON."""
        g, backend, facts = self.geometry, self.backend, self.facts
        return {
            "page_bytes": backend.page_bytes, "device": backend.device,
            "can_alias": backend.can_alias, "uuid": getattr(backend, "uuid", ""),
            "total_bytes": getattr(backend, "total_bytes", 0),
            "block_bytes": g.block_bytes, "num_planes": g.num_planes, "num_blocks": g.num_blocks,
            "reserved_bytes": self.reservation.nbytes, "facts": vars(facts),
        }  # fmt: skip

    def close(self) -> None:
        """End the server and give everything back. What a page pool has mapped must be gone."""
        if self._server is not None:
            self._server.close()
        self.cool()
        self.backend.close(self.reservation)
        self.backend.shutdown()

    def _fitting(self, pages: int) -> Handle:
        """A handle of exactly ``pages`` pages: the last one, or a smaller one for the rest."""
        for handle in self._handles[::-1]:
            if handle.num_pages == pages:
                return handle
        self._handles.append(self.backend.create(pages))
        return self._handles[-1]

    def _map(self, page: int, handle: Handle) -> None:
        self.backend.map(self.reservation, page, handle)
        self._warm.append((page, handle))

    def _settle(self) -> None:
        from kvcached.memory.fences import fence_on, wait_for

        wait_for(fence_on(self.backend, self.stream))


class _Cooling(Adopted):
    """The adopted range; whoever takes it finds it empty, since warm-up is over by then."""

    def __init__(self, region: Region) -> None:
        super().__init__(region.backend, region.reservation)
        self._region = region

    def reserve(self, nbytes: int) -> Any:
        """See ``Adopted.reserve``; some of the addresses beyond the tensors may be asked for."""
        self._region.cool()
        tensors, whole = self._region.geometry.reserved_bytes, self._region.reservation.nbytes
        return super().reserve(whole if tensors <= nbytes <= whole else nbytes)


def publish(region: Region) -> None:
    """Make ``region`` the one of this process; an older one, of an engine that ended, goes."""
    global _current
    if _current is not None:
        with contextlib.suppress(KvcachedError):  # its tensors may be in use; then it stays
            _current.close()
    _current = region


def current(num_blocks: int) -> Region | None:
    """The region of this process, if it has this many blocks and nobody has taken it over."""
    found = _current
    if found is None or found.taken or found.geometry.num_blocks != num_blocks:
        return None
    return found


def facts_in(description: dict[str, Any]) -> Facts:
    """The ``Facts`` of a worker's description."""
    return Facts(**description["facts"])
