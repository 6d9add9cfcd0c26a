"""``EngineBlocks``: what is promised and what others do meanwhile; when a fence has passed."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from cache_rig import FOREVER, stop_caretaker

from kvcached.broker.budget import LocalBudget
from kvcached.engines.vllm.tenant import EngineBlocks
from kvcached.errors import BudgetExceeded, DriverError
from kvcached.layout import Geometry
from kvcached.testing import FakeBackend, ManualFence

PAGE = 8
NONE, ALL = np.zeros(99, np.bool_), np.ones(99, np.bool_)


class AskedBudget(LocalBudget):
    """``meanwhile`` is done once while the budget waits for an answer."""

    meanwhile = None
    pending, free = False, True
    """Others have been asked, and have not answered; ``waited`` is called each time."""

    def __init__(self, *args):
        super().__init__(*args)
        self.waits, self.waited = [], lambda: None

    def claim(self, nbytes, *, transient=False, seconds=None):
        self.waits.append(seconds)
        if self.pending:
            self.waited()
            error = BudgetExceeded("others have not answered yet")
            error.pending = True
            raise error
        super().claim(nbytes, transient=transient, seconds=seconds)

    def claim_if_free(self, nbytes, *, ask):
        if ask and self.meanwhile is not None:
            do, self.meanwhile = self.meanwhile, None
            do()
        return self.free and not self.pending and super().claim_if_free(nbytes, ask=ask)


@pytest.fixture
def make():
    made = []

    def tenant(*, blocks=20, limit=100, make_tail=None):
        budget, backend = AskedBudget(limit * PAGE), FakeBackend(PAGE)
        tenant = EngineBlocks(
            Geometry(PAGE, 1, blocks, PAGE), backend=backend, budget=budget, name="vllm",
            config=FOREVER, make_tail=make_tail,
        )  # fmt: skip
        stop_caretaker(tenant)
        made.append((tenant, budget, backend))
        return tenant, budget

    yield tenant
    for tenant, budget, backend in made:
        tenant.check()
        tenant.close()
        assert budget.claimed_bytes == 0
        backend.shutdown()


def taken(tenant, count):
    assert tenant.secure(count)
    return tenant.take(count)


def test_what_is_free_is_counted_again_after_others_had_the_lock(make):
    tenant, budget = make(limit=4)
    with tenant.scheduling():
        ids = taken(tenant, 3)
    with tenant.updating(step=True):
        tenant.give(ids[:1], ALL[:1])
        tenant.give(ids[1:], NONE[:2])
    assert (tenant._blocks.num_free, tenant._blocks.num_cached) == (2, 1)

    def others():  # they get what lay free, while we ask for more
        tenant.reclaim(2 * PAGE)
        budget._limit = budget.claimed_bytes

    budget.meanwhile = others
    with tenant.scheduling():
        assert not tenant.secure(3), "promised what others have"
        assert tenant.num_available == 1
        assert tenant.secure(1)
        assert len(tenant.take(1)) == 1


def test_what_was_promised_is_said_to_be_available(make):
    tenant, _ = make()
    with tenant.scheduling():
        tenant.num_available = 0  # as if the count had been in other units
        assert tenant.secure(3)
        assert tenant.num_available == 3
        tenant.num_available = 0
        assert tenant.secure(3)
        assert tenant.num_available == 3
        tenant.take(3)
        assert tenant.num_available == 0
    with tenant.updating(step=True):
        pass
    assert tenant.num_available == tenant.count_available() == 16


def test_a_take_that_is_refused_counts_nothing(make):
    tenant, _ = make(limit=4)
    with tenant.scheduling():
        before = tenant.num_available
        with pytest.raises(BudgetExceeded):
            tenant.take(5)
        assert tenant.num_available == before


def test_no_block_is_free_before_the_steps_are_done_that_may_touch_it(make):
    tenant, _ = make()
    with tenant.scheduling():
        first = taken(tenant, 2)
    with tenant.scheduling():
        second = taken(tenant, 2)
    tenant.give(first, NONE[:2])  # both steps are on their way
    assert tenant._blocks.num_quarantined == 2
    with tenant.updating(step=True):
        tenant.give(second, ALL[:2])
    assert tenant._blocks.num_quarantined == 4
    with tenant.updating(step=True):
        pass
    assert tenant._blocks.num_quarantined == 0
    assert tenant._blocks.num_cached == 2
    tenant.give(taken(tenant, 1), NONE[:1])  # nothing is on its way
    assert tenant._blocks.num_quarantined == 0


def test_where_kernels_run_on_a_fence_lies_behind_them_too(make):
    made = []

    def tail():
        made.append(ManualFence())
        return made[-1]

    tenant, _ = make(make_tail=tail)
    with tenant.scheduling():
        ids = taken(tenant, 2)
    tenant.give(ids, NONE[:2])
    assert made == []  # the step's result comes first
    with tenant.updating(step=True):
        pass
    assert len(made) == 1
    assert tenant._blocks.num_quarantined == 2
    made[0].done = True
    with tenant.updating(step=False):
        pass
    assert tenant._blocks.num_quarantined == 0
    assert len(made) == 1


def test_cached_blocks_stay_while_the_scheduler_looks_and_go_after_it(make):
    tenant, _ = make()
    gone = []
    tenant.on_evict(lambda ids: gone.extend(ids.tolist()))
    with tenant.scheduling():
        ids = np.concatenate([taken(tenant, 1) for _ in range(3)])  # an extent each
    with tenant.updating(step=True):
        tenant.give(ids, ALL[:3])
    with tenant.scheduling():
        assert tenant.reclaim(100 * PAGE) == 0
        tenant.acquire(ids[1:2])
    with tenant.updating(step=True):
        pass
    assert tenant.reclaim(100 * PAGE) > 0
    assert int(ids[1]) not in gone
    assert tenant.num_used == 1


def test_what_is_owed_is_not_paid_with_what_the_scheduler_looks_at(make):
    tenant, _ = make()
    gone = []
    tenant.on_evict(lambda ids: gone.extend(ids.tolist()))
    with tenant.scheduling():
        ids = taken(tenant, 3)
    with tenant.updating(step=True):
        tenant.give(ids, ALL[:3])
    with tenant.scheduling():
        tenant.reclaim(100 * PAGE, patient=True)
        with tenant.updating(step=False):  # a request ends within the pass
            pass
        assert gone == []
        tenant.acquire(ids[:1])
        assert not tenant.lets_in
    with tenant.updating(step=True):
        tenant.give(ids[:1], ALL[:1])
    assert sorted(gone) == sorted(ids.tolist())
    assert tenant.reclaim(100 * PAGE) == 0


@pytest.mark.parametrize("in_flight", [False, True])
def test_what_is_forgotten_is_kept_for_no_prefix(make, in_flight):
    tenant, budget = make()
    with tenant.scheduling():
        ids = taken(tenant, 4)
    if not in_flight:
        with tenant.updating(step=True):
            pass
    tenant.give(ids, ALL[:4])
    tenant.forget()
    if in_flight:
        assert budget.claimed_bytes == 5 * PAGE  # the step may still write there
        with tenant.updating(step=True):
            pass
        assert tenant._blocks.num_cached == 0
        tenant.reclaim(100 * PAGE)
    assert budget.claimed_bytes == PAGE  # the null block's


def test_who_is_to_start_is_not_waited_for_and_starts_when_the_memory_has_come(make):
    tenant, budget = make()
    with tenant.scheduling():
        taken(tenant, 1)  # a request runs
        budget.waits.clear()
        budget.pending = True
        for _ in range(5):  # asked at every pass: no refusal stands in the way of a late answer
            assert not tenant.secure(3, running=False)
        assert budget.waits == [0.0] * 5
        budget.pending = False
        assert tenant.secure(3, running=False)


def test_one_that_runs_is_waited_for_but_in_one_pass_no_longer_than_for_one(make, monkeypatch):
    tenant, budget = make()
    with tenant.scheduling():
        taken(tenant, 1)
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def slow():
        now[0] += 0.015

    budget.pending, budget.waited = True, slow
    for _ in range(2):
        budget.waits.clear()
        with tenant.scheduling():
            for _ in range(3):
                assert not tenant.secure(3)
        assert budget.waits == [pytest.approx(0.02), pytest.approx(0.005), 0.0]
    budget.pending = False
    with tenant.scheduling():
        assert tenant.secure(3)


def test_a_refusal_of_much_is_none_of_less(make):
    tenant, budget = make(limit=6)
    with tenant.scheduling():
        taken(tenant, 2)
        budget.waits.clear()
        assert not tenant.secure(9, running=False)
        assert not tenant.secure(9, running=False)
        assert len(budget.waits) == 1, "asked again at once"
        assert tenant.secure(3)
        assert len(tenant.take(3)) == 3


def test_that_nothing_is_free_is_no_refusal_by_others(make):
    tenant, budget = make(limit=8)
    with tenant.scheduling():
        ids = taken(tenant, 4)
    with tenant.updating(step=True):
        tenant.give(ids, ALL[:4])
    budget.free = False  # what is left is held by others, who would give it
    with tenant.scheduling():
        assert tenant.secure(1)  # a cached block of our own
        budget.waits.clear()
        assert tenant.secure(6, running=False)
        assert budget.waits, "others were not asked"


def test_what_a_pass_may_take_is_grown_at_once_if_it_is_free(make):
    tenant, budget = make(limit=12)
    budget.waits.clear()
    with tenant.scheduling(8):
        assert tenant._blocks.num_free >= 8
        grown = tenant.stats().counters.grow
        for _ in range(4):
            taken(tenant, 2)
        assert tenant.stats().counters.grow == grown
        assert not budget.waits, "others were asked"
    with tenant.scheduling(50):  # more than there is: nothing is taken in advance
        assert tenant._blocks.num_free < 8
        assert not budget.waits
        taken(tenant, 2)


def test_nothing_is_grown_for_those_who_may_not_start(make):
    tenant, _ = make(limit=12)
    with tenant.scheduling():
        ids = taken(tenant, 8)
    tenant.reclaim(4 * PAGE, patient=True)
    assert not tenant.lets_in
    with tenant.scheduling(4):
        assert tenant._blocks.num_free < 4
    with tenant.updating(step=True):
        tenant.give(ids, NONE[:8])


def test_after_growth_that_failed_others_get_cached_memory_as_before(make, monkeypatch):
    tenant, _ = make()
    with tenant.scheduling():
        ids = taken(tenant, 2)
    with tenant.updating(step=True):
        tenant.give(ids, ALL[:2])

    def broken(_):
        raise DriverError("no", status="CUDA_ERROR_UNKNOWN", call="cuMemCreate")

    monkeypatch.setattr(tenant._blocks.grower, "prepare", broken)
    with pytest.raises(DriverError), tenant.scheduling(4):
        pass
    assert tenant.reclaim(2 * PAGE) >= 2 * PAGE


def test_a_step_waits_for_a_part_of_a_claim_and_not_for_all_of_it(make):
    tenant, _ = make(blocks=90)
    with tenant.scheduling():
        ids = taken(tenant, 60)
    with tenant.updating(step=True):
        tenant.give(ids, ALL[:60])
    tenant.turns.part_bytes = 4 * PAGE
    left, done = [], threading.Event()

    def step():
        with tenant.scheduling():
            left.append(tenant._blocks.num_cached)
            assert not tenant.lets_in, "what is given back would go to a new request"
        done.set()

    evicted, thread = tenant._blocks.on_evict, threading.Thread(target=step)

    def on_evict(ids):
        evicted(ids)
        if not thread.ident:
            thread.start()
            while not tenant.turns._waiting:
                time.sleep(0.001)

    tenant.on_evict(on_evict)
    assert tenant.reclaim(60 * PAGE) >= 55 * PAGE
    assert done.wait(10)
    assert 0 < left[0] < 60
    assert tenant.lets_in
    thread.join(10)


def test_a_debt_is_paid_in_parts(make):
    tenant, _ = make(blocks=90)
    with tenant.scheduling():
        ids = taken(tenant, 40)
    tenant.reclaim(100 * PAGE, patient=True)
    tenant.turns.part_bytes = 8 * PAGE
    with tenant.updating(step=True):
        tenant.give(ids, ALL[:40])
    after_one = tenant._blocks.num_cached
    assert 0 < after_one < 40
    tenant.turns.part_bytes = 100 * PAGE
    with tenant.updating(step=False):
        pass
    assert tenant._blocks.num_cached == 0
