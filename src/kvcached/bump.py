"""``Bump``: growth whose place was planned before, and which is written up afterwards.

What is around the driver's calls cost a third of them, most of it the time to fetch code and data
that the driver had driven out of the processor's caches. So a run of pages and the ids of the next
extents are set aside ahead, growth is one call of compiled code that takes the next of them (a bump
allocator), and what it did stands in a journal. The dictionaries of the page pool, its ledger and
the backend are brought up to date from that before anybody looks at them (``settle``).

Only where a block is whole pages of one plane and the backend lets it (``Direct``); only into one
run, and if the budget has the bytes. Else nothing is done, and the general way is gone
(``growth.py``).
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from kvcached.errors import OutOfPages, PoolBroken
from kvcached.layout import cdiv
from kvcached.memory.base import Direct, Made

if TYPE_CHECKING:
    from kvcached.blocks import BlockPool, Ids

_INT32 = np.dtype(np.int32)
_ROOM, _MOST_ROOM = 8, 64  # extents planned at a time, and for growth that needs more of them


class Bump:
    """The journal of one block pool; ``grow`` is what ``BlockPool.alloc`` calls."""

    def __init__(self, pool: BlockPool, bound: Any) -> None:
        self._pool, self._pages, self._bound = pool, pool.pages, bound
        self._room = self._settled = self._end = 0  # rows planned, rows written up, last page
        self._journal = array("q", [0] * (bound.ROWS + bound.ROW_WIDTH * _MOST_ROOM))
        self._ready: list[Ids] = []  # arrays for one block's id
        self.grow: Callable[[int, int], Ids | None] = _never
        g, backend = pool.geometry, pool.pages.backend
        self._per_block, over = divmod(g.block_bytes, g.page_bytes)
        self._most = pool.pages.max_extent_pages
        self._most -= self._most % max(1, self._per_block)  # an extent ends where a block does
        if over or g.num_planes > 1 or self._most == 0:
            return
        if not (isinstance(backend, Direct) and backend.direct_calls()):
            return
        self._backend: Direct = backend
        self._journal[bound.PAGE_BYTES] = g.page_bytes
        self._journal[bound.BASE] = pool.pages.reservation.address
        self.grow = self._make()
        pool.pages.settle, pool.pages.close_journal = self.settle, self.close
        pool.pages.prepare = self._prepare

    def _make(self) -> Callable[[int, int], Ids | None]:
        pool, grower, journal, most = self._pool, self._pool.grower, self._journal, self._most
        grow_at, where = self._bound.grow_at, journal.buffer_info()[0]
        full, page, per_block = self._bound.COUNT, self._bound.PAGE, self._per_block
        block_bytes, most_ahead = pool.geometry.block_bytes, grower.most_ahead
        claim, spares, clock = pool.pages.budget.claim_if_free, pool.spares, pool.clock
        grown, clock_ns, empty = pool.pages.grown, time.perf_counter_ns, np.empty
        burst, time_constant, ready = spares.burst, spares.time_constant, self._ready

        def grow(count: int, short: int) -> Ids | None:
            """``count`` blocks, ``short`` of which must be backed first; ``None`` if not so.

            Raises as ``Grower.fill``, all or nothing.
            """
            pages, row = short * per_block, journal[full]
            rows = 1 if pages <= most else cdiv(pages, most)
            if row + rows > self._room or journal[page] + pages > self._end:
                if not self._plan(pages, rows):
                    return None
                row = 0
            if grower.refused_until >= 0.0 or (most_ahead and grower.target() >= block_bytes):
                return None  # eviction comes first, or more than what is missing is due
            nbytes = short * block_bytes
            if not claim(nbytes, ask=False):
                return None
            out = ready.pop() if count == 1 and ready else empty(count, _INT32)
            started = clock_ns()
            try:
                status = grow_at(pool.where, where, pages, most, out)
                if status:
                    self._raise(status, pages)
            except BaseException as error:  # noqa: BLE001 - KeyboardInterrupt too; it is raised
                return self._undo(error, row, short, out)
            grown.count += rows
            grown.ns += clock_ns() - started
            grower.demanded += short
            now = clock()
            if now - spares.updated > burst:
                spares.advance(now)
            spares.rate += nbytes / time_constant
            spares.last_growth = now
            if most_ahead:
                pool.on_low()
            return out

        return grow

    def _prepare(self) -> None:
        """Have a plan, if there is none."""
        if not self._room:
            self._plan()

    def _plan(self, wanted: int = 1, rows: int = 1) -> bool:
        """Set a run for ``wanted`` pages aside, and ids for extents; whether there is one."""
        pages, per_block, h = self._pages, self._per_block, self._bound
        run = pages.runs.best(max(wanted, per_block)) if pages.usable else None  # closes the last
        driver, room = self._backend.direct_calls(), _ROOM if rows == 1 else _ROOM + rows
        if run is None or run[0] % per_block or not driver or room > _MOST_ROOM:
            return False
        first, end = run[0], min(sum(run), pages.geometry.num_blocks * per_block)
        if end - first < wanted:
            return False
        if wanted > per_block and pages.runs.best(per_block) != run:
            end = first + wanted  # what is wanted later may fit better elsewhere
        ids, journal, width = pages.new_ids(room), self._journal, h.ROW_WIDTH
        journal[h.DRIVER], journal[h.PAGE], journal[h.COUNT] = driver, first, 0
        journal[h.ROWS : h.ROWS + width * room : width] = array("q", ids)
        if max(ids) >= len(self._pool.ext):
            self._pool.make_rows(max(ids))
        self._settled, self._room, self._end = 0, room, end
        while len(self._ready) < _ROOM:
            self._ready.append(np.empty(1, _INT32))
        return True

    def settle(self) -> None:
        """Write up what was grown."""
        start, stop = self._settled, self._journal[self._bound.COUNT]
        if start < stop:
            self._pages.count_in(self._ids(start, stop), self._made(start, stop))
            self._settled = stop

    def close(self) -> None:
        """As ``settle``; what was set aside and not used is free again."""
        if self._room:
            self.settle()
            self._pages.drop_ids(self._ids(self._settled, self._room)[::-1])
            self._journal[self._bound.COUNT] = self._settled = self._room = 0

    def _ids(self, start: int, stop: int) -> array[int]:
        first, width = self._bound.ROWS, self._bound.ROW_WIDTH
        return self._journal[first + width * start : first + width * stop : width]

    def _made(self, start: int, stop: int) -> list[Made]:
        first, width = self._bound.ROWS, self._bound.ROW_WIDTH
        rows = self._journal[first + width * start : first + width * stop]
        return list(zip(rows[1::width], rows[2::width], rows[3::width], strict=True))

    def _raise(self, status: int, pages: int) -> None:
        """What the status of the call stands for after which no other was made."""
        journal, h, rows = self._journal, self._bound, cdiv(pages, self._most)
        assert status != self._pool.hot.SHORT, "BlockPool: made room, but not enough"
        done, row = journal[h.DONE], journal[h.COUNT]
        if done < 2 * rows:
            (place,) = self._made(row + done // 2, row + done // 2 + 1)
            self._backend.raise_direct(status, done % 2, self._pages.reservation, place[:2])
        place_of_all = journal[h.PAGE], pages
        self._backend.raise_direct(status, 2, self._pages.reservation, place_of_all)

    def _undo(self, error: BaseException, row: int, short: int, out: Ids) -> Ids:
        """After growth failed: give back what there is of it, and try the general way or raise."""
        pages, journal, h = self._pages, self._journal, self._bound
        if journal[h.COUNT] > row:  # it did not fail: whoever interrupted us came after it
            raise error
        done, journal[h.DONE] = journal[h.DONE], 0
        try:
            if done:
                made = self._made(row, row + (done + 1) // 2)
                self._backend.undo_direct(pages.reservation, made, done // 2, error)
        except PoolBroken as broken:
            pages.note_broken(broken.message)
            raise
        finally:
            pages.refund(short * self._pool.geometry.block_bytes)
        if not isinstance(error, OutOfPages):
            raise error
        run = journal[h.PAGE], short * self._per_block
        return self._pool.grower.fill(out, (run, error))


def _never(count: int, short: int) -> None:
    """Where no growth is made so."""
