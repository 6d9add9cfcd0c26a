"""``Reclaimer``: how a block pool gives physical memory back, cheapest first.

Spare extents are unmapped. Extents that hold only cached prefixes are emptied whole, least
recently used first. Extents that hold blocks in use are split, those that need the least copying
first; the cached prefixes in them go. Every step is all or nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterator, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy as np

from kvcached.layout import cdiv
from kvcached.runs import Extent, Run
from kvcached.splits import Job
from kvcached.stats import Timer

if TYPE_CHECKING:
    from kvcached.blocks import BlockPool, Ids

_log = logging.getLogger(__name__)


class Reclaimer:
    """The part of a ``BlockPool`` that gives back; it shares the pool's arrays and its lock."""

    def __init__(self, blocks: BlockPool) -> None:
        from kvcached import _hot, _scan  # numba is imported at the first hot call

        self._blocks = blocks
        self._hot: Any = _hot
        self._scan: Any = _scan
        self.timer = Timer()

    def reclaim(
        self, nbytes: int, *, may_split: bool, may_evict: bool = True, most: int | None = None
    ) -> int:
        """See ``BlockPool.reclaim``; at most ``most`` extents go whole: each takes driver time."""
        started = time.perf_counter_ns()
        self._blocks.poll_fences()
        freed = self._blocks.pages.shrink([])  # what could not be released before
        spare = self._spare_extents()[:most]
        freed += self._drop(spare, nbytes - freed)
        left = None if most is None else most - len(spare)
        if freed < nbytes and may_evict:
            cached = self._cached_extents()[:left]
            freed += self._drop(cached, nbytes - freed)
            left = None if left is None else left - len(cached)
        if freed < nbytes and may_split and self._blocks.may_unmap and left != 0:
            freed += self._split_some(nbytes - freed)
        if freed:
            self.timer.add(started)
        return freed

    def trim(self, *, may_split: bool) -> int:
        """See ``BlockPool.trim``."""
        everything = self._blocks.pages.backed_bytes
        self._blocks.spares.forget()
        freed = self.reclaim(everything, may_split=False)
        self._blocks.evict_oldest(self._blocks.num_cached)
        return freed + self.reclaim(everything, may_split=may_split)

    def excess_spare(self) -> Extent | None:
        """The largest spare extent that the spare policy has no use for any more."""
        pool = self._blocks
        spare = self._spare_extents()
        group = pool.geometry.page_group_bytes
        excess = sum(e.pages for e in spare) * group
        excess -= pool.spares.target(pool.clock()) if spare else 0
        return next((e for e in spare if e.pages * group <= excess), None)

    def drop_spares(self, keep: Collection[int]) -> int:
        """See ``BlockPool.drop_spares``."""
        return self._drop([e for e in self._spare_extents() if e.id not in keep])

    # --- whole extents -----------------------------------------------------------------------

    def _spare_extents(self) -> list[Extent]:
        pool = self._blocks
        if pool.num_spare_extents == 0 or not pool.may_unmap:
            return []
        ids = np.empty(pool.num_spare_extents, np.int32)
        self._scan.spare(ids, pool.ext)
        extents = pool.pages.extents
        spare = [extents[i] for i in ids.tolist()]
        spare.sort(key=_pages_of, reverse=True)
        return spare

    def _drop(self, extents: Sequence[Extent], nbytes: int | None = None) -> int:
        """Unmap extents, all or until ``nbytes`` are back."""
        group, freed, rest = self._blocks.geometry.page_group_bytes, 0, list(extents)
        while rest and (nbytes is None or freed < nbytes):
            count, size = 0, freed  # as many as it takes, if each gives what it holds
            while count < len(rest) and (nbytes is None or size < nbytes):
                size += rest[count].pages * group
                count += 1
            freed += self._drop_all(rest[:count])
            del rest[:count]
        return freed

    def _cached_extents(self) -> list[Extent]:
        """Extents that hold nothing but cached blocks, least recently used first."""
        pool, h = self._blocks, self._hot
        if not pool.may_unmap:
            return []
        idle = pool.ext[:, h.X_USED] + pool.ext[:, h.X_QUARANTINED] == 0
        cached = (pool.ext[:, h.X_CACHED] > 0) & (pool.ext[:, h.X_PAGES] > 0)
        ids = np.flatnonzero(idle & cached)
        place = np.zeros(len(pool.ext), np.int32)
        self._scan.last_use(place, pool.blk, pool.page, pool.ext, pool.meta)
        order = ids[np.argsort(place[ids], kind="stable")]
        return [pool.pages.extents[int(i)] for i in order]

    def _drop_all(self, extents: Sequence[Extent]) -> int:
        """Unmap extents without blocks in use; the prefixes in them are evicted with them.

        The memory goes first: where the backend refuses, nothing has been evicted.
        """
        pool = self._blocks
        cached = {
            extent.id: self._cached_in(extent)
            for extent in extents if pool.ext[extent.id, self._hot.X_CACHED]
        }  # fmt: skip
        try:
            return pool.pages.shrink(extents)
        finally:
            gone = [extent for extent in extents if not extent.handles]
            evicted = [cached[extent.id] for extent in gone if extent.id in cached]
            if evicted:  # a block may lie in two of them
                pool.evict(np.unique(np.concatenate(evicted)))
            pool.detach_all(gone)

    def _cached_in(self, extent: Extent) -> Ids:
        pool = self._blocks
        touching = pool.geometry.blocks_touching(extent.first, extent.first + extent.pages)
        out = np.empty(len(touching), np.int32)
        return out[: self._scan.cached_in(extent.id, out, pool.blk, pool.ext, pool.meta)]

    # --- splits ------------------------------------------------------------------------------

    def _split_some(self, nbytes: int) -> int:
        """Split extents until ``nbytes`` are back, or there is no room for the copies."""
        pages = self._blocks.pages
        sized = [(e, self._live_runs(e)) for e in list(pages.extents.values())]
        jobs = [(e, keep) for e, keep in sized if 0 < _length(keep) < e.pages]
        jobs.sort(key=lambda job: (_length(job[1]), job[0].first))
        freed = 0
        try:
            for batch in self._batches(jobs, nbytes):
                if freed < nbytes:
                    freed += self._split_batch(batch)
        except MemoryError:  # ours: not even for a moment can there be room to copy into
            _log.info("no room to split more extents")
        return freed

    def _batches(self, jobs: Sequence[Job], nbytes: int) -> Iterator[list[Job]]:
        """As many jobs at once as go through the bounce buffer, or give ``nbytes``; else one."""
        pool = self._blocks
        most, planes = pool.pages.bounce_pages, pool.geometry.num_planes
        wanted = cdiv(nbytes, pool.geometry.page_group_bytes)
        batch, pages, gain = list[Job](), 0, 0
        for extent, keep in jobs:
            size = _length(keep) * planes
            if batch and (pages + size > most or gain >= wanted):
                yield batch
                batch, pages = [], 0
            batch.append((extent, keep))
            pages += size
            gain += extent.pages - _length(keep)
        if batch:
            yield batch

    def _split_batch(self, batch: list[Job]) -> int:
        """Split extents together if there is room for the bounce, else one by one."""
        planes, most = self._blocks.geometry.num_planes, self._blocks.pages.bounce_pages
        if sum(_length(keep) for _, keep in batch) * planes <= most:
            try:
                return self._split(batch, bounce=True)
            except MemoryError:  # ours: but maybe there is for what is kept alone
                _log.debug("no room for a bounce buffer")
        return sum(self._split([job], bounce=False) for job in batch)

    def _live_runs(self, extent: Extent) -> list[Run]:
        """What a split keeps; nothing if the extent is gone."""
        pool = self._blocks
        if pool.pages.extents.get(extent.id) is not extent:
            return []
        out = np.empty(2 * extent.pages, np.int32)
        n = self._scan.live_runs(extent.id, out, pool.blk, pool.ext, pool.meta)
        return [(int(out[2 * i]), int(out[2 * i + 1])) for i in range(n)]

    def _split(self, jobs: list[Job], *, bounce: bool) -> int:
        """Split extents; returns the bytes given back. The claim may let others in."""
        pool, pages = self._blocks, self._blocks.pages
        kept = pages.bytes_of([run for _, keep in jobs for run in keep])
        before = sum(extent.pages for extent, _ in jobs) * pool.geometry.page_group_bytes
        claim = 2 * kept if bounce else kept
        pages.budget.claim(claim, transient=True)
        if any(self._live_runs(extent) != keep for extent, keep in jobs):
            pages.refund(claim)  # what was planned is not what is there now
            return 0
        cached = [self._cached_in(extent) for extent, _ in jobs]
        try:
            pieces = pages.split(jobs, bounce=bounce)
        except BaseException:  # the claim goes back, whatever it was
            pages.refund(claim)
            raise
        pool.evict(np.unique(np.concatenate(cached)))  # a block may lie in two of the extents
        pool.detach_all([extent for extent, _ in jobs])
        pool.attach(pieces)
        return before - kept


_pages_of = attrgetter("pages")


def _length(runs: Sequence[Run]) -> int:
    return sum(count for _, count in runs)


def release_excess(blocks: BlockPool) -> None:
    """Let spares decay. For a thread that does not hold the pool's lock: the driver works without.

    If the backend refuses, the extent is as it was.
    """
    while True:
        started = time.perf_counter_ns()
        with blocks.lock:
            extent = blocks.reclaimer.excess_spare() if blocks.pages.usable else None
            if extent is None:
                return
            blocks.detach_all([extent])
            blocks.pages.withdraw(extent)
        freed, error = blocks.pages.unback([extent])
        with blocks.lock:
            if extent.handles:
                blocks.pages.admit([extent])
                blocks.attach([extent])
            else:  # even if something came in between afterwards
                blocks.pages.unstage([extent])
                blocks.pages.shrunk.add(started)
                blocks.pages.budget.give_back(freed)
            if error is not None:
                raise error
