"""``ElasticBlocks``: the blocks of one tenant, without sequences. What an engine plugs into.

A block pool, the budget that it draws on, and the thread that looks after both. ``KVCache`` adds
sequences and prefixes; engines that have their own of those (vLLM) hold this and nothing more.

One lock guards one tenant. Calls come from the engine's thread; the budget's thread takes the same
lock to answer reclaim requests, and the caretaker to let spares decay.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from kvcached.arguments import not_open
from kvcached.blocks import BlockPool
from kvcached.broker.budget import Budget
from kvcached.caretaker import Caretaker, WeakTenant
from kvcached.config import Config, parse_size
from kvcached.errors import KvcachedError
from kvcached.layout import Geometry
from kvcached.memory.base import Fence, MemoryBackend
from kvcached.memory.fences import PassedFence, fence_on, wait_for
from kvcached.pauses import Pauses
from kvcached.resources import make_pages, release
from kvcached.snapshot import free_blocks_hint, page_runs, take_report, take_stats
from kvcached.spares import SparePolicy
from kvcached.stats import CacheStats, LimitRecord, TenantReport

_log = logging.getLogger(__name__)
_live: weakref.WeakSet[ElasticBlocks] = weakref.WeakSet()
_LEAVE_SECONDS = 5.0  # how long ``close`` waits for the calls of other threads


def _after_fork() -> None:
    """A thread that is not in the child may have held a lock: there each call gets its error."""
    for blocks in list(_live):
        blocks._lock = threading.RLock()  # noqa: SLF001 - our own


os.register_at_fork(after_in_child=_after_fork)


class ElasticBlocks:
    """Blocks over elastic memory, for one tenant of a budget.

    Parameters
    ----------
    geometry:
        Where blocks lie; ``backend.page_bytes`` is its page.
    backend:
        Where memory comes from.
    budget:
        What may be backed. Owned: closed with this object, or if it cannot be made.
    name:
        How other processes see this tenant.
    config:
        Settings.
    owns_backend:
        Whether ``close`` shuts the backend down.

    Raises ``BudgetExceeded``, ``OutOfPages`` or ``DriverError`` if not even the null block can be
    backed.
    """

    def __init__(
        self,
        geometry: Geometry,
        *,
        backend: MemoryBackend,
        budget: Budget,
        name: str,
        config: Config,
        owns_backend: bool = False,
    ) -> None:
        self.geometry, self.backend, self.name, self.config = geometry, backend, name, config
        self._lock, self._pid = threading.RLock(), os.getpid()
        self._pauses = Pauses(self._lock)
        self._closed = False
        self._inside, self._left = 0, threading.Condition(self._lock)
        self._matching = False  # the engine knows of cached blocks that it is about to take
        self._closing = threading.Lock()
        self._budget = budget
        try:
            self._make_blocks()
        except BaseException:  # whatever went wrong, what was granted does not stay behind
            budget.close()
            raise
        self._parts = self._pid, self._blocks, budget, owns_backend
        self._finalizer = weakref.finalize(self, release, *self._parts)
        _live.add(self)
        self._caretaker = Caretaker(self)
        self._blocks.on_low = self._caretaker.hurry

    def _make_blocks(self) -> None:
        pages = make_pages(self.backend, self.geometry, self._budget, self.config)
        ahead = parse_size(self.config.ahead, total=self._budget.limit_bytes)
        spares = SparePolicy(self.config.spare_seconds)
        try:
            self._blocks = BlockPool(pages, spares=spares, lock=self._lock, most_ahead=ahead)
            self._prepare()
            self._budget.attach(WeakTenant(self), self._lock)  # last: it may be called at once
        except BaseException:  # the reservation, and what the budget granted, too
            pages.close()
            raise

    def _prepare(self) -> None:
        """For subclasses: make what must be there before the budget may call."""

    @property
    def num_free_blocks_hint(self) -> int:
        """Blocks that could be taken without reclaim from others: a hint, others may be faster."""
        with self._lock:
            self._require_open()
            return free_blocks_hint(self._blocks)

    # --- memory ---------------------------------------------------------------------------------

    def trim(self, *, fence: Fence | None = None) -> int:
        """Give back all memory that holds no block in use, cached prefixes too. Returns the bytes.

        Extents that are only partly in use are split: contents, addresses and block ids stay. No
        kernel may touch this cache meanwhile: call it between steps, and with a ``fence`` if work
        may still be queued; it is waited for first (see ``fence``).
        """
        wait_for(fence)
        with self._entered():
            return self._blocks.trim()

    def evict_prefixes(self, nbytes: int | str) -> int:
        """Give back about ``nbytes`` of spares and cached prefixes, the oldest first.

        A share (``"50%"``) is one of what is backed. Returns the bytes that came back.
        """
        with self._entered():
            size = parse_size(nbytes, total=self._blocks.pages.backed_bytes)
            return self._blocks.reclaim(size)

    def set_limit(self, limit: int | str) -> LimitRecord:
        """Set the most physical memory this cache may hold; gives back at once what it can.

        A share (``"50%"``) is one of the limit that holds now. Blocks in use stay:
        ``LimitRecord.applied`` tells whether the limit holds already.
        """
        size = parse_size(limit, total=self._budget.limit_bytes)
        with self._entered():
            return self._budget.set_limit(size)

    def fence(self, stream: int | None = None) -> Fence:
        """A point behind the work that is queued now on ``stream`` (default: torch's current one).

        On the CPU it has passed already: work is done when a call returns.
        """
        self._require_open()
        return fence_on(self.backend, stream)

    @contextmanager
    def idle(self, *, fence: Fence | None = None) -> Iterator[None]:
        """Inside, no kernel reads or writes this cache, so extents may be split for a peer.

        With a ``fence`` that is so once it has passed. An engine that does this between its steps
        is waited for: a peer's request for memory is met at the next such pause.
        """
        before = self._pauses.enter(fence if fence is not None else PassedFence())
        try:
            yield
        finally:
            self._pauses.leave(before)

    def reclaim(self, nbytes: int, *, patient: bool = False, most: int | None = None) -> int:
        """For the budget (``Tenant.reclaim``): give back up to ``nbytes`` now.

        ``most``: see ``Reclaimer.reclaim``.
        """
        with self._lock:
            if self._closed:
                return 0
            self._blocks.spares.forget()  # or growth ahead would take it again
            busy = self._inside > 0  # a call is under way; its thread may be waiting for us
            try:
                now = self._pauses.now() and (patient or not busy)
                freed = self._blocks.reclaimer.reclaim(
                    nbytes, may_split=now, may_evict=not self._matching, most=most
                )
                wait = patient and not busy and freed < nbytes and self._blocks.splits_would_help()
                if wait and self._pauses.wait() and not self._closed:
                    freed += self._blocks.reclaim(nbytes - freed, may_split=True)
                return freed
            except KvcachedError:  # the peer that asks can do nothing about it; the owner will see
                _log.exception("%s: reclaim of %d bytes failed", self.name, nbytes)
                return 0

    def take_care(self, *, urgent: bool = False) -> bool:
        """For the caretaker, without the lock: see ``BlockPool.tend``."""
        return self.state == "open" and self._blocks.tend(urgent=urgent)

    def seconds_ready(self) -> float:
        """For the caretaker, without the lock: see ``Grower.seconds_ready``."""
        return self._blocks.grower.seconds_ready()

    def report(self) -> TenantReport:
        """For the budget (``Tenant.report``): what is held."""
        with self._lock:
            idle = self._pauses.now() and not self._inside
            return take_report(self._blocks, idle=idle, pauses=self._pauses.expected())

    def _num_sequences(self) -> int:
        """For subclasses: how many sequences hold blocks, as far as that is known here."""
        return 0

    def stats(self) -> CacheStats:
        """A snapshot; see ``CacheStats``."""
        with self._lock:
            self._require_open()
            return take_stats(self.name, self._blocks, self._num_sequences())

    def page_runs(self) -> list[tuple[int, int, str]]:
        """Backed runs in address order, as (first page, pages, state); neighbours are merged."""
        with self._lock:
            self._require_open()
            return page_runs(self._blocks)

    # --- life cycle ----------------------------------------------------------------------------

    def check(self) -> None:
        """Assert the invariants of everything this cache owns (docs/invariants.md). Slow."""
        with self._lock:
            self._require_open()
            self._blocks.check()
            self._check_contents()
            self._budget.check()
            held = self._blocks.pages.backed_bytes
            assert held <= self._budget.lease_bytes, "I1: backed more than leased"

    def _check_contents(self) -> None:
        """For subclasses: check what lies in the blocks."""

    def close(self) -> None:
        """Give back everything: memory, addresses, the lease. Views and sequences die.

        Idempotent. If the backend refuses, the error is raised; call again to give back the rest.
        """
        if os.getpid() != self._pid:
            return  # the memory is the parent's
        with self._lock:  # another thread's call may be waiting for the budget, without the lock
            self._closed = True
            self._left.wait_for(lambda: self._inside == 0, _LEAVE_SECONDS)
        self._caretaker.end()
        with self._closing:
            if self._finalizer.alive:
                release(*self._parts)
                self._finalizer.detach()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def state(self) -> str:
        """``"open"``, ``"closed"``, or ``"of process <pid>"`` in a child of it."""
        if os.getpid() != self._pid:
            return f"of process {self._pid}"
        return "closed" if self._closed else "open"

    @contextmanager
    def _entered(self) -> Iterator[None]:
        with self._lock:
            self._require_open()
            self._inside += 1
            try:
                yield
            finally:
                self._inside -= 1
                if self._closed:
                    self._left.notify_all()
            if self.config.check and not self._closed:
                self.check()

    def _require_open(self) -> None:
        if self._closed or os.getpid() != self._pid:
            raise not_open(self.name, self._pid)
