"""Claims whose owner waits a little only: the broker goes on with them for a while."""

from __future__ import annotations

import contextlib
import time
from unittest import mock

import pytest
from broker_tenant import MIB, CountingTenant

from kvcached.broker.mirror import MirrorState
from kvcached.broker.protocol import OK, REFUSED, Message, Op
from kvcached.broker.waiting import LOST, PENDING, Vacancy, Waiting
from kvcached.errors import BudgetExceeded


def grant(answer, status=OK):
    return Message(Op.GRANT, answer.request, status=status, values=(1,))


def test_who_gives_up_leaves_a_claim_that_the_next_one_waits_for():
    waiting = Waiting()
    first, new = waiting.add(100, transient=False)
    assert new
    waiting.remove(first)
    again, new = waiting.add(60, transient=False)
    assert again is first
    assert not new
    assert again.nbytes == 60
    assert waiting.granted(grant(first)) is first
    waiting.remove(first)
    assert waiting.add(60, transient=False)[1]


def test_a_larger_claim_and_one_for_a_moment_are_their_own():
    waiting = Waiting()
    first, _ = waiting.add(100, transient=False)
    waiting.remove(first)
    assert waiting.add(101, transient=False)[1]
    assert waiting.add(10, transient=True)[1]


def test_an_answer_for_nobody_is_only_a_larger_lease():
    waiting = Waiting()
    first, _ = waiting.add(100, transient=False)
    waiting.remove(first)
    assert waiting.granted(grant(first, REFUSED)) is None
    assert waiting.add(50, transient=False)[1]
    assert waiting.granted(grant(first)) is None


def test_a_lost_connection_ends_what_nobody_waits_for():
    waiting = Waiting()
    left, _ = waiting.add(100, transient=False)
    waiting.remove(left)
    awaited, _ = waiting.add(200, transient=False)
    waiting.lose()
    assert awaited.outcome == LOST
    assert waiting.add(50, transient=False)[1]


@pytest.fixture
def pair():
    made = [CountingTenant(name, capacity=100 * MIB) for name in ("a", "b")]
    yield made
    for tenant in made:
        tenant.close()


def test_a_claim_that_waits_a_little_is_met_by_what_a_slow_peer_gives(pair):
    a, b = pair
    a.use(90 * MIB)
    a.cache()
    with a.lock:  # its thread cannot answer yet
        with pytest.raises(BudgetExceeded):
            b.budget.claim(40 * MIB, seconds=0.05)
        assert b.budget.claimed_bytes == 0
    b.use(40 * MIB)
    assert b.budget.claimed_bytes == 40 * MIB
    assert a.cached <= 60 * MIB
    assert a.reclaims == 1  # for one claim, not for two
    a.budget.check()
    b.budget.check()


def test_who_does_not_wait_finds_later_what_others_gave(pair):
    a, b = pair
    a.use(90 * MIB)
    a.cache()
    with a.lock:
        with pytest.raises(BudgetExceeded) as refused:
            b.budget.claim(40 * MIB, seconds=0)
        assert refused.value.pending
        with pytest.raises(BudgetExceeded) as again:
            b.budget.claim(20 * MIB, seconds=0)
        assert again.value.pending
    assert wait_until(lambda: b.budget.lease_bytes >= 40 * MIB)
    b.budget.claim(40 * MIB, seconds=0)
    assert a.reclaims == 1
    b.budget.give_back(40 * MIB)


def test_who_does_not_wait_is_told_of_the_refusal_by_the_next_claim(pair):
    a, b = pair
    a.use(90 * MIB)  # in use: it cannot give
    assert refusal_of(b, 40 * MIB)
    assert wait_until(lambda: refusal_of(b, 40 * MIB) is False)


def test_who_does_not_wait_gets_its_share_when_what_others_use_ends(pair):
    a, b = pair
    a.use(90 * MIB)  # in use: it cannot give
    assert refusal_of(b, 40 * MIB)
    a.drop(50 * MIB)
    assert wait_until(lambda: b.budget.lease_bytes >= 40 * MIB)
    b.budget.claim(40 * MIB, seconds=0)
    b.budget.give_back(40 * MIB)


def refusal_of(tenant, nbytes):
    """Whether the answer to a claim is still to come."""
    with pytest.raises(BudgetExceeded) as refused:
        tenant.budget.claim(nbytes, seconds=0)
    return refused.value.pending


def test_a_refusal_that_nobody_waited_for_answers_the_next_claim_of_as_much():
    now = [0.0]
    waiting = Waiting(clock=lambda: now[0])
    for nbytes, later, new in ((100, 0.0, False), (120, 0.0, False), (99, 0.0, True),
                               (100, 5.0, True)):  # fmt: skip
        first, _ = waiting.add(100, transient=False)
        assert first.outcome == PENDING
        waiting.remove(first)
        assert waiting.granted(grant(first, REFUSED)) is None
        now[0] += later
        answer, asked = waiting.add(nbytes, transient=False)
        assert asked is new
        assert (answer.outcome == REFUSED) is not new
        waiting.remove(answer)
        waiting.lose()


def wait_until(true, seconds=10.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if true():
            return True
        time.sleep(0.002)
    return False


class Published:
    """What the broker says and what it answers; counts the questions."""

    def __init__(self, leased, capacity=100):
        self.leased, self.capacity, self.asked, self.now, self.answer = (
            leased,
            capacity,
            0,
            0.0,
            False,
        )
        self.vacancy = Vacancy(self.mirrored, lambda: self.now)

    def mirrored(self):
        return None if self.leased is None else MirrorState(self.capacity, self.leased, 0, 1)

    def ask(self):
        self.asked += 1
        return None if self.answer else REFUSED

    def claim(self, need):
        return self.vacancy.asked(need, self.ask)


def test_nobody_is_asked_for_what_is_leased_to_the_last_byte():
    broker = Published(leased=95)
    assert not any(broker.claim(6) for _ in range(1000))
    assert broker.asked == 0
    broker.answer = True
    assert broker.claim(5)
    broker.leased = None  # no broker's word: then ask
    assert broker.claim(6)
    assert broker.asked == 2


def test_after_a_refusal_as_much_is_not_asked_for_until_less_is_leased_or_a_while_has_passed():
    """What is kept free of a device, for splits or by others, the mirror does not tell."""
    broker = Published(leased=90)
    assert not any(broker.claim(5) for _ in range(1000))
    assert broker.asked == 1
    assert not broker.claim(4)
    assert broker.asked == 2, "less may be there"
    broker.leased = 89
    assert not broker.claim(4)
    assert broker.asked == 3
    broker.leased, broker.answer = 91, True
    assert not broker.claim(4)
    broker.now = 0.6
    assert broker.claim(4)
    assert broker.asked == 4


def test_an_engine_that_fills_all_memory_goes_on_without_the_broker(runtime_dir):
    """Where its own prefixes fill the device, growth is asked for at every turn."""
    with contextlib.ExitStack() as stack:
        a, b = (stack.enter_context(contextlib.closing(CountingTenant(name))) for name in "ab")
        b.use(24 * MIB)
        while a.budget.claim_if_free(MIB, ask=True):
            a.held = a.budget.claimed_bytes
        sent = mock.Mock(side_effect=a.budget._session.send)
        with mock.patch.object(a.budget._session, "send", sent):
            began = time.monotonic()
            assert not any(a.budget.claim_if_free(MIB, ask=True) for _ in range(1000))
            asked = sum(one.args[0].op is Op.CLAIM for one in sent.mock_calls)
            assert asked <= 2 + 2 * (time.monotonic() - began)
        a.budget.give_back(a.budget.claimed_bytes)
