from __future__ import annotations

import pytest
from ledger_rig import add, claim, holds, ledger_of

from kvcached.broker.ceiling import OOM_S
from kvcached.broker.lease import Grant, Reclaim, Report
from kvcached.broker.ledger import ASK_S, BLIND_S, CLAIM_S, GRACE_S, Ledger
from kvcached.broker.plan import reserve_bytes
from kvcached.broker.protocol import LATE, REFUSED


def test_free_capacity_is_granted_in_batches_but_not_beyond_the_limit():
    ledger = ledger_of(a=0)
    ledger.a.limit = 300
    assert claim(ledger, ledger.a, 10, 200) == [Grant(1, 7, 200, 0)]
    assert claim(ledger, ledger.a, 10, 200) == [Grant(1, 7, 100, 0)]
    assert claim(ledger, ledger.a, 10) == [Grant(1, 7, 0, REFUSED)]


def test_what_could_never_be_met_is_refused_and_nobody_is_asked():
    ledger = ledger_of(a=0, b=900)
    holds(ledger.b, cached=900)
    ledger.b.floor = 400
    assert claim(ledger, ledger.a, 601) == [Grant(1, 7, 0, REFUSED)]


def test_a_claim_is_met_by_others_and_never_by_the_claimer():
    ledger = ledger_of(a=400, b=600)
    holds(ledger.a, cached=400)
    holds(ledger.b, cached=600)
    (ask,) = claim(ledger, ledger.a, 250)
    assert (ask.tenant, ask.nbytes) == (ledger.b.ident, 250)
    assert ledger.give_back(ledger.b.ident, 250)
    ledger.answer(ask.request)
    assert ledger.pump(0.1) == [Grant(ledger.a.ident, 7, 250, 0)]
    ledger.check()


def test_who_is_below_its_share_is_given_more_at_once_by_who_is_above():
    ledger = ledger_of(a=0, b=900, c=100)
    holds(ledger.b, cached=900)
    holds(ledger.c, cached=100)
    (ask,) = claim(ledger, ledger.a, 50, want=200)
    assert (ask.tenant, ask.nbytes) == (ledger.b.ident, 200)
    assert ledger.give_back(ledger.b.ident, 200)
    ledger.answer(ask.request, 200)
    assert ledger.pump(0.0) == [Grant(ledger.a.ident, 7, 200, 0)]
    holds(ledger.a, in_use=200)  # 300 more would be above its share: only what it needs
    assert [ask.nbytes for ask in claim(ledger, ledger.a, 300, want=400)] == [300]


def test_when_all_have_answered_and_it_is_not_enough_it_is_refused_at_once():
    ledger = ledger_of(a=0, b=1000)
    holds(ledger.b)  # all in use
    (ask,) = claim(ledger, ledger.a, 100)  # asked once all the same: reports are old
    ledger.answer(ask.request)
    assert ledger.pump(0.01) == [Grant(1, 7, 0, REFUSED)]


def test_who_does_not_answer_gets_nothing_until_it_does():
    ledger = ledger_of(a=0, b=1000)
    holds(ledger.b, cached=1000)
    (ask,) = claim(ledger, ledger.a, 100)
    assert ledger.next_deadline() == ASK_S
    assert ledger.pump(ASK_S) == [Grant(1, 7, 0, REFUSED)]
    assert ledger.b.late
    assert claim(ledger, ledger.b, 1, now=ASK_S) == [Grant(2, 7, 0, REFUSED)]  # nothing is free
    ledger.capacity = ledger.b.ceiling = ledger.b.limit = 2000
    assert claim(ledger, ledger.b, 1, now=ASK_S) == [Grant(2, 7, 0, LATE)]
    ledger.answer(ask.request)
    ledger.answered_late(ledger.b.ident)
    assert claim(ledger, ledger.b, 1, now=ASK_S) == [Grant(2, 7, 1, 0)]


def test_a_transient_claim_passes_its_limit_and_the_queue_but_not_the_capacity():
    ledger = ledger_of(a=0, b=900)
    ledger.b.limit = 900
    holds(ledger.b, cached=900)
    claim(ledger, ledger.a, 500, request=1)
    ledger.claim(ledger.b.ident, 2, 60, 60, 0.0, transient=True)
    assert ledger.pump(0.0) == [Grant(ledger.b.ident, 2, 60, 0)]
    ledger.claim(ledger.b.ident, 3, 60, 60, 0.0, transient=True)
    assert Grant(ledger.b.ident, 3, 0, REFUSED) in ledger.pump(0.0)
    ledger.check()


def test_who_is_above_its_share_leaves_room_for_a_split():
    ledger = ledger_of(a=400, b=0)
    reserve = reserve_bytes(1000)
    holds(ledger.a)
    assert claim(ledger, ledger.b, 500, 700)[-1] == Grant(ledger.b.ident, 7, 600 - reserve, 0)
    ledger.give_back(ledger.b.ident, 100 - reserve)
    assert ledger.b.lease == 500
    assert claim(ledger, ledger.a, 100) == [Grant(ledger.a.ident, 7, 100, 0)], "up to its share"
    ledger.give_back(ledger.a.ident, 100)
    assert claim(ledger, ledger.b, 100 - reserve) == [Grant(ledger.b.ident, 7, 100 - reserve, 0)]
    ledger.claim(ledger.a.ident, 8, reserve, reserve, 0.0, transient=True)
    assert ledger.pump(0.0) == [Grant(ledger.a.ident, 8, reserve, 0)], "the room is for that"


def test_claims_are_served_in_turn_but_a_floor_needs_no_turn():
    ledger = ledger_of(a=0, b=900, c=0)
    holds(ledger.b, cached=900)
    assert [type(e) for e in claim(ledger, ledger.a, 300, request=1)] == [Reclaim]
    assert claim(ledger, ledger.c, 50, request=2) == []  # would fit, but a is first
    ledger.c.floor = 50
    assert ledger.pump(0.0)[-1] == Grant(ledger.c.ident, 2, 50, 0)


def test_claims_within_a_share_come_before_those_that_came_first():
    ledger = ledger_of(a=0, b=900, c=0)
    holds(ledger.b, cached=900)
    claim(ledger, ledger.a, 500, request=1)
    assert claim(ledger, ledger.c, 50, request=2)[0] == Grant(ledger.c.ident, 2, 50, 0)


def test_floors_of_others_are_kept_free_and_are_never_reclaimed():
    ledger = ledger_of(a=0, b=300)
    ledger.b.floor = 500
    holds(ledger.b, cached=300)
    assert claim(ledger, ledger.a, 500, 1000) == [Grant(1, 7, 500, 0)]
    assert claim(ledger, ledger.a, 1) == [Grant(1, 7, 0, REFUSED)]


def test_floors_above_the_capacity_are_not_taken_in():
    ledger = ledger_of(a=0)
    ledger.a.floor = 600
    assert add(ledger, "b", floor=401) is None
    assert add(ledger, "b", floor=400) is not None


def test_a_dead_owner_keeps_its_lease_until_the_bytes_are_back():
    ledger = ledger_of(a=0, b=1000)
    ledger.revoke(ledger.b.ident)
    assert claim(ledger, ledger.a, 10) == []  # waits for them
    with pytest.raises(AssertionError, match="I8"):
        ledger.credit(ledger.b.ident)
    ledger.drain(ledger.b.ident)
    assert ledger.pump(0.1) == []
    assert ledger.credit(ledger.b.ident) == 1000
    assert ledger.pump(0.2) == [Grant(1, 7, 10, 0)]


def test_a_live_owner_cannot_be_drained_and_a_dead_one_is_not_asked():
    ledger = ledger_of(a=0, b=1000)
    holds(ledger.b, cached=1000)
    with pytest.raises(AssertionError, match="I8"):
        ledger.drain(ledger.b.ident)
    claim(ledger, ledger.a, 10)
    ledger.revoke(ledger.b.ident)
    assert not ledger.asks
    ledger.check()


def test_a_new_broker_waits_for_those_it_expects_or_for_the_grace_time():
    for back in (True, False):
        ledger = Ledger(1000, 0.0, ["a", "b"])
        a = add(ledger, "a", lease=100)
        assert claim(ledger, a, 10) == []
        if back:
            add(ledger, "b", lease=50)
        assert ledger.pump(0.1) == ([Grant(a.ident, 7, 10, 0)] if back else [])
        if not back:
            assert ledger.pump(GRACE_S) == [Grant(a.ident, 7, 10, 0)]


def test_an_unknown_roster_means_the_whole_grace_time():
    ledger = Ledger(1000, 0.0, None)
    a = add(ledger, "a")
    assert claim(ledger, a, 10, now=GRACE_S / 2) == []
    assert ledger.pump(GRACE_S) == [Grant(1, 7, 10, 0)]


def test_re_asserted_leases_are_always_taken_in_and_nothing_is_granted_above_the_capacity():
    ledger = ledger_of(a=800, b=700)
    assert ledger.over_committed
    ledger.check()
    holds(ledger.a)
    holds(ledger.b)
    effects = claim(ledger, ledger.a, 10)
    assert all(isinstance(effect, Reclaim) for effect in effects)
    ledger.give_back(ledger.b.ident, 500)
    assert not ledger.over_committed
    assert ledger.pump(0.1) == []  # what was asked for is still to come, but a is not overtaken


def test_a_returning_engine_takes_over_its_old_lease():
    ledger = ledger_of(a=500, b=0)
    ledger.a.limit, ledger.a.revision = 600, 3
    again = add(ledger, "a", lease=450, limit=900)
    ledger.succeed(ledger.a.ident, again.ident)
    assert (ledger.leased, again.limit, again.revision) == (450, 600, 3)


def test_an_engine_lowers_its_limit_and_raises_it_no_further_than_an_administrator_allows():
    ledger = ledger_of(a=0)
    ident = ledger.a.ident

    def limit(nbytes, *, by_admin):
        tenant = ledger.set_limit(ident, nbytes, by_admin=by_admin)
        ledger.check()
        return tenant.limit, tenant.revision

    assert limit(5000, by_admin=False) == (1000, 1)  # the capacity
    assert limit(300, by_admin=True) == (300, 2)
    assert limit(900, by_admin=False) == (300, 3)
    assert limit(200, by_admin=False) == (200, 4)
    assert limit(250, by_admin=False) == (250, 5)
    assert limit(600, by_admin=True) == (600, 6)  # the administrator's word replaces the engine's
    assert limit(5000, by_admin=True) == (1000, 7)


def test_a_returning_engine_may_not_have_heard_what_the_administrator_said():
    for known, said in ((0, (300, 1)), (1, (300, 1)), (2, (300, 2))):
        ledger = ledger_of(a=0)
        ledger.set_limit(ledger.a.ident, 300, by_admin=True)
        again = ledger.join("a", 0.0, limit=900, floor=0, weight=1.0, lease=0, revision=known)
        ledger.succeed(ledger.a.ident, again.ident)
        ledger.check()
        assert (again.limit, again.revision) == said
        assert ledger.set_limit(again.ident, 900, by_admin=False).limit == 300


def test_a_new_broker_is_told_what_an_administrator_allows():
    ledger = Ledger(1000, 0.0)
    a = ledger.join("a", 0.0, limit=900, floor=0, weight=1.0, lease=500, ceiling=400, revision=7)
    assert (a.limit, a.ceiling, a.revision) == (400, 400, 7)
    ledger.check()


def test_the_device_out_of_memory_lowers_the_capacity_for_a_while():
    ledger = ledger_of(a=500, b=0)
    holds(ledger.a)
    ledger.give_back(ledger.a.ident, 100)
    ledger.out_of_memory(ledger.a.ident, 0.0)
    effects = claim(ledger, ledger.b, 100)
    assert not any(isinstance(effect, Grant) and effect.nbytes for effect in effects)
    assert claim(ledger, ledger.b, 100, now=OOM_S)[-1].nbytes == 100


def test_what_others_left_of_the_device_is_all_that_is_handed_out():
    ledger = ledger_of(a=300, b=0)
    ledger.device_has(100)  # others hold 600 of the 1000
    assert claim(ledger, ledger.b, 60, 500)[-1].nbytes == 100
    holds(ledger.a)
    effects = claim(ledger, ledger.b, 50)  # not refused: a might give
    assert effects == [Reclaim(ledger.a.ident, effects[0].request, 50, patient=True)]
    ledger.answer(effects[0].request)
    assert ledger.pump(0.0) == [Grant(ledger.b.ident, 7, 0, REFUSED)]  # it gave nothing
    assert claim(ledger, ledger.b, 301) == [Grant(ledger.b.ident, 7, 0, REFUSED)]  # never possible


def test_a_look_at_the_device_stays_right_while_leases_grow_and_shrink():
    ledger = ledger_of(a=300, b=0)
    ledger.device_has(100)
    ledger.give_back(ledger.a.ident, 200)  # to the device: 300 are free now
    assert ledger.available(ledger.b, 0.0) == 300
    claim(ledger, ledger.b, 250)
    assert ledger.available(ledger.a, 0.0) == 50
    ledger.device_has(None)  # it has stopped to answer
    assert ledger.available(ledger.a, 0.0) == 650


def test_a_reserve_that_others_have_eaten_into_has_to_come_back_first():
    ledger = ledger_of(a=0, b=600)
    holds(ledger.b, cached=600)
    ledger.device_has(-40)
    (ask,) = claim(ledger, ledger.a, 100)
    assert (ask.tenant, ask.nbytes) == (ledger.b.ident, 140)
    ledger.give_back(ledger.b.ident, 140)
    ledger.answer(ask.request)
    assert ledger.pump(0.0) == [Grant(ledger.a.ident, 7, 100, 0)]


def test_a_floor_is_granted_whatever_others_use():
    ledger = ledger_of(a=0, b=0)
    ledger.a.floor = 200
    ledger.device_has(-500)
    assert claim(ledger, ledger.a, 200) == [Grant(ledger.a.ident, 7, 200, 0)]
    assert claim(ledger, ledger.b, 1) == [Grant(ledger.b.ident, 7, 0, REFUSED)]


def test_a_look_is_worthless_once_a_lease_came_or_went_in_another_way():
    ledger = ledger_of(a=300, b=200)
    for change in (
        lambda: ledger.succeed(ledger.a.ident, add(ledger, "a2", lease=250).ident),
        lambda: (ledger.revoke(ledger.b.ident), ledger.drain(ledger.b.ident),
                 ledger.credit(ledger.b.ident)),
        lambda: add(ledger, "c", lease=100),
    ):  # fmt: skip
        ledger.device_has(0)
        assert ledger.ceiling.looked
        change()
        assert not ledger.ceiling.looked
    assert ledger.effective_capacity(0.0) == 1000


def test_limits_end_at_the_capacity():
    ledger = ledger_of(a=0)
    assert ledger.a.limit == 1000
    assert ledger.set_limit(ledger.a.ident, 5000, by_admin=True).revision == 1
    assert ledger.a.limit == 1000


def test_giving_back_too_much_is_an_error_and_changes_nothing():
    ledger = ledger_of(a=5)
    assert not ledger.give_back(ledger.a.ident, 6)
    assert ledger.leased == 5


def test_a_claim_that_waits_too_long_is_refused():
    ledger = ledger_of(a=0, b=1000)
    ledger.revoke(ledger.b.ident)
    claim(ledger, ledger.a, 10)
    assert ledger.pump(CLAIM_S - 0.01) == []
    assert ledger.pump(CLAIM_S) == [Grant(1, 7, 0, REFUSED)]


def test_a_report_that_was_not_made_good_is_not_asked_by_again():
    ledger = ledger_of(a=0, b=1000)
    holds(ledger.b, cached=600)
    (ask,) = claim(ledger, ledger.a, 500)
    assert ask == Reclaim(ledger.b.ident, ask.request, 500, patient=True)
    ledger.answer(ask.request, 0)  # kernels ran, say
    (once,) = ledger.pump(0.0)  # for all that may be asked, since reports are old
    ledger.answer(once.request, 0)
    assert ledger.pump(0.0) == [Grant(ledger.a.ident, 7, 0, REFUSED)]
    assert claim(ledger, ledger.a, 500, request=8) == [Grant(ledger.a.ident, 8, 0, REFUSED)]
    later = claim(ledger, ledger.a, 500, request=9, now=BLIND_S)
    assert [type(effect) for effect in later] == [Reclaim], "but now and then all the same"
    ledger.check()


def test_who_got_more_since_it_was_asked_in_vain_is_asked_again_at_once():
    """Filled and let go between two reports: its old one says nothing of that."""
    ledger = ledger_of(a=0, b=900)
    holds(ledger.b)
    (blind,) = claim(ledger, ledger.a, 500)
    ledger.answer(blind.request, 0)
    assert ledger.pump(0.0) == [Grant(ledger.a.ident, 7, 0, REFUSED)]
    assert claim(ledger, ledger.a, 500) == [Grant(ledger.a.ident, 7, 0, REFUSED)], "just asked"
    assert claim(ledger, ledger.b, 10)[-1].nbytes == 10
    assert [type(effect) for effect in claim(ledger, ledger.a, 500)] == [Reclaim]


def test_a_new_report_is_asked_by():
    ledger = ledger_of(a=0, b=1000)
    holds(ledger.b, cached=600)
    (ask,) = claim(ledger, ledger.a, 500)
    ledger.answer(ask.request, 100)
    ledger.give_back(ledger.b.ident, 100)
    holds(ledger.b, cached=500)
    (again,) = ledger.pump(0.0)
    assert again == Reclaim(ledger.b.ident, again.request, 400, patient=True)


def test_what_only_a_split_can_give_is_asked_of_engines_that_pause():
    ledger = ledger_of(a=0, b=500, c=500)
    for tenant, pauses in ((ledger.b, False), (ledger.c, True)):
        tenant.report = Report(500, 0, 0, 100, 0.0, idle=False, pauses=pauses)
    (ask,) = claim(ledger, ledger.a, 300)
    assert ask == Reclaim(ledger.c.ident, ask.request, 300, patient=True)


def test_who_is_above_its_share_makes_no_engine_at_work_move_its_blocks():
    ledger = ledger_of(a=500, b=500)
    ledger.b.blind_until, reserve = 1.0, reserve_bytes(1000)
    ledger.b.report = Report(500, 50, 0, 100, 0.0, idle=False, pauses=True)
    (ask,) = claim(ledger, ledger.a, 10)
    wanted = 10 + reserve
    assert ask == Reclaim(ledger.b.ident, ask.request, wanted, patient=False), "cached, at once"
    ledger.answer(ask.request, 0)
    assert ledger.pump(0.0) == [Grant(ledger.a.ident, 7, 0, REFUSED)]
    ledger.b.report = Report(500, 0, 0, 100, 0.0, idle=True, pauses=True)
    (ask,) = claim(ledger, ledger.a, 300, request=8)
    assert ask.nbytes == 300 + reserve, "an engine that does nothing loses nothing by a split"
