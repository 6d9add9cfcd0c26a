"""Snapshots: frozen, ready for JSON, and names that stay."""

import json
from dataclasses import FrozenInstanceError

import pytest
from cache_rig import tiny_cache

from kvcached.stats import SCHEMA_VERSION, LimitRecord

FIELDS = [
    "schema_version",
    "name",
    "device",
    "page_bytes",
    "block_bytes",
    "reserved_bytes",
    "backed_bytes",
    "in_use_bytes",
    "cached_bytes",
    "spare_bytes",
    "quarantined_bytes",
    "lease_bytes",
    "limit_bytes",
    "packed_floor_bytes",
    "split_floor_bytes",
    "spare_target_bytes",
    "blocks_total",
    "blocks_usable",
    "blocks_in_use",
    "blocks_cached",
    "blocks_quarantined",
    "blocks_free",
    "extents",
    "sequences",
    "counters",
]
COUNTERS = [
    "grow",
    "grow_ns",
    "shrink",
    "shrink_ns",
    "split",
    "split_ns",
    "reclaim",
    "reclaim_ns",
    "evicted_blocks",
    "ahead",
    "ahead_ns",
]


def test_names_of_fields_are_a_contract_add_but_never_rename():
    with tiny_cache() as cache:
        row = cache.stats().to_dict()
    assert set(FIELDS) <= set(row)
    assert set(COUNTERS) <= set(row["counters"])
    assert row["schema_version"] == SCHEMA_VERSION == 1
    assert json.loads(json.dumps(row)) == row


def test_a_snapshot_is_frozen_and_does_not_follow_the_cache():
    with tiny_cache() as cache:
        before = cache.stats()
        cache.extend(cache.new_sequence(), 9)
        assert (before.blocks_in_use, cache.stats().blocks_in_use) == (0, 3)
        with pytest.raises(FrozenInstanceError):
            before.backed_bytes = 0


def test_claims_add_up_and_each_extent_counts_once():
    with tiny_cache() as cache:
        used, cached, spare = (cache.new_sequence() for _ in range(3))
        cache.extend(used, 8)
        cache.extend(cached, list(range(8)))
        cache.extend(spare, 12)
        cache.free(cached)
        cache.free(spare)
        stats = cache.stats()
        assert (stats.in_use_bytes, stats.cached_bytes, stats.spare_bytes) == (96, 64, 96)
        assert stats.backed_bytes == 256 == stats.lease_bytes
        assert stats.packed_floor_bytes == 96  # two blocks and the null block
        assert stats.split_floor_bytes == 96
        assert stats.blocks_usable == 7
        report = cache.report()
        assert report.backed_bytes == 256
        assert report.to_dict()["cached_bytes"] == 64


def test_counters_count():
    with tiny_cache() as cache:
        sequence, other = cache.new_sequence(), cache.new_sequence()
        cache.extend(sequence, 4)
        cache.extend(other, list(range(16)))
        part = cache.fork(other)
        cache.free(part)
        cache.free(other)
        cache.trim()
        counters = cache.stats().counters
        assert (counters.grow, counters.shrink, counters.reclaim) == (3, 1, 1)
        assert counters.evicted_blocks == 4
        assert min(counters.grow_ns, counters.shrink_ns, counters.reclaim_ns) > 0


def test_a_limit_record_is_applied_when_no_more_is_held():
    assert LimitRecord(100, 1, 100).applied
    assert not LimitRecord(100, 1, 101).applied
