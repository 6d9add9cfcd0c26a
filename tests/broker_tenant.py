"""A tenant without memory, for tests of the broker: it counts what a cache would hold."""

from __future__ import annotations

import threading
from contextlib import contextmanager

from kvcached.broker.admin import list_tenants
from kvcached.broker.client import BrokerBudget
from kvcached.stats import TenantReport

MIB = 1 << 20


class CountingTenant:
    """``in_use`` stays, ``cached`` can be reclaimed; both in bytes."""

    def __init__(self, name, *, device="cpu", limit=None, capacity=1024 * MIB, **options):
        self.lock = threading.RLock()
        self.in_use = self.cached = self.reclaims = 0
        self.age = 1.0
        self.budget = BrokerBudget(
            name, device=device, limit_bytes=limit, capacity_bytes=capacity, **options
        )
        self.budget.attach(self, self.lock)

    def use(self, nbytes):
        with self.lock:
            self.budget.claim(nbytes)
            self.in_use += nbytes

    def cache(self):
        """Let go of what is in use; it stays cached."""
        with self.lock:
            self.cached, self.in_use = self.cached + self.in_use, 0

    def drop(self, nbytes):
        with self.lock:
            self.in_use -= nbytes
            self.budget.give_back(nbytes)

    def reclaim(self, nbytes, *, patient):
        self.reclaims += 1
        nbytes = min(nbytes, self.cached)
        self.cached -= nbytes
        self.budget.give_back(nbytes)
        return nbytes

    def report(self):
        return TenantReport(
            backed_bytes=self.in_use + self.cached, in_use_bytes=self.in_use,
            cached_bytes=self.cached, split_floor_bytes=self.in_use,
            oldest_cached_age_s=self.age if self.cached else 0.0,
        )  # fmt: skip

    def close(self):
        with self.lock:
            if not self.budget.claimed_bytes:
                self.budget.close()
                return
            self.budget.give_back(self.budget.claimed_bytes)
        self.budget.close()


@contextmanager
def tenants():
    """A function that makes them; all are closed in the end."""
    made = []

    def make(name, **options):
        made.append(CountingTenant(name, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def device():
    """What is listed of the only device."""
    (found,) = list_tenants("cpu")
    return found
