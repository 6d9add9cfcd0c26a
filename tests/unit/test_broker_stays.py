"""Claims that stay: they wait for their tenant's share of what others have in use."""

from __future__ import annotations

from ledger_rig import claim, holds, ledger_of

from kvcached.broker.lease import Grant
from kvcached.broker.ledger import CLAIM_S
from kvcached.broker.protocol import REFUSED


def stays(ledger, tenant, need, *, now=0.0, request=7):
    ledger.claim(tenant.ident, request, need, need, now, stays=True)
    effects = ledger.pump(now)
    ledger.check()
    return effects


def asked_in_vain(ledger, effects, now=0.0):
    """All that were asked have nothing to give now."""
    for effect in effects:
        ledger.answer(effect.request, 0)
    return ledger.pump(now)


def test_a_claim_that_stays_waits_until_what_others_use_beyond_their_share_ends():
    ledger = ledger_of(a=0, b=700, c=300)
    holds(ledger.b)
    holds(ledger.c)
    (ask,) = stays(ledger, ledger.a, 200)
    assert (ask.tenant, ask.nbytes, ask.patient) == (ledger.b.ident, 200, True)
    more = asked_in_vain(ledger, [ask])
    assert all(effect.tenant == ledger.c.ident for effect in more), "b said no"
    assert asked_in_vain(ledger, more) == []
    assert ledger.give_back(ledger.b.ident, 150)
    assert ledger.pump(0.2) == []
    assert claim(ledger, ledger.b, 10, now=0.2, request=8) == [
        Grant(ledger.b.ident, 8, 0, REFUSED)
    ], "who holds too much takes none of it"
    assert ledger.give_back(ledger.b.ident, 50)
    assert ledger.pump(0.3) == [Grant(ledger.a.ident, 7, 200, 0)]


def test_a_claim_that_stays_does_not_wait_for_ever():
    ledger = ledger_of(a=0, b=1000)
    holds(ledger.b)
    asked_in_vain(ledger, stays(ledger, ledger.a, 200))
    assert ledger.next_deadline() == CLAIM_S
    assert ledger.pump(CLAIM_S) == [Grant(ledger.a.ident, 7, 0, REFUSED)]


def test_a_claim_beyond_the_share_does_not_wait_for_what_is_in_use():
    ledger = ledger_of(a=0, b=1000)
    holds(ledger.b)
    effects = asked_in_vain(ledger, stays(ledger, ledger.a, 501))
    assert effects[-1] == Grant(ledger.a.ident, 7, 0, REFUSED)


def test_whose_owner_is_held_up_by_it_gets_its_answer_at_once():
    ledger = ledger_of(a=0, b=1000)
    holds(ledger.b)
    effects = asked_in_vain(ledger, claim(ledger, ledger.a, 200))
    assert effects[-1] == Grant(ledger.a.ident, 7, 0, REFUSED)
