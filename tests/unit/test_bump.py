"""Growth by one block: planned ahead, made in one compiled call, written up afterwards."""

import itertools

import numpy as np
import pytest
from cache_rig import Clock, YieldingBudget

from kvcached.blocks import BlockPool
from kvcached.errors import (
    BudgetExceeded,
    DriverError,
    ForkedProcessError,
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
    mapped = rig.driver.mappings.values()
    return sorted((m.address - base) // PAGE for m in mapped if m.accessible)


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


# --- failures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [0, 1, 15, 16])
@pytest.mark.parametrize("call", CALLS)
def test_a_call_that_fails_leaves_nothing(rig, call, ahead):
    for _ in range(ahead):
        rig.pool.alloc(1)
    before = rig.state()
    rig.driver.fail(call)
    with pytest.raises(DriverError, match=call) as caught:
        rig.pool.alloc(1)
    assert (caught.value.call, caught.value.status) == (call, "CUDA_ERROR_UNKNOWN")
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


# --- interrupts, forks, ends ----------------------------------------------------------------------


def interrupted(monkeypatch, rig, when):
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


@pytest.mark.parametrize("failing", [None, *CALLS])
def test_an_interrupt_never_hides_what_was_done(rig, monkeypatch, failing):
    rig.pool.alloc(1)
    for when in ("after", "before"):  # what the first leaves behind is not taken for the second's
        before = rig.state()
        if failing and when == "after":
            rig.driver.fail(failing)
        interrupted(monkeypatch, rig, when)
        with pytest.raises(KeyboardInterrupt):
            rig.pool.alloc(1)
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
                    held.append(rig.pool.alloc(1 + 2 * (step % 4 == 2)))
            except KvcachedError:
                rig.pool.check()
        failed = rig.driver.last_failed
        rig.driver.heal()
        rig.end()
        if not failed:
            assert fail_at > 30
            return
