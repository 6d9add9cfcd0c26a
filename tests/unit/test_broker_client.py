"""Budgets of one process that talk to a real broker process."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
from broker_tenant import MIB, device, tenants
from fault.broker_rig import until

from kvcached.broker import link
from kvcached.broker.admin import list_tenants, request_reclaim, set_tenant_limit
from kvcached.broker.ledger import ASK_S
from kvcached.config import Config
from kvcached.errors import (
    BrokerUnavailable,
    BudgetExceeded,
    ClosedError,
    InvalidInput,
    NameTaken,
    UnknownName,
)


@pytest.fixture
def tenant():
    with tenants() as make:
        yield make


def row(name):
    return next(tenant for tenant in device().tenants if tenant.name == name)


def reported(tenant, name):
    """Wait until the broker knows what the tenant holds."""
    assert until(lambda: row(name).report == tenant.report())


def test_nobody_runs_nobody_is_listed_and_nothing_is_started(runtime_dir):
    assert list_tenants() == []
    assert list_tenants("cpu", config=Config(runtime_dir=f"{runtime_dir}/none")) == []
    with pytest.raises(BrokerUnavailable, match="no broker"):
        set_tenant_limit("a", 1)
    assert os.listdir(runtime_dir) == []


def test_the_first_starts_the_broker_and_the_last_ends_it(runtime_dir, tenant):
    a = tenant("a")
    b = tenant("b", capacity=5)  # the first one's word counts
    assert b.budget.capacity_bytes == 1024 * MIB
    pid = device().broker_pid
    assert {"cpu.sock", "cpu.lock", "cpu.roster.json"} <= set(os.listdir(runtime_dir))
    assert os.stat(runtime_dir / "cpu.sock").st_mode & 0o777 == 0o600
    a.close()
    assert device().broker_pid == pid
    b.close()
    assert until(lambda: not set(os.listdir(runtime_dir)) - {"cpu.log"})
    assert until(lambda: not os.path.exists(f"/proc/{pid}/cmdline"))


def test_what_a_broker_killed_while_it_wrote_has_left_is_cleared_away(runtime_dir, tenant):
    left = ("cpu.new", "cpu.roster.json.new", "cpu.sock", "cpu.lock")
    for name in left:
        (runtime_dir / name).write_text("")
    tenant("a").close()
    assert until(lambda: not set(left) & set(os.listdir(runtime_dir)))


def test_claims_are_leased_in_batches_and_the_rest_goes_back_when_idle(tenant):
    a = tenant("a")
    a.use(MIB)
    assert a.budget.lease_bytes >= 2 * MIB
    assert a.budget.claimed_bytes == MIB
    a.budget.check()
    assert until(lambda: row("a").lease_bytes == a.budget.lease_bytes == MIB)
    a.drop(MIB)
    assert until(lambda: row("a").lease_bytes == 0)


def test_a_claim_above_the_limit_or_the_capacity_changes_nothing(tenant):
    a = tenant("a", limit=10 * MIB)
    a.use(8 * MIB)
    with pytest.raises(BudgetExceeded, match="the limit is 10"):
        a.use(3 * MIB)
    b = tenant("b")
    b.use(1000 * MIB)
    with pytest.raises(MemoryError, match="the others hold the rest"):
        b.use(17 * MIB)
    assert (a.budget.claimed_bytes, b.budget.claimed_bytes) == (8 * MIB, 1000 * MIB)
    b.use(8 * MIB)  # above its share: room to split what the other has in use stays free


def test_an_idle_peer_gives_its_cached_bytes(tenant):
    a, b = tenant("a"), tenant("b")
    a.use(1000 * MIB)
    a.cache()
    reported(a, "a")
    b.use(256 * MIB)
    assert a.cached <= 1000 * MIB - 232 * MIB
    assert a.budget.claimed_bytes == a.cached
    assert device().leased_bytes <= 1024 * MIB


def test_two_that_claim_from_each_other_at_once_both_get_an_answer(tenant):
    a, b = tenant("a"), tenant("b")
    for one in (a, b):
        one.use(500 * MIB)
        one.cache()
    done = []

    def work(one):
        for _ in range(20):
            with one.lock, one.lock:  # an engine may hold its lock twice
                try:
                    one.use(300 * MIB)
                except MemoryError:
                    continue
                one.cache()
        done.append(one)

    threads = [threading.Thread(target=work, args=(one,)) for one in (a, b)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30.0)
    assert sorted(map(id, done)) == sorted(map(id, (a, b)))
    assert a.reclaims
    assert b.reclaims


def test_a_split_may_exceed_the_limit_for_a_moment_even_while_a_peer_waits(tenant):
    a, b = tenant("a", limit=400 * MIB), tenant("b")
    a.use(400 * MIB)
    a.budget.claim(10 * MIB, transient=True)  # on the owner's thread: trim()
    a.budget.give_back(10 * MIB)
    b.use(590 * MIB)
    split = []

    def reclaim(nbytes, *, patient):  # on the budget's own thread: copies 10 MiB to free 200
        a.budget.claim(10 * MIB, transient=True)
        a.in_use -= 200 * MIB
        a.budget.give_back(210 * MIB)
        split.append(nbytes)
        return 200 * MIB

    a.reclaim = reclaim
    started = time.monotonic()
    b.use(150 * MIB)
    assert split
    assert time.monotonic() - started < 1.0
    with pytest.raises(BudgetExceeded, match="not even for a moment"):
        a.budget.claim(500 * MIB, transient=True)
    a.budget.check()
    assert device().leased_bytes <= 1024 * MIB


def test_floors_are_honoured(tenant):
    a = tenant("a", floor_bytes=600 * MIB)
    b = tenant("b")
    a.use(600 * MIB)
    a.cache()
    reported(a, "a")
    with pytest.raises(BudgetExceeded):
        b.use(500 * MIB)
    assert a.cached == 600 * MIB
    with pytest.raises(InvalidInput, match="floors"):
        tenant("c", floor_bytes=500 * MIB)


def test_who_is_above_its_fair_share_gives_first(tenant):
    a, b, c = tenant("a"), tenant("b"), tenant("c")
    a.age = 1000.0  # the oldest, but a holds less than its share
    for one, size in ((a, 100), (b, 900)):
        one.use(size * MIB)
        one.cache()
    reported(a, "a")
    reported(b, "b")
    c.use(200 * MIB)
    assert a.cached == 100 * MIB
    assert b.cached <= 900 * MIB - 176 * MIB


def test_a_lowered_limit_is_obeyed_by_an_idle_tenant(tenant):
    a = tenant("a")
    a.use(800 * MIB)
    a.cache()
    record = set_tenant_limit("a", 100 * MIB)
    assert (record.desired_bytes, record.revision) == (100 * MIB, 1)
    assert record.applied
    assert a.budget.claimed_bytes == a.cached == 100 * MIB
    assert a.budget.limit_record() == record
    with pytest.raises(BudgetExceeded, match="the limit is"):
        a.use(MIB)
    assert set_tenant_limit("a", 900 * MIB).revision == 2
    a.use(MIB)
    assert request_reclaim("a", 50 * MIB) >= 50 * MIB


def test_a_limit_above_the_capacity_is_the_capacity_everywhere(tenant):
    a = tenant("a", limit=4096 * MIB)
    assert a.budget.limit_bytes == row("a").limit.desired_bytes == 1024 * MIB
    assert set_tenant_limit("a", 100 * MIB).desired_bytes == 100 * MIB
    assert set_tenant_limit("a", 5000 * MIB).desired_bytes == 1024 * MIB
    assert a.budget.limit_bytes == row("a").limit.desired_bytes == 1024 * MIB
    assert a.budget.set_limit(2048 * MIB).desired_bytes == 1024 * MIB
    assert until(lambda: row("a").limit.revision == a.budget.limit_record().revision)
    assert row("a").limit.desired_bytes == 1024 * MIB
    os.kill(device().broker_pid, signal.SIGKILL)
    assert until(lambda: list_tenants("cpu") and device().tenants)
    assert row("a").limit.desired_bytes == 1024 * MIB


def test_a_limit_below_what_is_in_use_is_applied_as_soon_as_that_is_over(tenant):
    a = tenant("a")
    a.use(100 * MIB)
    assert not set_tenant_limit("a", 10 * MIB).applied
    a.cache()
    assert until(lambda: row("a").limit.applied)
    assert a.cached == 10 * MIB


def test_an_own_limit_is_known_to_all_and_revisions_only_grow(tenant):
    a = tenant("a")
    a.use(50 * MIB)
    a.cache()
    record = a.budget.set_limit(20 * MIB)
    assert record.applied
    assert until(lambda: row("a").limit.desired_bytes == 20 * MIB)
    assert set_tenant_limit("a", 30 * MIB).revision == record.revision + 1


def agreed(tenant):
    """Whether a broker knows the tenant, and both have the same record of its limit."""
    known = [t.limit for device in list_tenants("cpu") for t in device.tenants]
    return known[:1] == [tenant.budget.limit_record()]


def test_an_engine_cannot_undo_an_administrators_limit(tenant):
    a = tenant("a")
    set_tenant_limit("a", 100 * MIB)
    assert a.budget.set_limit(900 * MIB).desired_bytes == 100 * MIB
    with pytest.raises(BudgetExceeded, match="the limit is 100"):
        a.use(500 * MIB)
    assert a.budget.set_limit(50 * MIB).desired_bytes == 50 * MIB  # lower is its own affair
    os.kill(device().broker_pid, signal.SIGKILL)
    assert until(lambda: agreed(a))
    assert a.budget.set_limit(900 * MIB).desired_bytes == 100 * MIB  # the next broker knows, too
    assert until(lambda: agreed(a))
    assert set_tenant_limit("a", 2000 * MIB).desired_bytes == 1024 * MIB  # the capacity
    a.use(500 * MIB)


def test_changes_of_a_limit_that_cross_end_the_same_on_both_sides(tenant):
    a = tenant("a")
    for step in range(20):
        thread = threading.Thread(target=set_tenant_limit, args=("a", (700 + step) * MIB))
        thread.start()
        a.budget.set_limit((300 + step) * MIB)
        thread.join()
        assert until(lambda: row("a").limit == a.budget.limit_record()), step


def test_names(tenant):
    tenant("a")
    with pytest.raises(NameTaken, match="the name 'a' is taken by process"):
        tenant("a")
    with pytest.raises(UnknownName, match="live: a"):
        set_tenant_limit("b", 1)
    with pytest.raises(InvalidInput, match="not a valid name"):
        tenant("../a")
    for bad in (-1, True, 1.5, 1 << 63):
        with pytest.raises(InvalidInput, match="number of bytes"):
            set_tenant_limit("a", bad)


def test_many_tenants_are_listed_in_several_messages(tenant):
    for i in range(20):
        tenant(f"t{i}", meta={"text": "x" * 400})
    assert {t.name for t in device().tenants} == {f"t{i}" for i in range(20)}
    assert row("t3").meta == {"text": "x" * 400}
    assert device().to_dict()["tenants"][0]["limit"]["applied"]


def test_the_broker_dies_and_everything_goes_on(tenant):
    a, b = tenant("a"), tenant("b")
    a.use(500 * MIB)
    set_tenant_limit("b", 700 * MIB)
    for _ in range(3):
        before = device()
        os.kill(before.broker_pid, signal.SIGKILL)
        a.use(MIB)  # waits for the next broker
        after = until(lambda: next((d for d in list_tenants() if len(d.tenants) == 2), None))
        assert after.broker_pid != before.broker_pid
        assert after.epoch > before.epoch
        assert after.capacity_bytes == before.capacity_bytes
        assert until(lambda: row("a").lease_bytes >= a.budget.claimed_bytes)
        assert row("b").limit.desired_bytes == 700 * MIB
    b.use(100 * MIB)


@pytest.mark.slow
def test_without_a_broker_what_is_leased_can_be_used_and_more_is_refused(tenant, monkeypatch):
    a = tenant("a")
    a.use(10 * MIB)

    def cannot(*_):
        raise BrokerUnavailable("not today")

    monkeypatch.setattr(link, "_start", cannot)
    os.kill(device().broker_pid, signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(BudgetExceeded, match="the broker does not answer"):
        a.use(100 * MIB)
    assert time.monotonic() - started < 10
    a.drop(5 * MIB)
    assert a.budget.claimed_bytes == 5 * MIB
    monkeypatch.undo()
    assert until(lambda: list_tenants("cpu") and row("a").lease_bytes == 5 * MIB)


@pytest.mark.slow
def test_a_stopped_broker_delays_a_claim_and_no_more(tenant):
    a = tenant("a")
    pid = device().broker_pid
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(BudgetExceeded, match="the broker does not answer"):
            a.use(MIB)
        a.budget.give_back(0)
    finally:
        os.kill(pid, signal.SIGCONT)
    a.use(MIB)


def test_a_peer_whose_lock_is_held_is_late_and_the_claimer_is_refused(tenant):
    a, b = tenant("a"), tenant("b")
    a.use(1000 * MIB)
    a.cache()
    reported(a, "a")
    with a.lock:  # an engine in a long step cannot answer
        started = time.monotonic()
        with pytest.raises(BudgetExceeded):
            b.use(500 * MIB)
        assert ASK_S <= time.monotonic() - started < 5
        assert row("a").state == "late"
    assert until(lambda: row("a").state == "live")
    b.use(500 * MIB)


def test_memory_that_the_device_refused_lowers_what_is_handed_out(tenant):
    a, b = tenant("a"), tenant("b")
    a.use(300 * MIB)
    a.budget.report_out_of_memory(100 * MIB)
    a.drop(100 * MIB)
    with pytest.raises(BudgetExceeded):
        b.use(200 * MIB)


def test_after_close(tenant):
    a = tenant("a")
    a.close()
    a.budget.close()
    for call in (a.budget.claim, a.budget.give_back, a.budget.set_limit):
        with pytest.raises(ClosedError):
            call(0)
    assert until(lambda: "kvcached-a" not in {thread.name for thread in threading.enumerate()})
    tenant("a")


def test_close_with_claims_is_an_error_and_dropping_a_budget_ends_its_thread(tenant):
    a = tenant("a")
    a.use(MIB)
    with pytest.raises(AssertionError, match="I4"):
        a.budget.close()


@pytest.mark.parametrize("bad", [-1, True, 1.5, "8G", 1 << 63])
def test_sizes(tenant, bad):
    a = tenant("a")
    for call in (a.budget.claim, a.budget.set_limit):
        with pytest.raises(InvalidInput, match="number of bytes"):
            call(bad)
