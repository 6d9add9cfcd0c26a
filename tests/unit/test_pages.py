"""``PagePool``: extents, undo, splits, handles that are given back late."""

import pytest
from cache_rig import page_pool

from kvcached.errors import ClosedError, DriverError, OutOfPages, PoolBroken
from kvcached.testing import CountingBackend, FailingBackend, FakeBackend

PAGE = 16


def grown(pool, *runs):
    pool.budget.claim(pool.bytes_of(runs))
    return pool.grow(runs)


def test_a_run_is_cut_at_ends_of_blocks_where_that_is_possible():
    pool = page_pool(FakeBackend(PAGE), block_bytes=24, num_blocks=40, longest=4)
    assert list(pool.chop((0, 10))) == [(0, 3), (3, 3), (6, 4)]
    large = page_pool(FakeBackend(PAGE), block_bytes=100, num_blocks=4, longest=3)
    assert list(large.chop((0, 7))) == [(0, 3), (3, 3), (6, 1)]


def test_one_handle_a_plane_and_an_extent_costs_two_calls_a_plane():
    backend = CountingBackend(FakeBackend(PAGE))
    pool = page_pool(backend, planes=3)
    backend.calls.clear()
    (extent,) = grown(pool, (2, 4))
    assert len(extent.handles) == 3
    assert backend.calls == {"create": 3, "map": 3}
    assert pool.backed_bytes == 3 * 4 * PAGE
    assert pool.shrink([extent]) == 3 * 4 * PAGE
    pool.check()


def test_growth_is_undone_step_by_step():
    inner = FakeBackend(PAGE, capacity_pages=5)
    pool = page_pool(inner)
    with pytest.raises(OutOfPages):
        grown(pool, (0, 4), (8, 4))
    assert inner.resident_bytes() == 0
    assert not pool.extents
    pool.budget.give_back(8 * PAGE)
    pool.check()


@pytest.mark.parametrize("bounce", [False, True])
def test_a_split_keeps_addresses_and_contents(bounce):
    backend = FakeBackend(PAGE)
    pool = page_pool(backend, planes=2, longest=8, num_blocks=8, bounce=8)
    one, two = grown(pool, (0, 8), (16, 4))
    pages = [*range(8), *range(16, 20)]
    for page in pages:
        for plane in range(2):
            backend.write(pool.address_of(page, plane), bytes([32 * plane + page]) * PAGE)
    keep = [(1, 2), (6, 1), (17, 1)]
    pool.budget.claim(pool.bytes_of(keep) * (1 + bounce))
    pieces = pool.split([(one, keep[:2]), (two, keep[2:])], bounce=bounce)
    assert sorted((e.first, e.pages) for e in pieces) == keep
    for page in (1, 2, 6, 17):
        for plane in range(2):
            data = backend.read(pool.address_of(page, plane), PAGE)
            assert data == bytes([32 * plane + page]) * PAGE
    assert pool.budget.claimed_bytes == backend.resident_bytes() == 2 * 4 * PAGE
    pool.check()
    pool.close()
    backend.shutdown()


def test_a_bounced_split_gives_access_once_a_piece_and_waits_twice_a_batch():
    backend = CountingBackend(FakeBackend(PAGE))
    pool = page_pool(backend, longest=4, num_blocks=16, bounce=8)
    extents = grown(pool, (0, 16))
    pool.budget.claim(2 * 4 * PAGE)
    backend.calls.clear()
    pool.split([(e, [(e.first + 1, 1)]) for e in extents], bounce=True)
    once = {"create": 1, "map": 1, "unmap": 1, "release": 1, "copy_many": 2, "reserve": 1}
    assert backend.calls == {**once, "create": 5, "map": 5, "unmap": 5, "release": 5}
    pool.close()


def test_what_is_staged_or_withdrawn_is_in_transit_until_the_driver_has_done_its_part():
    backend = FakeBackend(PAGE)
    pool = page_pool(backend, num_blocks=16)
    pool.budget.claim(6 * PAGE)
    staged = pool.stage([(0, 6)])
    assert pool.backed_bytes == 0
    assert not list(pool.runs) or next(iter(pool.runs))[0] == 6, "nobody else plans with them"
    pool.check()
    pool.back(staged)
    assert pool.backed_bytes == backend.resident_bytes() == 6 * PAGE
    pool.check()
    pool.admit(staged)
    pool.withdraw(staged[0])
    assert pool.backed_bytes == 6 * PAGE, "held until it is back"
    pool.check()
    freed, error = pool.unback([staged[0]])
    assert error is None
    pool.unstage([staged[0]])
    pool.budget.give_back(freed)
    assert pool.backed_bytes == backend.resident_bytes() == pool.budget.claimed_bytes == 2 * PAGE
    pool.check()
    pool.close()


def test_a_handle_that_cannot_be_released_yet_stays_on_the_books():
    inner = FakeBackend(PAGE)
    backend = FailingBackend(inner, only={"release"})
    pool = page_pool(backend, planes=2)
    one, two = grown(pool, (0, 2), (4, 2))
    backend.fail_at = 2  # that of the second plane: the first cannot be had back
    assert pool.shrink([one]) == 2 * PAGE
    assert pool.backed_bytes == inner.resident_bytes() == pool.budget.claimed_bytes == 6 * PAGE
    pool.check()
    assert pool.shrink([two]) == 6 * PAGE
    assert inner.resident_bytes() == 0
    pool.close()
    inner.shutdown()


def test_a_failure_that_cannot_be_undone_breaks_the_pool_and_close_gives_all_back():
    inner = FakeBackend(PAGE)
    backend = FailingBackend(inner, sticky=True)
    pool = page_pool(backend, planes=2)
    backend.seen, backend.fail_at = 0, 4  # create, map, create, and no map, unmap, release
    with pytest.raises(PoolBroken, match="undoing it failed") as error:
        grown(pool, (0, 2))
    pool.refund(4 * PAGE)
    assert error.value.hint == "Close the cache."
    assert pool.budget.claimed_bytes == inner.resident_bytes() == 4 * PAGE, "I8"
    pool.check()
    for call in (lambda: pool.grow([(0, 1)]), lambda: pool.shrink([])):
        with pytest.raises(PoolBroken):
            call()
    with pytest.raises(DriverError):
        pool.close()
    backend.fail_at = None
    pool.close()
    assert pool.budget.claimed_bytes == inner.resident_bytes() == 0
    inner.shutdown()


def test_an_interrupt_is_undone_too():
    def interrupt(name):
        return KeyboardInterrupt()

    inner = FakeBackend(PAGE)
    backend = FailingBackend(inner, 5, error=interrupt)
    pool = page_pool(backend, planes=2)
    with pytest.raises(KeyboardInterrupt):
        grown(pool, (0, 2))
    assert inner.resident_bytes() == 0
    pool.budget.give_back(4 * PAGE)
    pool.check()


def test_a_closed_pool_refuses_work():
    inner = FakeBackend(PAGE)
    pool = page_pool(inner)
    grown(pool, (0, 3))
    pool.close()
    pool.close()
    assert not pool.usable
    for call in (lambda: pool.grow([(0, 1)]), lambda: pool.shrink([])):
        with pytest.raises(ClosedError, match="closed"):
            call()
    inner.shutdown()
