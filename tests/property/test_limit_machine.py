"""One limit record (docs/broker.md, rule 10): an engine and its broker, with messages that cross.

Both sides are the real ones, ``BrokerBudget`` and ``Service``; only when a message arrives is
the machine's choice.
"""

from __future__ import annotations

import tempfile

from broker_desk import Desk
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvcached.broker.protocol import Message, Op
from kvcached.errors import BudgetExceeded

CAPACITY = 1000
LIMITS = st.integers(0, 1200)
TURNS = st.lists(st.booleans(), max_size=4)


class LimitMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory(prefix="kv-")
        self.desk = Desk(self.folder.name, CAPACITY)
        self.engine = self.desk.tenant("a")
        self.session = self.engine.budget._session
        self.greeted = True  # else the broker's answer to the hello is still on its way
        self.allowed = self.heard = CAPACITY  # the administrator's last word; what got through
        self.wish = None  # the engine's own last word, if it came after the administrator's
        self.least = self.revision = 0

    def online(self):
        return self.session.connected

    def member(self):
        return self.desk.members.named("a")

    # --- who speaks -------------------------------------------------------------------------------

    @rule(nbytes=LIMITS)
    def engine_sets_its_own(self, nbytes):
        record = self.engine.budget.set_limit(nbytes)
        self.wish = nbytes
        # Without a connection it is cut to what is known, though more may be allowed meanwhile.
        self.least = nbytes if self.online() else min(nbytes, self.heard)
        assert record.desired_bytes == min(nbytes, self.heard), "it knows what it was told"

    @rule(nbytes=LIMITS)
    def administrator(self, nbytes):
        admin = self.desk.connect()
        said = Message(Op.SET_LIMIT, 5, body={"name": "a", "limit": nbytes})
        reply = admin.ask(said)
        if reply is not None and reply.op is Op.ERROR:
            assert not self.online(), "a live tenant is not known"
            return
        self.allowed, self.wish = min(nbytes, CAPACITY), None

    @precondition(online)
    @rule(nbytes=st.integers(1, 600))
    def engine_claims(self, nbytes):
        try:
            self.engine.use(nbytes)
        except BudgetExceeded:
            return
        self.engine.cache()
        assert self.engine.budget.claimed_bytes <= self.engine.budget.limit_bytes

    @rule()
    def tick(self):
        self.engine.budget.tick()

    # --- what arrives -----------------------------------------------------------------------------

    @precondition(online)
    @rule()
    def broker_hears(self):
        self.session.wire.deliver()

    @precondition(online)
    @rule()
    def engine_hears(self):
        self.next_to_engine()

    def next_to_engine(self):
        message = self.session.deliver()
        if message is not None and message.op is Op.LIMIT:
            self.heard = message.values[0]
        return message

    @precondition(online)
    @rule(own=LIMITS, admins=LIMITS, engine_first=st.booleans(), to_engine=TURNS)
    def both_change_it(self, own, admins, engine_first, to_engine):
        """What chance seldom brings together."""
        if engine_first:
            self.engine_sets_its_own(own)
        self.administrator(admins)
        if not engine_first:
            self.engine_sets_its_own(own)
        for turn in to_engine:
            self.next_to_engine() if turn else self.session.wire.deliver()
            self.the_books_are_right()

    @precondition(online)
    @rule(noticed=st.booleans())
    def socket_is_lost(self, noticed):
        """The engine drops it. If the broker has not noticed, the next hello tells it."""
        self.session.lose()
        self.greeted = False
        if self.allowed != self.heard:
            self.wish = None  # not told apart from an older word
        if noticed:
            while self.session.wire.deliver():
                pass
            self.desk.service.lost(self.session.wire.peer, self.desk.now)
            if (
                not self.desk.members.by_ident
            ):  # it held nothing and is gone: so is what it was told
                self.allowed = self.heard

    @precondition(lambda self: not self.online() and not self.greeted)
    @rule()
    def hello(self):
        self.session.say_hello()
        self.greeted = True

    @precondition(lambda self: not self.online() and self.greeted)
    @rule()
    def welcome(self):
        self.session.hear_welcome()
        self.heard = self.engine.budget._limit.ceiling

    @rule(drained=st.booleans())
    def broker_is_killed(self, drained):
        """What it had sent may still arrive."""
        while drained and self.online() and self.next_to_engine():
            pass
        if self.online():
            self.session.lose()
        self.desk.restart()
        self.greeted = False
        if self.allowed != self.heard:
            self.wish = None
        self.allowed = self.heard

    # --- what must hold ---------------------------------------------------------------------------

    @rule()
    def everything_arrives(self):
        if not self.greeted:
            self.hello()
        if not self.online():
            self.welcome()
        self.engine.budget.tick()  # says what was changed meanwhile
        while self.session.wire.deliver() or self.next_to_engine():
            pass
        budget, tenant = self.engine.budget, self.member().tenant
        record = budget.limit_record()
        assert (record.desired_bytes, record.revision) == (tenant.limit, tenant.revision)
        assert record.held_bytes == tenant.lease
        assert record.applied, "all that it holds is cached, so a limit can be obeyed"
        assert tenant.limit <= self.allowed == tenant.ceiling == budget._limit.ceiling
        if self.wish is not None:
            assert min(self.least, self.allowed) <= tenant.limit <= self.wish
        assert self.desk.published_limit(self.member()) == tenant.limit

    @invariant()
    def the_books_are_right(self):
        self.desk.ledger.check()
        self.engine.budget.check()
        revision = self.engine.budget.limit_record().revision
        assert revision >= self.revision, "a revision never comes again"
        self.revision = revision
        if self.wish is not None:
            assert self.engine.budget.limit_bytes <= self.wish, (
                "the engine's own word holds at once"
            )

    def teardown(self):
        try:
            self.everything_arrives()
        finally:
            if self.online():
                self.session.lose()
            self.engine.close()
            self.desk.close()
            self.folder.cleanup()


TestLimitMachine = LimitMachine.TestCase
TestLimitMachine.settings = settings(stateful_step_count=40)
