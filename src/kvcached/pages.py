"""``PagePool``: extents of physical memory under one reservation; grow, shrink, split.

An extent is a run of page indices backed by one handle in each plane. Every operation is all or
nothing: each backend call registers its inverse, and a failure undoes the calls before it in
reverse order. If even that fails the pool is *broken*: it refuses further work, and ``close()``
still gives back everything, because ``Ledger`` records each handle and mapping as it happens.

The pool knows nothing of blocks; ``BlockPool`` decides which pages, the pool makes it so.

Callers hold the owner's lock around every call but ``back`` and ``unback``, which do nothing but
driver calls: a thread that grows ahead of demand, or lets spares decay, makes those without the
lock, so that no step of the engine waits for the driver. Extents in between are ``in_transit``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sequence

from kvcached import planning
from kvcached.broker.budget import Budget
from kvcached.errors import ClosedError, KvcachedError, PoolBroken
from kvcached.layout import Geometry
from kvcached.memory.base import Handle, Made, MemoryBackend
from kvcached.memory.ledger import Ledger, Undo
from kvcached.page_books import PageBooks
from kvcached.runs import Extent, Run
from kvcached.splits import Job, Splitter
from kvcached.stats import Timer

__all__ = ["Extent", "PagePool", "Run"]
_log = logging.getLogger(__name__)


class PagePool(PageBooks):
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
    bounce_pages:
        Largest buffer of a split that goes by way of one; 0 for none.
    """

    def __init__(
        self,
        backend: MemoryBackend,
        geometry: Geometry,
        budget: Budget,
        max_extent_pages: int,
        bounce_pages: int = 0,
    ) -> None:
        super().__init__(geometry.num_pages)
        self.backend, self.geometry, self.budget = backend, geometry, budget
        self.max_extent_pages, self.bounce_pages = max(1, max_extent_pages), bounce_pages
        self.grown, self.shrunk, self.splits = Timer(), Timer(), Timer()
        self._limbo: list[Handle] = []  # unmapped, but the driver refused to release them
        self._kept = 0  # claims that a broken pool cannot return before it is closed
        self._broken: str = ""
        self._closed = False
        self.usable = True  # neither closed nor broken; a plain attribute: every alloc looks
        self._ledger = Ledger(backend)
        self.reservation = self._ledger.reserve(geometry.reserved_bytes)
        self._splitter = Splitter(self, self._ledger, bounce_pages)

    @property
    def backed_bytes(self) -> int:
        """Physical bytes held for the reservation; those of extents on their way out too."""
        nbytes = self.backed_pages * self.geometry.page_group_bytes
        if self._limbo or self.in_transit:
            extents = [e.handles for e in self.in_transit.values()]
            handles = [handle for group in [*extents, self._limbo] for handle in group]
            nbytes += sum(handle.num_pages for handle in handles) * self.geometry.page_bytes
        return nbytes

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
        if len(runs) == 1:
            return runs[0][1] * self.geometry.page_group_bytes
        return sum(count for _, count in runs) * self.geometry.page_group_bytes

    def chop(self, run: Run) -> Iterator[Run]:
        """Cut a run into pieces of at most one handle, at ends of blocks where that is possible."""
        return planning.chop(self.geometry, run, self.max_extent_pages)

    # --- growing -------------------------------------------------------------------------------

    def grow(self, runs: Sequence[Run]) -> list[Extent]:
        """Back free runs, all or nothing. The bytes are already claimed from the budget.

        Raises ``OutOfPages`` or ``DriverError``; the claim then is still the caller's.
        """
        started = time.perf_counter_ns()
        if not self.usable:
            self.require_usable()
        places, extents = self._pieces(runs), []
        for (first, count), handles in zip(places, self._back(places)):  # noqa: B905 (one each)
            # After the driver's part: if that fails, nothing has changed.
            self.runs.take(first, count)
            ident = self._free_ids.pop() if self._free_ids else self.new_id()
            extent = self._extents[ident] = Extent(ident, first, count, handles)
            self._backed_pages += count
            extents.append(extent)
        self._epoch += 1
        grown = self.grown
        grown.count += len(extents)
        grown.ns += time.perf_counter_ns() - started
        return extents

    def stage(self, runs: Sequence[Run]) -> list[Extent]:
        """Set free runs aside for extents to be: in transit, nobody else plans with them."""
        self.require_usable()
        self._epoch += 1
        extents = [Extent(self.new_id(), first, count) for first, count in self._pieces(runs)]
        for extent in extents:
            self.runs.take(extent.first, extent.pages)
            self.in_transit[extent.id] = extent
        return extents

    def _pieces(self, runs: Sequence[Run]) -> Sequence[Run]:
        """Runs of at most one handle each."""
        if len(runs) == 1 and runs[0][1] <= self.max_extent_pages:  # nearly always
            return runs
        return [piece for run in runs for piece in self.chop(run)]

    def back(self, extents: Sequence[Extent]) -> None:
        """Create and map the handles of extents to be, all or nothing. Needs no lock."""
        places = [(extent.first, extent.pages) for extent in extents]
        for extent, handles in zip(extents, self._back(places), strict=True):
            extent.handles = handles

    def _back(self, runs: Sequence[Run]) -> Iterable[tuple[Handle, ...]]:
        """Back runs of at most one handle: of each the handles, one a plane."""
        planes, pages, places = self.geometry.num_planes, self.geometry.num_pages, runs
        if planes > 1:
            places = [(plane * pages + p, n) for plane in range(planes) for p, n in runs]
        try:
            handles = self._ledger.back(self.reservation, places)
        except PoolBroken as error:
            self.note_broken(error.message)
            raise
        if planes == 1:
            return zip(handles)
        return [tuple(handles[i :: len(runs)]) for i in range(len(runs))]

    # --- shrinking -----------------------------------------------------------------------------

    def shrink(self, extents: Sequence[Extent]) -> int:
        """Unmap and release extents, each all or nothing; gives the bytes back to the budget.

        Returns the bytes given back. If one fails it, and those behind it in memory, are as they
        were, and the error is raised. What is gone has no handles any more.
        """
        self.require_usable()
        started = time.perf_counter_ns()
        waiting, self._limbo = self._limbo, []
        freed = self._release_late(waiting)
        for extent in extents:
            self.withdraw(extent)
        nbytes, error = self.unback(extents)
        gone = [extent for extent in extents if not extent.handles]
        self.unstage(gone)
        self.admit([extent for extent in extents if extent.handles])
        if freed := freed + nbytes:
            self.budget.give_back(freed)
            self.shrunk.add(started, len(gone))
            self.prepare()
        if error is not None:
            raise error
        return freed

    def count_in(self, ids: Sequence[int], made: Sequence[Made]) -> None:
        """Extents one after the other, of one plane, whose handles others have made."""
        handles = self._ledger.adopt(self.reservation, made)
        for ident, (first, pages, _), handle in zip(ids, made, handles, strict=True):
            self._extents[ident] = Extent(ident, first, pages, (handle,))
        total = sum(handle.num_pages for handle in handles)
        self._runs.take(made[0][0], total)
        self._backed_pages += total
        self._epoch += 1

    def unback(self, extents: Sequence[Extent]) -> tuple[int, BaseException | None]:
        """Unmap and release withdrawn extents, each all or nothing, by address. Needs no lock.

        Returns the bytes that are back and what stopped it. What is gone has no handles any more.
        """
        if not extents:
            return 0, None
        if self.geometry.num_planes == 1:
            ordered = sorted(extents, key=lambda e: e.first)  # neighbours are unmapped in one call
            mapped = [(extent.first, extent.handles[0]) for extent in ordered]
            count, error = self._ledger.unback(self.reservation, mapped)
            if isinstance(error, PoolBroken):
                self.note_broken(error.message)
            del ordered[count:]
            for extent in ordered:
                extent.handles = ()
            return sum(e.pages for e in ordered) * self.geometry.page_bytes, error
        freed = 0
        for extent in extents:
            try:
                freed += self._unback_planes(extent)
            except BaseException as error:  # noqa: BLE001 - the caller raises it, whatever it was
                return freed, error
        return freed, None

    def _unback_planes(self, extent: Extent) -> int:
        """As ``unback``, one extent. What is refused after the point of no return is parked."""
        undo = Undo()
        try:
            for plane, handle in enumerate(extent.handles):
                self.unmap(extent.first, plane, handle, undo)
            self._ledger.release(extent.handles[0])  # the last step that can be undone
        except BaseException as cause:  # KeyboardInterrupt too must leave a whole pool
            self._unwind(undo, cause)
            raise
        late, extent.handles = extent.handles[1:], ()
        return extent.pages * self.geometry.page_bytes + self._release_late(late)

    def refund(self, nbytes: int) -> None:
        """Return an unused claim. A broken pool keeps it: the memory may not be back (I8)."""
        if self._broken:
            self._kept += nbytes
        else:
            self.budget.give_back(nbytes)

    def split(self, jobs: Sequence[Job], *, bounce: bool = False) -> list[Extent]:
        """Replace extents by small ones under the runs to keep; contents and addresses stay (I3).

        All or nothing; see ``splits`` for ``bounce``. The claim for what is kept, and for as much
        again if ``bounce``, is the caller's; the old extents' bytes and the buffer's are given
        back. No kernel may touch the extents meanwhile.
        """
        self.require_usable()
        started = time.perf_counter_ns()
        undo, handles = Undo(), [h for extent, _ in jobs for h in extent.handles]
        try:
            if bounce:
                new, buffer = self._splitter.bounced(jobs, undo)
                handles.append(buffer)
            else:
                new = self._splitter.staged(jobs, undo)
            self._ledger.release(handles[0])  # the last step that can be undone
        except BaseException as cause:  # KeyboardInterrupt too must leave a whole pool
            self._unwind(undo, cause)
            raise
        freed = handles[0].num_pages * self.geometry.page_bytes + self._release_late(handles[1:])
        for extent, keep in jobs:
            self.forget(extent, keep)
        for piece in new:
            piece.id = self.new_id()
            self.in_transit[piece.id] = piece
        self.admit(new)
        self.budget.give_back(freed)
        self.splits.add(started, len(jobs))
        return new

    def check(self) -> None:
        """Extents, runs and the record of handles agree (I1, I4)."""
        self.check_books()
        if not (self._broken or self.in_transit):
            assert self._ledger.nbytes == self.backed_bytes, "I4: handles and extents disagree"
        assert self.backed_bytes <= self.budget.claimed_bytes, "I1: backed more than claimed"
        assert self._ledger.nbytes <= self.budget.claimed_bytes, "I8: credited before it is back"

    def close(self) -> None:
        """Unmap and release everything, whatever state the pool is in. Idempotent."""
        if self._closed and not self._ledger.reservations:
            return
        self._closed, self.usable = True, False
        self.close_journal()
        self._ledger.close_all()
        freed, self._kept = self.backed_bytes + self._kept, 0
        self._limbo.clear()
        self.forget_all()
        self.budget.give_back(freed)

    # --- steps -----------------------------------------------------------------------------

    def _unwind(self, undo: Undo, cause: BaseException) -> None:
        """Run the registered inverses; break the pool if they fail too."""
        try:
            undo.unwind(cause)
        except PoolBroken as error:
            self.note_broken(error.message)
            raise

    def note_broken(self, why: str) -> None:
        """What the backend holds is not known any more: refuse all work."""
        self.usable, self._broken = False, why

    def unback_all(self, extents: Sequence[Extent]) -> None:
        """Undo a ``back``."""
        for extent in extents:
            for plane, handle in enumerate(extent.handles):
                page = plane * self.geometry.num_pages + extent.first
                self._ledger.unmap(self.reservation, page, handle)
                self._ledger.release(handle)

    def map(self, first: int, plane: int, handle: Handle, undo: Undo) -> None:
        """Map a handle at its place in a plane."""
        page = plane * self.geometry.num_pages + first
        self._ledger.map(self.reservation, page, handle)
        undo.push(self._ledger.unmap, self.reservation, page, handle)

    def unmap(self, first: int, plane: int, handle: Handle, undo: Undo) -> None:
        """Undo a ``map``."""
        page = plane * self.geometry.num_pages + first
        self._ledger.unmap(self.reservation, page, handle)
        undo.push(self._ledger.map, self.reservation, page, handle)

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
