"""``Turns``: a step that waits goes between two parts of what is given back."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from cache_rig import FOREVER, stop_caretaker
from hypothesis import given
from hypothesis import strategies as st

from kvcached.broker.budget import LocalBudget
from kvcached.engines.vllm.tenant import EngineBlocks
from kvcached.engines.vllm.turns import Turns
from kvcached.layout import Geometry
from kvcached.memory.cuda import CudaBackend
from kvcached.testing import FakeCudaDriver


@pytest.fixture
def turns():
    made = Turns(threading.RLock(), "engine")
    yield made
    made.check()


def test_a_step_goes_between_two_parts(turns):
    lock, order, inside = turns._lock, [], threading.Event()

    def step():
        with turns.step():
            order.append("step")

    def some(most):
        order.append("part")
        if len(order) == 1:
            thread.start()
            while not turns._waiting:
                time.sleep(0.001)
        inside.set()
        return most

    thread = threading.Thread(target=step)
    with lock:
        assert turns.give(3 * turns.part_bytes, some) == 3 * (64 << 20)
    thread.join(10)
    assert order.index("step") == 1, "the step waited for more than one part"
    assert turns.longest_wait > 0


def test_nobody_is_let_in_while_memory_is_given_back(turns):
    seen = []
    with turns._lock:
        turns.give(1 << 20, lambda most: seen.append(turns.giving) or most)
    assert seen == [True]
    assert not turns.giving


def test_an_error_ends_it(turns):
    def some(most):
        raise OSError("refused")

    with turns._lock, pytest.raises(OSError, match="refused"):
        turns.give(1 << 20, some)
    assert not turns.giving


def test_parts_follow_the_time_that_they_take(turns):
    first = turns.part_bytes

    def slow(most):
        time.sleep(0.002)
        return most

    turns.part(first, slow)
    assert turns.part_bytes == first // 2
    for _ in range(20):
        turns.part(turns.part_bytes, slow)
    assert turns.part_bytes == 2 << 20
    turns.part(turns.part_bytes, lambda most: most)
    assert turns.part_bytes >= 2 << 20


def test_parts_are_of_so_many_blocks_however_fast_they_go():
    """What took no time while the engine was idle is the first part that a step may wait for."""
    turns = Turns(threading.RLock(), "engine", block_bytes=32 << 10)
    assert turns.part_bytes == 256 * (32 << 10)
    for _ in range(5):
        turns.part(turns.part_bytes, lambda most: most)
    assert turns.part_bytes == 256 * (32 << 10)
    turns = Turns(threading.RLock(), "engine", block_bytes=2 << 20)
    for _ in range(9):
        turns.part(turns.part_bytes, lambda most: most)
    assert turns.part_bytes == 512 << 20


@given(wanted=st.integers(0, 1 << 34), has=st.integers(0, 1 << 34))
def test_all_that_there_is_and_no_more_is_given(wanted, has):
    turns, left, asked = Turns(threading.RLock(), "engine"), [has], []

    def some(most):
        asked.append(most)
        part = min(most, left[0])
        left[0] -= part
        return part

    with turns._lock:
        assert turns.give(wanted, some) == min(wanted, has)
    assert all(most <= wanted for most in asked)
    turns.check()


def test_a_long_wait_is_told_once(turns, caplog):
    caplog.set_level("INFO")
    for waited in (0.0001, 0.003, 0.0031, 0.004, 0.009):
        turns._note(waited)
    assert [record.getMessage() for record in caplog.records] == [
        "engine: a step waited 3.00 ms for memory to be given back",
        "engine: a step waited 9.00 ms for memory to be given back",
    ]
    assert turns.longest_wait == 0.009


@pytest.mark.parametrize("planes", [1, 3])
@pytest.mark.parametrize("kept", ["cached", "spare"])
def test_a_step_waits_for_few_calls_of_the_driver(planes, kept):
    """However much is asked for at once, and however small the pieces that it was grown in."""
    driver, blocks = FakeCudaDriver(), 60
    backend, budget = CudaBackend(driver=driver), LocalBudget(1 << 20)
    page = backend.page_bytes
    engine = EngineBlocks(Geometry(page // planes // 8 * 8, planes, 2 * blocks, page), name="vllm",
                          backend=backend, budget=budget, config=FOREVER)  # fmt: skip
    stop_caretaker(engine)
    with engine.scheduling():
        ids = np.concatenate([engine.take(1) for _ in range(blocks) if engine.secure(1)])
    with engine.updating(step=True):
        engine.give(ids, np.full(len(ids), kept == "cached"))
    part, turns = engine.turns.part, []

    def counted(asked, some):
        before = driver.calls["cuMemUnmap"] + driver.calls["cuMemRelease"]
        given = part(asked, some)
        turns.append(driver.calls["cuMemUnmap"] + driver.calls["cuMemRelease"] - before)
        return given

    engine.turns.part = counted
    held, handles = budget.claimed_bytes, len(driver.memories)
    assert engine.reclaim(1 << 30) >= held - 4 * page * planes
    assert len(driver.memories) <= 2 * planes < handles // 2
    assert max(turns) <= 2 * max(8, planes)
    assert len(turns) >= (handles - 2 * planes) // 8
    engine.check()
    engine.close()
    assert driver.used == 0
