"""The records of the ledger: tenants with their leases, claims, requests, and its answers."""

from __future__ import annotations

from typing import NamedTuple

LIVE, REVOKED, DRAINING = "live", "revoked", "draining"


class Report(NamedTuple):
    """What a tenant said about itself last; zeros before the first report."""

    backed: int = 0
    cached: int = 0
    spare: int = 0
    packed_floor: int = 0
    oldest_cached_s: float = 0.0


class Tenant:
    """One lease."""

    __slots__ = ("asked", "floor", "ident", "late", "lease", "limit", "name",
                 "report", "revision", "state", "weight")  # fmt: skip

    def __init__(self, ident: int, name: str, *, limit: int, floor: int, weight: float) -> None:
        self.ident, self.name = ident, name
        self.limit, self.floor, self.weight = limit, floor, weight
        self.lease = 0
        self.revision = 0
        self.state = LIVE
        self.report = Report()
        self.asked = 0
        self.late = False

    @property
    def reserved(self) -> int:
        """Bytes that nobody else may have: the lease, or the floor if that is more."""
        return max(self.lease, self.floor) if self.state == LIVE else self.lease


class Claim:
    """A claim that waits."""

    __slots__ = ("asked", "deadline", "need", "request", "tenant", "transient", "want")

    def __init__(self, tenant: int, request: int, need: int, want: int, deadline: float) -> None:
        self.tenant, self.request, self.need, self.want = tenant, request, need, want
        self.deadline = deadline
        self.transient = False
        self.asked: set[int] = set()
        """Who was asked for all that it could be, whatever it had reported."""


class Ask(NamedTuple):
    """A request to give back that is not answered yet."""

    tenant: int
    nbytes: int
    deadline: float


class Grant(NamedTuple):
    """Effect: tell ``tenant`` that its claim got ``nbytes`` (0: refused, see ``status``)."""

    tenant: int
    request: int
    nbytes: int
    status: int


class Reclaim(NamedTuple):
    """Effect: ask ``tenant`` to give back ``nbytes`` and to answer with ``request``."""

    tenant: int
    request: int
    nbytes: int
