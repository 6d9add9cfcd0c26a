"""Snapshots of a block pool and its budget: the report for the broker, the stats for the user."""

from __future__ import annotations

from kvcached.blocks import BlockPool
from kvcached.stats import SCHEMA_VERSION, CacheStats, PoolCounters, TenantReport


def take_report(blocks: BlockPool, *, idle: bool = False, pauses: bool = False) -> TenantReport:
    """What is held, by the strongest claim on each extent (I1)."""
    in_use, cached, spare, quarantined = blocks.bytes_by_claim()
    return TenantReport(
        backed_bytes=blocks.pages.backed_bytes, in_use_bytes=in_use, cached_bytes=cached,
        spare_bytes=spare, quarantined_bytes=quarantined,
        split_floor_bytes=blocks.split_floor_bytes(),
        oldest_cached_age_s=blocks.oldest_cached_seconds(), idle=idle, pauses=pauses,
    )  # fmt: skip


def free_blocks_hint(blocks: BlockPool) -> int:
    """Blocks that could be taken now without reclaim from others, if nobody is faster."""
    budget, g = blocks.pages.budget, blocks.geometry
    left = min(budget.limit_bytes - budget.claimed_bytes, blocks.pages.backend.available())
    growable = max(0, left) // (g.block_bytes * g.num_planes)
    unused = g.num_blocks - 1 - blocks.num_used - blocks.num_quarantined
    return min(blocks.num_free + blocks.num_cached + growable, unused)


def take_counters(blocks: BlockPool) -> PoolCounters:
    """How often what is backed changed."""
    pages = blocks.pages
    return PoolCounters(
        grow=pages.grown.count, grow_ns=pages.grown.ns, shrink=pages.shrunk.count,
        shrink_ns=pages.shrunk.ns, split=pages.splits.count, split_ns=pages.splits.ns,
        reclaim=blocks.reclaimed.count, reclaim_ns=blocks.reclaimed.ns,
        evicted_blocks=blocks.evicted,
        ahead=blocks.grower.ahead.count, ahead_ns=blocks.grower.ahead.ns,
    )  # fmt: skip


def take_stats(name: str, blocks: BlockPool, sequences: int) -> CacheStats:
    """One moment of one cache."""
    report, pages, g = take_report(blocks), blocks.pages, blocks.geometry
    usable = blocks.num_free + blocks.num_used + blocks.num_cached + blocks.num_quarantined
    return CacheStats(
        schema_version=SCHEMA_VERSION, name=name, device=pages.backend.device,
        page_bytes=g.page_bytes, block_bytes=g.block_bytes * g.num_planes,
        reserved_bytes=g.reserved_bytes,
        backed_bytes=report.backed_bytes, in_use_bytes=report.in_use_bytes,
        cached_bytes=report.cached_bytes, spare_bytes=report.spare_bytes,
        quarantined_bytes=report.quarantined_bytes, lease_bytes=pages.budget.lease_bytes,
        limit_bytes=pages.budget.limit_bytes,
        packed_floor_bytes=g.packed_floor_bytes(blocks.num_used + 1),  # and the null block
        split_floor_bytes=report.split_floor_bytes,
        spare_target_bytes=blocks.spares.target(blocks.clock()),
        blocks_total=g.num_blocks - 1, blocks_usable=usable, blocks_in_use=blocks.num_used,
        blocks_cached=blocks.num_cached, blocks_quarantined=blocks.num_quarantined,
        blocks_free=blocks.num_free, extents=len(pages.extents), sequences=sequences,
        counters=take_counters(blocks),
    )  # fmt: skip


def page_runs(blocks: BlockPool) -> list[tuple[int, int, str]]:
    """See ``ElasticBlocks.page_runs``."""
    h, runs = blocks.hot, list[tuple[int, int, str]]()
    for extent in sorted(blocks.pages.extents.values(), key=lambda e: e.first):
        counts = blocks.ext[extent.id]
        state = ("in use" if counts[h.X_USED] else
                 "quarantined" if counts[h.X_QUARANTINED] else
                 "cached" if counts[h.X_CACHED] else "spare")  # fmt: skip
        if runs and runs[-1][2] == state and runs[-1][0] + runs[-1][1] == extent.first:
            runs[-1] = (runs[-1][0], runs[-1][1] + extent.pages, state)
        else:
            runs.append((extent.first, extent.pages, state))
    return runs
