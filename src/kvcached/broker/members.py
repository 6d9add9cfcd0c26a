"""The broker's tenants as processes: who they are, and when their memory may be credited."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any, Protocol

from kvcached.broker.files import RuntimeDir
from kvcached.broker.lease import LIVE, Tenant
from kvcached.broker.ledger import Ledger
from kvcached.broker.peer import Peer
from kvcached.broker.probe import POLL_S, TIMEOUT_S, MemoryProbe


class Watcher(Protocol):
    """The loop: tells when a process has ended."""

    def watch_exit(self, pidfd: int, ident: int) -> None:
        """Call ``Members.exited(ident)`` when the process of ``pidfd`` ends."""
        ...

    def unwatch_exit(self, pidfd: int) -> None:
        """Undo ``watch_exit``."""
        ...


class Member:
    """A tenant's process."""

    __slots__ = ("draining_since", "exited", "instance", "meta", "peer", "pid", "pidfd", "report",
                 "since", "slot", "tenant", "uid")  # fmt: skip

    def __init__(self, tenant: Tenant, peer: Peer, pidfd: int, slot: int, now: float) -> None:
        self.tenant, self.pidfd, self.slot, self.since = tenant, pidfd, slot, now
        self.peer: Peer | None = peer
        self.pid, self.uid = peer.pid, peer.uid
        self.exited = False
        self.draining_since: float | None = None
        self.instance = ""
        self.meta: dict[str, Any] = {}
        self.report: dict[str, Any] = {}

    def to_row(self, now: float) -> dict[str, Any]:
        """What ``list_tenants`` shows."""
        tenant = self.tenant
        return {
            "name": tenant.name, "pid": self.pid, "uid": self.uid,
            "state": "late" if tenant.late else tenant.state,
            "lease": tenant.lease, "limit": tenant.limit, "revision": tenant.revision,
            "floor": tenant.floor, "weight": tenant.weight, "report": self.report,
            "connected_s": round(now - self.since, 3), "meta": self.meta,
        }  # fmt: skip


class Members:
    """All members of one broker, their ends, and the roster that outlives the broker.

    ``lasting`` is what the roster says beside who is here.
    """

    def __init__(
        self, ledger: Ledger, probe: MemoryProbe, watcher: Watcher, directory: RuntimeDir,
        log: Callable[[str], None], *, lasting: dict[str, Any],
    ) -> None:  # fmt: skip
        self._ledger, self._probe, self._watcher = ledger, probe, watcher
        self._directory, self._log = directory, log
        self._lasting = lasting
        self.by_ident: dict[int, Member] = {}
        self.had_one = False

    def named(self, name: str) -> Member | None:
        """The live member of this name."""
        for member in self.by_ident.values():
            if member.tenant.name == name and member.tenant.state == LIVE:
                return member
        return None

    def holder_of(self, name: str, instance: str) -> Member | None:
        """Another instance that still goes by this name: a dead process does not."""
        for member in self.by_ident.values():
            same = member.tenant.name == name and member.instance != instance
            if same and not member.exited:
                return member
        return None

    def of_instance(self, instance: str) -> Member | None:
        """The earlier connection of an instance that has come back."""
        for member in self.by_ident.values():
            if member.instance == instance:
                return member
        return None

    def add(self, member: Member) -> None:
        """Take a member in and watch its process."""
        self.by_ident[member.tenant.ident] = member
        self.had_one = True
        self._watcher.watch_exit(member.pidfd, member.tenant.ident)

    def remove(self, ident: int) -> None:
        """Forget a member; its lease is dealt with already."""
        member = self.by_ident.pop(ident)
        self._watcher.unwatch_exit(member.pidfd)
        os.close(member.pidfd)

    def disconnected(self, ident: int, now: float) -> None:
        """The socket of a member has ended."""
        member = self.by_ident.get(ident)
        if member is not None:
            member.peer = None
            self._ended(member, now)

    def exited(self, ident: int, now: float) -> None:
        """The process of a member has ended."""
        member = self.by_ident[ident]
        member.exited = True
        self._watcher.unwatch_exit(member.pidfd)
        self._ended(member, now)

    def _ended(self, member: Member, now: float) -> None:
        ident = member.tenant.ident
        self._ledger.revoke(ident)
        gone = member.peer is None
        if gone and member.tenant.lease == 0:
            self._ledger.credit(ident)
            self.remove(ident)
            self.write_roster()
        elif gone and member.exited:
            self._ledger.drain(ident)
            member.draining_since = now
            self.credit(now)

    def credit(self, now: float) -> None:
        """Strike the leases of those whose bytes are back, or have not come back for too long."""
        for member in [m for m in self.by_ident.values() if m.draining_since is not None]:
            tenant = member.tenant
            back = self._probe.is_back(self._ledger.leased - tenant.lease)
            overdue = now - (member.draining_since or now) >= TIMEOUT_S
            if back or overdue:
                if not back:
                    self._log(f"warning: {tenant.lease} bytes of {tenant.name} (pid {member.pid}) "
                              f"did not come back in {TIMEOUT_S} s; credited")  # fmt: skip
                self._ledger.credit(tenant.ident)
                self.remove(tenant.ident)
                self.write_roster()

    def observe(self) -> None:
        """Let the probe look at the device while every owner lives."""
        if all(member.tenant.state == LIVE for member in self.by_ident.values()):
            self._probe.observe(self._ledger.leased)

    def next_look(self, now: float) -> float | None:
        """When ``credit`` should be called again."""
        waiting = any(m.draining_since is not None for m in self.by_ident.values())
        return now + POLL_S if waiting else None

    def write_roster(self) -> None:
        """Write who is here or still expected, for the next broker. Rather unknown than wrong."""
        missing = self._ledger.missing
        if missing is None:
            return  # the roster we found is unreadable: leave it so until the grace is over
        here = {member.instance for member in self.by_ident.values() if not member.exited}
        foreign = getattr(self._probe, "foreign", None)
        roster = {**self._lasting, "foreign": foreign, "instances": sorted(here | missing)}
        data = json.dumps(roster, separators=(",", ":")).encode()
        try:
            self._directory.replace(self._directory.roster, data)
        except OSError as error:
            self._log(f"warning: cannot write the roster: {error}")
            self._forget_roster()

    def _forget_roster(self) -> None:
        """Empty the roster, which needs no space: the next broker then waits its whole grace."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        try:
            os.close(self._directory.open(self._directory.roster, flags))
        except OSError as error:
            self._log(f"warning: cannot empty the roster: {error}")
