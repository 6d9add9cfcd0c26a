"""Sleep: which of vLLM's resets leaves the prefixes, and what goes in any case."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from cache_rig import FOREVER, stop_caretaker

from kvcached.broker.budget import LocalBudget
from kvcached.engines.vllm import steps
from kvcached.engines.vllm.queue import ElasticQueue
from kvcached.engines.vllm.tenant import EngineBlocks
from kvcached.layout import Geometry
from kvcached.testing import FakeBackend

PAGE = 8


class Pool:
    """As vLLM's ``BlockPool``, as far as it is asked here."""

    def __init__(self, queue):
        self.free_block_queue, self.forgot, self.evicted = queue, 0, []

    def _maybe_evict_cached_block(self, block):
        self.evicted.append(block)

    def reset_prefix_cache(self):
        self.forgot += 1
        return True

    def get_usage(self):
        return 0.0


class Core:
    """As vLLM's ``EngineCore``; ``pending`` are resets that wait for requests to end."""

    def __init__(self, pool):
        self.scheduler = SimpleNamespace(kv_cache_manager=SimpleNamespace(block_pool=pool))
        self.pool, self.pending = pool, []

    def sleep(self, level=1, mode="abort"):
        if level >= 1 and mode == "wait":
            self.pending.append(self._reset_caches)
        elif level >= 1:
            self._reset_caches()

    def wake_up(self, tags=None):
        return True

    def _reset_caches(self):
        assert self.pool.reset_prefix_cache()


@pytest.fixture
def engine():
    """An engine core whose sleep keeps prefixes, and its tenant with 3 cached and 2 free blocks."""
    budget, backend = LocalBudget(100 * PAGE), FakeBackend(PAGE)
    tenant = EngineBlocks(Geometry(PAGE, 1, 20, PAGE), backend=backend, budget=budget, name="vllm",
                          config=FOREVER)  # fmt: skip
    stop_caretaker(tenant)
    # classes of their own, since the wrappers change them
    pool_class, core_class = type("P", (Pool,), {}), type("C", (Core,), {})
    steps._wrap_pool(pool_class)
    steps._wrap_sleep(core_class)
    core = core_class(pool_class(ElasticQueue(list(range(20)), tenant)))
    fill(tenant)
    yield core, tenant
    tenant.check()
    tenant.close()
    backend.shutdown()


def fill(tenant):
    with tenant.scheduling():
        taken = []
        for count in (3, 2):  # two extents
            assert tenant.secure(count)
            taken.append(tenant.take(count))
    with tenant.updating(step=True):
        tenant.give(taken[0], np.ones(3, np.bool_))
        tenant.give(taken[1], np.zeros(2, np.bool_))


def backed(tenant):
    return tenant._blocks.pages.backed_bytes // PAGE


def test_level_1_keeps_what_prefixes_name_and_no_more(engine):
    core, tenant = engine
    assert backed(tenant) >= 6
    core.sleep(1)
    assert (backed(tenant), tenant._blocks.num_cached, core.pool.forgot) == (4, 3, 0)
    core.wake_up()
    with tenant.scheduling():
        assert tenant.secure(10), "waking takes nothing; requests do"


@pytest.mark.parametrize("level", [0, 2])
def test_other_levels_do_what_vllm_does(engine, level):
    core, tenant = engine
    core.sleep(level)
    assert core.pool.forgot == (level > 0)
    assert (tenant._blocks.num_cached > 0) is (level == 0)
    assert level == 0 or backed(tenant) == 1


def test_a_reset_that_is_no_sleep_drops(engine):
    core, tenant = engine
    core.sleep(1)
    core._reset_caches()
    assert (backed(tenant), core.pool.forgot) == (1, 1)


def test_a_sleep_that_waits_keeps_when_it_comes_to_it(engine):
    core, tenant = engine
    core.sleep(1, mode="wait")
    assert core.pool.reset_prefix_cache(), "somebody asks for it meanwhile"
    assert backed(tenant) == 1
    fill(tenant)
    core.pending.pop()()
    assert tenant._blocks.num_cached == 3


def test_waking_ends_what_was_asked_for(engine):
    core, tenant = engine
    core.sleep(1, mode="wait")
    core.wake_up()
    core._reset_caches()
    assert backed(tenant) == 1


def test_an_engine_that_is_not_elastic_sleeps_as_it_always_does(engine):
    core, _ = engine
    core.pool.free_block_queue = object()
    core.sleep(1)
    assert core.pool.forgot == 1
