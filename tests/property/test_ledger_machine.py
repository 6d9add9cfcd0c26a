"""The ledger against a plain model: tenants are numbers of bytes, truth is what engines hold."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from kvcached.broker.lease import LIVE, Grant, Reclaim, Report
from kvcached.broker.ledger import CLAIM_S, GRACE_S, Ledger

CAPACITY = 1000
BYTES = st.integers(0, 400)


class LedgerMachine(RuleBasedStateMachine):
    tenants = Bundle("tenants")
    dead = Bundle("dead")

    def __init__(self):
        super().__init__()
        self.now = 0.0
        self.ledger = Ledger(CAPACITY, self.now)
        self.names = 0
        self.held = {}  # what the engine may hold: it knows of every grant and of no other
        self.floors = {}
        self.limits = {}  # what the last word allows, and what the administrator's last word did
        self.pending = {}
        self.asked = {}
        self.seen = None  # the most that may be held, by the last look at the device

    def pump(self):
        """Deliver the effects to the model; each claim gets at most one answer."""
        for effect in self.ledger.pump(self.now):
            assert self.ledger.tenants[effect.tenant].state == LIVE
            if isinstance(effect, Grant):
                need = self.pending.pop((effect.tenant, effect.request))
                assert effect.nbytes == 0 or effect.nbytes >= need
                assert (effect.status == 0) == (effect.nbytes >= need)
                self.held[effect.tenant] += effect.nbytes
                if effect.nbytes and self.seen is not None:
                    floors = {t.ident: t.floor for t in self.ledger.live()}
                    kept = {i: max(held, floors.get(i, 0)) for i, held in self.held.items()}
                    kept[effect.tenant] = self.held[effect.tenant]
                    most = max(self.seen, sum(floors.values()))
                    assert sum(kept.values()) <= most, "more than the device has"
            else:
                assert isinstance(effect, Reclaim)
                assert not any(tenant == effect.tenant for tenant, _ in list(self.pending)[:1])
                lease = self.ledger.tenants[effect.tenant].lease
                assert lease - effect.nbytes >= self.floors[effect.tenant], "below the floor"
                self.asked[effect.request] = effect

    @rule(target=tenants, floor=st.integers(0, 300), limit=st.integers(0, 1200),
          weight=st.sampled_from([0.5, 1.0, 3.0]))  # fmt: skip
    def join(self, floor, limit, weight):
        self.names += 1
        room = sum(t.floor for t in self.ledger.live()) + floor <= CAPACITY
        tenant = self.ledger.join(
            f"t{self.names}", self.now, limit=limit, floor=floor, weight=weight
        )
        assert (tenant is not None) == room
        self.pump()
        if tenant is None:
            return -1
        self.held[tenant.ident], self.floors[tenant.ident] = 0, floor
        self.limits[tenant.ident] = (min(limit, CAPACITY), CAPACITY)
        return tenant.ident

    @rule(tenant=tenants, need=st.integers(1, 400), more=BYTES,
          room=st.none() | st.integers(-100, 200), stays=st.booleans())  # fmt: skip
    def claim(self, tenant, need, more, room, stays):
        if self.is_live(tenant) and not any(t == tenant for t, _ in self.pending):
            if room is not None:  # as the broker does: it looks when a claim comes in
                self.look(room)
            request = len(self.held) * 1000 + int(self.now * 1000)
            self.pending[tenant, request] = need
            self.ledger.claim(tenant, request, need, need + more, self.now, stays=stays)
            self.pump()

    @rule(tenant=tenants, nbytes=BYTES)
    def give_back(self, tenant, nbytes):
        if self.is_live(tenant):
            fits = nbytes <= self.held[tenant]
            assert self.ledger.give_back(tenant, nbytes) == fits
            self.held[tenant] -= nbytes if fits else 0
            self.pump()

    @rule(data=st.data(), share=st.floats(0, 1))
    def answer(self, data, share):
        open_asks = [r for r, ask in self.asked.items() if self.is_live(ask.tenant)]
        if open_asks:
            ask = self.asked.pop(data.draw(st.sampled_from(open_asks)))
            nbytes = min(int(ask.nbytes * share), self.held[ask.tenant])
            self.ledger.give_back(ask.tenant, nbytes)
            self.held[ask.tenant] -= nbytes
            self.ledger.answer(ask.request, nbytes)
            self.pump()

    @rule(tenant=tenants, spare=st.floats(0, 1), cached=st.floats(0, 1), age=st.floats(0, 100),
          idle=st.booleans(), pauses=st.booleans())  # fmt: skip
    def report(self, tenant, spare, cached, age, idle, pauses):
        if self.is_live(tenant):
            backed = self.held[tenant]
            spare_bytes = int(backed * spare)
            cached_bytes = int((backed - spare_bytes) * cached)
            floor = backed - spare_bytes - cached_bytes
            self.ledger.tenants[tenant].report = Report(
                backed, cached_bytes, spare_bytes, int(floor * 0.7), age, idle, pauses
            )

    @rule(tenant=tenants, limit=st.integers(0, 1200), by_admin=st.booleans())
    def limit(self, tenant, limit, by_admin):
        if self.is_live(tenant):
            before = self.ledger.tenants[tenant].revision
            ceiling = min(limit, CAPACITY) if by_admin else self.limits[tenant][1]
            self.limits[tenant] = (min(limit, ceiling), ceiling)
            assert self.ledger.set_limit(tenant, limit, by_admin=by_admin).revision == before + 1
            self.pump()

    @rule(tenant=tenants)
    def out_of_memory(self, tenant):
        if self.is_live(tenant):
            self.ledger.out_of_memory(tenant, self.now)
            self.pump()

    def look(self, room):
        self.seen = sum(self.held.values()) + room
        self.ledger.device_has(room)
        self.pump()

    @rule()
    def the_device_does_not_answer(self):
        self.seen = None
        self.ledger.device_has(None)
        self.pump()

    @rule(seconds=st.sampled_from([0.001, 0.1, 0.6, 2.0, 6.0]))
    def wait(self, seconds):
        self.now += seconds
        self.pump()
        if seconds > CLAIM_S + GRACE_S:
            assert not self.pending, "a claim outlived its deadline"

    @rule(target=dead, tenant=consumes(tenants))
    def revoke(self, tenant):
        if self.is_live(tenant):
            self.ledger.revoke(tenant)
            self.pending = {k: v for k, v in self.pending.items() if k[0] != tenant}
            self.pump()
        return tenant

    @rule(tenant=consumes(dead))
    def credit(self, tenant):
        if tenant in self.ledger.tenants:
            self.ledger.drain(tenant)
            credited = self.held.pop(tenant)
            assert self.ledger.credit(tenant) == credited
            self.seen = None if credited else self.seen
            self.pump()

    @rule(target=tenants, tenant=consumes(tenants), lost=BYTES, behind=st.integers(-2, 2),
          own=st.booleans())  # fmt: skip
    def come_back(self, tenant, lost, behind, own):
        """A lost socket: the engine knows what it holds, which may be less than the lease.

        Its word about its limit counts if it is not older than the broker's, or was never heard.
        """
        if not self.is_live(tenant):
            return tenant
        old = self.ledger.tenants[tenant]
        held = max(0, self.held.pop(tenant) - lost)
        known = max(0, old.revision - behind)
        new = self.ledger.join(
            old.name, self.now, limit=900, floor=old.floor, weight=old.weight, lease=held,
            revision=known,
        )  # fmt: skip
        limit, ceiling = self.limits[tenant]
        if new is None:  # nothing held and the floors are full: it is a newcomer like any other
            self.ledger.revoke(tenant)
            self.pending = {k: v for k, v in self.pending.items() if k[0] != tenant}
            self.ledger.drain(tenant)
            self.seen = None if self.ledger.credit(tenant) else self.seen
            return -1
        self.ledger.succeed(tenant, new.ident, own_limit=own)
        self.seen = None
        self.pending = {k: v for k, v in self.pending.items() if k[0] != tenant}
        self.held[new.ident], self.floors[new.ident] = held, old.floor
        self.limits[new.ident] = (
            min(900, ceiling) if own or known >= old.revision else limit,
            ceiling,
        )
        assert new.revision >= old.revision
        assert new.revision > old.revision or new.limit == old.limit, "one revision, two limits"
        self.pump()
        return new.ident

    def is_live(self, tenant):
        found = self.ledger.tenants.get(tenant)
        return found is not None and found.state == LIVE

    @invariant()
    def books_agree(self):
        self.ledger.check()
        assert {t.ident: t.lease for t in self.ledger.tenants.values()} == self.held
        assert self.ledger.leased == sum(self.held.values()) <= CAPACITY
        for tenant in self.ledger.live():
            assert (tenant.limit, tenant.ceiling) == self.limits[tenant.ident]
        waiting = {(c.tenant, c.request) for c in self.ledger.queue}
        assert waiting == set(self.pending)
        assert all(t.limit <= CAPACITY for t in self.ledger.tenants.values())
        assert self.ledger.ceiling.looked or self.seen is None


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(stateful_step_count=60)
