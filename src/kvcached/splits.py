"""``Splitter``: small handles in place of large ones, under the pages that are to stay.

Contents and addresses stay, so block ids, block tables and captured CUDA graphs do too. Two ways:

* *staged*: each small handle is mapped at a scratch address, filled there, and mapped at its place
  once the large one is gone. Needs room for what is kept, nothing more.
* *bounced*: what is kept is copied to one buffer, the large handles are unmapped, small ones are
  mapped at their places, and the contents copied back. Twice the room, but three driver calls
  less a handle and two waits a batch: a GPU's driver takes 35 us to give access to a handle, and
  copies 2 MiB in one or two (docs/adr/0007).

Every step registers its inverse; the large handles live until the last of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvcached.memory.base import Copy, Handle, Reservation
from kvcached.memory.ledger import Ledger, Undo
from kvcached.runs import Extent, Run

if TYPE_CHECKING:
    from kvcached.pages import PagePool

Job = tuple[Extent, Sequence[Run]]
"""An extent, and the runs of it that are kept."""


class Splitter:
    """The part of a ``PagePool`` that splits; callers hold its lock.

    ``bounce_pages`` is the size of the largest bounce buffer.
    """

    def __init__(self, pool: PagePool, ledger: Ledger, bounce_pages: int) -> None:
        self._pool, self._ledger = pool, ledger
        self._scratch_pages = max(pool.max_extent_pages, bounce_pages)
        self._scratch: Reservation | None = None

    def staged(self, jobs: Sequence[Job], undo: Undo) -> list[Extent]:
        """Swap in small handles that were filled at a scratch address. They have no ids yet."""
        pool, scratch = self._pool, self._get_scratch()
        new = [
            self._stage(piece, scratch, undo)
            for _, keep in jobs for run in keep for piece in pool.chop(run)
        ]  # fmt: skip
        self._unmap_all(jobs, undo)
        for extent in new:
            for plane, handle in enumerate(extent.handles):
                pool.map(extent.first, plane, handle, undo)
        return new

    def bounced(self, jobs: Sequence[Job], undo: Undo) -> tuple[list[Extent], Handle]:
        """Swap in small handles by way of a buffer; also returns its handle, to be released."""
        pool, scratch = self._pool, self._get_scratch()
        new = [
            Extent(0, first, count)
            for _, keep in jobs for run in keep for first, count in pool.chop(run)
        ]  # fmt: skip
        pages = sum(extent.pages for extent in new) * pool.geometry.num_planes
        buffer = self._ledger.create(pages)
        undo.push(self._ledger.release, buffer)
        self._ledger.map(scratch, 0, buffer)
        undo.push(self._ledger.unmap, scratch, 0, buffer)
        away = self._copies_to(scratch.address, new)
        pool.backend.copy_many(away)
        self._unmap_all(jobs, undo)
        pool.back(new)
        undo.push(pool.unback_all, new)
        pool.backend.copy_many([(home, buffered, n) for buffered, home, n in away])
        self._ledger.unmap(scratch, 0, buffer)
        undo.push(self._ledger.map, scratch, 0, buffer)
        return new, buffer

    def _copies_to(self, address: int, extents: Sequence[Extent]) -> list[Copy]:
        """The copies that put the contents of ``extents`` one after another at ``address``."""
        pool, copies = self._pool, list[Copy]()
        for plane in range(pool.geometry.num_planes):
            for extent in extents:
                nbytes = extent.pages * pool.geometry.page_bytes
                copies.append((address, pool.address_of(extent.first, plane), nbytes))
                address += nbytes
        return copies

    def _unmap_all(self, jobs: Sequence[Job], undo: Undo) -> None:
        for extent, _ in jobs:
            for plane, handle in enumerate(extent.handles):
                self._pool.unmap(extent.first, plane, handle, undo)

    def _stage(self, run: Run, scratch: Reservation, undo: Undo) -> Extent:
        """New handles with the contents of a run, mapped nowhere yet."""
        pool, (first, count), handles = self._pool, run, list[Handle]()
        for plane in range(pool.geometry.num_planes):
            handle = self._ledger.create(count)
            undo.push(self._ledger.release, handle)
            self._ledger.map(scratch, 0, handle)
            undo.push(self._ledger.unmap, scratch, 0, handle)
            nbytes = count * pool.geometry.page_bytes
            pool.backend.copy(scratch.address, pool.address_of(first, plane), nbytes)
            self._ledger.unmap(scratch, 0, handle)
            undo.pop()
            handles.append(handle)
        return Extent(0, first, count, tuple(handles))

    def _get_scratch(self) -> Reservation:
        """Addresses where handles are filled; reserved at the first split, kept until close."""
        if self._scratch is None:
            nbytes = self._scratch_pages * self._pool.geometry.page_bytes
            self._scratch = self._ledger.reserve(nbytes)
        return self._scratch
