"""Frozen, versioned snapshots. Field names are a public contract: add, never rename."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

SCHEMA_VERSION = 1


@dataclass(slots=True)
class Timer:
    """A count and the time spent."""

    count: int = 0
    ns: int = 0

    def add(self, started: int, count: int = 1) -> None:
        """Count something that began at ``started`` (``time.perf_counter_ns``)."""
        self.count += count
        self.ns += time.perf_counter_ns() - started


@dataclass(frozen=True, slots=True)
class PoolCounters:
    """How often the pool changed what is backed, and how long the backend took for it."""

    grow: int = 0
    grow_ns: int = 0
    shrink: int = 0
    shrink_ns: int = 0
    split: int = 0
    split_ns: int = 0
    reclaim: int = 0
    reclaim_ns: int = 0
    evicted_blocks: int = 0
    ahead: int = 0
    """Extents that the background thread backed before anybody asked; not in ``grow``."""
    ahead_ns: int = 0


@dataclass(frozen=True, slots=True)
class CacheStats:
    """One moment of one cache. All ``*_bytes`` are bytes of physical memory unless said otherwise.

    ``backed = in_use + cached + spare + quarantined`` (invariant I1). An extent is counted whole,
    under the strongest claim on it: a block in use, else a fence not yet passed (quarantined),
    else a cached prefix, else it is spare. So each figure says what an action can give back:
    spare at once, cached by eviction, quarantined by waiting, in use by a split, down to
    ``split_floor_bytes``.
    """

    schema_version: int
    name: str
    device: str
    page_bytes: int
    block_bytes: int
    reserved_bytes: int
    """Bytes of address space; costs no memory."""
    backed_bytes: int
    in_use_bytes: int
    cached_bytes: int
    spare_bytes: int
    quarantined_bytes: int
    lease_bytes: int
    limit_bytes: int
    packed_floor_bytes: int
    """The fewest whole pages that could hold the blocks in use."""
    split_floor_bytes: int
    """The whole pages that the blocks in use lie on: what splits can get down to.

    The packed floor where a block is whole pages; else up to two partial pages more for each run of
    blocks, since a split keeps block ids and so addresses.
    """
    spare_target_bytes: int
    """What may stay spare now: it follows the growth of the last second, and decays to zero."""
    blocks_total: int
    """Block ids that exist (address space)."""
    blocks_usable: int
    """Blocks all of whose pages are backed."""
    blocks_in_use: int
    blocks_cached: int
    blocks_quarantined: int
    blocks_free: int
    """Usable blocks that hold nothing."""
    extents: int
    sequences: int
    counters: PoolCounters

    def to_dict(self) -> dict[str, Any]:
        """A plain dict, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class LimitRecord:
    """The one limit record (docs/broker.md), the same in the CLI, the API and the broker.

    ``applied`` holds if and only if ``held_bytes <= desired_bytes``; until then the owner is
    giving back.
    """

    desired_bytes: int
    revision: int
    held_bytes: int
    floor_bytes: int = 0
    weight: float = 1.0

    @property
    def applied(self) -> bool:
        """Whether the owner holds no more than it may."""
        return self.held_bytes <= self.desired_bytes


@dataclass(frozen=True, slots=True)
class TenantReport:
    """What a tenant tells the broker about its lease, so that reclaim can choose well."""

    backed_bytes: int = 0
    in_use_bytes: int = 0
    cached_bytes: int = 0
    spare_bytes: int = 0
    quarantined_bytes: int = 0
    split_floor_bytes: int = 0
    oldest_cached_age_s: float = 0.0
    """Seconds since the least recently used cached prefix was used."""
    idle: bool = False
    """No kernel runs and no call is under way: extents in use can be split now."""
    pauses: bool = False
    """The engine pauses between its steps: they can be split then."""

    def to_dict(self) -> dict[str, Any]:
        """A plain dict, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class TenantSnapshot:
    """One tenant of a device, as its broker sees it."""

    name: str
    pid: int
    """0 if the tenant lives in a pid namespace that the broker cannot see into."""
    uid: int
    state: str
    """``live``; ``late`` (missed a reclaim); ``revoked``, ``draining`` (ended, bytes not back)."""
    lease_bytes: int
    limit: LimitRecord
    report: TenantReport
    connected_s: float
    meta: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """A plain dict, ready for JSON."""
        row = asdict(self)
        row["limit"]["applied"] = self.limit.applied
        return row


@dataclass(frozen=True, slots=True)
class DeviceSnapshot:
    """One device and all its tenants. ``leased_bytes`` includes leases that are not back yet.

    ``usable_bytes`` is what all leases together may come to now: less than the capacity while
    others, outside, use the device too.
    """

    schema_version: int
    device: str
    capacity_bytes: int
    leased_bytes: int
    broker_pid: int
    epoch: int
    tenants: tuple[TenantSnapshot, ...]
    usable_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """A plain dict, ready for JSON."""
        row = asdict(self)
        row["tenants"] = [tenant.to_dict() for tenant in self.tenants]
        return row
