"""``EngineBlocks``: the blocks of one vLLM engine, as its scheduler uses them.

The scheduler's thread holds the lock while it schedules and while it takes in results; the budget's
thread gives memory back only between the two. A step that has been scheduled and whose result is
not in yet may still touch blocks that were freed meanwhile: they wait for it (``StepFence``).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from kvcached.elastic import ElasticBlocks
from kvcached.engines.vllm.turns import Turns
from kvcached.errors import KvcachedError
from kvcached.memory.base import Fence

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ids = NDArray[np.int32]


_log = logging.getLogger("vllm.kvcached")
_BUSY_SECONDS, _IDLE_SECONDS = 0.02, 0.25
"""How long others may take to give memory: in one pass while requests run here, while none do."""
_PAUSE_SECONDS = 0.005
_QUIET_SECONDS = 0.5
_DEBT_SECONDS = 1.0
"""How long an engine above its share lets nobody in, after others asked in vain."""


class StepFence:
    """Passed when ``steps`` results are in, and then, if asked for, all that was queued by then."""

    def __init__(self, tenant: EngineBlocks, steps: int) -> None:
        self._tenant, self._steps = tenant, steps
        self._tail: Fence | None = None

    def passed(self) -> bool:
        """See ``Fence.passed``."""
        tenant = self._tenant
        make = tenant.make_tail
        if tenant.steps_done < self._steps:
            make = tenant.make_idle_tail if tenant.is_quiet else None
            if make is None:
                return False
        if self._tail is None and make is not None:
            self._tail = make()
        return self._tail is None or self._tail.passed()


class EngineBlocks(ElasticBlocks):
    """See the module's docstring. Parameters are those of ``ElasticBlocks``, and these.

    Parameters
    ----------
    make_tail:
        Makes a fence behind what the workers have queued; for engines whose kernels run on after
        a step's result is known.
    make_idle_tail:
        The same, for where vLLM may leave a result where it is until the next request comes: it
        stands in for the result when nothing has happened for a while.
    handles:
        How many handles of the driver stand behind one of the backend's.
    """

    def __init__(
        self,
        *args: Any,
        make_tail: Callable[[], Fence] | None = None,
        make_idle_tail: Callable[[], Fence] | None = None,
        handles: int = 1,
        **more: Any,
    ) -> None:
        self.steps_scheduled = self.steps_done = 0
        self.make_tail, self.make_idle_tail = make_tail, make_idle_tail
        self._handles = handles
        self._last_pass = time.monotonic()
        self._owed, self._owed_until = 0, -1.0
        self._patience = _BUSY_SECONDS
        self._fence: StepFence | None = None
        self.keeps_prefixes = False
        """Whether vLLM's reset of its prefix cache is one that is to leave the prefixes."""
        super().__init__(*args, **more)
        self.num_available = self.count_available()
        """As ``count_available`` says, between its calls."""

    def _prepare(self) -> None:
        """See ``ElasticBlocks._prepare``."""
        planes = self.geometry.num_planes
        self.turns = Turns(self._lock, self.name, planes * self._handles,
                           planes * self.geometry.block_bytes)  # fmt: skip

    @contextmanager
    def scheduling(self, expected: int = 0) -> Iterator[None]:
        """Around one pass of the scheduler: no cached block goes that it may have matched.

        ``expected``: blocks that it may take for requests that start. Memory for them is grown at
        once if it is free: a call for each would cost the driver's time for each.
        """
        with self.turns.step():
            self._last_pass, self._patience = time.monotonic(), _BUSY_SECONDS
            if self.lets_in:
                self._blocks.grower.prepare(expected)
            self._matching = True  # not before: growth may fail
            self.num_available = self.count_available()
            try:
                yield
            finally:
                self._matching = False
                self.steps_scheduled += 1
                self._fence = None

    @contextmanager
    def updating(self, *, step: bool) -> Iterator[None]:
        """Around what changes blocks between passes; ``step``: a step's result is taken in."""
        with self.turns.step():
            if step:
                self.steps_done += 1
            yield
            self._settle()
            self.num_available = self.count_available()

    def _settle(self) -> None:
        """Retire fences, and pay of what is owed what takes no time to speak of.

        The engine goes on if the memory cannot be given back.
        """
        may_evict = not self._matching  # a request may end while the scheduler looks
        try:
            self._blocks.poll_fences()
            if self._owed and not self._closed:
                most = self.turns.part_extents
                some = partial(self._blocks.reclaimer.reclaim, may_split=False, may_evict=may_evict,
                               most=most)  # fmt: skip
                given = self.turns.part(min(self._owed, self.turns.part_bytes), some)
                self._owed = max(0, self._owed - given)
        except KvcachedError:  # nobody here has asked for it; the next growth meets it again
            _log.exception("%s: memory could not be given back", self.name)
            self._owed = 0

    @property
    def is_quiet(self) -> bool:
        """Whether the scheduler has not looked for a while."""
        return not self._matching and time.monotonic() - self._last_pass > _QUIET_SECONDS

    # --- others ----------------------------------------------------------------------------------

    def reclaim(self, nbytes: int, *, patient: bool = False, most: int | None = None) -> int:
        """See ``ElasticBlocks.reclaim``.

        ``patient`` means that we hold more than our share, and who asks less than its own. What
        could not be given is owed: it goes back as requests end, and none is let in meanwhile.
        Between two parts a step that waits for the lock may have it.
        """
        with self._lock:
            most = most or self.turns.part_extents
            freed = self.turns.give(nbytes, partial(super().reclaim, most=most))
            if patient:
                self._owed = max(0, nbytes - freed)
                self._owed_until = self._blocks.clock() + _DEBT_SECONDS
            return freed

    @property
    def lets_in(self) -> bool:
        """Whether new requests may start: not while others wait for their share of the memory."""
        if self._owed and self._blocks.clock() > self._owed_until:
            self._owed = 0
        return not self._owed and not self.turns.giving

    # --- blocks ----------------------------------------------------------------------------------

    def secure(self, count: int, *, running: bool = True) -> bool:
        """Whether ``take(count)`` is certain to succeed. Grows; may wait for others to give.

        ``running``: the blocks are for a request that runs: without them one is preempted. For one
        that is to start while others run nobody waits: it starts when the memory has come.
        """
        if self._blocks.num_free >= count:
            self.num_available = max(self.num_available, count)  # counted in bytes, it may be less
            return True
        with self._lock:
            busy = self._blocks.num_used > 0
            seconds = (self._patience if running else 0.0) if busy else _IDLE_SECONDS
            began = time.monotonic()
            done = self._blocks.secure(count, seconds)
            if seconds and busy:
                self._patience = max(0.0, self._patience - (time.monotonic() - began))
            if not (done or busy):
                self._left.wait(_PAUSE_SECONDS)  # or vLLM asks again at once, and again
            self.num_available = max(self.num_available, count) if done else self.count_available()
            return done

    def take(self, count: int) -> Ids:
        """``count`` blocks, int32."""
        with self._lock:
            ids = self._blocks.take(count)
            self.num_available -= count  # last: what was not secured may be refused
            return ids

    def give(self, ids: Ids, named: NDArray[np.bool_]) -> None:
        """Free blocks, those to be evicted first, first. ``named``: a prefix names them."""
        with self._lock:
            self._blocks.keep_all(ids, named)
            self._blocks.free(ids, self._in_flight())
            self.num_available += len(ids)
        self._caretaker.wake()

    def acquire(self, ids: Ids) -> None:
        """Take cached blocks into use."""
        with self._lock:
            self._blocks.acquire(ids)
            self.num_available -= len(ids)

    def _in_flight(self) -> Fence | None:
        """A fence behind the steps whose results are not in yet; ``None`` if there are none."""
        if self.steps_done >= self.steps_scheduled and self.make_tail is None:
            return None
        if self._fence is None:
            self._fence = StepFence(self, self.steps_scheduled)
        return self._fence

    # --- counts ----------------------------------------------------------------------------------

    def count_available(self) -> int:
        """Blocks that could be had: free or cached, or backed if nobody else is faster.

        vLLM asks a hundred times a step, so ``num_available`` is counted once a pass, and kept up.
        """
        pool, budget, g = self._blocks, self._blocks.pages.budget, self.geometry
        unused = g.num_blocks - 1 - pool.num_used
        left = max(0, budget.limit_bytes - budget.claimed_bytes) // (g.block_bytes * g.num_planes)
        return min(unused, left + pool.num_free + pool.num_cached + pool.num_quarantined)

    @property
    def num_used(self) -> int:
        """Blocks in use, the null block not counted."""
        return self._blocks.num_used

    def listed(self) -> list[int]:
        """Ids of the blocks that are free or cached."""
        hot, blk = self._blocks.hot, self._blocks.blk
        state = blk[:, hot.STATE]
        ids = np.flatnonzero((state == hot.FREE) | (state == hot.CACHED))
        return [int(block) for block in ids]

    def on_evict(self, call: Callable[[Ids], None]) -> None:
        """Call ``call`` with cached blocks before they are reused or lose their memory."""
        self._blocks.on_evict = call

    def forget(self) -> int:
        """Evict all cached blocks and give the memory back. Returns the bytes.

        No prefix names the blocks that wait for a step either: they are free once it is done.
        """
        hot, blk = self._blocks.hot, self._blocks.blk
        with self._lock:
            blk[blk[:, hot.STATE] == hot.QUARANTINED, hot.KEEP] = 0
            return self._blocks.trim(may_split=False)

    def shed(self) -> int:
        """Give back the memory that holds nothing, and leave the prefixes. Returns the bytes."""
        with self._lock:
            self._blocks.spares.forget()  # or growth ahead would take it again
            return self._blocks.drop_spares()
