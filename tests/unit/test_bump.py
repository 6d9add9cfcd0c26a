"""Growth by one block: planned ahead, made in one compiled call, written up afterwards."""

import itertools
from random import Random

import numpy as np
import pytest
from cache_rig import Clock, YieldingBudget

from kvcached import _hot
from kvcached.blocks import BlockPool
from kvcached.errors import (
    BudgetExceeded,
    DriverError,
    ForkedProcessError,
    InvalidInput,
    KvcachedError,
    OutOfPages,
    PoolBroken,
)
from kvcached.layout import Geometry
from kvcached.memory.cuda import CudaBackend
from kvcached.pages import PagePool
from kvcached.testing import FailingBackend, FakeBackend, FakeCudaDriver

PAGE = 64
CALLS = ["cuMemCreate", "cuMemMap", "cuMemSetAccess"]
NOTHING = dict.fromkeys(FakeCudaDriver().open_resources(), 0)


class Rig:
    """A pool whose blocks are pages; all is back at its end."""

    def __init__(self, *, planes=1, block=PAGE, blocks=64, limit=1 << 16, wrap=None, **options):
        self.driver = FakeCudaDriver(capacity=1 << 16)
        self.memory = CudaBackend(driver=self.driver, zero="never", **options)
        backend = wrap(self.memory) if wrap else self.memory
        self.budget = YieldingBudget(limit)
        geometry = Geometry(block, planes, blocks, PAGE)
        self.pages = PagePool(backend, geometry, self.budget, 4)
        self.pool = BlockPool(self.pages, clock=Clock())

    @property
    def by_journal(self):
        return self.pool._grow.__name__ == "grow"

    def state(self):
        pool, pages = self.pool, self.pages
        extents = sorted((e.id, e.first, e.pages) for e in pages.extents.values())
        return (
            extents,
            list(pages.runs),
            pages.backed_bytes,
            self.budget.claimed_bytes,
            (pool.num_free, pool.num_used, self.driver.open_resources()),
        )

    def end(self):
        if self.pages.usable:
            self.pool.check()
            self.memory.check()
        self.pool.close()
        assert self.budget.claimed_bytes == 0
        self.memory.shutdown()
        assert self.driver.open_resources() == NOTHING


@pytest.fixture
def rig():
    rig = Rig()
    yield rig
    rig.end()


def backed(rig):
    """Pages that the driver has mapped and made accessible."""
    base = rig.pages.reservation.address
    mapped = [m for m in rig.driver.mappings.values() if m.accessible]
    places = [range(m.address - base, m.end - base, PAGE) for m in mapped]
    return sorted(start // PAGE for place in places for start in place)


def test_it_asks_the_driver_for_no_more_than_three_calls_a_block(rig):
    before = rig.driver.calls.copy()
    ids = [int(rig.pool.alloc(1)[0]) for _ in range(40)]
    assert sorted(ids) == list(range(1, 41)), "low ids first, each once"
    assert {name: n for name, n in (rig.driver.calls - before).items() if n} == dict.fromkeys(
        CALLS, 40
    )
    assert backed(rig) == list(range(41))
    assert rig.pages.grown.count == 41
    assert rig.pages.backed_bytes == rig.budget.claimed_bytes == 41 * PAGE
    assert len(rig.pages.extents) == 41
    rig.pool.check()


def test_what_was_grown_is_given_back_like_any_other(rig):
    for _ in range(3):
        ids = np.concatenate([rig.pool.alloc(1) for _ in range(20)])
        rig.pool.free(ids[::2].copy())
        assert rig.pool.trim(may_split=False) == 10 * PAGE
        rig.pool.free(ids[1::2].copy())
        assert rig.pool.trim(may_split=False) == 10 * PAGE
        rig.pool.check()
    assert backed(rig) == [0]
    assert len(rig.pool.ext) == 64, "ids are used again"


def test_many_blocks_get_their_access_in_one_call(rig):
    rig.pool.alloc(1)
    before = rig.driver.calls.copy()
    assert sorted(rig.pool.alloc(9).tolist()) == list(range(2, 11))
    assert dict(rig.driver.calls - before) == dict(zip(CALLS, (3, 3, 1), strict=True))
    assert sorted(e.pages for e in rig.pages.extents.values()) == [1, 1, 1, 4, 4]
    assert rig.pages.grown.count == 5
    assert backed(rig) == list(range(11))


def test_what_takes_too_many_handles_goes_the_general_way():
    rig = Rig(blocks=300)
    rig.pool.alloc(280)
    assert len(rig.pages.extents) == 71
    rig.end()


def test_the_end_of_the_address_space():
    rig = Rig(blocks=20)
    for _ in range(19):
        rig.pool.alloc(1)
    with pytest.raises(OutOfPages, match="no room"):
        rig.pool.alloc(1)
    rig.pool.check()
    rig.end()


def test_ids_beyond_the_first_counters():
    rig = Rig(blocks=200)
    for _ in range(199):
        rig.pool.alloc(1)
    assert len(rig.pool.ext) > 199
    rig.end()


def test_blocks_of_several_pages():
    rig = Rig(block=3 * PAGE)
    for _ in range(20):
        rig.pool.alloc(1)
    assert {e.pages for e in rig.pages.extents.values()} == {3}
    rig.end()


@pytest.mark.parametrize(
    "options",
    [{"block": PAGE + 8}, {"planes": 2}, {"block": 5 * PAGE}, {"wrap": FailingBackend},
     {"exportable": True}],
)  # fmt: skip
def test_where_it_does_not_apply_growth_is_as_before(options):
    rig = Rig(**options)
    assert not rig.by_journal
    rig.pool.alloc(1)
    rig.end()


def test_a_backend_of_ones_own_needs_nothing_of_this():
    pages = PagePool(FakeBackend(PAGE), Geometry(PAGE, 1, 8, PAGE), YieldingBudget(1 << 10), 4)
    pool = BlockPool(pages, clock=Clock())
    pool.alloc(1)
    pool.close()


def test_memory_that_must_be_cleared_goes_the_general_way():
    driver = FakeCudaDriver(dirt=0xAB)
    backend = CudaBackend(driver=driver, zero="always")
    pages = PagePool(backend, Geometry(PAGE, 1, 8, PAGE), YieldingBudget(1 << 10), 4)
    pool = BlockPool(pages, clock=Clock())
    (block,) = pool.alloc(1).tolist()
    assert driver.read(pages.address_of(block), PAGE) == bytes(PAGE)
    pool.close()
    backend.shutdown()


def arrays(pool):
    """What the compiled functions know, with extents called by their first pages, not by ids."""
    extents = pool.pages.extents
    first = {0: -1} | {e.id: e.first for e in extents.values()}
    rows = {first[e]: [*row[:_hot.X_NEXT], first[row[_hot.X_NEXT]] if row[_hot.X_LEVEL] else None]
            for e, row in ((e, pool.ext[e].tolist()) for e in extents)}  # fmt: skip
    meta = pool.meta.tolist()
    levels = [first[e] for e in meta[_hot.M_LEVEL :]]
    pages = [first[e] for e in pool.page.tolist()]
    used = pool.blk[:, _hot.STATE] == _hot.USED
    blocks = np.where(used[:, None], pool.blk[:, [_hot.STATE, _hot.REFS, _hot.STATE, _hot.STATE,
                      _hot.KEEP, _hot.STAMP, 6, 7]], pool.blk)  # fmt: skip
    return blocks.tolist(), pages, rows, meta[: _hot.M_LEVEL], levels


@pytest.mark.parametrize("block", [PAGE, 2 * PAGE])
@pytest.mark.parametrize("seed", range(8))
def test_both_ways_to_grow_leave_the_same_arrays(block, seed):
    both, rng, held = [Rig(block=block), Rig(block=block, wrap=FailingBackend)], Random(seed), []
    assert [rig.by_journal for rig in both] == [True, False]
    for _ in range(150):
        what, count = rng.random(), rng.randint(1, 5)
        if what < 0.6 and len(held) + count < 60:
            for _ in range(count):  # for several at once the general way may choose another run
                mine, theirs = (rig.pool.alloc(1).tolist() for rig in both)
                assert mine == theirs
                held += mine
        elif what < 0.9 and held:
            gone = [held.pop(rng.randrange(len(held))) for _ in range(min(count, len(held)))]
            for rig in both:
                rig.pool.free(np.asarray(gone, np.int32))
        else:
            for rig in both:  # all of it: among equals it is by id what goes first
                rig.pool.trim(may_split=count > 1)
        mine, theirs = (arrays(rig.pool) for rig in both)
        assert mine == theirs
    for rig in both:
        rig.end()


# --- failures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [0, 1, 7, 8])
@pytest.mark.parametrize(("call", "count", "at"), [
    *((call, 1, 1) for call in CALLS), ("cuMemCreate", 9, 3), ("cuMemMap", 9, 2),
    ("cuMemSetAccess", 9, 1)])  # fmt: skip
def test_a_call_that_fails_leaves_nothing_and_is_named(rig, call, count, at, ahead):
    for _ in range(ahead):
        rig.pool.alloc(1)
    before = rig.state()
    rig.driver.fail(call, at)
    with pytest.raises(DriverError, match=call) as caught:
        rig.pool.alloc(count)
    assert (caught.value.call, caught.value.status) == (call, "CUDA_ERROR_UNKNOWN")
    first = ahead + 1 + 4 * (at - 1)
    place = first, (count if call == "cuMemSetAccess" else min(4, count - 4 * (at - 1)))
    address, nbytes = hex(rig.pages.address_of(place[0])), hex(place[1] * PAGE)
    shown = f"({nbytes}" if call == "cuMemCreate" else f"({address}, {nbytes}"
    assert shown in str(caught.value)
    assert rig.state() == before, "I6"
    assert rig.pool.alloc(1).tolist() == [ahead + 1]


@pytest.mark.parametrize("call", ["cuMemUnmap", "cuMemRelease"])
def test_what_cannot_be_undone_breaks_the_pool_until_it_is_closed(call):
    rig = Rig()
    rig.pool.alloc(1)
    rig.driver.fail("cuMemSetAccess")
    rig.driver.fail(call, sticky=True)
    with pytest.raises(PoolBroken, match="could not be given back"):
        rig.pool.alloc(1)
    assert rig.budget.claimed_bytes == 3 * PAGE, "I8: the memory is not back"
    with pytest.raises(PoolBroken, match="is broken"):
        rig.pool.alloc(1)
    rig.driver.heal()
    rig.end()


@pytest.mark.parametrize("others", [False, True])
def test_out_of_memory_is_tried_once_more_if_others_may_give(rig, monkeypatch, others):
    rig.pool.alloc(1)
    before, asked = rig.state(), []
    rig.driver.capacity = rig.driver.used

    def ask(nbytes):
        asked.append((nbytes, rig.budget.claimed_bytes))
        rig.driver.capacity += PAGE if others else 0
        return others

    monkeypatch.setattr(rig.budget, "report_out_of_memory", ask)
    if others:
        assert rig.pool.alloc(1).tolist() == [2]
    else:
        with pytest.raises(OutOfPages, match="cuMemCreate says CUDA_ERROR_OUT_OF_MEMORY"):
            rig.pool.alloc(1)
        assert rig.state() == before, "I6"
    assert asked == [(PAGE, 2 * PAGE)], "once, with the claim given back"


def test_without_budget_cached_blocks_go_first_and_then_it_is_refused():
    rig = Rig(limit=3 * PAGE)
    ids = [rig.pool.alloc(1) for _ in range(2)]
    rig.pool.keep(1, named=True)
    rig.pool.free(ids[0])
    assert rig.pool.num_cached == 1
    assert rig.pool.alloc(1).tolist() == [1]
    with pytest.raises(BudgetExceeded):
        rig.pool.alloc(1)
    assert rig.budget.claimed_bytes == 3 * PAGE
    rig.end()


def test_what_cannot_be_is_not_adopted():
    backend = CudaBackend(driver=FakeCudaDriver(), zero="never")
    reservation = backend.reserve(8 * PAGE)
    for made in ([(0, 1, 7), (2, 1, 8)], [(0, 0, 7)], [(7, 2, 7)], [(-1, 1, 7)]):
        with pytest.raises(InvalidInput):
            backend.adopt(reservation, made)
    backend.check()
    backend.back(reservation, [(1, 1)])
    with pytest.raises(InvalidInput, match="mapped already"):
        backend.adopt(reservation, [(0, 1, 7), (1, 1, 8)])
    backend.check()


# --- interrupts, forks, ends ----------------------------------------------------------------------


def interrupted(rig, when):
    """``KeyboardInterrupt`` before the compiled call, in it (after a failed call), or after it."""
    inner = rig.pool._grow.__closure__
    names = rig.pool._grow.__code__.co_freevars
    cell = inner[names.index("grow_at")]
    grow_at = cell.cell_contents

    def call(*args):
        cell.cell_contents = grow_at
        if when != "before":
            grow_at(*args)
        raise KeyboardInterrupt

    cell.cell_contents = call


@pytest.mark.parametrize("count", [1, 9])
@pytest.mark.parametrize("failing", [None, *CALLS])
def test_an_interrupt_never_hides_what_was_done(rig, failing, count):
    rig.pool.alloc(1)
    for when in ("after", "before"):  # what the first leaves behind is not taken for the second's
        before = rig.state()
        if failing and when == "after":
            rig.driver.fail(failing)
        interrupted(rig, when)
        with pytest.raises(KeyboardInterrupt):
            rig.pool.alloc(count)
        if failing or when == "before":
            assert rig.state() == before
        rig.pool.check()
        rig.memory.check()
        assert len(backed(rig)) == rig.pages.backed_pages
    rig.pool.alloc(1)


def test_a_child_of_a_fork_makes_no_driver_call():
    rig = Rig()
    rig.pool.alloc(1)
    rig.memory.disown()
    before = rig.driver.calls.copy()
    with pytest.raises(ForkedProcessError):
        rig.pool.alloc(1)
    assert rig.driver.calls == before


def test_closing_gives_back_what_nobody_has_asked_about():
    for count in range(1, 20):
        rig = Rig()
        for _ in range(count):
            rig.pool.alloc(1)
        rig.pool.close()
        assert rig.budget.claimed_bytes == 0
        rig.memory.shutdown()
        assert rig.driver.open_resources() == NOTHING


def test_the_nth_call_fails_wherever_that_is():
    """Growth by one and by several, splits and shrinks in turn; a failure changes nothing."""
    for fail_at in itertools.count(1):
        rig, held = Rig(), []
        rig.driver.fail("*", fail_at)
        rig.driver.last_failed = ""
        for step in range(12):
            try:
                if step % 4 == 3:
                    rig.pool.free(held.pop(0))
                    rig.pool.trim()
                else:
                    held.append(rig.pool.alloc(1 + 8 * (step % 4 == 2)))
            except KvcachedError:
                rig.pool.check()
        failed = rig.driver.last_failed
        rig.driver.heal()
        rig.end()
        if not failed:
            assert fail_at > 30
            return
