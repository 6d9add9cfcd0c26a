"""``ElasticQueue`` under a plain model of vLLM: no block is lost, shared, or unmapped too early."""

from __future__ import annotations

import random
from contextlib import suppress

import numpy as np
import pytest
from cache_rig import FOREVER, Clock, machine_settings, stop_caretaker
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from near_workers import Ranks, Shape
from vllm_model import Pool, Request, Step

from kvcached.broker.budget import LocalBudget
from kvcached.engines.vllm.queue import ElasticQueue
from kvcached.engines.vllm.tenant import EngineBlocks
from kvcached.growth import back_ahead
from kvcached.layout import Geometry
from kvcached.testing import FakeBackend

PAGE = 8
# None: the scheduler and the only worker are one process. Else stages of unlike many layers, in
# planes or in whole blocks, some with two workers, some on a device with others.
WORKERS = st.sampled_from([
    None, None, None,
    lambda b: [Shape(b, 2, 0), Shape(b, 1, 1)],
    lambda b: [Shape(2 * b, 1, 0, 2), Shape(2 * b, 1, 1, 2), Shape(b, 1, 2, 1), Shape(b, 1, 2, 1)],
    lambda b: [Shape(b, 1, 0), Shape(b, 1, 0), Shape(b, 3, 0), Shape(b, 3, 1)],
])  # fmt: skip
SEEN = dict.fromkeys(("steps", "hits", "lifted", "evicted", "preempted", "refused", "reset",
                      "ranks", "queued"), 0)  # fmt: skip
SEED = st.integers(0, 1 << 30)


class AskingBudget(LocalBudget):
    """As a broker's: while it waits for an answer, others get the lock."""

    meanwhile = staticmethod(lambda: None)

    def claim(self, nbytes, *, transient=False, seconds=None):
        self.meanwhile()
        super().claim(nbytes, transient=transient)

    def claim_if_free(self, nbytes, *, ask):
        if ask:
            self.meanwhile()
        return super().claim_if_free(nbytes, ask=ask)


class DeviceFence:
    """Passed once the device has run all steps that were queued when this was made."""

    def __init__(self, machine):
        self.machine, self.position = machine, len(machine.steps)

    def passed(self):
        return self.machine.device_done >= self.position


class QueueMachine(RuleBasedStateMachine):
    """The model.

    ``steps``: all that were ever scheduled; the results of the first ``results`` are in. With
    ``tails`` kernels run on after that, until ``device_done``.
    """

    @initialize(
        blocks=st.integers(3, 40), planes=st.integers(1, 2), block=st.integers(1, 30),
        limit=st.integers(1, 100), tails=st.booleans(), ahead=st.sampled_from([0, 40]),
        workers=WORKERS,
    )  # fmt: skip
    def start(self, blocks, planes, block, limit, tails, ahead, workers):
        self.clock, geometry = Clock(), Geometry(block, planes, blocks, PAGE)
        self.ranks, self.backend = None, FakeBackend(PAGE)
        least = max(limit, planes * (block // PAGE + 2)) * PAGE
        self.budgets = [AskingBudget(least)]
        self.budget = self.budgets[0]
        if workers is not None:
            self.ranks = Ranks(workers(block), blocks)
            self.backend, geometry = self.ranks.backend, self.ranks.stages.geometry
            least = max(limit * PAGE, (geometry.block_bytes // geometry.page_bytes + 2)
                        * geometry.page_bytes)  # fmt: skip
            self.budget = self.ranks.budget(least, AskingBudget)
            self.budgets = self.ranks.parts
        SEEN["ranks"] += workers is not None
        self.tails, self.steps, self.results, self.device_done = tails, [], 0, 0
        self.tenant = EngineBlocks(
            geometry, backend=self.backend, budget=self.budget, name="vllm", config=FOREVER,
            make_tail=(lambda: DeviceFence(self)) if tails else None,
        )  # fmt: skip
        stop_caretaker(self.tenant)
        blocks_of = self.tenant._blocks
        blocks_of.clock, blocks_of._epoch0 = self.clock, 0.0
        blocks_of.grower._most_ahead = ahead * PAGE
        self.pool = Pool(blocks, lambda listed: ElasticQueue(listed, self.tenant))
        self.queue, self.running = self.pool.queue, []

    # --- the model -----------------------------------------------------------------------------

    def pieces(self, block):
        """Backend, address and size of each piece of a block, in all planes of all workers."""
        if self.ranks is not None:
            return list(self.ranks.places(block))
        g, pages = self.tenant.geometry, self.tenant._blocks.pages
        return [(self.backend, pages.address_of(0, plane) + block * g.block_bytes, g.block_bytes)
                for plane in range(g.num_planes)]  # fmt: skip

    def contents(self, block):
        """What lies in a block, in all planes; raises where a page of it is not mapped."""
        return [backend.read(address, size) for backend, address, size in self.pieces(block)]

    def run(self, step):
        for block, chain in step.writes:
            for backend, address, size in self.pieces(block):
                backend.write(address, self.data(chain, size))
        for block, chain in step.reads:
            wanted = [self.data(chain, size) for _, _, size in self.pieces(block)]
            assert self.contents(block) == wanted, "read what is not there"

    def meanwhile(self, act):
        for budget in self.budgets:
            budget.meanwhile = act

    @staticmethod
    def data(chain, size):
        return random.Random(repr(chain)).randbytes(size)

    def drop(self, request, *, backwards):
        self.running.remove(request)
        self.pool.free_blocks(request.blocks[::-1] if backwards else request.blocks)

    def others(self, seed):
        """What another thread does while the budget is asked."""

        def act():
            rng = random.Random(f"{seed} {self.budget.claimed_bytes}")
            what = rng.choice((0, 1, 1, 2, 3))
            self.meanwhile(lambda: None)  # it asks, too
            if what == 1:
                self.tenant.reclaim(rng.randint(1, 40) * PAGE, patient=rng.random() < 0.5)
            elif what == 2:
                back_ahead(self.tenant._blocks)
            elif what == 3:
                self.tenant.take_care()
            self.meanwhile(act)

        return act

    # --- the scheduler ---------------------------------------------------------------------------

    @rule(seed=SEED, waiting=st.integers(1, 4), growing=st.integers(0, 3), asked=st.booleans())
    def schedule(self, seed, waiting, growing, asked):
        rng = random.Random(seed)
        step = Step()
        self.meanwhile(self.others(seed) if asked else lambda: None)
        with self.tenant.scheduling():
            scheduled = []
            for request in rng.sample(self.running, min(growing, len(self.running))):
                if request in self.running:
                    self.grow(request, rng.randint(0, 2), rng, scheduled)
            for _ in range(waiting):
                request = Request(tuple(rng.choices((1, 2), k=rng.randint(1, 5))))
                if self.admit(request):
                    scheduled.append((request, 0))
            for request, before in scheduled:
                held = [
                    (block.block_id, request.chain(i)) for i, block in enumerate(request.blocks)
                ]
                step.writes += held[before + request.hits :]
                step.reads += held[: before + request.hits]
                request.hits = 0
            self.steps.append(step)
        self.meanwhile(lambda: None)
        SEEN["steps"] += 1
        SEEN["queued"] += len(self.steps) - self.results > 2
        SEEN["lifted"] += bool(self.tenant._blocks._lifted)

    def admit(self, request):
        hits = self.pool.lookup([request.chain(i) for i in range(len(request.prompt) - 1)])
        evictable = sum(block.ref_cnt == 0 for block in hits)
        count = len(request.prompt) - len(hits) + evictable
        if not self.fits(count):
            self.pool.matched = set()
            return False
        SEEN["hits"] += len(hits)
        self.pool.touch(hits)
        request.blocks = hits + self.pool.get_new_blocks(len(request.prompt) - len(hits))
        request.hits = len(hits)
        self.running.append(request)
        self.publish(request)
        return True

    def grow(self, request, count, rng, scheduled):
        done = [entry[0] for entry in scheduled]
        while not self.fits(count):  # as vLLM: one whose turn has not come goes, or this one itself
            victim = rng.choice([other for other in self.running if other not in done])
            self.drop(victim, backwards=True)
            SEEN["preempted"] += 1
            if victim is request:
                return
        before = len(request.blocks)
        request.blocks = request.blocks + self.pool.get_new_blocks(count)
        request.prompt += tuple(rng.choices((1, 2), k=count))
        request.hits = 0
        scheduled.append((request, before))
        self.publish(request)

    def fits(self, count):
        """As ``_wrap_admission``, and vLLM's own comparison after it."""
        secured = not count or self.tenant.secure(count)
        needed = count if secured else len(self.pool.blocks) + 1
        fits = needed <= self.queue.num_free_blocks
        assert fits or not secured, "secured, and yet vLLM is told that there are not enough"
        SEEN["refused"] += not fits
        return fits

    def publish(self, request):
        """Full blocks are named when they are scheduled; the last one is never full."""
        for i, block in enumerate(request.blocks[:-1]):
            self.pool.name(block, request.chain(i))

    @precondition(lambda self: self.results < len(self.steps))
    @rule(seed=SEED, finished=st.integers(0, 2), backwards=st.booleans())
    def a_result_is_taken_in(self, seed, finished, backwards):
        self.run(self.steps[self.results])
        with self.tenant.updating(step=True):
            self.results += 1
            if not self.tails:
                self.device_done = max(self.device_done, self.results)
            rng = random.Random(seed)
            for request in rng.sample(self.running, min(finished, len(self.running))):
                self.drop(request, backwards=backwards)
        assert self.tenant.num_available == self.tenant.count_available()

    @rule(seed=SEED)
    def the_engine_catches_up(self, seed):
        while self.results < len(self.steps):
            self.a_result_is_taken_in(seed, 2, backwards=True)
        self.device_done = self.results
        self.tenant.take_care()

    @precondition(lambda self: self.running)
    @rule(seed=SEED, backwards=st.booleans())
    def a_request_is_aborted(self, seed, backwards):
        with self.tenant.updating(step=False):
            self.drop(random.Random(seed).choice(self.running), backwards=backwards)
        assert self.tenant.num_available == self.tenant.count_available()

    @precondition(lambda self: len(self.steps) % 8 == 7)  # seldom, or nothing is ever cached
    @rule()
    def the_prefix_cache_is_reset(self):
        with self.tenant.updating(step=False), self.queue.as_if_all_were_free():
            done = self.pool.reset_prefix_cache()
        assert done is (not self.running)
        if not done:
            return
        self.tenant.forget()
        SEEN["reset"] += 1
        assert self.tenant._blocks.num_cached == 0
        if self.device_done >= len(self.steps) == self.results:
            self.tenant.take_care()
            self.tenant.forget()
            assert self.only_the_null_block_is_backed(), "a reset leaves memory behind"

    def only_the_null_block_is_backed(self):
        blocks = self.tenant._blocks
        return blocks.pages.backed_pages == len(self.tenant.geometry.pages_of(0))

    # --- others ----------------------------------------------------------------------------------

    @precondition(lambda self: self.tails and self.device_done < self.results)
    @rule()
    def the_device_goes_on(self):
        self.device_done = self.results

    @rule(pages=st.integers(0, 40), patient=st.booleans())
    def another_engine_needs_memory(self, pages, patient):
        before = self.budget.claimed_bytes
        freed = self.tenant.reclaim(pages * PAGE, patient=patient)
        assert before - self.budget.claimed_bytes == freed

    @rule(pages=st.integers(1, 80))
    def the_limit_moves(self, pages):
        self.tenant.set_limit(pages * PAGE)

    @rule(seconds=st.floats(0, 2))
    def time_passes(self, seconds):
        self.clock.now += seconds
        self.tenant.take_care()

    @precondition(lambda self: len(self.steps) % 8 == 3)  # it evicts
    @rule(count=st.integers(1, 6))
    def what_was_not_secured_may_be_refused_and_then_nothing_has_changed(self, count):
        before = self.tenant.num_available
        with suppress(MemoryError):
            taken = self.queue.popleft_n(count)
            for block in taken:
                assert block.ref_cnt == 0
            self.queue.append_n(taken)
        assert self.tenant.num_available == before

    # --- what must hold --------------------------------------------------------------------------

    @invariant()
    def nothing_is_unmapped_that_a_step_may_touch(self):
        for i, step in enumerate(self.steps):
            if i >= self.results or i >= self.device_done:
                for block in step.touched:
                    self.contents(block)

    @invariant()
    def what_is_in_use_or_named_is_backed(self):
        for block in self.pool.blocks:
            if block.ref_cnt or block.block_hash is not None:
                self.contents(block.block_id)

    @invariant()
    def the_counts_agree(self):
        used = sum(block.ref_cnt > 0 for block in self.pool.blocks)
        assert self.tenant.num_used == used
        listed = self.queue.get_all_free_blocks()
        assert all(block.ref_cnt == 0 for block in listed)
        blocks = self.tenant._blocks
        assert len(listed) == blocks.num_free + blocks.num_cached
        cached = np.flatnonzero(blocks.blk[:, blocks.hot.STATE] == blocks.hot.CACHED).tolist()
        assert all(self.pool.blocks[block].block_hash for block in cached), "kept for no prefix"
        assert 0 <= self.queue.num_free_blocks <= len(self.pool.blocks) - 1 - used
        assert self.budget.claimed_bytes == self.tenant._blocks.pages.backed_bytes
        if self.ranks is not None:
            assert self.ranks.held() == [budget.claimed_bytes for budget in self.budgets]
        self.tenant.check()

    def teardown(self):
        if hasattr(self, "pool"):
            SEEN["evicted"] += self.pool.evicted
            self.tenant.close()
            assert self.budget.claimed_bytes == 0
            self.backend.check()
            self.backend.shutdown() if self.ranks is None else self.ranks.close()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_queue_of_vllm_is_its_model():
    run_state_machine_as_test(QueueMachine, settings=machine_settings(600, 60))
    assert SEEN["steps"] > 1_000, SEEN
    assert all(SEEN.values()), SEEN
