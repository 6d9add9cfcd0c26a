"""The block pool's model over the CUDA backend, whose growth by one block goes by a journal."""

import random

import pytest
from cache_rig import Clock, block_pool, machine_settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule, run_state_machine_as_test
from property.test_block_machine import PAGE, SEED, BlockMachine

from kvcached.errors import KvcachedError
from kvcached.memory.cuda import CudaBackend
from kvcached.testing import FakeCudaDriver

SEEN = {"by journal": 0, "at once": 0, "failed": 0}
NOTHING = dict.fromkeys(FakeCudaDriver().open_resources(), 0)


class BumpMachine(BlockMachine):
    """Blocks of whole pages, taken one by one, several before anybody looks at the books."""

    @initialize(
        blocks=st.integers(2, 60), longest=st.integers(1, 6), pages=st.integers(1, 3),
        limit=st.sampled_from([12, 40, 400]), ahead=st.sampled_from([0, 5, 50]),
    )  # fmt: skip
    def start(self, blocks, longest, pages, limit, ahead):
        self.driver, self.clock = FakeCudaDriver(PAGE, capacity=1 << 16), Clock()
        self.backend = CudaBackend(driver=self.driver, zero="never")
        self.backend.read, self.backend.write = self.driver.read, self.driver.write
        self.pool = block_pool(
            self.backend, clock=self.clock, block_bytes=pages * PAGE, longest=longest,
            num_blocks=blocks, limit=limit * PAGE, ahead=ahead * PAGE,
        )  # fmt: skip
        self.pool.on_evict = self.on_evict
        self.total, self.block, self.planes = blocks - 1, pages * PAGE, 1
        self.refs, self.cached, self.waiting, self.named = {}, [], set(), set()
        self.pending, self.bytes, self.fences, self.staged = {}, {}, [], []
        self.write(0)

    def take_one(self):
        """One block, if there is room; whether there was."""
        grown = self.pool.pages.grown.count
        try:
            (block,) = self.pool.alloc(1).tolist()
        except MemoryError:
            return False
        assert block not in {0, *self.refs, *self.waiting, *self.cached}
        SEEN["by journal"] += self.pool.pages.grown.count > grown
        self.refs[block] = 1
        self.write(block)
        return True

    @rule(count=st.integers(2, 25), seed=SEED, then=st.sampled_from(
        ["nothing", "free", "trim", "reclaim", "many", "stage", "tend", "close"]))  # fmt: skip
    def trickle(self, count, seed, then):
        """Growth upon growth, and then at once something that must know of it."""
        for _ in range(count):
            if not self.take_one():
                break
        SEEN["at once"] += then != "nothing"
        if then in {"free", "trim", "reclaim"} and self.refs:
            self.free(seed, fenced=False, twice=False)
        if then == "trim":
            self.trim()
        elif then == "reclaim":
            self.reclaim(random.Random(seed).randint(1, 12), split=True)
        elif then == "many":
            self.alloc(3, busy=True)
        elif then == "stage":
            self.other_thread_grows_ahead()
            self.take_one()
        elif then == "tend":
            self.time_passes(0.01)
        elif then == "close":
            assert self.pool.pages.backed_bytes == self.pool.pages.budget.claimed_bytes - sum(
                nbytes for _, nbytes in self.staged
            )

    @rule(count=st.integers(2, 9))
    def another_thread_takes_one_while_a_claim_waits(self, count):
        self.pool.pages.budget.meanwhile = self.take_one
        try:
            ids = self.pool.alloc(count).tolist()
        except MemoryError:
            return
        finally:
            self.pool.pages.budget.meanwhile = None
        assert not {0, *self.refs, *self.waiting, *self.cached} & set(ids), "I2"
        for block in ids:
            self.refs[block] = 1
            self.write(block)

    @precondition(lambda self: len(self.refs) < self.total)
    @rule(at=st.integers(1, 5), sticky=st.booleans(), memory=st.booleans(),
          before=st.integers(0, 3))  # fmt: skip
    def a_call_fails(self, at, sticky, memory, before):
        for _ in range(before):
            self.take_one()
        if sticky and at > 1:  # then what was done may not be undone, and the pool is broken
            return
        shape = self.shape()
        status = "CUDA_ERROR_OUT_OF_MEMORY" if memory else "CUDA_ERROR_UNKNOWN"
        self.driver.fail("*", at, status=status, sticky=sticky)
        try:
            (block,) = self.pool.alloc(1).tolist()
        except KvcachedError:
            SEEN["failed"] += 1
            assert self.shape() == shape, "I6"
        else:
            self.refs[block] = 1
        self.driver.heal()
        for block in self.refs:
            if block not in self.bytes:
                self.write(block)

    def teardown(self):
        super().teardown()
        if hasattr(self, "driver"):
            assert self.driver.open_resources() == NOTHING


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_growth_by_journal_is_growth():
    run_state_machine_as_test(BumpMachine, settings=machine_settings(400, 40))
    assert SEEN["by journal"] > 1000, SEEN
    assert SEEN["at once"] > 200, SEEN
    assert SEEN["failed"] > 100, SEEN
