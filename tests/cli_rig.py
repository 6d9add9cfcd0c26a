"""Tenants to look at and to steer, and the commands that do it."""

from __future__ import annotations

import threading

from kvcached import cli
from kvcached.broker.client import BrokerBudget
from kvcached.stats import TenantReport

MIB = 1 << 20
COMMANDS = {"kvcached": cli.main, "kvctl": cli.kvctl, "kvtop": cli.kvtop}


class Owner:
    """A tenant with 100 MiB claimed, of which 40 can be given back."""

    def __init__(self, name: str, **options) -> None:
        self.budget = BrokerBudget(
            name, device="cpu", limit_bytes=256 * MIB, capacity_bytes=1024 * MIB, **options
        )
        self.spare = 40 * MIB
        self.lock = threading.RLock()
        self.budget.attach(self, self.lock)
        self.budget.claim(100 * MIB)

    def reclaim(self, nbytes: int, *, patient: bool) -> int:
        freed = min(nbytes, self.spare)
        self.spare -= freed
        if freed:
            self.budget.give_back(freed)
        return freed

    def report(self) -> TenantReport:
        held = self.budget.claimed_bytes
        return TenantReport(held, max(0, held - self.spare), 0, min(held, self.spare))

    def close(self) -> None:
        with self.lock:
            self.budget.give_back(self.budget.claimed_bytes)
        self.budget.close()
