"""``KVCache``: what an engine of your own holds. Sequences, block tables, slots and tensor views.

One lock guards one cache. Calls come from the engine's thread; the budget's thread takes the same
lock to answer reclaim requests, and the caretaker to let spares decay.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Iterator
from collections.abc import Sequence as ListLike
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from kvcached.arguments import check_arguments, check_terms, not_open
from kvcached.blocks import BlockPool
from kvcached.broker.budget import Budget
from kvcached.caretaker import Caretaker, WeakTenant
from kvcached.config import Config, parse_size
from kvcached.errors import InvalidInput, KvcachedError
from kvcached.layout import CacheSpec, Geometry, cdiv
from kvcached.memory.base import Fence, MemoryBackend
from kvcached.memory.fences import PassedFence, fence_on, wait_for
from kvcached.pages import PagePool
from kvcached.pauses import Pauses
from kvcached.prefix import PrefixIndex, contents_key
from kvcached.resources import make_backend, make_budget, make_pages, release
from kvcached.sequence import Sequence, read_tokens, token_array
from kvcached.sequences import SequenceStore
from kvcached.snapshot import free_blocks_hint, take_report, take_stats
from kvcached.spares import SparePolicy
from kvcached.stats import CacheStats, LimitRecord, TenantReport

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = ["CacheSpec", "KVCache", "Sequence"]
_log = logging.getLogger(__name__)
_LEAVE_SECONDS = 5.0  # how long ``close`` waits for the calls of other threads


class KVCache:
    """An elastic KV cache for one model on one device.

    Construction reserves addresses and backs one block, nothing else.

    Parameters
    ----------
    spec:
        What a block holds.
    device:
        ``"cpu"``, ``"cuda"``, ``"cuda:1"``.
    name:
        How other processes see this tenant; default ``pid-<pid>``.
    max_tokens:
        Address space, in tokens. Costs nothing until used; may exceed the device's memory.
    limit:
        Most physical memory (``"256MiB"``, ``"40%"`` of the budget, bytes); default: the budget.
    floor, weight:
        Memory that is never reclaimed for others, and the share of what lies above all floors. They
        mean something between processes only: a ``budget`` that is given has its own.
    prefix_caching:
        Keep freed blocks whose tokens are known until their memory is needed.
    model:
        What the model is called, with its revision: part of each prefix's key, as ``spec`` is.
    budget, backend:
        Use these instead of the broker and the device's own backend. The caller closes a backend
        that it gives; a budget belongs to one cache and is closed with it.
    config:
        Settings; default: the environment.

    Raises
    ------
    InvalidInput, BackendUnavailable, BudgetExceeded, OutOfPages, BrokerUnavailable, NameTaken
    """

    def __init__(
        self,
        spec: CacheSpec,
        *,
        device: str = "cpu",
        name: str | None = None,
        max_tokens: int = 1 << 20,
        limit: int | str | None = None,
        floor: int | str = 0,
        weight: float = 1.0,
        prefix_caching: bool = True,
        model: str = "",
        budget: Budget | None = None,
        backend: MemoryBackend | None = None,
        config: Config | None = None,
    ) -> None:
        check_arguments(
            spec, device, name, max_tokens, budget=budget, backend=backend, config=config
        )
        check_terms(limit, floor, weight, budget_given=budget is not None)
        self.config = config if config is not None else Config.from_env()
        self.spec, self.name = spec, name if name is not None else f"pid-{os.getpid()}"
        self.prefix_caching, self._contents = prefix_caching, contents_key(spec, model)
        self._lock, self._pid = threading.RLock(), os.getpid()
        self._pauses = Pauses(self._lock)
        self._closed = False
        self._inside, self._left = 0, threading.Condition(self._lock)
        self._closing = threading.Lock()
        self._owns_backend = backend is None
        self.backend = backend if backend is not None else make_backend(device, spec, self.config)
        try:
            self._build(max_tokens, budget, limit=limit, floor=floor, weight=weight)
        except BaseException:  # whatever went wrong, what we made does not stay behind
            if self._owns_backend:
                self.backend.shutdown()
            raise
        self._views: Any = None
        self._parts = self._pid, self._blocks, self._budget, self._owns_backend
        self._finalizer = weakref.finalize(self, release, *self._parts)
        self._caretaker = Caretaker(self)
        self._blocks.on_low = self._caretaker.hurry

    def _build(self, max_tokens: int, budget: Budget | None, **terms: Any) -> None:
        num_blocks = cdiv(max_tokens, self.spec.block_size) + 1  # and the null block
        page_bytes = self.backend.page_bytes
        self.geometry = Geometry.of(self.spec, page_bytes=page_bytes, num_blocks=num_blocks)
        if budget is None:
            self._budget = make_budget(self.name, self.backend, self.config, **terms)
        else:
            self._budget = budget
        try:
            if budget is not None and terms["limit"] is not None:
                self._budget.set_limit(parse_size(terms["limit"], total=budget.limit_bytes))
            self._make_blocks(make_pages(self.backend, self.geometry, self._budget, self.config))
        except BaseException:  # as in __init__
            self._budget.close()
            raise

    def _make_blocks(self, pages: PagePool) -> None:
        ahead = parse_size(self.config.ahead, total=self._budget.limit_bytes)
        spares = SparePolicy(self.config.spare_seconds)
        try:
            self._blocks = BlockPool(pages, spares=spares, lock=self._lock, most_ahead=ahead)
            size = self.spec.block_size
            self._prefixes = PrefixIndex(self._blocks, size)
            named = self._prefixes if self.prefix_caching else None
            self._store = SequenceStore(self._blocks, named, size, self._contents)
            self._budget.attach(WeakTenant(self), self._lock)  # last: it may be called at once
        except BaseException:  # the reservation, and what the budget granted, too
            pages.close()
            raise

    # --- sequences -----------------------------------------------------------------------------

    def new_sequence(self, token_ids: Any = (), *, salt: str = "") -> Sequence:
        """Begin a sequence; what is cached of the prefix ``token_ids`` is shared, not recomputed.

        ``num_cached_tokens`` tokens then have slots already (whole blocks, never the last token);
        pass the others to ``extend``. ``salt`` separates prefixes that must not be shared.
        """
        tokens = token_array(token_ids)
        with self._entered():
            return self._store.new(tokens, salt)

    def extend(self, sequence: Sequence, tokens: Any) -> NDArray[np.int32]:
        """Give the next tokens slots: int32 ``[n]``; backs what is missing. All or nothing.

        ``tokens`` is a count, or the token ids, which is what makes full blocks matchable by
        later sequences: at once, so run the forward pass that fills these slots before, or in the
        same batch as, one that reads them. A last block shared with a fork is copied first.

        Raises ``BudgetExceeded`` or ``OutOfPages`` (both ``MemoryError``).
        """
        count, known = read_tokens(tokens)
        with self._entered():
            return self._store.extend(sequence, count, known)

    def fork(self, sequence: Sequence) -> Sequence:
        """A second sequence with the same tokens; blocks are shared until one of them writes."""
        with self._entered():
            return self._store.fork(sequence)

    def free(
        self, sequence: Sequence, *, fence: Fence | None = None, discard: bool = False
    ) -> None:
        """End a sequence. Blocks that nothing else holds become cached prefixes, or free.

        ``fence``: kernels may read the blocks until it has passed. ``discard``: the slots of the
        newest ``extend`` were never filled (the forward pass failed), so do not cache them.
        """
        if fence is not None and not callable(getattr(fence, "passed", None)):
            raise InvalidInput(f"{fence!r} is not a fence", hint="A fence has a method passed().")
        with self._entered():
            self._store.free(sequence, fence, discard=discard)
        self._caretaker.wake()

    # --- what kernels read -----------------------------------------------------------------------

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, ``[num_blocks, block_size, num_kv_heads, head_dim]`` each.

        Strided views over the whole address space, made without a copy. Touch only blocks in use:
        the rest may have no memory behind it (a fault). Invalid after ``close``.
        """
        known = isinstance(index, int) and not isinstance(index, bool)
        if not known or not 0 <= index < self.spec.num_layers:
            raise InvalidInput(f"layer {index!r} does not exist: the cache has "
                               f"{self.spec.num_layers}")  # fmt: skip
        with self._entered():
            if self._views is None:
                from kvcached.memory.views import layer_views  # torch, only when tensors are wanted

                base = self._blocks.pages.address_of(0)
                self._views = [layer_views(self.spec, self.geometry, base, self.backend.device, i)
                               for i in range(self.spec.num_layers)]  # fmt: skip
            views: tuple[Tensor, Tensor] = self._views[index]
            return views

    def block_tables(self, sequences: ListLike[Sequence]) -> NDArray[np.int32]:
        """Block tables int32 ``[len(sequences), most blocks]``, padded with the null block (0)."""
        with self._lock:
            self._require_open()
            for sequence in sequences:
                self._store.require(sequence)
            width = max((s.num_blocks for s in sequences), default=0)
            tables = np.zeros((len(sequences), max(1, width)), np.int32)
            for row, sequence in zip(tables, sequences, strict=True):
                row[: sequence.num_blocks] = sequence.table
            return tables

    @property
    def num_free_tokens_hint(self) -> int:
        """Tokens that could be taken without reclaim from others: a hint, others may be faster."""
        with self._lock:
            self._require_open()
            return free_blocks_hint(self._blocks) * self.spec.block_size

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
        """Give back about ``nbytes`` of spares and cached prefixes, the oldest first."""
        size = parse_size(nbytes, total=self._blocks.pages.backed_bytes)
        with self._entered():
            return self._blocks.reclaim(size)

    def set_limit(self, limit: int | str) -> LimitRecord:
        """Set the most physical memory this cache may hold; gives back at once what it can.

        Blocks in use stay: ``LimitRecord.applied`` tells whether the limit holds already.
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

    def reclaim(self, nbytes: int, *, patient: bool = False) -> int:
        """For the budget (``Tenant.reclaim``): give back up to ``nbytes`` now."""
        with self._lock:
            if self._closed:
                return 0
            self._blocks.spares.forget()  # or growth ahead would take it again
            busy = self._inside > 0  # a call is under way; its thread may be waiting for us
            try:
                now = self._pauses.now() and (patient or not busy)
                freed = self._blocks.reclaim(nbytes, may_split=now)
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

    def report(self) -> TenantReport:
        """For the budget (``Tenant.report``): what is held."""
        with self._lock:
            idle = self._pauses.now() and not self._inside
            return take_report(self._blocks, idle=idle, pauses=self._pauses.expected())

    def stats(self) -> CacheStats:
        """A snapshot; see ``CacheStats``."""
        with self._lock:
            self._require_open()
            return take_stats(self.name, self.spec, self._blocks, len(self._store))

    def page_runs(self) -> list[tuple[int, int, str]]:
        """Backed runs in address order, as (first page, pages, state); neighbours are merged."""
        with self._lock:
            self._require_open()
            return self._blocks.page_runs()

    # --- life cycle ----------------------------------------------------------------------------

    def check(self) -> None:
        """Assert the invariants of everything this cache owns (docs/invariants.md). Slow."""
        with self._lock:
            self._require_open()
            self._blocks.check()
            self._prefixes.check()
            self._store.check()
            self._budget.check()
            held = self._blocks.pages.backed_bytes
            assert held <= self._budget.lease_bytes, "I1: backed more than leased"

    def close(self) -> None:
        """Give back everything: memory, addresses, the lease. Views and sequences die.

        Idempotent. If the backend refuses, the error is raised; call again to give back the rest.
        """
        if os.getpid() != self._pid:
            return  # the memory is the parent's
        with self._lock:  # another thread's call may be waiting for the budget, without the lock
            self._closed, self._views = True, None
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

    def __repr__(self) -> str:
        from kvcached.display import line

        return line(self)

    def _repr_html_(self) -> str:
        from kvcached.display import page_map_html

        return page_map_html(self)

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
