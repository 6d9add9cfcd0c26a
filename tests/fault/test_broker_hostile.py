"""A broker whose peers are broken or hostile: they are cut, and nobody else notices."""

from __future__ import annotations

import contextlib
import os
import random
import socket

import pytest
from broker_tenant import MIB
from fault.broker_rig import broker_fds, connect, ping_seconds, until

from kvcached.broker import protocol as p
from kvcached.broker.admin import list_tenants
from kvcached.broker.peer import MAX_ERRORS
from kvcached.broker.protocol import Message, Op

pytestmark = [pytest.mark.timeout(120)]


def malformed(rng):
    good = p.encode(Message(Op.CLAIM, 1, values=(1, 1)))
    op = rng.choice([Op.GIVE_BACK, Op.BYE, Op.GRANT, Op.ANSWER, Op.WELCOME])
    form = p._FIXED.get(op)
    values = (7,) * (form.size // 8 if form else 0)
    return rng.choice([
        rng.randbytes(rng.randint(1, 5000)),
        good[: rng.randint(1, len(good) - 1)],
        good + b"x" * rng.randint(1, 9),
        good * rng.randint(2, 200),
        p.HEADER.pack(p.MAGIC, 1, Op.HELLO, (1 << 32) - 1, 0, 1, 0),
        p.encode(Message(rng.choice([Op.HELLO, Op.REPORT]), 1, body={"name": [], "x": -1})),
        p.encode(Message(op, 1, values=values)),
    ])  # fmt: skip


def is_told_of_an_error(peer):
    reply = p.decode(peer.recv(p.MAX_MESSAGE))
    return (reply.op, reply.status) == (Op.ERROR, p.BAD_MESSAGE)


def test_ten_thousand_malformed_messages_and_each_peer_is_cut_at_its_third(tenant, runtime_dir):
    rng = random.Random(1)
    tenant.use(MIB)
    (device,) = list_tenants("cpu")
    before = broker_fds()
    for _ in range(-(-10_000 // MAX_ERRORS)):
        with connect(runtime_dir) as peer:
            for _ in range(MAX_ERRORS):
                fds = [0, 1, 2] if rng.random() < 0.1 else []
                socket.send_fds(peer, [malformed(rng)], fds)
                assert is_told_of_an_error(peer)
            assert peer.recv(p.MAX_MESSAGE) == b""
    assert until(lambda: broker_fds() == before)
    assert tenant.budget.claimed_bytes == MIB
    tenant.use(MIB)
    assert list_tenants("cpu")[0].broker_pid == device.broker_pid


# --- peers that have a tenant -------------------------------------------------------------------


class Hostile:
    """A tenant that speaks for itself; knows what the broker must think of it."""

    def __init__(self, runtime_dir, name):
        self.socket, self.lease, self.errors = connect(runtime_dir), 0, 0
        body = {"name": name, "instance": f"{name:-<8}", "limit": p.MAX_BYTES}
        data = p.encode(Message(Op.HELLO, 1, body=body))
        pidfd = os.pidfd_open(os.getpid())
        socket.send_fds(self.socket, [data], [pidfd])
        os.close(pidfd)
        reply, fds, _, _ = socket.recv_fds(self.socket, p.MAX_MESSAGE, 4)
        assert p.decode(reply).op is Op.WELCOME
        for fd in fds:
            os.close(fd)

    def ask(self, op, *values, body=None):
        self.socket.send(p.encode(Message(op, 9, values=values, body=body or {})))
        reply = p.decode(self.socket.recv(p.MAX_MESSAGE))
        self.errors += reply.status == p.BAD_MESSAGE
        return reply

    def claim(self, nbytes):
        self.lease += self.ask(Op.CLAIM, nbytes, nbytes).values[0]

    def claim_far_too_much(self, rng):
        for nbytes in (1025 * MIB, p.MAX_BYTES):
            reply = self.ask(Op.CLAIM, nbytes, p.MAX_BYTES)
            assert (reply.op, reply.status, reply.values) == (Op.GRANT, p.REFUSED, (0,))

    def answer_for_others(self, rng):
        for request in (0, 9, rng.randrange(1 << 49), (1 << 48) + rng.randrange(9)):
            self.socket.send(p.encode(Message(Op.ANSWER, request, values=(p.MAX_BYTES,))))
        assert self.ask(Op.PING).op is Op.DONE

    def set_its_limit(self, rng):
        wanted = rng.choice([0, 2000 * MIB, p.MAX_BYTES])
        said = self.ask(Op.OWN_LIMIT, body={"limit": wanted}).body
        assert said["limit"] == min(wanted, 1024 * MIB)
        self.ask(Op.OWN_LIMIT, body={"limit": p.MAX_BYTES})

    def err(self, rng):
        op, values, body = rng.choice([
            (Op.GIVE_BACK, (self.lease + 1,), None), (Op.GIVE_BACK, (p.MAX_BYTES,), None),
            (Op.GRANT, (MIB,), None), (Op.LIMIT, (1, 1), None), (Op.OWN_LIMIT, (), {"limit": -1}),
            (Op.REPORT, (), {"backed_bytes": "x"}), (Op.HELLO, (), {"name": "a"}),
            (Op.REPORT, (), {"x": "y" * 3000}),
        ])  # fmt: skip
        reply = self.ask(op, *values, body=body)
        assert (reply.op, reply.status) == (Op.ERROR, p.BAD_MESSAGE)


def test_a_tenant_that_errs_is_cut_at_its_third_and_the_ledger_stays_right(tenant, runtime_dir):
    rng = random.Random(2)
    tenant.use(300 * MIB)
    victim = tenant.budget.limit_record()
    before = broker_fds()
    for round_ in range(60):
        hostile = Hostile(runtime_dir, f"h{round_}")
        hostile.claim(rng.randint(1, 100) * MIB)
        steps = [hostile.claim_far_too_much, hostile.answer_for_others, hostile.set_its_limit]
        steps += [hostile.err] * rng.randint(0, MAX_ERRORS - 1)
        for step in rng.sample(steps, len(steps)):
            step(rng)
        leases = {one.name: one.lease_bytes for one in list_tenants("cpu")[0].tenants}
        assert leases == {"a": tenant.budget.lease_bytes, f"h{round_}": hostile.lease}
        # Given back first: this process lives on, so what a cut tenant holds would stay leased.
        hostile.socket.send(p.encode(Message(Op.GIVE_BACK, 9, values=(hostile.lease,))))
        hostile.lease = 0
        while hostile.errors < MAX_ERRORS:
            hostile.err(rng)
        assert hostile.socket.recv(p.MAX_MESSAGE) == b""
        hostile.socket.close()
    assert until(lambda: broker_fds() == before)
    (device,) = list_tenants("cpu")
    assert [one.name for one in device.tenants] == ["a"]
    after = tenant.budget.limit_record()
    assert (after.desired_bytes, after.revision) == (victim.desired_bytes, victim.revision)
    tenant.use(700 * MIB)


def test_too_many_descriptors_are_closed(tenant, runtime_dir):
    before = broker_fds()
    for _ in range(20):
        with connect(runtime_dir) as peer, contextlib.suppress(OSError):
            socket.send_fds(peer, [p.encode(Message(Op.PING, 1))], [0] * 253)
            peer.recv(5000)
    assert until(lambda: broker_fds() == before)


def test_a_flood_of_connections_and_a_peer_that_does_not_read(tenant, runtime_dir):
    before, peers = broker_fds(), []
    quiet = ping_seconds(runtime_dir)
    for _ in range(1000):
        with contextlib.suppress(OSError):
            peers.append(connect(runtime_dir))
    deaf = connect(runtime_dir)
    deaf.setblocking(False)
    ping = p.encode(Message(Op.LIST, 1))
    with contextlib.suppress(OSError):
        for _ in range(20_000):
            deaf.send(ping)
    tenant.use(200 * MIB)
    assert ping_seconds(runtime_dir) < 20 * quiet
    for peer in [*peers, deaf]:
        peer.close()
    assert until(lambda: broker_fds() == before)


def test_a_stranger_cannot_speak_for_a_tenant(tenant, runtime_dir):
    tenant.use(8 * MIB)
    with connect(runtime_dir) as peer:
        for op, values in ((Op.GIVE_BACK, (1,)), (Op.CLAIM, (1, 1)), (Op.BYE, ())):
            peer.send(p.encode(Message(op, 9, values=values)))
            assert p.decode(peer.recv(5000)).status == p.BAD_MESSAGE
        assert peer.recv(5000) == b""
    (device,) = list_tenants("cpu")
    assert device.leased_bytes >= 8 * MIB
