"""``Reclaimer``: how a block pool gives physical memory back, cheapest first.

Spare extents are unmapped. Extents that hold only cached prefixes are emptied whole, least
recently used first. Extents that hold blocks in use are split, those that need the least copying
first. Every step is all or nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kvcached.pages import Extent
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

    def reclaim(self, nbytes: int, *, may_split: bool) -> int:
        """See ``BlockPool.reclaim``."""
        started = time.perf_counter_ns()
        self._blocks.poll_fences()
        freed = self._blocks.pages.shrink([])  # what could not be released before
        freed += self._drop(self._spare_extents(), nbytes - freed)
        if freed < nbytes:
            freed += self._drop_cached(nbytes - freed)
        if freed < nbytes and may_split:
            freed += self._split_some(nbytes - freed)
        if freed:
            self.timer.add(started)
        return freed

    def trim(self, *, may_split: bool) -> int:
        """See ``BlockPool.trim``."""
        everything = self._blocks.pages.backed_bytes
        freed = self.reclaim(everything, may_split=False)
        self._blocks.evict_oldest(self._blocks.num_cached)
        return freed + self.reclaim(everything, may_split=may_split)

    def decay_spares(self) -> int:
        """See ``BlockPool.decay_spares``."""
        pool = self._blocks
        pool.poll_fences()
        if pool.num_spare_extents == 0:
            return 0
        spare = self._spare_extents()
        total = sum(e.pages for e in spare) * pool.geometry.page_group_bytes
        excess = total - pool.spares.target(pool.clock())
        return total - (self._drop(spare, excess, strict=True) if excess > 0 else 0)

    def drop_spares(self, keep: Collection[int]) -> int:
        """See ``BlockPool.drop_spares``."""
        return sum(self._drop_one(e) for e in self._spare_extents() if e.id not in keep)

    # --- whole extents -----------------------------------------------------------------------

    def _spare_extents(self) -> list[Extent]:
        pool, h = self._blocks, self._hot
        if pool.num_spare_extents == 0:
            return []
        claims = pool.ext[h.X_USED] + pool.ext[h.X_CACHED] + pool.ext[h.X_QUARANTINED]
        ids = np.flatnonzero((claims == 0) & (pool.ext[h.X_PAGES] > 0))
        spare = [pool.pages.extents[int(i)] for i in ids]
        return sorted(spare, key=lambda e: -e.pages)

    def _drop(self, extents: Sequence[Extent], nbytes: int, *, strict: bool = False) -> int:
        """Unmap extents until ``nbytes`` are back; ``strict``: never more than that."""
        group = self._blocks.geometry.page_group_bytes
        freed = 0
        for extent in extents:
            size = extent.pages * group
            if freed < nbytes and not (strict and freed + size > nbytes):
                freed += self._drop_one(extent)
        return freed

    def _drop_cached(self, nbytes: int) -> int:
        """Drop extents that hold nothing but cached blocks, least recently used first."""
        pool, h = self._blocks, self._hot
        idle = pool.ext[h.X_USED] + pool.ext[h.X_QUARANTINED] == 0
        cached = (pool.ext[h.X_CACHED] > 0) & (pool.ext[h.X_PAGES] > 0)
        ids = np.flatnonzero(idle & cached)
        place = np.zeros(pool.ext.shape[1], np.int32)
        self._scan.last_use(place, pool.blk, pool.page, pool.ext, pool.meta)
        order = ids[np.argsort(place[ids], kind="stable")]
        return self._drop([pool.pages.extents[int(i)] for i in order], nbytes)

    def _drop_one(self, extent: Extent) -> int:
        """Unmap an extent without blocks in use; the prefixes in it are evicted with it.

        The memory goes first: if the backend refuses, nothing has been evicted.
        """
        pool = self._blocks
        cached = self._cached_in(extent)
        freed = pool.pages.shrink([extent])
        pool.evict(cached)
        self._hot.detach(extent.id, pool.blk, pool.page, pool.ext, pool.meta)
        return freed

    def _cached_in(self, extent: Extent) -> Ids:
        pool = self._blocks
        touching = pool.geometry.blocks_touching(extent.first, extent.first + extent.pages)
        out = np.empty(len(touching), np.int32)
        return out[: self._scan.cached_in(extent.id, out, pool.blk, pool.ext, pool.meta)]

    # --- splits ------------------------------------------------------------------------------

    def _split_some(self, nbytes: int) -> int:
        """Split extents until ``nbytes`` are back, or there is no room for the copies."""
        extents = list(self._blocks.pages.extents.values())
        sized = [(sum(count for _, count in self._live_runs(e)), e) for e in extents]
        worth = [(kept, e) for kept, e in sized if 0 < kept < e.pages]
        freed = 0
        try:
            for _, extent in sorted(worth, key=lambda entry: (entry[0], entry[1].first)):
                if freed < nbytes:
                    freed += self._split(extent)
        except MemoryError:  # ours: not even for a moment can there be room to copy into
            _log.info("no room to split more extents")
        return freed

    def _live_runs(self, extent: Extent) -> list[tuple[int, int]]:
        """What a split keeps; nothing if the extent is gone."""
        pool = self._blocks
        if pool.pages.extents.get(extent.id) is not extent:
            return []
        out = np.empty(2 * extent.pages, np.int32)
        n = self._scan.live_runs(extent.id, out, pool.blk, pool.ext, pool.meta)
        return [(int(out[2 * i]), int(out[2 * i + 1])) for i in range(n)]

    def _split(self, extent: Extent) -> int:
        """Split one extent; returns the bytes given back. The claim may let others in."""
        pool, keep = self._blocks, self._live_runs(extent)
        nbytes = pool.pages.bytes_of(keep)
        if not 0 < nbytes < extent.pages * pool.geometry.page_group_bytes:
            return 0
        pool.pages.budget.claim(nbytes, transient=True)
        if self._live_runs(extent) != keep:  # what was planned is not what is there now
            pool.pages.refund(nbytes)
            return 0
        try:
            pieces = pool.pages.split(extent, keep)
        except BaseException:  # the claim goes back, whatever it was
            pool.pages.refund(nbytes)
            raise
        self._hot.detach(extent.id, pool.blk, pool.page, pool.ext, pool.meta)
        pool.attach(pieces)
        return extent.pages * pool.geometry.page_group_bytes - nbytes
