"""``Budget``: what a page pool asks before it backs anything; ``LocalBudget``: without a broker.

The broker's client (``client.py``) implements the same protocol over a socket.

Rules (docs/broker.md):

* Grow: ``claim``, then create. Shrink: unmap and release, then ``give_back``.
* ``claim`` may release the owner's lock while it waits, so that the owner can answer reclaim
  requests meanwhile. Call it at a clean point and read your state again afterwards.
* ``claim`` is all or nothing. A refusal raises ``BudgetExceeded`` and changes nothing.
"""

from __future__ import annotations

import threading
from typing import Protocol

from kvcached.config import format_size
from kvcached.errors import BudgetExceeded, ClosedError, InvalidInput
from kvcached.stats import LimitRecord, TenantReport


class Tenant(Protocol):
    """The owner of a lease, as the budget sees it: the cache."""

    def reclaim(self, nbytes: int, *, patient: bool) -> int:
        """Give back up to ``nbytes`` of physical memory now (spares, cached prefixes, splits).

        ``patient``: if that is not enough, it may wait for the engine's next pause, a moment at
        which extents in use can be split; it may release the owner's lock meanwhile.
        Calls ``give_back`` on the budget for what it freed, and returns that many bytes.
        Runs with the owner's lock held. Never raises for want of something to give.
        """
        ...

    def report(self) -> TenantReport:
        """What is held, for the broker's choice and for ``kvcached ps``. Cheap."""
        ...


class Budget(Protocol):
    """The bytes that one tenant may back with physical memory."""

    @property
    def lease_bytes(self) -> int:
        """Bytes granted to this tenant now; at least what it has claimed."""
        ...

    @property
    def claimed_bytes(self) -> int:
        """Bytes claimed and not given back: what the tenant backs, or is about to."""
        ...

    @property
    def limit_bytes(self) -> int:
        """Most bytes that this tenant may hold."""
        ...

    @property
    def slack_bytes(self) -> int:
        """Bytes that can be claimed now without asking anybody."""
        ...

    def attach(self, tenant: Tenant, lock: threading.RLock) -> None:
        """Name the owner, ready to be called, and the lock that guards it. Called once."""
        ...

    def claim(self, nbytes: int, *, transient: bool = False, seconds: float | None = None) -> None:
        """Add ``nbytes`` to the claim, or raise ``BudgetExceeded`` and change nothing.

        ``seconds``: how long others may take to give back; ``None``: as long as is usual. With 0
        they are asked and not waited for: the error is ``pending``, and a later claim may be met.
        ``transient``: the owner gives back more than this within the same operation (a split), so
        its own limit does not stand in the way; the capacity of the device still does.
        """
        ...

    def claim_if_free(self, nbytes: int, *, ask: bool) -> bool:
        """Claim ``nbytes`` if the lease covers them already; whether it did.

        With ``ask`` the lease may grow by what is free, but nobody is asked to give back.
        """
        ...

    def report_out_of_memory(self, nbytes: int) -> bool:
        """The device refused ``nbytes`` that were claimed; the caller has given the claim back.

        Returns whether a new claim may help, since others are then asked for what they hold.
        """
        ...

    def give_back(self, nbytes: int) -> None:
        """Return ``nbytes`` whose physical memory is already back with the device."""
        ...

    def set_limit(self, nbytes: int) -> LimitRecord:
        """Set the limit, to the device's capacity at most. The owner gives back what is above.

        What an administrator has set is not exceeded: the record says what holds.
        """
        ...

    def limit_record(self) -> LimitRecord:
        """The limit as desired, and what is held."""
        ...

    def check(self) -> None:
        """Assert the invariants (I7: claimed <= lease <= capacity)."""
        ...

    def close(self) -> None:
        """Return everything. The owner has released its memory before."""
        ...


class LocalBudget:
    """A budget of one process: a limit and a count. No limit goes above ``capacity_bytes``."""

    def __init__(self, limit_bytes: int, capacity_bytes: int = 1 << 62) -> None:
        self._limit, self._capacity = min(limit_bytes, capacity_bytes), capacity_bytes
        self._claimed = 0
        self._revision = 0
        self._tenant: Tenant | None = None
        self._lock = threading.RLock()
        self._closed = False

    @property
    def lease_bytes(self) -> int:
        """Bytes claimed: without a broker nothing is leased ahead."""
        return self._claimed

    @property
    def claimed_bytes(self) -> int:
        """Bytes claimed and not given back."""
        return self._claimed

    @property
    def limit_bytes(self) -> int:
        """Most bytes that may be claimed."""
        return self._limit

    @property
    def slack_bytes(self) -> int:
        """See ``Budget.slack_bytes``."""
        return max(0, self._limit - self._claimed)

    def attach(self, tenant: Tenant, lock: threading.RLock) -> None:
        """See ``Budget.attach``."""
        self._tenant, self._lock = tenant, lock

    def claim(
        self,
        nbytes: int,
        *,
        transient: bool = False,
        seconds: float | None = None,  # noqa: ARG002 (there is nobody to wait for)
    ) -> None:
        """See ``Budget.claim``."""
        with self._lock:
            if self._closed:
                raise ClosedError("the budget is closed")
            if self._claimed + nbytes > self._limit and not transient:
                raise BudgetExceeded(
                    f"cannot back {format_size(nbytes)} more: {format_size(self._claimed)} of the "
                    f"limit of {format_size(self._limit)} are held",
                    hint="Free sequences, or raise the limit with set_limit().",
                )
            self._claimed += nbytes

    def claim_if_free(self, nbytes: int, *, ask: bool) -> bool:  # noqa: ARG002 (the protocol's)
        """See ``Budget.claim_if_free``."""
        with self._lock:
            claimed = self._claimed + nbytes
            if self._closed or claimed > self._limit:
                return False
            self._claimed = claimed
            return True

    def report_out_of_memory(self, nbytes: int) -> bool:  # noqa: ARG002 (the protocol's)
        """See ``Budget.report_out_of_memory``: there are no others."""
        return False

    def give_back(self, nbytes: int) -> None:
        """See ``Budget.give_back``."""
        with self._lock:
            assert 0 <= nbytes <= self._claimed, "I1: gave back more than was claimed"
            self._claimed -= nbytes

    def set_limit(self, nbytes: int) -> LimitRecord:
        """See ``Budget.set_limit``. Reclaims at once, on the caller's thread."""
        if nbytes < 0:
            raise InvalidInput(f"limit is {nbytes} bytes, but must be >= 0")
        with self._lock:
            self._limit = min(nbytes, self._capacity)
            self._revision += 1
            if self._tenant is not None and self._claimed > self._limit:
                self._tenant.reclaim(self._claimed - self._limit, patient=True)
            return self.limit_record()

    def limit_record(self) -> LimitRecord:
        """See ``Budget.limit_record``."""
        return LimitRecord(self._limit, self._revision, self._claimed)

    def check(self) -> None:
        """Claims are never negative; they exceed the limit only after it was lowered."""
        assert self._claimed >= 0, "I1: negative claim"
        assert self._revision or self._claimed <= self._limit, "I7: claim above the limit"

    def close(self) -> None:
        """See ``Budget.close``. Idempotent."""
        with self._lock:
            assert self._claimed == 0, "I4: budget closed while memory is still claimed"
            self._closed = True
