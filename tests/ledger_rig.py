"""A ledger for tests, and what tenants do in it."""

from __future__ import annotations

from kvcached.broker.lease import Report
from kvcached.broker.ledger import Ledger


def ledger_of(capacity=1000, **tenants):
    """A ledger with tenants of the given leases; names are attributes of the result."""
    ledger = Ledger(capacity, 0.0)
    for name, lease in tenants.items():
        setattr(ledger, name, add(ledger, name, lease=lease))
    return ledger


def add(ledger, name, *, lease=0, floor=0, weight=1.0, limit=1 << 40, now=0.0):
    return ledger.join(
        name, now, limit=limit, floor=floor, weight=weight, lease=lease, instance=name
    )


def holds(tenant, *, spare=0, cached=0, age=1.0, in_use=None):
    """Set the report of a tenant whose lease is all backed."""
    used = tenant.lease - spare - cached if in_use is None else in_use
    tenant.report = Report(spare + cached + used, cached, spare, used, age if cached else 0.0)


def claim(ledger, tenant, need, want=0, now=0.0, request=7):
    ledger.claim(tenant.ident, request, need, want, now)
    effects = ledger.pump(now)
    ledger.check()
    return effects
