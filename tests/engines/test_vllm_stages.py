"""Pipeline stages of unlike many layers: one pool of blocks over workers of unlike shapes."""

from __future__ import annotations

import random
from fractions import Fraction

import numpy as np
import pytest
from cache_rig import FOREVER, stop_caretaker
from hypothesis import given
from hypothesis import strategies as st
from near_workers import PAGE, Ranks, Shape, failing

from kvcached.blocks import BlockPool
from kvcached.engines.vllm.stages import stages_of
from kvcached.engines.vllm.tenant import EngineBlocks
from kvcached.errors import BackendUnavailable, EngineUnsupported, KvcachedError
from kvcached.memory.remote import Share
from kvcached.pages import PagePool

# Two stages of two workers each: a block in three and one planes, or of three and two layers.
PLANES = [Shape(20, 3, 0), Shape(20, 3, 1), Shape(20, 1, 2), Shape(20, 1, 3)]
WHOLE = [Shape(15, 1, 0, 3), Shape(15, 1, 0, 3), Shape(10, 1, 1, 2), Shape(10, 1, 1, 2)]
ALIKE = [Shape(24, 2, rank) for rank in range(4)]
SHAPES = {"planes": PLANES, "whole blocks": WHOLE, "alike": ALIKE}


@st.composite
def shapes(draw):
    """Stages of some layers each, workers of a stage alike, devices as they come."""
    layer, whole = draw(st.integers(1, 12)), draw(st.booleans())
    found = []
    for layers in draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)):
        for _ in range(draw(st.integers(1, 2))):
            device = draw(st.integers(0, 3))
            found.append(Shape(layer * layers, 1, device, layers) if whole
                         else Shape(layer, layers, device))  # fmt: skip
    return found


def pool_over(ranks, budget):
    return BlockPool(PagePool(ranks.backend, ranks.stages.geometry, budget, 4, 0))


def contents(block):
    """What a piece of ``block`` holds: like no other."""
    return lambda piece, size: random.Random(f"{block} {piece}").randbytes(size)


# --- shapes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "geometry", "shares"),
    [
        ("planes", (60, 1, 3 * PAGE), [Share(3), Share(3), Share(1), Share(1)]),
        ("whole blocks", (15, 1, 3 * PAGE), [Share(1, 3), Share(1, 3), Share(1, 2), Share(1, 2)]),
        ("alike", (24, 2, PAGE), [Share()] * 4),
    ],
)
def test_a_page_of_all_holds_the_same_blocks_in_each(kind, geometry, shares):
    ranks = Ranks(SHAPES[kind], 50)
    g = ranks.stages.geometry
    assert (g.block_bytes, g.num_planes, g.page_bytes, g.num_blocks) == (*geometry, 50)
    assert ranks.stages.shares == tuple(shares)
    assert ranks.backend.page_bytes == g.page_bytes
    ranks.close()


def test_of_devices_each_counts_what_its_workers_hold():
    ranks = Ranks(WHOLE, 50)
    assert ranks.stages.leader == 0
    assert ranks.stages.factor([0, 1]) == 2
    assert ranks.stages.factor([2]) == Fraction(2, 3)
    ranks.close()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"num_blocks": 49}, "of different shapes"),
        ({"page_bytes": 16}, "of different shapes"),
        ({"device": "cuda:1"}, "of different shapes"),
        ({"block_bytes": 7}, "no more than 1 bytes in common"),
        ({"num_planes": 2, "reserved_bytes": 2 * 752}, ""),
        ({"num_planes": 2, "block_bytes": 30}, "no more than 15 bytes in common"),
    ],
)
def test_workers_whose_blocks_have_nothing_in_common(change, why):
    own = {"block_bytes": 15, "num_planes": 1, "num_blocks": 50, "page_bytes": 8, "device": "cpu",
           "reserved_bytes": 752}  # fmt: skip
    if not why:
        assert stages_of([own, own | change]).shares == (Share(), Share(2))
        return
    with pytest.raises(EngineUnsupported, match=why):
        stages_of([own, own | change])


# --- memory ---------------------------------------------------------------------------------------


@given(shapes=shapes(), blocks=st.integers(2, 40), seed=st.integers(0, 1 << 30))
def test_blocks_are_backed_in_all_workers_and_lie_apart(shapes, blocks, seed):
    ranks, rng = Ranks(shapes, blocks), random.Random(seed)
    budget = ranks.budget(1 << 20)
    pool, used = pool_over(ranks, budget), {}
    for _ in range(12):
        if rng.random() < 0.6:
            for block in pool.alloc(min(rng.randint(1, 6), blocks - 1 - len(used))).tolist():
                used[block] = contents(block)
                ranks.write(block, used[block])
        elif used:
            gone = rng.sample(sorted(used), rng.randint(1, len(used)))
            pool.free(np.array(gone, np.int32))
            for block in gone:
                del used[block]
            if rng.random() < 0.5:
                pool.trim()  # moves blocks to other memory, where it splits
        for block, data in used.items():
            assert ranks.read(block) == [data(piece, size) for piece, (_, _, size)
                                         in enumerate(ranks.places(block))]  # fmt: skip
        budget.check()
        ranks.check()
        assert ranks.held() == [part.claimed_bytes for part in ranks.parts]
    pool.close()
    assert not any(ranks.held())
    ranks.close()


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("call", ["create", "map"])
@pytest.mark.parametrize("rank", range(4))
def test_when_one_worker_cannot_grow_all_stay_as_they_were(kind, call, rank):
    ranks = Ranks(SHAPES[kind], 50, wrap=failing)
    budget = ranks.budget(1 << 20)
    pool, bad = pool_over(ranks, budget), ranks.regions[rank].backend

    def state():
        return ranks.held(), budget.claimed_bytes, pool.num_free, pool.pages.backed_bytes

    before, failed, grown = state(), 0, False
    while not grown:
        bad.only, bad.fail_at = frozenset({call}), bad.seen + failed + 1
        try:
            ids = pool.alloc(8)
            grown = bad.raised == failed
        except KvcachedError:
            failed += 1
            assert state() == before
        ranks.check()
        budget.check()
        assert failed == bad.raised
    bad.fail_at = None
    assert failed >= 2
    pool.free(ids)
    pool.close()
    ranks.close()


@pytest.mark.parametrize("kind", SHAPES)
def test_a_worker_that_ends_is_an_error_and_what_others_have_is_known(kind):
    ranks = Ranks(SHAPES[kind], 50)
    budget = ranks.budget(1 << 20)
    pool = pool_over(ranks, budget)
    pool.alloc(3)
    claimed, held = budget.claimed_bytes, ranks.held()
    ranks.workers[2].dead = True
    with pytest.raises(BackendUnavailable, match="worker 2"):
        pool.alloc(40)
    assert (budget.claimed_bytes, ranks.held()) == (claimed, held)
    budget.check()


# --- steps in flight ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_a_freed_block_stays_in_all_workers_until_the_steps_in_flight_are_done(kind, depth):
    """As vLLM's queue of batches: ``depth`` are scheduled before the first result is taken in."""
    ranks = Ranks(SHAPES[kind], 60)
    engine = EngineBlocks(ranks.stages.geometry, backend=ranks.backend, name="vllm", config=FOREVER,
                          budget=ranks.budget(1 << 20))  # fmt: skip
    stop_caretaker(engine)
    floor = ranks.held()
    with engine.scheduling():
        assert engine.secure(20)
        ids = engine.take(20)
    for _ in range(depth - 1):
        with engine.scheduling():
            pass
    with engine.updating(step=False):  # a request is aborted
        engine.give(ids, ids < 0)
    for done in range(depth):
        engine.reclaim(1 << 20)
        for block in ids.tolist():
            ranks.read(block)
        with engine.scheduling():  # the queue stays full
            pass
        with engine.updating(step=True):
            pass
        assert engine.steps_scheduled - engine.steps_done == depth, done
    engine.reclaim(1 << 20)
    assert ranks.held() == floor
    engine.check()
    engine.close()
    ranks.close()
