"""``BrokerBudget``: a budget shared with the other processes of the device, through the broker.

The hot path stays in the process: a claim within the lease and a ``give_back`` touch no socket.
Leases grow in batches; what is not claimed goes back after a while, or when the broker asks. A
thread answers the broker, so that an idle engine gives way too. It takes the owner's lock, which
``claim`` releases while it waits: two engines that claim from each other both get their answer.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
import weakref
from typing import Any

from kvcached.broker import protocol as p
from kvcached.broker.budget import Tenant
from kvcached.broker.limits import EngineLimit, checked_size
from kvcached.broker.link import Welcome
from kvcached.broker.protocol import Message, Op
from kvcached.broker.session import Session
from kvcached.broker.waiting import LOST, PENDING, Vacancy, Waiting
from kvcached.config import Config, check_name, format_size
from kvcached.errors import BudgetExceeded, ClosedError, ForkedProcessError
from kvcached.stats import LimitRecord, TenantReport

_LOG = logging.getLogger("kvcached.broker")
_IDLE_S = 0.5
"""Bytes leased and not claimed for this long go back."""
_CLAIM_S = 2.5
"""How long a claim waits: more than the broker makes it wait, so that normally it is answered."""
_GOODBYE_S, _GOODBYE = 1.0, 1  # the latter: BYE's request number; changes of a limit have 0
_MAX_BATCH = 64 << 20  # or a thirty-second of the limit, if that is more
_LIVE: weakref.WeakSet[BrokerBudget] = weakref.WeakSet()


def _disown_all() -> None:
    for budget in list(_LIVE):
        budget.disown()
    _LIVE.clear()


os.register_at_fork(after_in_child=_disown_all)


class BrokerBudget:
    """One tenant of a device's broker; see ``Budget`` for what the methods promise.

    Parameters
    ----------
    name:
        Of the tenant, unique among the live ones of the device; ``NameTaken`` otherwise.
    device:
        ``"cpu"``, or a GPU's UUID.
    limit_bytes, floor_bytes, weight:
        Most bytes (``None`` or more: the capacity), guaranteed bytes, share of the rest.
    capacity_bytes:
        Of the device, should this process start the broker; ``None``: from ``config``.
    meta:
        Shown by ``kvcached ps --json``; at most 2 KiB of JSON.

    Raises ``BrokerUnavailable`` if no broker answers or can be started.
    """

    def __init__(
        self, name: str, *, device: str, limit_bytes: int | None, floor_bytes: int = 0,
        weight: float = 1.0, capacity_bytes: int | None = None, config: Config | None = None,
        meta: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self._name = check_name(name)
        self._floor, self._weight = checked_size("floor", floor_bytes), weight
        self._limit, self._meta = EngineLimit(limit_bytes), meta or {}
        self._instance = secrets.token_hex(16)
        self._claimed = self._lease = 0
        self._tenant: Tenant | None = None
        self._changed = threading.Condition(threading.RLock())
        self._waiting = Waiting()
        self._reclaiming = False
        self._busy_at = time.monotonic()
        self._reported: TenantReport | None = None
        self._closed = self._forked = self._said_goodbye = False
        settings = Config.from_env() if config is None else config
        self._session = Session(self, name, settings, device, capacity_bytes)
        self._vacancy = Vacancy(self._session.mirrored)
        _LIVE.add(self)

    # --- Budget -----------------------------------------------------------------------------------

    @property
    def lease_bytes(self) -> int:
        """See ``Budget.lease_bytes``."""
        return self._lease

    @property
    def claimed_bytes(self) -> int:
        """See ``Budget.claimed_bytes``."""
        return self._claimed

    @property
    def limit_bytes(self) -> int:
        """See ``Budget.limit_bytes``."""
        return self._limit.nbytes

    @property
    def slack_bytes(self) -> int:
        """See ``Budget.slack_bytes``."""
        return max(0, min(self._lease, self.limit_bytes) - self._claimed)

    @property
    def capacity_bytes(self) -> int:
        """Bytes of the device for all tenants together."""
        assert self._session.capacity is not None, "I7: joined without a capacity"
        return self._session.capacity

    def attach(self, tenant: Tenant, lock: threading.RLock) -> None:
        """See ``Budget.attach``."""
        with self._changed:
            self._tenant = tenant
            self._changed = threading.Condition(lock)

    def claim(self, nbytes: int, *, transient: bool = False, seconds: float | None = None) -> None:
        """See ``Budget.claim``. Waits up to 2.5 s for others to give back; not if ``transient``."""
        self._require_usable()
        checked_size("claim", nbytes)
        kind = p.OK if seconds is None else p.STAYS  # who bounds the wait goes on without it
        seconds = _CLAIM_S if seconds is None else min(seconds, _CLAIM_S)
        with self._changed:
            self._busy_at = time.monotonic()
            if self._fits(nbytes, transient=transient):
                self._claimed += nbytes
            elif not transient:
                self._wait_for(nbytes, time.monotonic() + seconds, kind)
            elif self._ask(nbytes, _GOODBYE_S, p.TRANSIENT, batch=False) is not None:
                raise self._refused(nbytes, "nothing is free, not even for a moment")

    def claim_if_free(self, nbytes: int, *, ask: bool) -> bool:
        """See ``Budget.claim_if_free``. Not while others wait for memory."""
        with self._changed:
            if self._closed or self._forked or self._claimed + nbytes > self.limit_bytes:
                return False
            if self._fits(nbytes):
                self._claimed, self._busy_at = self._claimed + nbytes, time.monotonic()
                return True
            if not ask or self._session.pressure:
                return False
            need = self._claimed + nbytes - self._lease
            return self._vacancy.asked(need, lambda: self._ask(nbytes, _GOODBYE_S, p.TRANSIENT))

    def give_back(self, nbytes: int) -> None:
        """See ``Budget.give_back``."""
        self._require_usable()
        with self._changed:
            assert 0 <= nbytes <= self._claimed, "I1: gave back more than was claimed"
            self._claimed -= nbytes
            self._busy_at = time.monotonic()
            urgent = self._lease > self.limit_bytes or self._session.pressure
            if urgent and not self._reclaiming:
                self._return_slack()

    def set_limit(self, nbytes: int) -> LimitRecord:
        """See ``Budget.set_limit``. Reclaims at once, on the caller's thread."""
        self._require_usable()
        checked_size("limit", nbytes)
        with self._changed:
            self._limit.set_own(min(nbytes, self.capacity_bytes))
            self._say_limit()
            self._apply_limit()
            return self.limit_record()

    def limit_record(self) -> LimitRecord:
        """See ``Budget.limit_record``."""
        limit = self._limit
        return LimitRecord(limit.nbytes, limit.revision, self._lease, self._floor, self._weight)

    def report_out_of_memory(self, nbytes: int) -> bool:
        """See ``Budget.report_out_of_memory``. The broker hands out less for a while."""
        self._require_usable()
        with self._changed:
            self._return_slack()  # first: what is leased then is what we back
            self._session.send(Message(Op.OUT_OF_MEMORY, values=(nbytes,)))
        return True

    def check(self) -> None:
        """See ``Budget.check``."""
        if self._forked:
            return
        with self._changed:
            assert 0 <= self._claimed <= self._lease, "I7: claimed bytes are not leased"

    def close(self) -> None:
        """See ``Budget.close``. Idempotent; ends the thread and waits for the broker's word."""
        if self._forked or self._closed:
            return
        with self._changed:
            assert self._claimed == 0, "I4: budget closed while memory is still claimed"
            self._closed, self._lease = True, 0
            said = self._session.send(Message(Op.BYE, _GOODBYE))
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._said_goodbye or not said, _GOODBYE_S)
        _LIVE.discard(self)
        self._session.stop()
        self._session.join(_GOODBYE_S)

    def disown(self) -> None:
        """After a fork, in the child: every further call raises ``ForkedProcessError``."""
        self._forked = self._session.forked = True

    # --- claims -----------------------------------------------------------------------------------

    def _wait_for(self, nbytes: int, deadline: float, kind: int) -> None:
        """Claim ``nbytes`` as soon as the lease covers it; ``BudgetExceeded`` if it never does."""
        while True:
            self._require_usable()
            if self._claimed + nbytes > self.limit_bytes:
                raise self._refused(nbytes, f"the limit is {format_size(self.limit_bytes)}")
            if self._fits(nbytes):
                self._claimed += nbytes
                return
            status = self._ask(nbytes, max(0.0, deadline - time.monotonic()), kind)
            if status is None:
                return
            if status == p.REFUSED:
                raise self._refused(nbytes, "the others hold the rest and cannot give it now")
            if time.monotonic() >= deadline:
                why = "others are too slow" if status == p.LATE else "the broker does not answer"
                raise self._refused(nbytes, why, pending=status == PENDING)
            if status in {LOST, p.LATE}:  # nobody to ask yet, or our own answer is overdue
                self._changed.wait(0.01)

    def _fits(self, nbytes: int, *, transient: bool = False) -> bool:
        """Whether lease and limit cover ``nbytes`` more."""
        most = self._lease if transient else min(self._lease, self.limit_bytes)
        return self._claimed + nbytes <= most

    def _ask(
        self, nbytes: int, seconds: float, kind: int = p.OK, *, batch: bool = True
    ) -> int | None:
        """Ask for a lease (``batch``: more than needed). ``None``: claimed; or status, ``LOST``."""
        need = self._claimed + nbytes - self._lease
        most = max(_MAX_BATCH, self.limit_bytes // 32)
        most = min(2 * need + self._lease // 8, most, self.limit_bytes - self._lease)
        want = max(need, most) if batch else need
        answer, new = self._waiting.add(nbytes, transient=kind == p.TRANSIENT)
        try:
            claim = Message(Op.CLAIM, answer.request, status=kind, values=(need, want))
            if new and not self._session.send(claim):
                answer.status = LOST
                return LOST
            if self._session.is_current_thread():  # the one that receives: a split on reclaim
                self._session.receive_answer(answer.request, seconds)
            else:
                self._changed.wait_for(lambda: answer.status is not None or self._closed, seconds)
        finally:
            self._waiting.remove(answer)
        return answer.outcome

    def _refused(self, nbytes: int, why: str, *, pending: bool = False) -> BudgetExceeded:
        held = format_size(self._claimed)
        text = f"{self._name} cannot back {format_size(nbytes)} more: {held} are held and {why}"
        hint = "`kvcached ps` shows who holds what. Free sequences, or raise a limit."
        error = BudgetExceeded(text, hint=hint)
        error.pending = pending
        return error

    # --- giving back, with the owner's lock held --------------------------------------------------

    def _return_slack(self, most: int = p.MAX_BYTES) -> int:
        """Hand back what is leased and not claimed, up to ``most`` bytes."""
        nbytes = min(self._lease - self._claimed, most)
        if nbytes <= 0:
            return 0
        self._lease -= nbytes
        if not self._session.send(Message(Op.GIVE_BACK, values=(nbytes,))):
            self._lease += nbytes  # a later tick, or the next hello, tells the broker
            return 0
        return nbytes

    def _reclaim(self, nbytes: int, *, patient: bool) -> int:
        """Give back up to ``nbytes``: what is not claimed, and what the owner can free.

        What is not claimed stays until the owner is done: a split needs room for a moment.
        """
        aim = self._lease - nbytes  # a split may lease more first: that goes back as well
        missing = self._claimed - aim
        if missing > 0 and self._tenant is not None:
            self._reclaiming = True
            try:
                self._tenant.reclaim(missing, patient=patient)
            except Exception:  # noqa: BLE001 (an owner's bug must not end the thread of its lease)
                _LOG.exception("%s: reclaiming %d bytes failed", self._name, missing)
            finally:
                self._reclaiming = False
        self._return_slack(max(0, self._lease - aim))
        return max(0, aim + nbytes - self._lease)

    def _apply_limit(self) -> None:
        if self._lease > self.limit_bytes:
            self._reclaim(self._lease - self.limit_bytes, patient=True)

    def _say_limit(self) -> None:
        change = self._limit.to_change()
        if change is not None and self._session.send(Message(Op.OWN_LIMIT, body=change)):
            self._limit.said()

    # --- Client: what the session's thread calls -------------------------------------------------

    def on_message(self, message: Message) -> None:
        """See ``Client.on_message``."""
        op = message.op
        with self._changed:
            if self._closed:  # all is given back: there is nothing left to ask of us
                self._said_goodbye |= op is Op.DONE and message.request == _GOODBYE
                self._changed.notify_all()
            elif op is Op.GRANT:
                self._on_grant(message)
            elif op is Op.RECLAIM:
                given = self._reclaim(message.values[0], patient=message.values[1] > 0)
                self._session.send(Message(Op.ANSWER, message.request, values=(given,)))
            elif op is Op.LIMIT:
                self._on_limit(message)
            elif op is Op.DONE:
                self._limit.answered(message.body)
                self._apply_limit()
            elif op is Op.ERROR:
                _LOG.warning("%s: the broker says: %s", self._name, message.body.get("error"))

    def _on_grant(self, message: Message) -> None:
        self._lease += message.values[0]
        self._busy_at = time.monotonic()
        answer = self._waiting.granted(message)
        if answer is not None and self._fits(answer.nbytes, transient=answer.transient):
            self._claimed += answer.nbytes  # now: else it might go back before it is used
            answer.done = True
        self._changed.notify_all()

    def _on_limit(self, message: Message) -> None:
        before = self._lease
        self._limit.set_by_admin(*message.values)
        self._apply_limit()
        given = max(0, before - self._lease)
        self._session.send(Message(Op.ANSWER, message.request, values=(given,)))
        self._changed.notify_all()

    def tick(self) -> None:
        """See ``Client.tick``: the report, unused lease, a limit that was out of reach."""
        if self._closed or not self._changed.acquire(blocking=False):
            return  # the owner is at work; the next round comes soon
        try:
            self._say_limit()
            self._apply_limit()
            if time.monotonic() - self._busy_at > _IDLE_S:
                self._return_slack()
            self._send_report()
        finally:
            self._changed.release()

    def _send_report(self) -> None:
        if self._tenant is None:
            return
        report = self._tenant.report()
        if report != self._reported and self._session.send(
            Message(Op.REPORT, body=report.to_dict())
        ):
            self._reported = report

    def hello(self) -> dict[str, Any]:
        """See ``Client.hello``. What was leased ahead of use is not asserted again."""
        with self._changed:
            self._lease = self._claimed
            return {
                "name": self._name, "instance": self._instance, "floor": self._floor,
                "weight": self._weight, "lease": self._lease, "meta": self._meta,
                **self._limit.to_hello(),
            }  # fmt: skip

    def welcomed(self, welcome: Welcome) -> None:
        """See ``Client.welcomed``."""
        with self._changed:
            self._limit.welcomed(welcome.limit, welcome.ceiling, welcome.revision)
            self._reported = None
            self._changed.notify_all()

    def lost(self) -> None:
        """See ``Client.lost``."""
        with self._changed:
            self._waiting.lose()
            self._said_goodbye = self._closed
            self._changed.notify_all()

    def _require_usable(self) -> None:
        if self._forked:
            raise ForkedProcessError(
                f"the budget {self._name!r} belongs to the process that forked this one",
                hint="Start workers with the 'spawn' method, or make the cache after the fork.",
            )
        if self._closed:
            raise ClosedError(f"the budget {self._name!r} is closed")
