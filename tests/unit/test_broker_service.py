"""What the broker does for whom: strangers, and tenants that say anything."""

from __future__ import annotations

import json
import os

import pytest
from broker_desk import Desk
from hypothesis import given
from hypothesis import strategies as st

from kvcached.broker import protocol as p
from kvcached.broker.link import raise_for
from kvcached.broker.protocol import Message, Op
from kvcached.broker.service import _MAX_CLAIMS
from kvcached.errors import NotAllowed

CAPACITY = 1000


@pytest.fixture
def desk(runtime_dir):
    desk = Desk(runtime_dir, CAPACITY)
    yield desk
    desk.close()


def hello(name, **more):
    body = {"name": name, "instance": f"{name:-<8}", "limit": CAPACITY, **more}
    return Message(Op.HELLO, 1, body=body)


def join(desk, name, **more):
    """A peer with a tenant, of which the test writes every message itself."""
    wire = desk.connect()
    assert wire.ask(hello(name, **more)).op is Op.WELCOME
    return wire


# --- who may do what ----------------------------------------------------------------------------

REQUESTS = {
    Op.HELLO: hello("b"), Op.CLAIM: Message(Op.CLAIM, 1, values=(1, 1)),
    Op.GIVE_BACK: Message(Op.GIVE_BACK, 1, values=(1,)), Op.REPORT: Message(Op.REPORT, 1),
    Op.OWN_LIMIT: Message(Op.OWN_LIMIT, 1, body={"limit": 1}),
    Op.ANSWER: Message(Op.ANSWER, 1, values=(1,)), Op.BYE: Message(Op.BYE, 1),
    Op.OUT_OF_MEMORY: Message(Op.OUT_OF_MEMORY, 1, values=(CAPACITY,)),
    Op.SET_LIMIT: Message(Op.SET_LIMIT, 1, body={"name": "a", "limit": 1}),
    Op.ASK_RECLAIM: Message(Op.ASK_RECLAIM, 1, body={"name": "a", "bytes": 1}),
}  # fmt: skip


def test_every_operation_of_an_engine_and_an_administrator_is_tried():
    assert set(REQUESTS) == {op for op in Op if p.LEASE <= op // 16 <= p.ADMIN}


@pytest.mark.parametrize("op", REQUESTS, ids=lambda op: op.name)
def test_another_user_may_look_and_no_more(desk, op):
    a = join(desk, "a")
    assert a.ask(Message(Op.CLAIM, 2, values=(100, 100))).op is Op.GRANT
    before = {name: getattr(desk.members.named("a").tenant, name) for name in ("lease", "limit")}
    stranger = desk.connect(uid=os.geteuid() + 4711)
    reply = stranger.ask(REQUESTS[op])
    assert (reply.op, reply.status) == (Op.ERROR, p.NOT_ALLOWED)
    with pytest.raises(NotAllowed, match=f"may only look, not {op.name.lower()}"):
        raise_for(reply)
    assert [row["name"] for row in stranger.ask(Message(Op.LIST, 2)).body["tenants"]] == ["a"]
    assert stranger.ask(Message(Op.PING, 3)).op is Op.DONE
    assert a.receive() is None, "the tenant was disturbed"
    tenant = desk.members.named("a").tenant
    assert {name: getattr(tenant, name) for name in before} == before
    assert desk.ledger.effective_capacity(desk.now) == CAPACITY


@pytest.mark.parametrize("uid", [None, 0])
def test_its_own_user_and_root_may_set_limits(desk, uid):
    a = join(desk, "a")
    desk.connect(uid).ask(REQUESTS[Op.SET_LIMIT])
    assert a.receive().values == (1, 1)
    assert desk.members.named("a").tenant.limit == 1


# --- a tenant that says anything ----------------------------------------------------------------

BYTES = st.sampled_from([0, 1, 7, CAPACITY, CAPACITY + 1, p.MAX_BYTES]) | st.integers(0, 600)
FIXED = [Op.CLAIM, Op.GIVE_BACK, Op.ANSWER, Op.OUT_OF_MEMORY, Op.GRANT, Op.RECLAIM, Op.LIMIT]
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | BYTES | st.text(max_size=300),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=5,
)
KEYS = st.sampled_from([
    "name", "instance", "limit", "floor", "weight", "lease", "revision", "ceiling", "meta",
    "backed_bytes", "cached_bytes", "spare_bytes", "split_floor_bytes", "in_use_bytes",
    "oldest_cached_age_s",
])  # fmt: skip


LEASES = st.sampled_from([0, 300, p.MAX_BYTES, p.MAX_BYTES])
LONG = st.builds(lambda char, n: char * n, st.sampled_from("xé語"), st.integers(0, 2040))
"""Text that is longer on the way out than it was on the way in."""


@st.composite
def anything(draw):
    """A well-formed message: of an engine about itself, or one that only a broker sends."""
    op = draw(st.sampled_from([*FIXED, Op.HELLO, Op.REPORT, Op.OWN_LIMIT, Op.DONE]))
    request = draw(st.integers(0, 9) | st.sampled_from([1 << 48, (1 << 48) + 1, (1 << 64) - 1]))
    status = draw(st.sampled_from([p.OK, p.TRANSIENT, 99]))
    if op in FIXED:
        count = p._FIXED[op].size // 8
        return Message(op, request, 0, status, tuple(draw(BYTES) for _ in range(count)))
    body = draw(st.dictionaries(KEYS, JSON | BYTES, max_size=6))
    if draw(st.booleans()):
        body |= {draw(st.sampled_from(["x", "meta"])): {"text": draw(LONG)}}
    return Message(op, request, 0, status, (), body)


def listed(desk):
    """Names and reports of all tenants."""
    wire = desk.connect()
    replies = [wire.ask(Message(Op.LIST, 3))]
    while replies[-1].status == p.MORE:
        replies.append(wire.receive())
    assert {reply.op for reply in replies} == {Op.TENANTS}, "a tenant spoils the list"
    return {row["name"]: row["report"] for reply in replies for row in reply.body["tenants"]}


def test_a_tenant_cannot_fill_the_queue(desk):
    """Every message of anybody looks at each claim that waits."""
    join(desk, "holder").ask(Message(Op.CLAIM, 2, values=(CAPACITY, CAPACITY)))
    flood, other = join(desk, "flood"), join(desk, "other")
    replies = [flood.ask(Message(Op.CLAIM, request, values=(1, 1))) for request in range(1000)]
    refused = [(reply.op, reply.status, reply.values) for reply in replies if reply is not None]
    assert refused == [(Op.GRANT, p.REFUSED, (0,))] * (1000 - _MAX_CLAIMS)
    other.ask(Message(Op.CLAIM, 3, values=(1, 1)))
    waiting = [claim.tenant for claim in desk.ledger.queue]
    assert waiting[-1] == desk.members.named("other").tenant.ident
    assert len(waiting) == _MAX_CLAIMS + 1


def as_it_is(message):
    """The bytes of a message with a body, written by somebody else's library."""
    body = json.dumps(message.body, ensure_ascii=False).encode(errors="replace")
    return p.HEADER.pack(p.MAGIC, p.VERSION, message.op, len(body), 0, 1, 0) + body


@given(
    tenants=st.lists(st.tuples(LEASES, LONG), max_size=7),
    said=st.lists(st.tuples(st.integers(0, 6), anything()), max_size=30),
)
def test_whatever_a_tenant_says_the_books_are_right_and_the_others_are_not_touched(
    runtime_dir, tenants, said
):
    desk = Desk(runtime_dir, CAPACITY)
    try:
        honest = join(desk, "honest", floor=100)
        assert honest.ask(Message(Op.CLAIM, 2, values=(300, 300))).values == (300,)
        hostile = [desk.connect() for _ in range(7)]
        hello_to_all = [hello(f"h{i}", lease=n, meta={"x": x}) for i, (n, x) in enumerate(tenants)]
        for which, message in [*enumerate(hello_to_all), *said]:
            data = p.encode(message) if message.op in FIXED else as_it_is(message)
            hostile[which].mine.send(data)
            hostile[which].deliver()
            desk.ledger.check()
            desk.now += 0.01
        tenant = desk.members.named("honest").tenant
        assert (tenant.lease, tenant.limit, tenant.floor) == (300, CAPACITY, 100)
        while (message := honest.receive()) is not None:
            assert message.op is Op.RECLAIM, "only a claim that waits may disturb"
            assert message.values[0] <= 200, "below its floor"
        reports = listed(desk)
        assert "honest" in reports
        for value in [value for report in reports.values() for value in report.values()]:
            assert isinstance(value, int | float), "ps cannot show it"
            assert 0 <= value < 1e20, "ps cannot show it"
    finally:
        desk.close()
