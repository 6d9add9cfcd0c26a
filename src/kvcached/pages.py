"""``PagePool``: extents of physical memory under one reservation; grow, shrink, split.

An extent is a run of page indices backed by one handle in each plane. Every operation is all or
nothing: each backend call registers its inverse, and a failure undoes the calls before it in
reverse order. If even that fails the pool is *broken*: it refuses further work, and ``close()``
still gives back everything, because ``Ledger`` records each handle and mapping as it happens.

The pool knows nothing of blocks; ``BlockPool`` decides which pages, the pool makes it so.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from kvcached.broker.budget import Budget
from kvcached.errors import ClosedError, KvcachedError, PoolBroken
from kvcached.layout import Geometry
from kvcached.memory.base import Handle, MemoryBackend, Reservation
from kvcached.memory.ledger import Ledger, Undo
from kvcached.runs import FreeRuns
from kvcached.stats import Timer

Run = tuple[int, int]
"""``(first page, number of pages)``."""
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Extent:
    """A run of pages and its handles, one a plane. ``id`` starts at 1 and is reused."""

    id: int
    first: int
    pages: int
    handles: tuple[Handle, ...]


class PagePool:
    """Which pages of a reservation are backed, and by what.

    Parameters
    ----------
    backend:
        Where memory comes from. Shared; the pool closes only what it made.
    geometry:
        Pages and planes of the reservation.
    budget:
        Asked before anything is backed, told after anything was given back.
    max_extent_pages:
        Longest run in one handle.
    """

    def __init__(
        self, backend: MemoryBackend, geometry: Geometry, budget: Budget, max_extent_pages: int
    ) -> None:
        self.backend, self.geometry, self.budget = backend, geometry, budget
        self.max_extent_pages = max(1, max_extent_pages)
        self.extents: dict[int, Extent] = {}
        self.runs = FreeRuns(geometry.num_pages)
        self.backed_pages = 0
        self.epoch = 0  # changes whenever what is backed changes
        self.grown, self.shrunk, self.splits = Timer(), Timer(), Timer()
        self._free_ids: list[int] = []
        self._next_id = 1
        self._limbo: list[Handle] = []  # unmapped, but the driver refused to release them
        self._kept = 0  # claims that a broken pool cannot return before it is closed
        self._scratch: Reservation | None = None
        self._broken: str = ""
        self._closed = False
        self._ledger = Ledger(backend)
        self.reservation = self._ledger.reserve(geometry.reserved_bytes)

    @property
    def backed_bytes(self) -> int:
        """Physical bytes held for the reservation."""
        limbo = (
            sum(h.num_pages for h in self._limbo) * self.geometry.page_bytes if self._limbo else 0
        )
        return self.backed_pages * self.geometry.page_group_bytes + limbo

    @property
    def usable(self) -> bool:
        """Whether the pool is neither closed nor broken."""
        return not (self._closed or self._broken)

    def require_usable(self) -> None:
        """Raise if the pool is closed or broken: what the page table says may not be so."""
        if self._closed:
            raise ClosedError("the page pool is closed")
        if self._broken:
            raise PoolBroken(
                f"the page pool is broken: {self._broken}",
                hint="Close the cache and make a new one.",
            )

    def address_of(self, page: int, plane: int = 0) -> int:
        """Address of a page in a plane."""
        g = self.geometry
        return self.reservation.address + plane * g.plane_bytes + page * g.page_bytes

    def bytes_of(self, runs: Sequence[Run]) -> int:
        """Physical bytes of runs, all planes."""
        return sum(count for _, count in runs) * self.geometry.page_group_bytes

    def chop(self, run: Run) -> Iterator[Run]:
        """Cut a run into pieces of at most one handle, at ends of blocks where that is possible."""
        g = self.geometry
        first, end = run[0], run[0] + run[1]
        while first < end:
            stop = min(end, first + self.max_extent_pages)
            if stop < end:
                aligned = stop * g.page_bytes // g.block_bytes * g.block_bytes // g.page_bytes
                stop = aligned if aligned > first else stop
            yield first, stop - first
            first = stop

    def grow(self, runs: Sequence[Run]) -> list[Extent]:
        """Back free runs, all or nothing. The bytes are already claimed from the budget.

        Raises ``OutOfPages`` or ``DriverError``; the claim then is still the caller's.
        """
        self.require_usable()
        started = time.perf_counter_ns()
        extents: list[Extent] = []
        try:
            with self._undo() as undo:
                for run in runs:
                    for first, count in self.chop(run):
                        extents.append(self._back(first, count, undo))
        except BaseException:  # the ids too go back, whatever it was
            self._free_ids.extend(extent.id for extent in reversed(extents))
            raise
        for extent in extents:
            self._admit(extent)
        self.grown.add(started, len(extents))
        return extents

    def shrink(self, extents: Sequence[Extent]) -> int:
        """Unmap and release extents, each all or nothing; gives the bytes back to the budget.

        Returns the bytes given back. If one fails the ones before it are gone, it and the ones
        after it are as they were, and the error is raised.
        """
        self.require_usable()
        started = time.perf_counter_ns()
        waiting, self._limbo = self._limbo, []
        freed, done = self._release_late(waiting), 0
        try:
            for extent in extents:
                freed += self._unback(extent)
                done += 1
        finally:
            if freed:
                self.budget.give_back(freed)
                self.shrunk.add(started, done)
        return freed

    def refund(self, nbytes: int) -> None:
        """Return an unused claim. A broken pool keeps it: the memory may not be back (I8)."""
        if self._broken:
            self._kept += nbytes
        else:
            self.budget.give_back(nbytes)

    def split(self, extent: Extent, keep: Sequence[Run]) -> list[Extent]:
        """Replace an extent by small ones under ``keep``; contents and addresses stay (I3).

        The small handles are staged at a scratch address, the live pages copied there, then the
        large handle is swapped for them. The claim for ``keep`` is the caller's; the old extent's
        bytes are given back. No kernel may touch the extent meanwhile.
        """
        self.require_usable()
        started = time.perf_counter_ns()
        pieces = [piece for run in keep for piece in self.chop(run)]
        scratch = self._get_scratch()
        with self._undo() as undo:
            new = [self._stage(first, count, scratch, undo) for first, count in pieces]
            for plane, handle in enumerate(extent.handles):
                self._unmap(extent.first, plane, handle, undo)
            for piece in new:
                for plane, handle in enumerate(piece.handles):
                    self._map(piece.first, plane, handle, undo)
            self._ledger.release(extent.handles[0])  # the last step that can be undone
        self._forget(extent)
        freed = extent.pages * self.geometry.page_bytes + self._release_late(extent.handles[1:])
        for piece in new:
            piece.id = self._new_id()
            self._admit(piece)
        self.budget.give_back(freed)
        self.splits.add(started)
        return new

    def check(self) -> None:
        """Extents, runs and the record of handles agree (I1, I4)."""
        self.runs.check()
        backed = sorted((e.first, e.pages) for e in self.extents.values())
        spans = sorted(backed + list(self.runs))
        end = 0
        for first, count in spans:
            assert first == end, "I1: a page is both free and backed, or neither"
            end = first + count
        assert end == self.geometry.num_pages, "I1: pages lost"
        assert self.backed_pages == sum(count for _, count in backed), "I1: backed pages miscounted"
        if not self._broken:
            assert self._ledger.nbytes == self.backed_bytes, "I4: handles and extents disagree"
        assert self.backed_bytes <= self.budget.claimed_bytes, "I1: backed more than claimed"
        assert self._ledger.nbytes <= self.budget.claimed_bytes, "I8: credited before it is back"
        ids = set(self.extents) | set(self._free_ids)
        assert len(ids) == len(self.extents) + len(self._free_ids), "PagePool: extent id used twice"
        assert len(ids) == self._next_id - 1, "PagePool: extent id lost"

    def close(self) -> None:
        """Unmap and release everything, whatever state the pool is in. Idempotent."""
        if self._closed and not self._ledger.reservations:
            return
        self._closed = True
        self._ledger.close_all()
        freed, self._kept = self.backed_bytes + self._kept, 0
        self.extents.clear()
        self.epoch += 1
        self._limbo.clear()
        self._free_ids = list(range(1, self._next_id))
        self.runs = FreeRuns(self.geometry.num_pages)
        self.backed_pages = 0
        self.budget.give_back(freed)

    # --- steps -----------------------------------------------------------------------------

    @contextmanager
    def _undo(self) -> Iterator[Undo]:
        """Run the registered inverses if the body fails; break the pool if they fail too."""
        undo = Undo()
        try:
            yield undo
        except BaseException as cause:  # KeyboardInterrupt too must leave a whole pool
            try:
                undo.run()
            except BaseException as error:  # noqa: BLE001 - whatever it was, the state is unknown
                self._broken = f"{cause!r}, and undoing it failed: {error!r}"
                raise PoolBroken(
                    f"the page pool is broken: {self._broken}", hint="Close the cache."
                ) from cause
            raise

    def _back(self, first: int, count: int, undo: Undo) -> Extent:
        handles = []
        for plane in range(self.geometry.num_planes):
            handle = self._ledger.create(count)
            undo.push(self._ledger.release, handle)
            self._map(first, plane, handle, undo)
            handles.append(handle)
        return Extent(self._new_id(), first, count, tuple(handles))

    def _unback(self, extent: Extent) -> int:
        """Unmap and release one extent, all or nothing (contents too). Returns the bytes back."""
        with self._undo() as undo:
            for plane, handle in enumerate(extent.handles):
                self._unmap(extent.first, plane, handle, undo)
            self._ledger.release(extent.handles[0])  # the last step that can be undone
        self._forget(extent)
        return extent.pages * self.geometry.page_bytes + self._release_late(extent.handles[1:])

    def _map(self, first: int, plane: int, handle: Handle, undo: Undo) -> None:
        page = plane * self.geometry.num_pages + first
        self._ledger.map(self.reservation, page, handle)
        undo.push(self._ledger.unmap, self.reservation, page, handle)

    def _unmap(self, first: int, plane: int, handle: Handle, undo: Undo) -> None:
        page = plane * self.geometry.num_pages + first
        self._ledger.unmap(self.reservation, page, handle)
        undo.push(self._ledger.map, self.reservation, page, handle)

    def _stage(self, first: int, count: int, scratch: Reservation, undo: Undo) -> Extent:
        """New handles with the contents of a run, mapped nowhere yet. The extent has no id yet."""
        handles = []
        for plane in range(self.geometry.num_planes):
            handle = self._ledger.create(count)
            undo.push(self._ledger.release, handle)
            self._ledger.map(scratch, 0, handle)
            undo.push(self._ledger.unmap, scratch, 0, handle)
            nbytes = count * self.geometry.page_bytes
            self.backend.copy(scratch.address, self.address_of(first, plane), nbytes)
            self._ledger.unmap(scratch, 0, handle)
            undo.pop()
            handles.append(handle)
        return Extent(0, first, count, tuple(handles))

    def _get_scratch(self) -> Reservation:
        """Addresses where handles are filled; reserved at the first split, kept until close."""
        if self._scratch is None:
            nbytes = self.max_extent_pages * self.geometry.page_bytes
            self._scratch = self._ledger.reserve(nbytes)
        return self._scratch

    def _release_late(self, handles: Sequence[Handle]) -> int:
        """Release handles at a point of no return. Returns the bytes that are back.

        What the backend refuses to release is parked, to be tried again.
        """
        freed = 0
        for handle in handles:
            try:
                self._ledger.release(handle)
            except KvcachedError:
                _log.exception("a handle of %d pages could not be released yet", handle.num_pages)
                self._limbo.append(handle)
            else:
                freed += handle.num_pages * self.geometry.page_bytes
        return freed

    def _admit(self, extent: Extent) -> None:
        self.runs.take(extent.first, extent.pages)
        self.extents[extent.id] = extent
        self.backed_pages += extent.pages
        self.epoch += 1

    def _forget(self, extent: Extent) -> None:
        del self.extents[extent.id]
        self._free_ids.append(extent.id)
        self.runs.give(extent.first, extent.pages)
        self.backed_pages -= extent.pages
        self.epoch += 1

    def _new_id(self) -> int:
        if self._free_ids:
            return self._free_ids.pop()
        self._next_id += 1
        return self._next_id - 1
