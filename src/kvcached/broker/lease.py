"""One tenant's lease and its limit record, as the broker keeps them."""

from __future__ import annotations

from typing import NamedTuple

from kvcached.broker.protocol import MAX_BYTES

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

    __slots__ = ("asked", "ceiling", "floor", "ident", "late", "lease", "limit", "name",
                 "report", "revision", "state", "weight")  # fmt: skip

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
        self.asked = 0
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
