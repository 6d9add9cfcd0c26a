"""The records of the ledger: tenants with their leases, claims, requests, and its answers."""

from __future__ import annotations

from typing import NamedTuple

from kvcached.broker.protocol import MAX_BYTES

LIVE, REVOKED, DRAINING = "live", "revoked", "draining"


class Report(NamedTuple):
    """What a tenant said about itself last; zeros before the first report."""

    backed: int = 0
    cached: int = 0
    spare: int = 0
    split_floor: int = 0
    oldest_cached_s: float = 0.0
    idle: bool = False
    pauses: bool = False


class Tenant:
    """One lease."""

    __slots__ = ("asked", "blind_until", "ceiling", "floor", "ident", "late", "lease", "limit",
                 "name", "report", "revision", "spent", "state", "weight")  # fmt: skip

    def __init__(
        self, ident: int, name: str, *, limit: int, floor: int, weight: float,
        ceiling: int = MAX_BYTES, revision: int = 0,
    ) -> None:  # fmt: skip
        self.ident, self.name = ident, name
        self.limit, self.floor, self.weight = min(limit, ceiling), floor, weight
        self.ceiling = ceiling
        """What an administrator allows: the engine may set its limit to this and less."""
        self.lease = 0
        self.revision = revision
        self.state = LIVE
        self.report = Report()
        self.spent: Report | None = None
        """The report that it could not make good: nothing more is asked by it."""
        self.asked = 0
        self.blind_until = 0.0
        """When it may again be asked for more than it reports."""
        self.late = False

    @property
    def reserved(self) -> int:
        """Bytes that nobody else may have: the lease, or the floor if that is more."""
        return max(self.lease, self.floor) if self.state == LIVE else self.lease

    def set_limit(self, nbytes: int, *, by_admin: bool, revision: int) -> None:
        """Take the last word; an engine's own is cut to what the administrator allows.

        ``revision`` is the engine's: of several changes it may have told only the last.
        """
        self.ceiling = nbytes if by_admin else self.ceiling
        self.limit = min(nbytes, self.ceiling)
        self.revision = max(self.revision + 1, revision)

    def take_over(self, previous: Tenant, *, own: bool) -> None:
        """Go on with the record of the same engine's last connection, as far as it is newer.

        The engine may not have heard of the administrator's last word, so that counts as it is;
        and ``own`` says that we may not have heard of the engine's.
        """
        self.ceiling = previous.ceiling
        if previous.revision > self.revision and not own:
            self.limit = previous.limit
        self.limit = min(self.limit, self.ceiling)
        self.revision = max(self.revision, previous.revision)
        if previous.revision == self.revision and previous.limit != self.limit:
            self.revision += 1  # one revision never means two limits


class Claim:
    """A claim that waits."""

    __slots__ = ("asked", "deadline", "need", "request", "stays", "tenant", "transient", "want")

    def __init__(self, tenant: int, request: int, need: int, want: int, deadline: float) -> None:
        self.tenant, self.request, self.need, self.want = tenant, request, need, want
        self.deadline = deadline
        self.transient = self.stays = False
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
    """Effect: ask ``tenant`` to give back ``nbytes`` and to answer with ``request``.

    ``patient``: at its next pause, if it takes that; else it answers at once.
    """

    tenant: int
    request: int
    nbytes: int
    patient: bool = False
