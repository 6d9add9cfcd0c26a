"""``Grower``: how a block pool gets physical memory: on demand, and ahead of it.

On demand: grow, then evict cached prefixes. A driver's cost is per handle and not per byte, so a
pool that has been growing takes a little more at once than it was asked for, if that is free.

Ahead of demand: another thread stages address runs under the lock, backs them without it (the
driver's part), and admits them under the lock again, so that nobody waits for the driver.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import numpy as np

from kvcached import planning
from kvcached.errors import BudgetExceeded, OutOfPages
from kvcached.layout import cdiv
from kvcached.runs import Extent, Run
from kvcached.stats import Timer

if TYPE_CHECKING:
    from kvcached.blocks import BlockPool, Ids

_NOTHING: Ids = np.empty(0, np.int32)
_ROUNDS = 8
_WATCH_SECONDS = 0.001, 0.005  # shortest and longest; a forward pass takes longer
_REFUSAL_SECONDS = 0.05  # after a refused claim, how long eviction comes before asking again
_LEAST_SHARE = 16  # growth ahead takes at most one part in this many of the limit


class Grower:
    """The part of a ``BlockPool`` that takes memory; it shares the pool's arrays and its lock.

    ``most_ahead`` is the most bytes that are backed ahead of demand; 0 turns that off.
    """

    def __init__(self, blocks: BlockPool, most_ahead: int) -> None:
        self._blocks, self.most_ahead = blocks, most_ahead
        self._block_bytes = blocks.geometry.block_bytes * blocks.geometry.num_planes
        self.refused_until = -1.0  # nothing was free: cached blocks of our own come first
        self._denied_until, self._denied_blocks = -1.0, 0  # others were asked for them in vain
        self._short_until = -math.inf  # there was nothing that growth ahead could have taken
        self.low_water = 0  # free blocks below which growth ahead is due
        self._used_seen = 0  # blocks in use when growth was last measured
        self.demanded = 0  # blocks that growth on demand has told the policy of since then
        self.ahead = Timer()

    # --- on demand -----------------------------------------------------------------------------

    def fill(self, out: Ids, failed: tuple[Run, OutOfPages] | None = None) -> Ids:
        """Take blocks into ``out``, though some are missing: grow, then evict cached prefixes.

        Nothing is evicted unless that, with what can be grown, is enough (I6). ``failed``: for what
        run the device was out of memory just now.
        """
        pool, count = self._blocks, len(out)
        for _ in range(_ROUNDS + 1):
            short = count - pool.num_free
            if short <= 0:
                code = pool.hot.alloc(out, pool.blk, pool.page, pool.ext, pool.meta)
                assert code == 0, "BlockPool: made room, but not enough"
                return out
            if self.refused_until < 0 or not self._evict_instead(short):
                try:
                    if failed is not None:
                        (run, error), failed = failed, None
                        done = self._grow_again([run], error, short, out)
                    else:
                        done = self._grow(short, out)
                    if done:
                        return out
                except MemoryError as error:  # ours: of the budget, the device, the address space
                    self._grow_and_evict(count, error)
        raise BudgetExceeded(f"{count} blocks could not be kept free: other threads took them")

    def _evict_instead(self, short: int) -> bool:
        """After a refusal, for a moment, cached blocks of our own go first; whether they did."""
        pool = self._blocks
        if short > pool.num_cached:
            return False
        if pool.clock() >= self.refused_until:
            self.refused_until = -1.0
            return False
        pool.evict_oldest(short)
        return True

    def secure(self, count: int, seconds: float | None = None) -> bool:
        """Whether ``count`` blocks can be had for certain, by eviction of cached ones if need be.

        Grows by what is missing; evicts nothing itself, since the caller may be about to take some
        of what is cached. What lies free is preferred to what is cached, and what nobody has to
        that of others, who may take ``seconds`` to give it; what they give later is there for the
        next call. After a refusal nobody is asked for as much, for a moment.
        """
        pool = self._blocks
        if pool.num_free < count:
            pool.poll_fences()
        for _ in range(_ROUNDS):
            if pool.num_free >= count:
                return True
            short, now = count - self._ready(), pool.clock()
            if short <= 0 and now < self.refused_until:
                return True
            if short >= self._denied_blocks and now < self._denied_until:
                return False
            if self._grow_if_free(count - pool.num_free):
                continue
            short = count - self._ready()  # after each question, since others may have acted
            if short > 0:
                answer = self._grow_patiently(short, seconds)
                if answer is None:
                    continue
                if answer.pending:
                    return self._ready() >= count
                self._denied_until, self._denied_blocks = pool.clock() + _REFUSAL_SECONDS, short
            self.refused_until = pool.clock() + _REFUSAL_SECONDS
            return self._ready() >= count
        return False

    def prepare(self, count: int) -> None:
        """Have ``count`` blocks free in one go, if that takes nothing from anybody."""
        pool = self._blocks
        short = count - pool.num_free
        if short > 0 and pool.clock() >= self.refused_until and not self._grow_if_free(short):
            self.refused_until = pool.clock() + _REFUSAL_SECONDS

    def _grow_patiently(self, wanted: int, seconds: float | None) -> BudgetExceeded | None:
        """Grow by ``wanted`` blocks, others may give for it; ``None``, or why that was refused."""
        try:
            self._grow(wanted, _NOTHING, seconds)
        except BudgetExceeded as refusal:
            return refusal
        except MemoryError as error:  # ours: the device, or the address space
            return BudgetExceeded(str(error))
        return None

    def _ready(self) -> int:
        """Blocks that can be had without growing."""
        pool = self._blocks
        return pool.num_free + pool.num_cached + pool.num_quarantined

    def _grow_if_free(self, wanted: int) -> bool:
        """Grow by ``wanted`` blocks if nobody has to give anything for it; False if not so.

        Also true, with nothing done, if something else changed while the budget was asked.
        """
        pool, pages = self._blocks, self._blocks.pages
        if self._grow_with_extra(wanted):
            return True
        try:
            runs = planning.plan(pool.geometry, pool.page, pages.runs, wanted)
            epoch, nbytes = pages.epoch, pages.bytes_of(runs)
            if not pages.budget.claim_if_free(nbytes, ask=True):
                return False
            if epoch != pages.epoch:
                pages.refund(nbytes)
                return True
            pool.attach(self._grow_claimed(runs, nbytes))
        except OutOfPages:
            return False
        self._note_demand(wanted)
        return True

    def grow_runs(self, runs: list[Run]) -> None:
        """Back these runs."""
        nbytes = self._blocks.pages.bytes_of(runs)
        self._blocks.pages.budget.claim(nbytes)
        self._blocks.attach(self._grow_claimed(runs, nbytes))

    def _grow_and_evict(self, count: int, refusal: MemoryError) -> None:
        """After growth was refused: evict, and grow by the rest."""
        pool = self._blocks
        short = count - pool.num_free
        if short > pool.num_cached:
            if pool.num_cached == 0:
                raise refusal
            try:
                self._grow(short - pool.num_cached, _NOTHING)
            except MemoryError:  # ours: then what stood in the way of all of it is what to name
                raise refusal from None
        self.refused_until = pool.clock() + _REFUSAL_SECONDS
        short = count - pool.num_free
        if 0 < short <= pool.num_cached:
            pool.evict_oldest(short)

    def _grow(self, wanted: int, out: Ids, seconds: float | None = None) -> bool:
        """Back runs that make ``wanted`` more blocks usable, all or nothing.

        The claim may release the lock; if what is backed changed meanwhile, the claim is returned
        and the caller looks again. So it does if blocks were not taken into ``out`` in passing,
        which is what is returned.
        """
        if self.most_ahead and self._grow_with_extra(wanted):
            return False
        pool, pages = self._blocks, self._blocks.pages
        runs = planning.plan(pool.geometry, pool.page, pages.runs, wanted)
        try:
            extents = self._claim_and_grow(runs, seconds)
        except OutOfPages as error:
            return self._grow_again(runs, error, wanted, out)
        return self._take_from(extents, wanted, out)

    def _take_from(self, extents: list[Extent], wanted: int, out: Ids) -> bool:
        """Count extents in that were grown for ``wanted`` blocks; whether ``out`` has its own."""
        pool = self._blocks
        if not extents:
            return False
        self._note_demand(wanted)
        if len(extents) == 1:
            return pool.attach_and_take(extents[0], out)
        pool.attach(extents)
        return False

    def _claim_and_grow(self, runs: list[Run], seconds: float | None = None) -> list[Extent]:
        """The new extents: none if what is backed changed while the claim waited."""
        pages = self._blocks.pages
        epoch, nbytes = pages.epoch, pages.bytes_of(runs)
        pages.budget.claim(nbytes, seconds=seconds)
        if epoch != pages.epoch:
            pages.refund(nbytes)
            return []
        return self._grow_claimed(runs, nbytes)

    def _note_demand(self, wanted: int) -> None:
        pool = self._blocks
        self.demanded += wanted
        pool.spares.grew(wanted * self._block_bytes, pool.clock())
        if self.most_ahead:
            pool.on_low()

    def _grow_again(self, runs: list[Run], error: OutOfPages, wanted: int, out: Ids) -> bool:
        """Once more after the device was out of memory, if it may have more by now.

        What it would not release before is tried again, and others are asked through the budget.
        Spares and cached prefixes of our own are no help here: the free blocks in them are counted
        before anything is backed, and cached ones are evicted in place if that is enough
        (``_grow_and_evict``). To unmap an extent and back another with its bytes gains no block,
        and somebody outside could take them in between.
        """
        pages = self._blocks.pages
        freed = pages.shrink([])
        if not pages.budget.report_out_of_memory(pages.bytes_of(runs)) and not freed:
            raise error
        try:
            extents = self._claim_and_grow(runs)
        except BudgetExceeded:  # nobody can give: what the device said is what matters
            raise error from None
        return self._take_from(extents, wanted, out)

    def _grow_with_extra(self, wanted: int) -> bool:
        """Grow by more than is wanted, if the pool has been growing and the lease covers it."""
        pool, pages = self._blocks, self._blocks.pages
        slack = pages.budget.slack_bytes // self._block_bytes - 1  # a block may need a page more
        extra = min(self.target() // self._block_bytes, slack - wanted)
        if extra <= 0:
            return False
        try:
            runs = planning.plan(pool.geometry, pool.page, pages.runs, wanted + extra)
            nbytes = pages.bytes_of(runs)
            if not pages.budget.claim_if_free(nbytes, ask=False):
                return False
            pool.attach(self._grow_claimed(runs, nbytes))
        except OutOfPages:
            return False  # then what is wanted alone, with all that can be done for it
        self._note_demand(wanted)
        return True

    def _grow_claimed(self, runs: list[Run], nbytes: int) -> list[Extent]:
        pages = self._blocks.pages
        try:
            return pages.grow(runs)
        except BaseException:  # the claim goes back, whatever it was
            pages.refund(nbytes)
            raise

    # --- ahead of demand -------------------------------------------------------------------------

    def target(self) -> int:
        """Bytes that should be ready, or may stay so, though nothing is in them."""
        if not self.most_ahead:
            return 0
        pool = self._blocks
        wanted = pool.spares.target(pool.clock())
        return min(wanted, self.most_ahead, pool.pages.budget.limit_bytes // _LEAST_SHARE)

    def measure(self) -> None:
        """Tell the policy how much ready memory went into use since the last time."""
        pool = self._blocks
        used = pool.num_used
        gone = used - self._used_seen - self.demanded
        self._used_seen, self.demanded = used, 0
        if gone > 0:
            pool.spares.grew(gone * self._block_bytes, pool.clock())

    def set_low_water(self) -> int:
        """Note, and return, how many free blocks there should be lest growth ahead is due."""
        self.low_water = self.target() // self._block_bytes * 3 // 4
        return self.low_water

    def seconds_ready(self) -> float:
        """How soon to look again whether ready blocks run low; 0 if they do. Needs no lock.

        Half of what they last at the rate of the last growth, but soon, for growth begins faster
        than its mean tells. ``inf`` if none are kept ready.
        """
        if not self.low_water:
            return math.inf
        pool, (shortest, longest) = self._blocks, _WATCH_SECONDS
        above = pool.num_free - self.low_water
        if above < 0:
            return max(0.0, self._short_until - pool.clock())
        seconds = above * self._block_bytes / max(pool.spares.rate, 1.0) / 2
        return min(longest, max(shortest, seconds))

    def stage(self) -> tuple[list[Extent], int]:
        """What to back now, and the bytes claimed for it; nothing if enough is ready.

        The claim may release the lock, but asks nobody to give back.
        """
        pool, pages = self._blocks, self._blocks.pages
        target = self.target() // self._block_bytes
        wanted = target - pool.num_free
        if wanted <= target // 4 or not pages.usable:
            return [], 0
        epoch, nbytes = pages.epoch, wanted * self._block_bytes
        nbytes = cdiv(nbytes, pool.geometry.page_group_bytes) * pool.geometry.page_group_bytes
        self._short_until = pool.clock() + _REFUSAL_SECONDS
        if not pages.budget.claim_if_free(nbytes, ask=True):
            return [], 0
        try:
            same = epoch == pages.epoch and pages.usable  # others may have had the lock
            runs = self._runs_within(wanted, nbytes) if same else []
        except BaseException:  # the claim goes back, whatever it was
            pages.refund(nbytes)
            raise
        taken = pages.bytes_of(runs)
        if taken < nbytes:
            pages.refund(nbytes - taken)
        if not runs:
            return [], 0
        self._short_until = -math.inf
        return pages.stage(runs), taken

    def _runs_within(self, wanted: int, nbytes: int) -> list[Run]:
        """Runs for up to ``wanted`` blocks that take at most ``nbytes``; none if that is not so."""
        pool = self._blocks
        try:
            runs = planning.plan(pool.geometry, pool.page, pool.pages.runs, wanted)
        except OutOfPages:  # the address space is nearly used up
            return []
        return runs if pool.pages.bytes_of(runs) <= nbytes else []

    def admit(self, extents: list[Extent], started: int) -> None:
        """Staged extents have been backed."""
        self._blocks.pages.admit(extents)
        self._blocks.attach(extents)
        self.ahead.add(started, len(extents))

    def abandon(self, extents: list[Extent], nbytes: int) -> None:
        """Staged extents could not be backed."""
        self._blocks.pages.unstage(extents)
        self._blocks.pages.refund(nbytes)


def back_ahead(blocks: BlockPool) -> None:
    """Grow ahead if that is due. For a thread that does not hold the pool's lock."""
    with blocks.lock:
        blocks.grower.measure()
        extents, nbytes = blocks.grower.stage()
    if not extents:
        return
    started = time.perf_counter_ns()
    try:
        blocks.pages.back(extents)
    except BaseException as error:  # addresses and claim go back, whatever it was
        with blocks.lock:
            blocks.grower.abandon(extents, nbytes)
            if isinstance(error, OutOfPages):  # nobody asked for it, so it is nobody's failure
                blocks.spares.forget()
                return
        raise
    with blocks.lock:
        blocks.grower.admit(extents, started)
