"""One budget over several devices, or over several workers of one device."""

from __future__ import annotations

import threading
from fractions import Fraction

import pytest

from kvcached.broker.budget import LocalBudget
from kvcached.broker.ranks import RankBudget
from kvcached.errors import BudgetExceeded, InvalidInput
from kvcached.stats import TenantReport


class Owner:
    def __init__(self, budget, held=0):
        self.budget, self.held, self.asked = budget, held, []

    def reclaim(self, nbytes, *, patient):
        self.asked.append(nbytes)
        given = min(nbytes, self.held)
        self.held -= given
        self.budget.give_back(given)
        return given

    def report(self):
        return TenantReport(backed_bytes=self.held, cached_bytes=self.held, idle=True)


def test_a_claim_counts_once_a_worker_on_every_device():
    a, b = LocalBudget(100), LocalBudget(100)
    budget = RankBudget([(a, 2), (b, 1)])
    assert budget.limit_bytes == 50
    budget.claim(30)
    assert (a.claimed_bytes, b.claimed_bytes) == (60, 30)
    assert (budget.claimed_bytes, budget.lease_bytes, budget.slack_bytes) == (30, 30, 20)
    budget.check()
    budget.give_back(30)
    assert a.claimed_bytes == b.claimed_bytes == 0
    budget.close()


@pytest.mark.parametrize("order", [(100, 10), (10, 100)])
def test_a_claim_that_one_device_refuses_changes_none(order):
    parts = [LocalBudget(size) for size in order]
    budget = RankBudget([(part, 1) for part in parts])
    with pytest.raises(BudgetExceeded):
        budget.claim(20)
    assert not budget.claim_if_free(20, ask=True)
    assert [part.claimed_bytes for part in parts] == [0, 0]
    assert budget.claim_if_free(10, ask=True)
    budget.check()


def test_what_one_device_asks_for_is_freed_on_all():
    a, b = LocalBudget(1000), LocalBudget(1000)
    budget = RankBudget([(a, 3), (b, 1)])
    owner = Owner(budget)
    budget.attach(owner, threading.RLock())
    budget.claim(90)
    owner.held = 90
    a.set_limit(200)  # 70 bytes too many for three workers: 24 each
    assert owner.asked == [24]
    assert (a.claimed_bytes, b.claimed_bytes) == (198, 66)
    record = budget.set_limit(10)
    assert record.desired_bytes == 10
    assert budget.claimed_bytes <= 10
    assert record.applied
    budget.check()


def test_a_device_with_fewer_layers_counts_less():
    """A stage of three layers and one of two: bytes here are those of the first."""
    a, b = LocalBudget(99), LocalBudget(50)
    budget = RankBudget([(a, 1), (b, Fraction(2, 3))])
    assert budget.limit_bytes == budget.slack_bytes == 75
    budget.claim(30)
    assert (a.claimed_bytes, b.claimed_bytes, budget.claimed_bytes) == (30, 20, 30)
    owner = Owner(budget)
    budget.attach(owner, threading.RLock())
    owner.held = 30
    b.set_limit(14)  # 6 bytes of two layers are 9 of three
    assert owner.asked == [9]
    assert (a.claimed_bytes, b.claimed_bytes) == (21, 14)
    record = budget.limit_record()
    assert (record.desired_bytes, record.held_bytes) == (21, 21)
    budget.check()
    assert budget.set_limit(12).desired_bytes == 12
    assert (a.limit_bytes, b.limit_bytes) == (12, 8)
    budget.give_back(budget.claimed_bytes)
    assert (a.claimed_bytes, b.claimed_bytes) == (0, 0)
    budget.close()


@pytest.mark.parametrize("factor", [0, Fraction(-1, 2)])
def test_a_device_whose_workers_hold_nothing(factor):
    with pytest.raises(InvalidInput):
        RankBudget([(LocalBudget(1), factor)])


def test_the_report_is_of_all_workers_of_the_device():
    a = LocalBudget(1000)
    budget = RankBudget([(a, 4)])
    budget.attach(Owner(budget, held=5), threading.RLock())
    report = a._tenant.report()
    assert (report.backed_bytes, report.cached_bytes, report.idle) == (20, 20, True)
    assert not budget.report_out_of_memory(1)


def test_a_device_without_workers():
    with pytest.raises(InvalidInput):
        RankBudget([])
