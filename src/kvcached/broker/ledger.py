"""``Ledger``: who holds how much of one device, and who may have more. A pure state machine.

No socket, no clock, no process: time is passed in, and what is to be sent comes back as effects
from ``pump``. So the whole of it is tested against a plain model (tests/property).

States of a lease: ``live -> revoked`` (its socket or its process has ended) ``-> draining`` (both
have) ``-> credited`` (its bytes are back with the device, so it is gone from the books).
"""

from __future__ import annotations

from collections.abc import Iterable

from kvcached.broker.ceiling import Ceiling
from kvcached.broker.lease import DRAINING, LIVE, REVOKED, Ask, Claim, Grant, Reclaim, Tenant
from kvcached.broker.plan import (
    Holding,
    ask_blindly,
    ask_for_more,
    fair_shares,
    holding_of,
    plan_reclaim,
    reserve_bytes,
)
from kvcached.broker.protocol import LATE, MAX_BYTES, REFUSED

GRACE_S = 0.5
"""How long a new broker grants nothing while engines of the last one are still missing."""
ASK_S = 0.5
"""How long a tenant may take to answer a reclaim."""
BLIND_S = 0.1
"""How often a tenant is asked for more than it reports: about as often as it reports."""
CLAIM_S = 1.5
"""How long a claim may wait for others to give back."""


class Ledger:
    """The books of one device.

    Parameters
    ----------
    capacity:
        Bytes for all tenants together.
    now:
        Seconds of a monotonic clock; every method that takes ``now`` expects the same clock.
    expected:
        Instances of the last broker's roster. Until they are all back, or for ``GRACE_S``, nothing
        is granted. ``None``: the roster is unknown, so the whole time is waited.
    """

    def __init__(self, capacity: int, now: float, expected: Iterable[str] | None = ()) -> None:
        self.capacity = capacity
        self.tenants: dict[int, Tenant] = {}
        self.queue: list[Claim] = []
        self.asks: dict[int, Ask] = {}
        self._next = 1
        self.missing = None if expected is None else set(expected)
        """Instances that may still come back; ``None`` while that is unknown."""
        self._grace_until = now if self.missing == set() else now + GRACE_S
        self.ceiling = Ceiling()
        self.over_committed = False
        """A re-asserted lease was accepted though there was no room: true until there is."""

    # --- who is there -----------------------------------------------------------------------------

    @property
    def leased(self) -> int:
        """Sum of all leases, of those too whose owner is dead but whose bytes are not back."""
        return sum(tenant.lease for tenant in self.tenants.values())

    def join(
        self, name: str, now: float, *, limit: int, floor: int, weight: float,
        lease: int = 0, instance: str = "", ceiling: int = MAX_BYTES, revision: int = 0,
    ) -> Tenant | None:  # fmt: skip
        """Add a tenant; ``None`` if the floors would not fit. A re-asserted lease always does."""
        if not lease and self._floors() + floor > self.capacity:
            return None
        tenant = Tenant(
            self._next, name, limit=min(limit, self.capacity), floor=floor, weight=weight,
            ceiling=min(ceiling, self.capacity), revision=revision,
        )  # fmt: skip
        self._next += 1
        tenant.lease = lease
        self.tenants[tenant.ident] = tenant
        if lease:
            self.ceiling.forget()
        self._note_over_commitment()
        if self.missing is not None:
            self.missing.discard(instance)
            if not self.missing:
                self._grace_until = min(self._grace_until, now)
        return tenant

    def live(self) -> list[Tenant]:
        """Tenants that may claim."""
        return [tenant for tenant in self.tenants.values() if tenant.state == LIVE]

    def revoke(self, ident: int) -> None:
        """The socket or the process has ended: nothing new for this tenant, nothing asked of it."""
        tenant = self.tenants[ident]
        tenant.state = REVOKED if tenant.state == LIVE else tenant.state
        tenant.asked = 0
        self.queue = [claim for claim in self.queue if claim.tenant != ident]
        self.asks = {key: ask for key, ask in self.asks.items() if ask.tenant != ident}

    def drain(self, ident: int) -> None:
        """Both have ended: the bytes will come back."""
        assert self.tenants[ident].state != LIVE, "I8: draining a lease that was not revoked"
        self.tenants[ident].state = DRAINING

    def credit(self, ident: int) -> int:
        """The bytes are back: strike the lease from the books. Returns its bytes."""
        tenant = self.tenants[ident]
        assert tenant.state == DRAINING or not tenant.lease, "I8: credited before the owner ended"
        del self.tenants[ident]
        if tenant.lease:
            self.ceiling.forget()
        self._note_over_commitment()
        return tenant.lease

    def succeed(self, old: int, new: int, *, own_limit: bool = False) -> None:
        """Tenant ``new`` is ``old`` on a new connection: its own word about its lease counts.

        ``own_limit``: it has changed its limit, and does not know whether that was heard.
        """
        previous = self.tenants.pop(old)
        tenant = self.tenants[new]
        tenant.take_over(previous, own=own_limit)
        self.queue = [claim for claim in self.queue if claim.tenant != old]
        self.asks = {key: ask for key, ask in self.asks.items() if ask.tenant != old}
        self.ceiling.forget()
        self._note_over_commitment()

    # --- what they do -----------------------------------------------------------------------------

    def claim(
        self, ident: int, request: int, need: int, want: int, now: float, *,
        transient: bool = False, stays: bool = False,
    ) -> None:  # fmt: skip
        """Queue a claim; ``pump`` answers it, now or later.

        ``transient``: at once, from what is free or not at all. It is part of giving more back, so
        neither its limit nor those who wait, maybe for it, stand in its way. ``stays``: nobody is
        held up by it, so it may wait for what others have in use.
        """
        claim = Claim(ident, request, need, max(need, want), now + CLAIM_S)
        claim.transient, claim.stays = transient, stays
        self.queue.append(claim)

    def give_back(self, ident: int, nbytes: int) -> bool:
        """Take ``nbytes`` off a lease; ``False`` if the lease is smaller than that."""
        tenant = self.tenants[ident]
        if nbytes > tenant.lease:
            return False
        tenant.lease -= nbytes
        tenant.late = False
        self._note_over_commitment()
        return True

    def answer(self, request: int, given: int | None = None) -> None:
        """The tenant has done what it could for this ``Reclaim``: it gave ``given`` bytes."""
        ask = self.asks.pop(request, None)
        if ask is not None:
            tenant = self.tenants[ask.tenant]
            if given is not None and given < ask.nbytes:
                tenant.spent = tenant.report
            tenant.asked = max(0, tenant.asked - ask.nbytes)
            tenant.late = False

    def answered_late(self, ident: int) -> None:
        """The tenant answers again; it may claim again."""
        self.tenants[ident].late = False

    def set_limit(self, ident: int, nbytes: int, *, by_admin: bool, revision: int = 0) -> Tenant:
        """Set a limit, as far as capacity and, for an engine itself, the administrator allow."""
        tenant = self.tenants[ident]
        tenant.set_limit(min(nbytes, self.capacity), by_admin=by_admin, revision=revision)
        return tenant

    def out_of_memory(self, ident: int, now: float) -> None:
        """The device refused the tenant what it had leased, and has given back since.

        For a while no more is handed out than what is backed. Of leases that others do not use
        nothing could be backed either, so they come back first. Who never reported backs all.
        """
        backed = sum(
            t.lease if t.ident == ident else min(t.lease, t.report.backed or t.lease)
            for t in self.tenants.values()
        )
        self.ceiling.ran_out(backed, now)

    def device_has(self, room: int | None) -> None:
        """The device has ``room`` bytes beside what is leased now; ``None``: it does not say."""
        self.ceiling.saw(None if room is None else self.leased + room)

    def effective_capacity(self, now: float) -> int:
        """The capacity, or less: others use the device too. Floors are kept all the same."""
        return min(self.capacity, max(self._floors(), self.ceiling.at(now)))

    def available(self, tenant: Tenant, now: float) -> int:
        """Bytes that ``tenant`` could be granted without asking anybody, its limit aside.

        Below zero: what has to come back before anything can be granted.
        """
        others = sum(t.reserved for t in self.tenants.values() if t is not tenant)
        return self.effective_capacity(now) - others - tenant.lease

    def in_grace(self, now: float) -> bool:
        """Whether engines of the last broker may still come back."""
        return now < self._grace_until

    # --- answers ----------------------------------------------------------------------------------

    def pump(self, now: float) -> list[Grant | Reclaim]:
        """Answer what can be answered, ask for what is missing. Call after every change."""
        effects: list[Grant | Reclaim] = []
        self._expire_asks(now)
        if not self.in_grace(now):
            self.missing = set()
        waiting: list[Claim] = []
        due = hopeless = False
        shares = self.shares(now) if self.queue else {}
        # Those that leave their tenant within its share come first, then all as they came.
        for claim in sorted(self.queue, key=lambda c: self._is_over(c.tenant, c.need, shares)):
            done = self._try(claim, shares, now, first=not waiting)
            if done is not None:
                effects.append(done)
                continue
            if waiting:
                hopeless = due and self._is_over(claim.tenant, claim.need, shares)
            elif not self.in_grace(now):
                asks = self._ask_for(claim, shares, now)
                effects.extend(asks)
                under_way = bool(asks) or self._something_under_way()
                due = not under_way and self._is_due(claim, shares)
                hopeless = not (under_way or due)
            if hopeless:
                effects.append(Grant(claim.tenant, claim.request, 0, REFUSED))
            else:
                waiting.append(claim)
        self.queue = waiting
        return effects

    def next_deadline(self) -> float | None:
        """When ``pump`` has to be called again although nothing came in."""
        times = [claim.deadline for claim in self.queue]
        times += [ask.deadline for ask in self.asks.values()]
        if self.queue and self.missing != set():
            times.append(self._grace_until)
        return min(times, default=None)

    def shortfall(self) -> int:
        """Bytes that waiting claims need: the pressure."""
        return sum(claim.need for claim in self.queue)

    def shares(self, now: float) -> dict[int, int]:
        """Fair share of each live tenant, in bytes."""
        rows = [(t.ident, t.floor, t.weight, t.limit) for t in self.live()]
        return fair_shares(self.effective_capacity(now), rows)

    def check(self) -> None:
        """Assert the invariants of the books."""
        assert all(t.lease >= 0 for t in self.tenants.values()), "I7: a negative lease"
        if not self.over_committed:
            assert self.leased <= self.capacity, "I7: leases above the capacity"
        limits = [(t.limit, t.ceiling, self.capacity) for t in self.tenants.values()]
        assert all(a <= b <= c for a, b, c in limits), "I7: a limit above what is allowed"
        live = {tenant.ident for tenant in self.live()}
        assert {claim.tenant for claim in self.queue} <= live, "I8: a dead tenant's claim waits"
        assert {ask.tenant for ask in self.asks.values()} <= live, "I8: a dead tenant is asked"
        for tenant in self.live():
            asked = sum(ask.nbytes for ask in self.asks.values() if ask.tenant == tenant.ident)
            assert tenant.asked == asked, "I7: open requests and their sum differ"

    # --- internals --------------------------------------------------------------------------------

    def _floors(self) -> int:
        return sum(tenant.floor for tenant in self.live())

    def _note_over_commitment(self) -> None:
        self.over_committed = self.leased > self.capacity

    def _is_due(self, claim: Claim, shares: dict[int, int]) -> bool:
        """Whether a claim that stays is for the tenant's share, and others hold more than theirs.

        They have been asked, and give when what they have in use ends.
        """
        over = any(t.lease > shares[t.ident] for t in self.live() if t.ident != claim.tenant)
        return claim.stays and over and not self._is_over(claim.tenant, claim.need, shares)

    def _try(
        self, claim: Claim, shares: dict[int, int], now: float, *, first: bool
    ) -> Grant | None:
        """Answer a claim if that is possible now. Those behind the first wait, to be fair."""
        tenant = self.tenants[claim.tenant]
        if claim.transient:
            nbytes = self._at_once(claim, tenant, shares, now)
            tenant.lease += nbytes
            return Grant(claim.tenant, claim.request, nbytes, 0 if nbytes else REFUSED)
        over = self._is_over(claim.tenant, claim.need, shares)
        reserve = self._reserve_beside(tenant)
        kept = reserve if over else 0
        if tenant.lease + claim.need > min(tenant.limit, self._most(tenant, now) - kept):
            return Grant(claim.tenant, claim.request, 0, REFUSED)
        if tenant.late:
            return Grant(claim.tenant, claim.request, 0, LATE)
        under_floor = tenant.lease + claim.need <= tenant.floor
        available = 0 if self.in_grace(now) else self.available(tenant, now) - kept
        if available >= claim.need and (first or under_floor):
            most = claim.want if first and len(self.queue) == 1 else claim.need
            ahead = available if over else available - reserve
            nbytes = min(most, max(claim.need, ahead), tenant.limit - tenant.lease)
            tenant.lease += nbytes
            tenant.spent, tenant.blind_until = None, 0.0  # it has more now than when it was asked
            return Grant(claim.tenant, claim.request, nbytes, 0)
        if now >= claim.deadline:
            return Grant(claim.tenant, claim.request, 0, REFUSED)
        return None

    def _at_once(self, claim: Claim, tenant: Tenant, shares: dict[int, int], now: float) -> int:
        """What a transient claim gets of what is free: more than it needs only if nobody waits."""
        free = 0 if self.in_grace(now) else self.available(tenant, now)
        if free < claim.need:
            return 0
        if len(self.queue) > 1 or self._is_over(claim.tenant, claim.want, shares):
            return claim.need
        return max(claim.need, min(claim.want, free - self._reserve_beside(tenant)))

    def _reserve_beside(self, tenant: Tenant) -> int:
        """Room for splits by the others: none is needed where they have nothing in use."""
        others = sum(t.report.split_floor for t in self.live() if t is not tenant)
        return min(reserve_bytes(self.capacity), others)

    def _is_over(self, ident: int, need: int, shares: dict[int, int]) -> bool:
        """Whether ``need`` more would take a tenant above its fair share."""
        return self.tenants[ident].lease + need > shares[ident]

    def _most(self, tenant: Tenant, now: float) -> int:
        """What ``tenant`` could hold if all others gave what they can. Asks are spared beyond."""
        return self.effective_capacity(now) - (self._floors() - tenant.floor)

    def _something_under_way(self) -> bool:
        return bool(self.asks) or any(t.state != LIVE and t.lease for t in self.tenants.values())

    def _ask_for(self, claim: Claim, shares: dict[int, int], now: float) -> list[Reclaim]:
        """Ask by the reports first; then once for all that may be asked, as reports are old.

        Whoever is, or would be, above its fair share takes what others do not need, but makes no
        engine at work move its blocks: two that want more than there is would only take turns.
        """
        tenant = self.tenants[claim.tenant]
        over = self._is_over(claim.tenant, claim.need, shares)
        missing = claim.need - self.available(tenant, now) - self._coming()
        missing += self._reserve_beside(tenant) if over else 0
        if missing <= 0:
            return []
        holdings = self._holdings(claim.tenant, shares, over=over)
        asks = plan_reclaim(holdings, missing)
        missing -= sum(asks.values())
        blind = [
            other for other in holdings
            if other.tenant not in claim.asked and self.tenants[other.tenant].blind_until <= now
        ]  # fmt: skip
        for ident, part in ask_blindly(blind, missing).items():
            claim.asked.add(ident)
            self.tenants[ident].blind_until = now + BLIND_S
            asks[ident] = asks.get(ident, 0) + part
        ask_for_more(holdings, asks, claim.want - claim.need, over=over)
        return [
            self._ask(t, nbytes, now, patient=not over and self.tenants[t].lease > shares[t])
            for t, nbytes in asks.items()
        ]

    def _coming(self) -> int:
        asked = sum(ask.nbytes for ask in self.asks.values())
        return asked + sum(t.lease for t in self.tenants.values() if t.state != LIVE)

    def _holdings(self, claimer: int, shares: dict[int, int], *, over: bool) -> list[Holding]:
        return [
            holding_of(tenant, shares[tenant.ident], over=over)
            for tenant in self.live()
            if tenant.ident != claimer and not tenant.late and tenant.lease > tenant.asked
        ]

    def _ask(self, ident: int, nbytes: int, now: float, *, patient: bool) -> Reclaim:
        request = self._next
        self._next += 1
        self.asks[request] = Ask(ident, nbytes, now + ASK_S)
        self.tenants[ident].asked += nbytes
        return Reclaim(ident, request, nbytes, patient)

    def _expire_asks(self, now: float) -> None:
        for request, ask in list(self.asks.items()):
            if now >= ask.deadline:
                self.answer(request)
                self.tenants[ask.tenant].late = True
