"""What growth ahead and the decay of spares leave behind when they are disturbed half-way."""

import pytest
from cache_rig import Clock, YieldingBudget

from kvcached.blocks import BlockPool
from kvcached.errors import PoolBroken
from kvcached.growth import back_ahead
from kvcached.layout import Geometry
from kvcached.memory.cuda import CudaBackend
from kvcached.pages import PagePool
from kvcached.reclaim import release_excess
from kvcached.testing import FakeBackend, FakeCudaDriver

PAGE = 64
NOTHING = dict.fromkeys(FakeCudaDriver().open_resources(), 0)


class AskingBudget(YieldingBudget):
    """Growth ahead may have to ask, too, and others get the lock meanwhile."""

    def claim_if_free(self, nbytes, *, ask):
        if ask and self.meanwhile is not None:
            do, self.meanwhile = self.meanwhile, None
            do()
        return super().claim_if_free(nbytes, ask=ask)


@pytest.mark.parametrize("end", ["broken", "closed"])
def test_a_pool_that_ends_while_growth_ahead_asks_gets_its_claim_back(end):
    backend, budget = FakeBackend(PAGE), AskingBudget(1 << 16)
    pages = PagePool(backend, Geometry(PAGE, 1, 64, PAGE), budget, 4)
    pool = BlockPool(pages, clock=Clock(), most_ahead=8 * PAGE)
    pool.spares.grew(1 << 12, 0.0)
    budget.meanwhile = pool.close if end == "closed" else lambda: pages.note_broken("a test")
    back_ahead(pool)
    assert budget.meanwhile is None, "it asked"
    assert not pages.in_transit
    if end == "broken":
        with pytest.raises(PoolBroken):
            pool.alloc(1)
    pool.close()
    assert budget.claimed_bytes == 0
    assert backend.resident_bytes() == 0


def test_a_spare_that_is_gone_is_counted_out_whatever_came_after(monkeypatch):
    driver = FakeCudaDriver()
    backend, budget = CudaBackend(driver=driver, zero="never"), YieldingBudget(1 << 16)
    pages = PagePool(backend, Geometry(PAGE, 1, 64, PAGE), budget, 4)
    pool = BlockPool(pages, clock=Clock())
    pool.free(pool.alloc(1))
    pool.clock.now = 10.0
    native = backend._find_native()
    unback = native._unback

    def all_done_and_then(*args):
        unback(*args)
        raise MemoryError("no room for what comes after")

    monkeypatch.setattr(native, "_unback", all_done_and_then)
    with pytest.raises(MemoryError, match="what comes after"):
        release_excess(pool)
    monkeypatch.undo()
    pool.check()
    assert pages.backed_bytes == budget.claimed_bytes == PAGE, "the null block's"
    assert pool.num_free == pool.num_spare_extents == 0
    pool.close()
    backend.shutdown()
    assert driver.open_resources() == NOTHING
