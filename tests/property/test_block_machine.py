"""``BlockPool`` against a plain model: references, LRU order, fences, and every byte."""

import os
import random

import numpy as np
import pytest
from cache_rig import Clock, block_pool, machine_settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvcached.errors import OwnershipError
from kvcached.testing import FakeBackend, ManualFence

PAGE = 8
STEPS = {"run": 0}
SEED = st.integers(0, 1 << 30)


class BlockMachine(RuleBasedStateMachine):
    """The model.

    ``refs`` of blocks in use; ``cached`` in LRU order; ``waiting`` blocks without references that
    wait for a fence; ``pending`` the newest fence on a block; ``bytes`` of all of these.
    """

    @initialize(
        blocks=st.integers(2, 20), planes=st.integers(1, 2), longest=st.integers(1, 6),
        block=st.integers(1, 30), limit=st.sampled_from([12, 40, 400]),
        bounce=st.sampled_from([0, 3, 12]), ahead=st.sampled_from([0, 5, 50]),
    )  # fmt: skip
    def start(self, blocks, planes, longest, block, limit, bounce, ahead):
        self.backend, self.clock = FakeBackend(PAGE), Clock()
        least = planes * (block // PAGE + 2)  # the null block must fit
        self.pool = block_pool(
            self.backend, clock=self.clock, block_bytes=block, planes=planes,
            longest=longest, num_blocks=blocks, limit=max(limit, least) * PAGE,
            bounce=bounce, ahead=ahead * PAGE,
        )  # fmt: skip
        self.pool.on_evict = self.on_evict
        self.total, self.block, self.planes = blocks - 1, block, planes
        self.refs, self.cached, self.waiting, self.named = {}, [], set(), set()
        self.pending, self.bytes, self.fences = {}, {}, []
        self.staged = []  # extents that another thread is backing, and the bytes it has claimed
        self.write(0)

    # --- the model ---------------------------------------------------------------------------

    def on_evict(self, ids):
        for block in ids.tolist():
            self.cached.remove(block)  # raises if it was not cached
            self.named.discard(block)
            del self.bytes[block]

    def address(self, block, plane):
        return self.pool.pages.address_of(0, plane) + block * self.block

    def write(self, block):
        self.bytes[block] = [os.urandom(self.block) for _ in range(self.planes)]
        for plane, data in enumerate(self.bytes[block]):
            self.backend.write(self.address(block, plane), data)

    def retire(self, block):
        if block in self.named:
            self.cached.append(block)
        else:
            del self.bytes[block]

    def poll(self):
        """Fences pass in the order in which they were given."""
        self.pool.poll_fences()
        while self.fences and self.fences[0][0].done:
            fence, ids = self.fences.pop(0)
            for block in ids:
                if self.pending.get(block) is fence:
                    del self.pending[block]
                    if block in self.waiting:
                        self.waiting.remove(block)
                        self.retire(block)

    def some(self, seed, blocks, most=6):
        blocks, rng = sorted(blocks), random.Random(seed)
        return np.asarray(rng.sample(blocks, min(len(blocks), rng.randint(1, most))), np.int32)

    def shape(self):
        return (self.pool.num_free, self.pool.num_cached, self.pool.pages.backed_bytes,
                sorted((e.first, e.pages) for e in self.pool.pages.extents.values()))  # fmt: skip

    # --- rules -------------------------------------------------------------------------------

    def other_thread_grows_ahead(self):
        """What it does with the lock; the driver's part is still to come."""
        self.pool.spares.grew(60 * PAGE, self.clock.now)
        extents, nbytes = self.pool.grower.stage()
        if extents:
            self.staged.append((extents, nbytes))

    @precondition(lambda self: self.staged)
    @rule(fails=st.booleans())
    def other_thread_is_done(self, fails):
        extents, nbytes = self.staged.pop()
        if fails:
            self.pool.grower.abandon(extents, nbytes)
        else:
            self.pool.pages.back(extents)
            self.pool.check()
            self.pool.grower.admit(extents, 0)

    @rule(count=st.integers(0, 9), busy=st.booleans())
    def alloc(self, count, busy):
        held, before = set(self.refs) | self.waiting, self.shape()
        room = count <= self.total - len(held)
        budget = self.pool.pages.budget
        budget.meanwhile = self.other_thread_grows_ahead if busy else None
        try:
            ids = self.pool.alloc(count).tolist()
        except MemoryError:
            taken = bool(self.staged)  # addresses and budget that are on their way in
            assert taken or not room or budget.limit_bytes < self.pool.geometry.reserved_bytes
            assert self.shape() == before, "I6"
            return
        finally:
            budget.meanwhile = None
        assert room and len(set(ids)) == count and 0 not in ids
        assert not held & set(ids), "I2: handed out twice"
        assert not set(self.cached) & set(ids), "taken from the cache without eviction"
        for block in ids:
            self.refs[block] = 1
            self.write(block)

    @precondition(lambda self: self.refs)
    @rule(seed=SEED)
    def share(self, seed):
        ids = self.some(seed, self.refs)
        self.pool.share(ids)
        for block in ids.tolist():
            self.refs[block] += 1

    @precondition(lambda self: self.refs)
    @rule(seed=SEED, fenced=st.booleans(), twice=st.booleans())
    def free(self, seed, fenced, twice):
        ids = self.some(seed, self.refs).tolist()
        if twice:
            ids += [block for block in ids if self.refs[block] > 1]
        fence = ManualFence() if fenced else None
        self.pool.free(np.asarray(ids, np.int32), fence)
        if fenced:
            self.fences.append((fence, list(dict.fromkeys(ids))))
            self.pending.update(dict.fromkeys(ids, fence))
        last = [b for b in dict.fromkeys(ids) if self.refs[b] == ids.count(b)]
        for block in ids:
            self.refs[block] -= 1
        for block in last:
            del self.refs[block]
            if block in self.pending:
                self.waiting.add(block)
            else:
                self.retire(block)

    @rule(seed=SEED, stranger=st.integers(-2, 25), what=st.sampled_from(["share", "free"]))
    def what_is_not_owned_is_refused(self, seed, stranger, what):
        good = self.some(seed, self.refs).tolist() if self.refs else []
        if stranger in self.refs:
            good = [*good, stranger] * (self.refs[stranger] + 1)
            if what == "share":
                return
        before = self.pool.blk.copy(), self.pool.ext.copy(), self.pool.meta.copy()
        with pytest.raises(OwnershipError, match=r"block -?\d+ cannot be"):
            getattr(self.pool, what)(np.asarray([*good, stranger], np.int32))
        after = self.pool.blk, self.pool.ext, self.pool.meta
        assert all((a == b).all() for a, b in zip(before, after, strict=True))

    @precondition(lambda self: self.refs)
    @rule(seed=SEED, named=st.booleans())
    def name(self, seed, named):
        block = int(self.some(seed, self.refs, 1)[0])
        self.pool.keep(block, named=named)
        (self.named.add if named else self.named.discard)(block)

    @precondition(lambda self: self.named)
    @rule(seed=SEED)
    def acquire(self, seed):
        ids = self.some(seed, self.named)
        self.pool.acquire(ids)
        for block in ids.tolist():
            self.refs[block] = self.refs.get(block, 0) + 1
            self.waiting.discard(block)
            if block in self.cached:
                self.cached.remove(block)

    @precondition(lambda self: self.fences)
    @rule(seed=SEED)
    def a_fence_passes(self, seed):
        random.Random(seed).choice(self.fences)[0].done = True
        self.poll()

    @rule(count=st.integers(0, 5))
    def evict_oldest(self, count):
        oldest = self.cached[:count]
        assert self.pool.evict_oldest(count) == len(oldest)
        assert not set(oldest) & set(self.cached)

    @rule(pages=st.integers(0, 12), split=st.booleans())
    def reclaim(self, pages, split):
        before = self.pool.pages.backed_bytes
        freed = self.pool.reclaim(pages * PAGE, may_split=split)
        assert before - self.pool.pages.backed_bytes == freed

    @rule()
    def trim(self):
        before = self.pool.pages.backed_bytes
        freed = self.pool.trim()
        assert before - self.pool.pages.backed_bytes == freed
        assert not self.cached
        assert self.pool.num_spare_extents == 0
        g = self.pool.geometry
        pages = {p for b in {0, *self.refs, *self.waiting} for p in g.pages_of(b)}
        assert self.pool.pages.backed_pages == len(pages), "trim left more than what is in use"
        if not self.waiting:
            assert self.pool.split_floor_bytes() == self.pool.pages.backed_bytes

    @rule(seconds=st.floats(0, 2))
    def time_passes(self, seconds):
        self.clock.now += seconds
        in_use = self.pool.num_used
        self.pool.tend()
        self.poll()
        assert self.pool.num_used == in_use

    @precondition(lambda self: not self.staged)
    @rule()
    def a_quiet_while_passes(self):
        for _ in range(2):  # the first measures what was taken since the last look
            self.clock.now += 1.001  # the clock rounds
            more = self.pool.tend()
            self.poll()
        assert self.pool.num_spare_extents == 0
        assert more == (self.pool.num_quarantined > 0)

    @rule(limit=st.integers(0, 60))
    def move_the_limit(self, limit):
        self.pool.pages.budget.set_limit(limit * PAGE)

    @precondition(lambda self: len(self.refs) > 1)
    @rule(seed=SEED)
    def copy(self, seed):
        source, target = random.Random(seed).sample(sorted(self.refs), 2)
        self.pool.copy(source, target)
        self.bytes[target] = self.bytes[source]

    # --- what must hold ----------------------------------------------------------------------

    @invariant()
    def the_pool_is_the_model(self):
        STEPS["run"] += 1
        pool = self.pool
        pool.check()
        coming = sum(nbytes for _, nbytes in self.staged)
        assert pool.pages.budget.claimed_bytes == pool.pages.backed_bytes + coming
        assert pool.num_used == len(self.refs)
        assert pool.num_quarantined == len(self.waiting)
        assert pool.num_cached == len(self.cached)
        assert all(pool.refs(block) == refs for block, refs in self.refs.items())
        lru = np.zeros(len(self.cached), np.int32)
        pool._scan.oldest(lru, pool.blk, pool.meta)
        assert lru.tolist() == self.cached
        for block, planes in self.bytes.items():
            for plane, data in enumerate(planes):
                assert self.backend.read(self.address(block, plane), self.block) == data

    def teardown(self):
        if hasattr(self, "pool"):
            while self.staged:
                self.pool.grower.abandon(*self.staged.pop())
            self.pool.close()
            assert self.pool.pages.budget.claimed_bytes == 0
            self.backend.check()
            self.backend.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_block_pool_is_its_model():
    run_state_machine_as_test(BlockMachine, settings=machine_settings(360, 60))
    assert STEPS["run"] > 18_000, f"only {STEPS['run']} steps"
