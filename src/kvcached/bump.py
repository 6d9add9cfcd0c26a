"""``Bump``: growth by one block, whose place was planned before and is written up afterwards.

What is around the driver's three calls cost a third of them, most of it the time to fetch code and
data that the driver had driven out of the processor's caches. So the pages and ids of the next
extents are set aside ahead, growth by a block is one call of compiled code that takes the next (a
bump allocator), and what it did stands in a journal. The dictionaries of the page pool, its ledger
and the backend are brought up to date from that before anybody looks at them (``settle``).

Only where a block is whole pages of one plane and the backend lets it (``Direct``); only if the
budget has the bytes. Else nothing is done, and the general way is gone (``growth.py``).
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvcached.errors import OutOfPages, PoolBroken
from kvcached.memory.base import Direct

if TYPE_CHECKING:
    from kvcached.blocks import BlockPool, Ids

_ROOM = 16  # extents planned at a time; each takes a microsecond to plan and two to write up


class Bump:
    """The journal of one block pool; ``grow`` is what ``BlockPool.alloc`` calls."""

    def __init__(self, pool: BlockPool, bound: Any) -> None:
        self._pool, self._pages, self._bound = pool, pool.pages, bound
        self._room = self._settled = 0  # rows planned, and rows that are written up
        g, backend = pool.geometry, pool.pages.backend
        self._per_block, over = divmod(g.block_bytes, g.page_bytes)
        self._journal = array("q", [0] * (bound.ROWS + 2 * _ROOM))
        self.grow: Callable[[Ids], bool] = _never
        if over or g.num_planes > 1 or self._per_block > pool.pages.max_extent_pages:
            return
        if not (isinstance(backend, Direct) and backend.direct_calls()):
            return
        self._backend: Direct = backend
        self._journal[bound.PAGES], self._journal[bound.PAGE_BYTES] = self._per_block, g.page_bytes
        self._journal[bound.BASE] = pool.pages.reservation.address
        self.grow = self._make()
        pool.pages.settle, pool.pages.close_journal = self.settle, self.close
        pool.pages.prepare = self._plan

    def _make(self) -> Callable[[Ids], bool]:
        pool, pages, grower, journal = self._pool, self._pages, self._pool.grower, self._journal
        grow_at, where, count = self._bound.grow_at, journal.buffer_info()[0], self._bound.COUNT
        nbytes, most_ahead, grown = pool.geometry.block_bytes, grower.most_ahead, pages.grown
        claim, spares, clock, ns = pages.budget.claim_if_free, pool.spares, pool.clock, _ns

        def grow(out: Ids) -> bool:
            """Take blocks into ``out``, though one is missing, by backing that; whether it did.

            Raises as ``Grower.fill``, all or nothing.
            """
            if journal[count] >= self._room and not self._plan():
                return False
            if grower.refused_until >= 0.0 or (most_ahead and grower.target() >= nbytes):
                return False  # eviction comes first, or more than a block is due
            if not claim(nbytes, ask=False):
                return False
            started, row = ns(), journal[count]
            try:
                status = grow_at(pool.where, where, out)
                if status:
                    self._raise(status)
            except BaseException as error:  # noqa: BLE001 - KeyboardInterrupt too; it is raised
                return self._undo(error, row, out)
            grown.count += 1
            grown.ns += ns() - started
            grower.demanded += 1
            spares.grew(nbytes, clock())
            if most_ahead:
                pool.on_low()
            return True

        return grow

    def _plan(self) -> bool:
        """Set the next extents' pages and ids aside; whether there are any."""
        pages, per_block, h = self._pages, self._per_block, self._bound
        run = pages.runs.best(per_block) if pages.usable else None  # closes what was open
        driver = self._backend.direct_calls()
        if run is None or run[0] % per_block or not driver:
            return False
        first, last = run[0], min(sum(run), pages.geometry.num_blocks * per_block)
        room = min(_ROOM, (last - first) // per_block)
        ids = [pages.new_id() for _ in range(room)]
        journal = self._journal
        journal[h.DRIVER], journal[h.FIRST], journal[h.COUNT] = driver, first, 0
        for row, ident in enumerate(ids):
            journal[h.ROWS + 2 * row] = ident
        if max(ids, default=0) >= len(self._pool.ext):
            self._pool.make_rows(max(ids))
        self._settled, self._room = 0, room
        return room > 0

    def settle(self) -> None:
        """Write up what was grown."""
        start, stop = self._settled, self._journal[self._bound.COUNT]
        if start < stop:
            rows = self._journal[self._bound.ROWS + 2 * start : self._bound.ROWS + 2 * stop]
            first = self._journal[self._bound.FIRST] + start * self._per_block
            self._pages.count_in(first, self._per_block, rows[::2], rows[1::2])
            self._settled = stop

    def close(self) -> None:
        """As ``settle``; what was set aside and not used is free again."""
        if self._room:
            self.settle()
            start = self._bound.ROWS + 2 * self._settled
            self._pages.drop_ids(self._journal[start : self._bound.ROWS + 2 * self._room : 2])
            self._journal[self._bound.COUNT] = self._settled = self._room = 0

    def _place(self, row: int) -> tuple[int, int]:
        return self._journal[self._bound.FIRST] + row * self._per_block, self._per_block

    def _raise(self, status: int) -> None:
        place, done = self._place(self._journal[self._bound.COUNT]), self._journal[self._bound.DONE]
        assert status != self._pool.hot.SHORT, "BlockPool: made room, but not enough"
        self._backend.raise_direct(status, place, done, self._pages.reservation)

    def _undo(self, error: BaseException, row: int, out: Ids) -> bool:
        """After growth failed: give back what there is of it, and try the general way or raise."""
        pages, journal, h = self._pages, self._journal, self._bound
        if journal[h.COUNT] > row:  # it did not fail: whoever interrupted us came after it
            raise error
        done, native, place = journal[h.DONE], journal[h.HANDLE], self._place(row)
        journal[h.DONE] = 0
        try:
            if done:
                made = (*place, native)
                self._backend.undo_direct(pages.reservation, made, done, error)
        except PoolBroken as broken:
            pages.note_broken(broken.message)
            raise
        finally:
            pages.refund(self._pool.geometry.block_bytes)
        if not isinstance(error, OutOfPages):
            raise error
        return self._pool.grower.grow_again([place], error, 1, out)


_ns = time.perf_counter_ns


def _never(out: Ids) -> bool:  # noqa: ARG001 (as ``grow`` above)
    """Where growth by one block is no different."""
    return False
