"""``RankBudget``: one budget for an engine whose workers hold the same pages on several devices.

With tensor parallelism every worker backs the same pages. Bytes here are those of one worker; a
device that ``factor`` workers share is claimed from that many times. A claim is all or nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from kvcached.broker.budget import Budget, Tenant
from kvcached.errors import InvalidInput
from kvcached.layout import cdiv
from kvcached.stats import LimitRecord, TenantReport

_BYTES = ("backed_bytes", "in_use_bytes", "cached_bytes", "spare_bytes", "quarantined_bytes",
          "split_floor_bytes")  # fmt: skip


class _ScaledTenant:
    """The owner, as the budget of a device with ``factor`` of its workers sees it."""

    def __init__(self, tenant: Tenant, factor: int) -> None:
        self._tenant, self._factor = tenant, factor

    def reclaim(self, nbytes: int, *, patient: bool) -> int:
        """See ``Tenant.reclaim``."""
        return self._factor * self._tenant.reclaim(cdiv(nbytes, self._factor), patient=patient)

    def report(self) -> TenantReport:
        """See ``Tenant.report``."""
        plain = self._tenant.report()
        sizes = {name: self._factor * getattr(plain, name) for name in _BYTES}
        return TenantReport(
            **sizes, oldest_cached_age_s=plain.oldest_cached_age_s, idle=plain.idle,
            pauses=plain.pauses,
        )  # fmt: skip


class RankBudget:
    """See the module's docstring, and ``Budget`` for what the methods promise.

    Parameters
    ----------
    shares:
        A budget for each device, and how many workers are on it. The budgets are owned.
    """

    def __init__(self, shares: Sequence[tuple[Budget, int]]) -> None:
        if not shares or any(factor < 1 for _, factor in shares):
            raise InvalidInput(f"no budget is made of {len(shares)} devices like these")
        self._shares = tuple(shares)

    @property
    def lease_bytes(self) -> int:
        """See ``Budget.lease_bytes``."""
        return min(budget.lease_bytes // factor for budget, factor in self._shares)

    @property
    def claimed_bytes(self) -> int:
        """See ``Budget.claimed_bytes``."""
        budget, factor = self._shares[0]
        return budget.claimed_bytes // factor

    @property
    def limit_bytes(self) -> int:
        """See ``Budget.limit_bytes``: of the device that allows least."""
        return min(budget.limit_bytes // factor for budget, factor in self._shares)

    @property
    def slack_bytes(self) -> int:
        """See ``Budget.slack_bytes``."""
        return min(budget.slack_bytes // factor for budget, factor in self._shares)

    def attach(self, tenant: Tenant, lock: threading.RLock) -> None:
        """See ``Budget.attach``."""
        for budget, factor in self._shares:
            budget.attach(_ScaledTenant(tenant, factor), lock)

    def claim(self, nbytes: int, *, transient: bool = False, seconds: float | None = None) -> None:
        """See ``Budget.claim``."""
        done: list[tuple[Budget, int]] = []
        try:
            for budget, factor in self._shares:
                budget.claim(factor * nbytes, transient=transient, seconds=seconds)
                done.append((budget, factor))
        except BaseException:  # whatever it was, the other devices get theirs back
            for budget, factor in done:
                budget.give_back(factor * nbytes)
            raise

    def claim_if_free(self, nbytes: int, *, ask: bool) -> bool:
        """See ``Budget.claim_if_free``."""
        for index, (budget, factor) in enumerate(self._shares):
            if not budget.claim_if_free(factor * nbytes, ask=ask):
                for other, times in self._shares[:index]:
                    other.give_back(times * nbytes)
                return False
        return True

    def report_out_of_memory(self, nbytes: int) -> bool:
        """See ``Budget.report_out_of_memory``. Which device it was is not known: all are told."""
        heard = [b.report_out_of_memory(factor * nbytes) for b, factor in self._shares]
        return any(heard)

    def give_back(self, nbytes: int) -> None:
        """See ``Budget.give_back``."""
        for budget, factor in self._shares:
            budget.give_back(factor * nbytes)

    def set_limit(self, nbytes: int) -> LimitRecord:
        """See ``Budget.set_limit``."""
        for budget, factor in self._shares:
            budget.set_limit(factor * nbytes)
        return self.limit_record()

    def limit_record(self) -> LimitRecord:
        """See ``Budget.limit_record``: of the device that allows least, for one worker."""
        budget, factor = min(self._shares, key=lambda share: share[0].limit_bytes // share[1])
        found = budget.limit_record()
        return LimitRecord(found.desired_bytes // factor, found.revision,
                           found.held_bytes // factor, found.floor_bytes // factor,
                           found.weight)  # fmt: skip

    def check(self) -> None:
        """See ``Budget.check``; also that all devices have the same claimed (I1)."""
        for budget, factor in self._shares:
            budget.check()
            assert budget.claimed_bytes == factor * self.claimed_bytes, "I1: the devices differ"

    def close(self) -> None:
        """See ``Budget.close``."""
        for budget, _ in self._shares:
            budget.close()
