"""What the broker does for each message. Knows peers and the ledger, but not the loop."""

from __future__ import annotations

import json
import os
import string
from collections.abc import Callable
from typing import Any, NamedTuple

from kvcached.broker import protocol as p
from kvcached.broker.lease import LIVE, Grant, Report, Tenant
from kvcached.broker.ledger import ASK_S, Ledger
from kvcached.broker.members import Member, Members
from kvcached.broker.mirror import SLOTS, MirrorState, MirrorWriter
from kvcached.broker.peer import Peer
from kvcached.broker.protocol import Message, Op, field
from kvcached.errors import ProtocolError

_FIRST_ADMIN_REQUEST = 1 << 48
_ADMIN_WAIT_S = 1.0
_NAME = frozenset(string.ascii_lowercase + string.digits + "._-")
_MAX_META, _MAX_REPORT = 2048, 1024
"""As JSON: with the rest of a tenant's row, both fit one message of a list."""
_MAX_CLAIMS = 64
"""Of one tenant that wait at a time: each costs time with every message of anybody."""
_OBSERVE_S = 0.1
_LOOK_S = 0.03
"""How long a look at the device counts: a burst of claims costs one call of its library."""


def is_name(name: object) -> bool:
    """The rule of ``config.check_name``, without the imports that config needs."""
    fits = isinstance(name, str) and 0 < len(name) <= 64 and name[0] not in "._-"
    return fits and _NAME.issuperset(str(name))


def _length(body: dict[str, Any]) -> int:
    """Bytes of ``body`` when we send it on: what a peer wrote may have been shorter."""
    return len(json.dumps(body, separators=(",", ":")))


class _Waiter(NamedTuple):
    """An administrator who waits until a tenant has answered."""

    peer: Peer
    request: int
    ident: int
    deadline: float


class Refusal(Exception):  # noqa: N818 (it is an answer, not a failure)
    """A well-formed request that cannot be done: a status and a text for the peer."""

    def __init__(self, status: int, text: str, **more: Any) -> None:
        super().__init__(text)
        self.status, self.text, self.more = status, text, more


class Service:
    """The broker without its sockets."""

    def __init__(
        self, ledger: Ledger, members: Members, mirror: MirrorWriter, *, epoch: int, device: str,
        log: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.ledger, self.members, self._mirror = ledger, members, mirror
        self._epoch, self._device, self._log = epoch, device, log
        self._waiters: dict[int, _Waiter] = {}
        self._next_request = _FIRST_ADMIN_REQUEST
        self._published: MirrorState | None = None
        self._observed = self._looked = float("-inf")
        self._uid = os.geteuid()
        self._handlers: dict[Op, Callable[[Peer, Message, list[int], float], None]] = {
            Op.LIST: self._list, Op.PING: self._ping, Op.HELLO: self._hello,
            Op.CLAIM: self._claim, Op.GIVE_BACK: self._give_back, Op.REPORT: self._report,
            Op.OWN_LIMIT: self._own_limit, Op.ANSWER: self._answer,
            Op.OUT_OF_MEMORY: self._out_of_memory, Op.BYE: self._bye,
            Op.SET_LIMIT: self._set_limit, Op.ASK_RECLAIM: self._ask_reclaim,
        }  # fmt: skip

    # --- entry points of the loop -----------------------------------------------------------------

    def handle(self, peer: Peer, message: Message, fds: list[int], now: float) -> None:
        """Do what a message asks. Raises ``ProtocolError`` if it is out of place."""
        handler = self._handlers.get(message.op)
        if handler is None:
            raise ProtocolError(f"{message.op.name} is for the broker to send")
        try:
            self._authorize(peer, message.op)
            handler(peer, message, fds, now)
        except Refusal as refusal:
            self._reply(peer, message, Op.ERROR, status=refusal.status,
                        body={"error": refusal.text, **refusal.more})  # fmt: skip

    def lost(self, peer: Peer, now: float) -> None:
        """A connection has ended."""
        self._waiters = {key: w for key, w in self._waiters.items() if w.peer is not peer}
        if peer.ident:
            self.members.disconnected(peer.ident, now)

    def settle(self, now: float) -> None:
        """Answer what can be answered now, and publish. Call after every batch of events."""
        self.members.credit(now)
        self._look(now)
        for effect in self.ledger.pump(now):
            member = self.members.by_ident[effect.tenant]
            if member.peer is None:
                continue
            if isinstance(effect, Grant):
                message = Message(Op.GRANT, status=effect.status, values=(effect.nbytes,))
            else:
                patience = int(ASK_S * 1000) if effect.patient else 0
                message = Message(Op.RECLAIM, values=(effect.nbytes, patience))
            member.peer.send(message._replace(request=effect.request, epoch=self._epoch))
        for request, waiter in list(self._waiters.items()):
            if now >= waiter.deadline or waiter.ident not in self.members.by_ident:
                self._finish(request, 0)
        self._publish()
        if now - self._observed >= _OBSERVE_S:
            self._observed = now
            self.members.observe()

    def _look(self, now: float) -> None:
        """See what others left of the device, if a claim waits to know: an idle broker sleeps.

        Not before all engines of the last broker are back: what they hold is neither free nor
        leased yet.
        """
        if not self.ledger.queue or self.ledger.in_grace(now):
            return
        if now - self._looked >= _LOOK_S or not self.ledger.ceiling.looked:
            self._looked = now
            self.members.look()

    def next_deadline(self, now: float) -> float | None:
        """When ``settle`` has to be called again although nothing came in."""
        times = [waiter.deadline for waiter in self._waiters.values()]
        times += [t for t in (self.ledger.next_deadline(), self.members.next_look(now)) if t]
        return min(times, default=None)

    # --- operations -------------------------------------------------------------------------------

    def _authorize(self, peer: Peer, op: Op) -> None:
        if op // 16 > p.OBSERVE and peer.uid not in {self._uid, 0}:
            raise Refusal(p.NOT_ALLOWED, f"user {peer.uid} may only look, not {op.name.lower()}")

    def _list(self, peer: Peer, message: Message, _fds: list[int], now: float) -> None:
        head = {
            "device": self._device, "capacity": self.ledger.capacity,
            "leased": self.ledger.leased, "pid": os.getpid(), "epoch": self._epoch,
            "usable": max(0, self.ledger.effective_capacity(now)),
        }  # fmt: skip
        rows = [member.to_row(now) for member in self.members.by_ident.values()]
        runs = p.split_rows(rows, room=p.MAX_BODY - 256)
        for index, run in enumerate(runs):
            status = p.MORE if index + 1 < len(runs) else p.OK
            self._reply(peer, message, Op.TENANTS, status=status, body={**head, "tenants": run})

    def _ping(self, peer: Peer, message: Message, _fds: list[int], _now: float) -> None:
        self._reply(peer, message, Op.DONE)

    def _hello(self, peer: Peer, message: Message, fds: list[int], now: float) -> None:
        body = message.body
        name, instance = body.get("name"), body.get("instance")
        weight, meta = body.get("weight", 1.0), body.get("meta", {})
        if not is_name(name) or not isinstance(instance, str) or not 8 <= len(instance) <= 64:
            raise ProtocolError("HELLO needs a valid name and an instance")
        if not isinstance(weight, int | float) or not 0 < weight < p.MAX_WEIGHT:
            raise ProtocolError(f"weight is {weight!r}, but must be a number above 0")
        if not isinstance(meta, dict) or _length(meta) > _MAX_META or peer.ident:
            raise ProtocolError("meta is too long, or this connection has a tenant already")
        taken = self.members.holder_of(str(name), instance)
        if taken is not None:
            raise Refusal(
                p.NAME_TAKEN, f"the name {name!r} is taken by process {taken.pid}", pid=taken.pid
            )
        if len(self.members.by_ident) >= SLOTS:
            raise Refusal(p.BUSY, f"this broker serves {SLOTS} tenants and no more")
        self._join(peer, message, fds, now)

    def _join(self, peer: Peer, message: Message, fds: list[int], now: float) -> None:
        body = message.body
        pidfd = peer.pidfd(fds)
        if pidfd is None:
            raise Refusal(p.BUSY, "no pidfd of this process: Linux 5.3 or later is needed")
        try:
            tenant = self.ledger.join(
                body["name"], now, limit=field(body, "limit"),
                floor=field(body, "floor", 0), weight=float(body.get("weight", 1.0)),
                lease=field(body, "lease", 0), instance=body["instance"],
                ceiling=field(body, "ceiling", p.MAX_BYTES), revision=field(body, "revision", 0),
            )  # fmt: skip
        except ProtocolError:
            os.close(pidfd)
            raise
        if tenant is None:
            os.close(pidfd)
            capacity = self.ledger.capacity
            raise Refusal(
                p.REFUSED,
                f"the floors of all exceed the capacity of {capacity / (1 << 20):,.1f} MiB",
            )
        self._replace(body["instance"], tenant.ident, own_limit=body.get("own") is True)
        used = {member.slot for member in self.members.by_ident.values()}
        slot = next(i for i in range(SLOTS) if i not in used)
        member = Member(tenant, peer, pidfd, slot, now)
        member.instance, member.meta = body["instance"], body.get("meta", {})
        self.members.add(member)
        peer.ident = tenant.ident
        self.members.write_roster()  # before the first grant: the next broker must know
        self._mirror.write_limit(slot, tenant.limit)
        welcome = {"capacity": self.ledger.capacity, "slot": slot, "limit": tenant.limit,
                   "ceiling": tenant.ceiling, "revision": tenant.revision,
                   "pid": os.getpid()}  # fmt: skip
        self._reply(peer, message, Op.WELCOME, body=welcome, fds=(self._mirror.fd,))

    def _replace(self, instance: str, ident: int, *, own_limit: bool) -> None:
        """An engine that lost its socket is back: its new connection takes over."""
        earlier = self.members.of_instance(instance)
        if earlier is None:
            return
        if earlier.peer is not None:
            earlier.peer.ident = 0
            earlier.peer.cut()
        self.ledger.succeed(earlier.tenant.ident, ident, own_limit=own_limit)
        self.members.remove(earlier.tenant.ident)

    def _claim(self, peer: Peer, message: Message, _fds: list[int], now: float) -> None:
        need, want = message.values
        ident, kind = self._own(peer), message.status
        if sum(claim.tenant == ident for claim in self.ledger.queue) >= _MAX_CLAIMS:
            refusal = Message(Op.GRANT, message.request, self._epoch, p.REFUSED, (0,))
            peer.send(refusal)
            return
        self.ledger.claim(ident, message.request, need, want, now,
                          transient=kind == p.TRANSIENT, stays=kind == p.STAYS)  # fmt: skip

    def _give_back(self, peer: Peer, message: Message, _fds: list[int], _now: float) -> None:
        if not self.ledger.give_back(self._own(peer), message.values[0]):
            raise ProtocolError(f"{message.values[0]} bytes given back, more than the lease")

    def _report(self, peer: Peer, message: Message, _fds: list[int], _now: float) -> None:
        member = self.members.by_ident[self._own(peer)]
        body = message.body
        names = ("backed_bytes", "cached_bytes", "spare_bytes", "split_floor_bytes")
        age = body.get("oldest_cached_age_s", 0.0)
        numbers = all(isinstance(n, int | float) and 0 <= n <= p.MAX_BYTES for n in body.values())
        if not numbers or age >= 1e12 or _length(body) > _MAX_REPORT:
            raise ProtocolError("REPORT has a value that is no size or age, or is too long")
        backed, cached, spare, split_floor = (field(body, name, 0) for name in names)
        pauses = body.get("idle") is True, body.get("pauses") is True
        member.tenant.report = Report(backed, cached, spare, split_floor, float(age), *pauses)
        member.report = body

    def _own_limit(self, peer: Peer, message: Message, _fds: list[int], _now: float) -> None:
        member = self.members.by_ident[self._own(peer)]
        tenant = self._change_limit(peer, member, message.body, by_admin=False)
        # The limit too: an administrator's change may be on its way to the engine at this moment.
        body = {"limit": tenant.limit, "revision": tenant.revision}
        self._reply(peer, message, Op.DONE, body=body)

    def _answer(self, peer: Peer, message: Message, _fds: list[int], _now: float) -> None:
        ident = self._own(peer)
        waiter = self._waiters.get(message.request)
        if waiter is not None and waiter.ident == ident:
            self._finish(message.request, message.values[0])
            return
        ask = self.ledger.asks.get(message.request)
        if ask is None:
            self.ledger.answered_late(ident)
        elif ask.tenant == ident:
            self.ledger.answer(message.request, message.values[0])

    def _out_of_memory(self, peer: Peer, message: Message, _fds: list[int], now: float) -> None:
        ident = self._own(peer)
        name = self.members.by_ident[ident].tenant.name
        self._log(f"{name}: the device refused {message.values[0]} bytes that were leased")
        self.ledger.out_of_memory(ident, now)

    def _bye(self, peer: Peer, message: Message, _fds: list[int], _now: float) -> None:
        ident, peer.ident = self._own(peer), 0
        self.ledger.give_back(ident, self.ledger.tenants[ident].lease)
        self.ledger.revoke(ident)
        self.ledger.credit(ident)
        self.members.remove(ident)
        self.members.write_roster()
        self._reply(peer, message, Op.DONE)

    def _set_limit(self, peer: Peer, message: Message, _fds: list[int], now: float) -> None:
        member = self._named(message)
        tenant = self._change_limit(peer, member, message.body, by_admin=True)
        self._ask(peer, message, member, Op.LIMIT, (tenant.limit, tenant.revision), now)

    def _ask_reclaim(self, peer: Peer, message: Message, _fds: list[int], now: float) -> None:
        member = self._named(message)
        nbytes = field(message.body, "bytes")
        self._log(f"reclaim {member.tenant.name} {nbytes} by uid {peer.uid} pid {peer.pid}")
        values = (nbytes, int(_ADMIN_WAIT_S * 1000))
        self._ask(peer, message, member, Op.RECLAIM, values, now)

    # --- internals --------------------------------------------------------------------------------

    def _own(self, peer: Peer) -> int:
        """The peer's tenant. A forked child may hold the socket of a dead one, so: a live one."""
        tenant = self.ledger.tenants.get(peer.ident)
        if tenant is None or tenant.state != LIVE:
            raise ProtocolError("this connection has no live tenant")
        return tenant.ident

    def _named(self, message: Message) -> Member:
        name = message.body.get("name")
        member = self.members.named(name) if isinstance(name, str) else None
        if member is None or member.peer is None:
            names = sorted(m.tenant.name for m in self.members.by_ident.values())[:40]
            said = f"no live tenant is named {name!r}" if is_name(name) else "no name was given"
            raise Refusal(p.UNKNOWN_NAME, said, names=names)
        return member

    def _change_limit(
        self, peer: Peer, member: Member, body: dict[str, Any], *, by_admin: bool
    ) -> Tenant:
        old = member.tenant.limit
        tenant = self.ledger.set_limit(
            member.tenant.ident, field(body, "limit"), by_admin=by_admin,
            revision=0 if by_admin else field(body, "revision", 0),
        )  # fmt: skip
        self._mirror.write_limit(member.slot, tenant.limit)
        self._log(f"limit {tenant.name} {old} -> {tenant.limit} revision {tenant.revision} "
                  f"by uid {peer.uid} pid {peer.pid}")  # fmt: skip
        return tenant

    def _ask(
        self, admin: Peer, message: Message, member: Member, op: Op, values: tuple[int, ...],
        now: float,
    ) -> None:  # fmt: skip
        request = self._next_request
        self._next_request += 1
        ident, deadline = member.tenant.ident, now + _ADMIN_WAIT_S
        self._waiters[request] = _Waiter(admin, message.request, ident, deadline)
        assert member.peer is not None, "I8: a live tenant without a connection"
        member.peer.send(Message(op, request, self._epoch, p.OK, values))

    def _finish(self, request: int, freed: int) -> None:
        """Tell the administrator how it stands."""
        waiter = self._waiters.pop(request)
        member = self.members.by_ident.get(waiter.ident)
        if member is None:
            body: dict[str, Any] = {"error": "the tenant has gone", "names": []}
            reply = Message(Op.ERROR, waiter.request, self._epoch, p.UNKNOWN_NAME, (), body)
        else:
            body = {"freed": freed, **member.to_row(waiter.deadline)}
            del body["meta"], body["report"]
            reply = Message(Op.DONE, waiter.request, self._epoch, p.OK, (), body)
        waiter.peer.send(reply)

    def _publish(self) -> None:
        ledger = self.ledger
        # Tenants assert what they like, and the fields have a fixed size.
        leased = min(ledger.leased, p.MAX_BYTES)
        shortfall = min(ledger.shortfall(), p.MAX_BYTES)
        state = MirrorState(ledger.capacity, leased, shortfall, self._epoch)
        if state != self._published:
            self._published = state
            self._mirror.write(state)

    def _reply(
        self, peer: Peer, message: Message, op: Op, *, status: int = p.OK,
        body: dict[str, Any] | None = None, fds: tuple[int, ...] = (),
    ) -> None:  # fmt: skip
        peer.send(Message(op, message.request, self._epoch, status, (), body or {}), fds)
