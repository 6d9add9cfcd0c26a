"""``BlockPool``: ownership, packing, growth, reclaim."""

import math

import numpy as np
import pytest
from cache_rig import Clock, block_pool

from kvcached.errors import (
    BudgetExceeded,
    ClosedError,
    DriverError,
    OutOfPages,
    OwnershipError,
)
from kvcached.testing import FailingBackend, FakeBackend, ManualFence

PAGE = 16


def ids(*blocks):
    return np.asarray(blocks, np.int32)


@pytest.fixture
def backend():
    backend = FakeBackend(PAGE)
    yield backend
    backend.check()
    backend.shutdown()


@pytest.fixture
def pool(backend):
    pool = block_pool(backend, block_bytes=PAGE, num_blocks=32, longest=8)
    yield pool
    pool.check()
    pool.close()
    assert pool.pages.budget.claimed_bytes == 0


def test_the_null_block_is_backed_and_never_handed_out(pool):
    assert pool.page[0] != 0
    assert sorted(pool.alloc(31).tolist()) == list(range(1, 32))
    assert pool.num_used == 31


@pytest.mark.parametrize("action", ["free", "share"])
@pytest.mark.parametrize(
    ("block", "why"),
    [(0, "null block"), (-1, "no block has this id"), (32, "no block has this id"),
     (20, "freed before, or never handed out")],
)  # fmt: skip
def test_what_is_not_in_use_cannot_be_freed_or_shared(pool, action, block, why):
    own = pool.alloc(2)
    with pytest.raises(OwnershipError, match=f"block {block} cannot be .*{why}"):
        getattr(pool, action)(np.append(own, ids(block)).astype(np.int32))
    assert [pool.refs(b) for b in own.tolist()] == [1, 1]


def test_a_double_free_raises_in_one_call_and_in_two(pool):
    own = pool.alloc(3)
    with pytest.raises(OwnershipError):
        pool.free(ids(own[0], own[0]))
    pool.free(own)
    with pytest.raises(OwnershipError, match="freed before"):
        pool.free(own[:1])
    assert pool.num_used == 0


def test_a_block_lives_as_long_as_its_last_reference(pool):
    own = pool.alloc(1)
    pool.share(own)
    pool.free(own)
    assert pool.num_used == 1
    pool.free(own)
    assert pool.num_used == 0


def test_blocks_come_from_the_fullest_extents(pool):
    full, empty = pool.alloc(8), pool.alloc(8)
    pool.free(full[:1])
    pool.free(empty[:7])
    assert pool.alloc(1).tolist() == full[:1].tolist()
    pool.free(empty[7:])
    assert pool.num_spare_extents == 1


def test_neighbours_make_the_block_between_them_usable(backend):
    pool = block_pool(backend, block_bytes=24, num_blocks=20, longest=2)
    before = pool.pages.backed_pages
    pool.alloc(7)
    blocks = 1 + pool.num_used + pool.num_free
    assert blocks == pool.pages.backed_pages * PAGE // 24  # none is lost between two extents
    assert pool.pages.backed_pages - before <= 11
    pool.check()
    pool.close()


def test_a_block_larger_than_an_extent_is_backed_by_several(backend):
    pool = block_pool(backend, block_bytes=5 * PAGE + 3, num_blocks=6, longest=2)
    own = pool.alloc(4)
    touched = {int(pool.page[p]) for p in pool.geometry.pages_of(int(own[0]))}
    assert len(touched) >= 3
    pool.check()
    pool.free(own)
    pool.reclaim(1 << 20)
    assert pool.pages.backed_pages == 6  # the null block's
    pool.alloc(5)
    pool.check()
    pool.close()


def test_the_last_partial_page_is_used(backend):
    pool = block_pool(backend, block_bytes=24, num_blocks=3)
    assert sorted(pool.alloc(2).tolist()) == [1, 2]
    with pytest.raises(OutOfPages, match="cache has only 2"):
        pool.alloc(3)
    pool.close()


def test_a_refusal_changes_nothing_and_evicts_nothing(backend):
    pool = block_pool(backend, block_bytes=PAGE, num_blocks=32, limit=6 * PAGE, longest=8)
    own = pool.alloc(5)
    pool.keep(int(own[0]), named=True)
    pool.free(own[:1])
    before = [a.copy() for a in (pool.blk, pool.page, pool.ext, pool.meta)]
    with pytest.raises(BudgetExceeded):
        pool.alloc(2)
    after = pool.blk, pool.page, pool.ext, pool.meta
    assert all((a == b).all() for a, b in zip(before, after, strict=True))
    assert pool.alloc(1).tolist() == own[:1].tolist()  # enough: the cached one makes room
    assert pool.evicted == 1
    pool.close()


def test_a_fenced_block_is_kept_until_its_fence_and_those_before_it_have_passed(pool):
    one, two = ManualFence(), ManualFence()
    first, second = pool.alloc(1), pool.alloc(1)
    pool.free(first, one)
    pool.free(second, two)
    two.done = True
    pool.poll_fences()
    assert pool.num_quarantined == 2
    one.done = True
    pool.poll_fences()
    assert pool.num_quarantined == 0


def test_numbers_of_fences_start_again(pool):
    pool._next_fence = (1 << 31) - 1
    for _ in range(3):
        fence = ManualFence()
        pool.free(pool.alloc(1), fence)
        assert pool.num_quarantined == 1
        fence.done = True
        pool.poll_fences()
        assert pool.num_quarantined == 0


def test_reclaim_takes_spares_then_cached_and_splits_only_when_told(pool):
    spare, cached, partial = pool.alloc(8), pool.alloc(8), pool.alloc(8)
    for block in cached.tolist():
        pool.keep(block, named=True)
    pool.free(spare)
    pool.free(cached)
    pool.free(partial[1:])
    assert pool.reclaim(1) == 8 * PAGE
    assert pool.num_cached == 8
    assert pool.reclaim(1) == 8 * PAGE
    assert pool.num_cached == 0
    assert pool.reclaim(1 << 20) == 0
    assert pool.reclaim(1 << 20, may_split=True) == 7 * PAGE
    assert pool.reclaimed.count == 3


def test_a_split_keeps_quarantined_blocks_and_drops_cached_ones(pool):
    fence, own = ManualFence(), pool.alloc(8)
    pool.keep(int(own[1]), named=True)
    pool.free(own[3:])
    pool.free(own[1:2])
    pool.free(own[2:3], fence)
    assert pool.reclaim(1 << 20, may_split=True) == 6 * PAGE
    assert (pool.num_used, pool.num_cached, pool.num_quarantined) == (1, 0, 1)
    pool.check()


def test_more_extents_than_the_table_first_holds(backend):
    pool = block_pool(backend, block_bytes=PAGE, num_blocks=400, longest=1)
    own = pool.alloc(300)
    assert len(pool.ext) >= 301
    pool.free(own)
    assert pool.trim() == 300 * PAGE
    pool.check()
    pool.close()


def test_spares_follow_growth_and_decay(backend):
    clock = Clock()
    pool = block_pool(backend, clock=clock, block_bytes=PAGE, num_blocks=64, longest=4)
    pool.free(pool.alloc(16))
    assert pool.tend()
    assert pool.num_spare_extents > 0
    clock.now = 1.1
    assert not pool.tend()
    assert pool.num_spare_extents == 0
    pool.check()
    pool.close()


def growing(backend, clock, **options):
    """A pool from which 4 blocks a tenth of a second have been taken for half a second."""
    pool = block_pool(backend, clock=clock, block_bytes=PAGE, num_blocks=400, **options)
    held = []
    for _ in range(5):
        held.append(pool.alloc(4))
        clock.now += 0.1
    return pool, held


def test_growth_ahead_follows_what_is_taken(backend):
    clock, woken = Clock(), []
    pool, held = growing(backend, clock, ahead=40 * PAGE, longest=64)
    pool.on_low = lambda: woken.append(clock.now)
    assert pool.grower.seconds_ready() == math.inf, "nothing is kept ready yet"
    assert pool.tend()
    ready = pool.num_free
    assert 4 <= ready <= 40
    assert pool.grower.ahead.count or ready >= pool.grower.low_water
    grown = pool.pages.grown.count
    for _ in range(20):
        held.append(pool.alloc(4))
        clock.now += 0.1
        pool.tend()
        assert 0 < pool.grower.seconds_ready() < 0.1, "it is looked at again before the next step"
    assert pool.pages.grown.count == grown, "a step waited for the driver"
    assert pool.grower.ahead.count
    assert not woken, "a step that takes what is ready wakes nobody"
    clock.now += 2
    assert not pool.tend()
    assert pool.grower.seconds_ready() == math.inf
    assert pool.num_free < 4, "what nobody wants any more is given back"
    pool.check()
    pool.close()


def test_ready_blocks_that_run_low_are_seen_without_a_call(backend):
    clock, woken = Clock(), []
    pool, held = growing(backend, clock, ahead=40 * PAGE, longest=64)
    pool.tend()
    pool.on_low = lambda: woken.append(clock.now)
    assert pool.grower.seconds_ready() > 0
    held.append(pool.alloc(pool.num_free - pool.grower.low_water + 1))
    assert pool.grower.seconds_ready() == 0
    assert not woken
    held.append(pool.alloc(pool.num_free + 1))
    assert woken, "growth on demand says so itself: growth ahead may have been off"
    pool.close()


def test_a_pool_that_has_been_growing_takes_more_at_once(backend):
    clock = Clock()
    pool, _ = growing(backend, clock, ahead=40 * PAGE, longest=64)
    assert len(pool.pages.extents) < 6
    exact, _ = growing(FakeBackend(PAGE), Clock(), longest=64)
    assert len(exact.pages.extents) == 6, "and one that must not, does not"
    assert exact.num_free == 0
    pool.close()
    exact.close()


def test_growth_ahead_takes_only_what_is_free(backend):
    clock = Clock()
    pool, _ = growing(backend, clock, ahead=40 * PAGE, longest=64, limit=24 * PAGE)
    pool.tend()
    assert pool.pages.backed_bytes <= 24 * PAGE
    assert pool.pages.budget.claimed_bytes == pool.pages.backed_bytes
    pool.close()
    full = FakeBackend(PAGE, capacity_pages=22)
    pool, _ = growing(full, clock, ahead=4 * PAGE, longest=64)
    for _ in range(4):
        pool.tend()
        clock.now += 0.01
    pool.check()
    assert pool.pages.budget.claimed_bytes == pool.pages.backed_bytes == full.resident_bytes()


@pytest.mark.parametrize("call", ["create", "map"])
def test_growth_ahead_that_fails_leaves_all_as_it_was(call):
    inner, clock = FakeBackend(PAGE), Clock()
    backend = FailingBackend(inner, only={call})
    pool, _ = growing(backend, clock, ahead=40 * PAGE)
    pool.spares.grew(80 * PAGE, clock.now)
    before = pool.pages.backed_bytes, list(pool.pages.runs), pool.num_free
    backend.seen, backend.fail_at = 0, 2
    backend.error = lambda name: DriverError(f"{name} refused", status="X", call=name)
    with pytest.raises(DriverError):
        pool.tend()
    assert (pool.pages.backed_bytes, list(pool.pages.runs), pool.num_free) == before
    assert pool.pages.budget.claimed_bytes == pool.pages.backed_bytes
    pool.check()


@pytest.mark.parametrize("call", ["unmap", "release"])
def test_a_spare_that_cannot_be_given_back_stays(call):
    inner, clock = FakeBackend(PAGE), Clock()
    backend = FailingBackend(inner, only={call})
    pool = block_pool(backend, clock=clock, block_bytes=PAGE, num_blocks=64, longest=4)
    pool.free(pool.alloc(16))
    clock.now = 1.1
    before = pool.pages.backed_bytes, pool.num_free
    backend.seen, backend.fail_at = 0, 1
    with pytest.raises(DriverError):
        pool.tend()
    assert (pool.pages.backed_bytes, pool.num_free) == before
    pool.check()
    pool.tend()
    assert pool.num_spare_extents == 0
    pool.check()


def test_after_close_nothing_is_handed_out(backend):
    pool = block_pool(backend, block_bytes=PAGE, num_blocks=8)
    pool.free(pool.alloc(2))
    pool.close()
    pool.close()
    with pytest.raises(ClosedError):
        pool.alloc(1)
