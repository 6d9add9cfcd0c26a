"""``RankBudget``: one budget for an engine whose workers hold the same pages on several devices.

With tensor parallelism every worker backs the same pages, with pipeline parallelism each as many as
its layers need. Bytes here are those of the worker that holds most; what a device's workers hold
for them is its ``factor``: how many there are, if all hold the same. A claim is all or nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from fractions import Fraction

from kvcached.broker.budget import Budget, Tenant
from kvcached.errors import InvalidInput
from kvcached.layout import cdiv
from kvcached.stats import LimitRecord, TenantReport

_BYTES = ("backed_bytes", "in_use_bytes", "cached_bytes", "spare_bytes", "quarantined_bytes",
          "split_floor_bytes")  # fmt: skip


class _Device:
    """The budget of one device, and between its bytes and those of the engine."""

    __slots__ = ("_device", "_engine", "budget")

    def __init__(self, budget: Budget, factor: int | Fraction) -> None:
        self.budget = budget
        self._device, self._engine = Fraction(factor).as_integer_ratio()

    def all_of(self, nbytes: int) -> int:
        """Bytes of the device for ``nbytes`` of the engine, which are whole pages."""
        return cdiv(nbytes * self._device, self._engine)

    def fits(self, nbytes: int) -> int:
        """Bytes of the engine, at most, that ``nbytes`` of the device are enough for."""
        return nbytes * self._engine // self._device

    def needs(self, nbytes: int) -> int:
        """Bytes of the engine, at least, with which ``nbytes`` of the device get free."""
        return cdiv(nbytes * self._engine, self._device)


class _ScaledTenant:
    """The owner, as the budget of one device sees it."""

    def __init__(self, tenant: Tenant, device: _Device) -> None:
        self._tenant, self._device = tenant, device

    def reclaim(self, nbytes: int, *, patient: bool) -> int:
        """See ``Tenant.reclaim``."""
        device = self._device
        return device.all_of(self._tenant.reclaim(device.needs(nbytes), patient=patient))

    def report(self) -> TenantReport:
        """See ``Tenant.report``."""
        plain = self._tenant.report()
        sizes = {name: self._device.all_of(getattr(plain, name)) for name in _BYTES}
        return TenantReport(
            **sizes, oldest_cached_age_s=plain.oldest_cached_age_s, idle=plain.idle,
            pauses=plain.pauses,
        )  # fmt: skip


class RankBudget:
    """See the module's docstring, and ``Budget`` for what the methods promise.

    Parameters
    ----------
    shares:
        A budget for each device, and its factor. The budgets are owned.
    """

    def __init__(self, shares: Sequence[tuple[Budget, int | Fraction]]) -> None:
        if not shares or any(factor <= 0 for _, factor in shares):
            raise InvalidInput(f"no budget is made of {len(shares)} devices like these")
        self._devices = tuple(_Device(budget, factor) for budget, factor in shares)

    @property
    def lease_bytes(self) -> int:
        """See ``Budget.lease_bytes``."""
        return min(device.fits(device.budget.lease_bytes) for device in self._devices)

    @property
    def claimed_bytes(self) -> int:
        """See ``Budget.claimed_bytes``."""
        return self._devices[0].fits(self._devices[0].budget.claimed_bytes)

    @property
    def limit_bytes(self) -> int:
        """See ``Budget.limit_bytes``: of the device that allows least."""
        return min(device.fits(device.budget.limit_bytes) for device in self._devices)

    @property
    def slack_bytes(self) -> int:
        """See ``Budget.slack_bytes``."""
        return min(device.fits(device.budget.slack_bytes) for device in self._devices)

    def attach(self, tenant: Tenant, lock: threading.RLock) -> None:
        """See ``Budget.attach``."""
        for device in self._devices:
            device.budget.attach(_ScaledTenant(tenant, device), lock)

    def claim(self, nbytes: int, *, transient: bool = False, seconds: float | None = None) -> None:
        """See ``Budget.claim``."""
        done: list[_Device] = []
        try:
            for device in self._devices:
                device.budget.claim(device.all_of(nbytes), transient=transient, seconds=seconds)
                done.append(device)
        except BaseException:  # whatever it was, the other devices get theirs back
            for device in done:
                device.budget.give_back(device.all_of(nbytes))
            raise

    def claim_if_free(self, nbytes: int, *, ask: bool) -> bool:
        """See ``Budget.claim_if_free``."""
        for index, device in enumerate(self._devices):
            if not device.budget.claim_if_free(device.all_of(nbytes), ask=ask):
                for other in self._devices[:index]:
                    other.budget.give_back(other.all_of(nbytes))
                return False
        return True

    def report_out_of_memory(self, nbytes: int) -> bool:
        """See ``Budget.report_out_of_memory``. Which device it was is not known: all are told."""
        heard = [d.budget.report_out_of_memory(d.all_of(nbytes)) for d in self._devices]
        return any(heard)

    def give_back(self, nbytes: int) -> None:
        """See ``Budget.give_back``."""
        for device in self._devices:
            device.budget.give_back(device.all_of(nbytes))

    def set_limit(self, nbytes: int) -> LimitRecord:
        """See ``Budget.set_limit``."""
        for device in self._devices:
            device.budget.set_limit(device.all_of(nbytes))
        return self.limit_record()

    def limit_record(self) -> LimitRecord:
        """See ``Budget.limit_record``: of the device that allows least, in the engine's bytes."""
        device = min(self._devices, key=lambda device: device.fits(device.budget.limit_bytes))
        found, fits = device.budget.limit_record(), device.fits
        return LimitRecord(fits(found.desired_bytes), found.revision, fits(found.held_bytes),
                           fits(found.floor_bytes), found.weight)  # fmt: skip

    def check(self) -> None:
        """See ``Budget.check``; also that all devices have the same claimed (I1)."""
        for device in self._devices:
            device.budget.check()
            claimed = device.budget.claimed_bytes
            assert claimed == device.all_of(self.claimed_bytes), "I1: the devices differ"

    def close(self) -> None:
        """See ``Budget.close``."""
        for device in self._devices:
            device.budget.close()
