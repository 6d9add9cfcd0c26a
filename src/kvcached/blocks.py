"""``BlockPool``: block ids, who owns them, and on which extents they are packed.

A block is *usable* when all of its pages are backed. It is then free, in use (with a reference
count), cached (no reference, but a prefix names it) or quarantined (no reference, a fence not yet
passed). Free blocks are taken from the fullest extents first. Extents that hold nothing are spare
and can be unmapped; extents that hold only cached blocks can be emptied by eviction; the others
can be split. The loops over blocks are in ``_hot.py``.

Callers hold ``lock`` (an RLock) around every call; ``alloc`` may release it while the budget waits.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kvcached.bump import Bump
from kvcached.errors import InvalidInput, OutOfPages, OwnershipError
from kvcached.growth import Grower, back_ahead
from kvcached.memory.base import Fence
from kvcached.pages import PagePool
from kvcached.reclaim import Reclaimer, release_excess
from kvcached.runs import Extent
from kvcached.spares import SparePolicy
from kvcached.stats import Timer

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ids = NDArray[np.int32]

_INT32 = np.dtype(np.int32)
_NOTHING = np.empty(0, _INT32)
_MOST_FENCES = (1 << 31) - 1  # their numbers are int32, and start again


def _never(*_: Any) -> None:
    """Stand-in for a listener."""


class BlockPool:
    """Blocks over the pages of a ``PagePool``.

    Parameters
    ----------
    pages:
        The pool to back blocks with. Owned: closed with this object.
    clock:
        Seconds, monotonic.
    spares:
        How much stays mapped though empty.
    lock:
        Guards the pool; the owner's.
    most_ahead:
        Most bytes to back ahead of demand; 0: only what is asked for.

    ``on_evict`` is called with the ids of cached blocks before they become free, ``on_low`` when
    memory was grown on demand, and ``tend`` should be called soon.
    """

    def __init__(
        self,
        pages: PagePool,
        *,
        clock: Callable[[], float] = time.monotonic,
        spares: SparePolicy | None = None,
        lock: threading.RLock | None = None,
        most_ahead: int = 0,
    ) -> None:
        # Here, at the first hot call: numba takes 0.3 s to import.
        from kvcached import _bound, _hot, _scan

        self.hot: Any = _hot
        self._bound: Any = _bound
        self._alloc, self._free, self._m_free = _bound.alloc_at, _bound.free_at, _hot.M_FREE
        self._attach_and_alloc = _bound.attach_and_alloc_at
        self._num_blocks = pages.geometry.num_blocks
        self._named = False  # whether a prefix has ever named a block
        self._scan: Any = _scan
        self.pages, self.geometry = pages, pages.geometry
        self.clock, self._epoch0 = clock, clock()
        self.spares = spares if spares is not None else SparePolicy()
        self.lock = lock if lock is not None else threading.RLock()
        self.on_evict: Callable[[Ids], None] = _never
        self.on_low: Callable[[], None] = _never
        self.evicted = 0
        self.grower, self.reclaimer = Grower(self, most_ahead), Reclaimer(self)
        self._fences: deque[tuple[int, Fence, Ids]] = deque()
        self._next_fence, self._lifted = 1, list[Fence]()  # lifted: taken before it had passed
        g = self.geometry
        self.blk = np.zeros((g.num_blocks, _hot.BLK_WIDTH), np.int32)
        self.page = np.zeros(g.num_pages, np.int32)
        self.ext = np.zeros((64, _hot.EXT_WIDTH), np.int32)
        self.meta = np.zeros(_hot.META_SIZE, np.int64)
        self.meta[_hot.M_BB], self.meta[_hot.M_PB] = g.block_bytes, g.page_bytes
        self._counts = self.meta.data  # the same numbers as Python's own: faster to read
        self.make_rows(0)
        self._back_null_block()
        self._grow = Bump(self, _bound).grow

    def _back_null_block(self) -> None:
        """Block 0 is mapped for the life of the pool: engines point padding at it."""
        self.blk[0, self.hot.STATE], self.blk[0, self.hot.REFS] = self.hot.USED, 1
        self.grower.grow_runs([(0, len(self.geometry.pages_of(0)))])

    # --- counts ------------------------------------------------------------------------------

    @property
    def num_free(self) -> int:
        """Usable blocks that hold nothing."""
        return self._counts[self._m_free]

    @property
    def num_used(self) -> int:
        """Blocks in use, the null block not counted."""
        return int(self.meta[self.hot.M_USED])

    @property
    def num_cached(self) -> int:
        """Blocks without references whose contents a prefix names."""
        return int(self.meta[self.hot.M_CACHED])

    @property
    def num_quarantined(self) -> int:
        """Blocks that wait for a fence."""
        return int(self.meta[self.hot.M_QUARANTINED])

    @property
    def reclaimed(self) -> Timer:
        """Reclaims that gave something back, and their time."""
        return self.reclaimer.timer

    @property
    def num_spare_extents(self) -> int:
        """Extents that hold nothing."""
        return int(self.meta[self.hot.M_SPARE])

    def refs(self, block: int) -> int:
        """References on a block."""
        return int(self.blk[block, self.hot.REFS])

    def bytes_by_claim(self) -> tuple[int, int, int, int]:
        """Backed bytes as (in use, cached, spare, quarantined), each extent counted whole (I1)."""
        h, top = self.hot, max(self.pages.extents, default=0) + 1
        ext = self.ext[:top]
        size = ext[:, h.X_PAGES].astype(np.int64)
        used, waiting = ext[:, h.X_USED] > 0, ext[:, h.X_QUARANTINED] > 0
        cached = ext[:, h.X_CACHED] > 0
        group = self.geometry.page_group_bytes
        in_use = int(size[used].sum()) * group
        quarantined = int(size[~used & waiting].sum()) * group
        kept = int(size[~used & ~waiting & cached].sum()) * group
        return in_use, kept, self.pages.backed_bytes - in_use - kept - quarantined, quarantined

    def split_floor_bytes(self) -> int:
        """Bytes of the pages that blocks in use or in quarantine lie on, the null block's too."""
        pages = int(self._scan.touched_pages(self.blk, self.meta))
        return pages * self.geometry.page_group_bytes

    def splits_would_help(self) -> bool:
        """Whether anything is backed that no block in use or in quarantine needs."""
        return self.pages.backed_bytes > self.split_floor_bytes()

    # --- taking and giving ---------------------------------------------------------------------

    def alloc(self, count: int) -> Ids:
        """Take ``count`` blocks, int32 ``[count]``, one reference each; backs what is missing.

        All or nothing. Raises ``BudgetExceeded`` or ``OutOfPages`` (both ``MemoryError``), or
        ``DriverError``.
        """
        if not self.pages.usable:
            self.pages.require_usable()
        if count >= self._num_blocks:
            raise OutOfPages(
                f"{count} blocks wanted, but the cache has only {self._num_blocks - 1}",
                hint="Make the cache with a larger max_tokens.",
            )
        short = count - self._counts[self._m_free]
        if short > 0 and (self._fences or self._lifted):
            self.poll_fences()
            short = count - self.num_free
        if short > 0:
            grown = self._grow(count, short)
            if grown is not None:
                return grown
            return self.grower.fill(np.empty(count, _INT32))
        out = np.empty(count, _INT32)
        self._alloc(self.where, out)
        return out

    def take(self, count: int) -> Ids:
        """As ``alloc``, but for what ``secure`` has promised: evicts rather than grows.

        Blocks that wait for a fence are reused too, so whoever calls this writes to them in the
        order of the stream behind which the fences lie. No memory is unmapped until they pass.
        """
        while (short := count - self.num_free) > 0 and (self.num_cached or self._fences):
            if self.num_cached:
                self.evict_oldest(short)
            else:
                self._lifted.append(self._fences[0][1])
                self._retire_oldest_fence()
        return self.alloc(count)

    def secure(self, count: int, seconds: float | None = None) -> bool:
        """Whether ``take(count)`` is certain to succeed; grows, if it must, to make it so.

        ``seconds``: how long others may take to give; ``None``: as long as is usual.
        """
        return self.grower.secure(count, seconds)

    def share(self, ids: Ids) -> None:
        """Add a reference to blocks in use (I2)."""
        code = self.hot.share(ids, self.blk)
        if code:
            raise self._not_owned(int(ids[~code]), "shared")

    def free(self, ids: Ids, fence: Fence | None = None) -> None:
        """Drop a reference of each block; the last one frees it, or caches it if a prefix names it.

        With ``fence`` it is quarantined until the fence has passed (I3). List the blocks that may
        be evicted first, first. Raises ``OwnershipError`` and changes nothing if one is not owned.
        """
        number = self._next_fence if fence is not None else 0
        stamp = self.now() if self._named else 0  # only cached blocks are stamped
        code = self._free(self.where, ids, stamp, number)
        if code:
            raise self._not_owned(int(ids[~code]), "freed")
        if fence is not None and len(ids):
            self._next_fence = self._next_fence % _MOST_FENCES + 1
            self._fences.append((number, fence, ids.copy()))

    def keep(self, block: int, *, named: bool) -> None:
        """Note whether a prefix names a block in use."""
        self._named = True
        self.blk[block, self.hot.KEEP] = named

    def keep_all(self, ids: Ids, named: NDArray[np.bool_]) -> None:
        """As ``keep``, for many."""
        self._named = True
        self.blk[ids, self.hot.KEEP] = named

    def acquire(self, ids: Ids) -> None:
        """Take a reference on blocks that a prefix names, whatever state they are in."""
        self.hot.acquire(ids, self.blk, self.page, self.ext, self.meta)

    def copy(self, source: int, target: int) -> None:
        """Copy the contents of one block in use to another, in every plane."""
        g, backend = self.geometry, self.pages.backend
        for plane in range(g.num_planes):
            base = self.pages.address_of(0, plane)
            backend.copy(
                base + target * g.block_bytes, base + source * g.block_bytes, g.block_bytes
            )

    def poll_fences(self) -> None:
        """Retire the blocks whose fence has passed, in the order they were freed."""
        fences = self._fences
        while fences and fences[0][1].passed():
            self._retire_oldest_fence()
        if self._lifted:
            self._lifted = [fence for fence in self._lifted if not fence.passed()]

    def _retire_oldest_fence(self) -> None:
        number, _, ids = self._fences.popleft()
        self.hot.release_fence(ids, number, self.now(), self.blk, self.page, self.ext, self.meta)

    @property
    def may_unmap(self) -> bool:
        """Whether no kernel can be at work on blocks that count as free (see ``take``)."""
        self._lifted = [fence for fence in self._lifted if not fence.passed()]
        return not self._lifted

    def now(self) -> int:
        """Hundredths of a second since the pool was made (int32: 248 days)."""
        return int((self.clock() - self._epoch0) * 100.0)

    def _not_owned(self, block: int, done: str) -> OwnershipError:
        if not 0 < block < self.geometry.num_blocks:
            what = "no block has this id" if block else "it is the null block"
        else:
            what = "it is not in use (freed before, or never handed out)"
        return OwnershipError(f"block {block} cannot be {done}: {what}")

    # --- what is backed -------------------------------------------------------------------------

    def attach(self, extents: Sequence[Extent]) -> None:
        """Count the blocks of newly backed extents in. Not for callers; nor is ``detach_all``."""
        for extent in extents:
            self.attach_and_take(extent, _NOTHING)

    def attach_and_take(self, extent: Extent, out: Ids) -> bool:
        """Count the blocks of an extent in; fill ``out`` with free ones, if there are enough."""
        if extent.id >= len(self.ext):
            self.make_rows(extent.id)
        first, count = extent.first, extent.pages
        code: int = self._attach_and_alloc(self.where, out, extent.id, first, count)
        return code == 0

    def make_rows(self, ident: int) -> None:
        """Have counters for the extent with this id."""
        while ident >= len(self.ext):
            self.ext = np.concatenate([self.ext, np.zeros_like(self.ext)])
        self._kept, self.where = self._bound.record_of(self.blk, self.page, self.ext, self.meta)

    def detach_all(self, extents: Sequence[Extent]) -> None:
        """Count the free blocks of extents out; those with a claim keep their state."""
        for extent in extents:
            self._scan.detach(extent.id, self.blk, self.page, self.ext, self.meta)

    # --- giving memory back --------------------------------------------------------------------

    def evict_oldest(self, count: int) -> int:
        """Turn the ``count`` least recently used cached blocks into free ones; how many it did."""
        out = np.empty(min(count, self.num_cached), np.int32)
        self._scan.oldest(out, self.blk, self.meta)
        self.evict(out)
        return len(out)

    def evict(self, ids: Ids) -> None:
        """Turn cached blocks into free ones."""
        if len(ids):
            self.on_evict(ids)
            self.hot.evict(ids, self.blk, self.page, self.ext, self.meta)
            self.evicted += len(ids)

    def oldest_cached_seconds(self) -> float:
        """Seconds since the least recently used cached block was used; 0 if there is none."""
        block = int(self.meta[self.hot.M_LRU_OLD])
        return (self.now() - int(self.blk[block, self.hot.STAMP])) / 100 if block else 0.0

    def reclaim(self, nbytes: int, *, may_split: bool = False, may_evict: bool = True) -> int:
        """Give back up to about ``nbytes``: spares, then cached prefixes, oldest extents first.

        With ``may_split`` then also what lies unused in extents that hold blocks in use: only if
        no kernel can be reading or writing them. Returns the bytes given back.
        """
        return self.reclaimer.reclaim(nbytes, may_split=may_split, may_evict=may_evict)

    def trim(self, *, may_split: bool = True) -> int:
        """Give back all that holds nothing in use, cached prefixes included. Returns the bytes.

        A sequence of steps, each all or nothing: what was given back before a failure stays so.
        """
        return self.reclaimer.trim(may_split=may_split)

    def drop_spares(self, keep: Collection[int] = ()) -> int:
        """Give back the extents that hold nothing, but those with an id in ``keep``: the bytes."""
        return self.reclaimer.drop_spares(keep)

    # --- in the background ------------------------------------------------------------------------

    def tend(self, *, urgent: bool = False) -> bool:
        """Retire fences, let spares decay, grow ahead. Call it *without* the lock.

        ``urgent``: growth ahead alone. Returns whether there will be more to do soon.
        """
        if not urgent:
            with self.lock:
                self.poll_fences()
                self.grower.measure()
            release_excess(self)
        back_ahead(self)
        with self.lock:
            low = self.grower.set_low_water()
            if low == 0:  # else it is this thread that grows
                self.pages.prepare()
            return low > 0 or self.num_spare_extents > 0 or self.num_quarantined > 0

    # --- invariants ----------------------------------------------------------------------------

    def check(self) -> None:
        """Recount everything from the block states and compare (I1, I2, I3)."""
        from kvcached._audit import audit

        self.pages.check()
        audit(self)

    def close(self) -> None:
        """Give back all memory and addresses. Idempotent."""
        self._fences.clear()
        self.pages.close()

    def validate(self, ids: Sequence[int] | Ids) -> Ids:
        """``ids`` as int32 ``[n]``; ``InvalidInput`` or ``OwnershipError`` if they are none."""
        array = np.asarray(ids)
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise InvalidInput(f"block ids must be a list of integers, not {ids!r}")
        for block in array[(array < 0) | (array >= self.geometry.num_blocks)][:1]:
            raise self._not_owned(int(block), "used")  # before int32 makes another id of it
        return np.ascontiguousarray(array, np.int32)
