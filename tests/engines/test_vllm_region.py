"""The memory under vLLM's tensors: warm-up, the scheduler that takes over, here or from afar."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
from cache_rig import FOREVER, stop_caretaker

from kvcached.blocks import BlockPool
from kvcached.broker.budget import LocalBudget
from kvcached.config import check_name
from kvcached.engines.vllm import attach
from kvcached.engines.vllm import region as regions
from kvcached.engines.vllm.region import Facts, Region
from kvcached.errors import (
    DriverError,
    EngineUnsupported,
    InvalidInput,
    KvcachedError,
    NotAllowed,
    OutOfPages,
)
from kvcached.layout import Geometry
from kvcached.memory.remote import RemoteBackend, Worker
from kvcached.memory.wire import Op
from kvcached.pages import PagePool
from kvcached.testing import CountingBackend, FailingBackend, FakeBackend

PAGE = 8
SHAPES = [(24, 1, 200), (20, 3, 30), (5, 2, 40), (8, 2, 100)]  # block bytes, planes, blocks


def facts(**changes):
    return Facts(**{"rank": 0, "world_size": 1, "model": "m", "engine": "vLLM", "limit_bytes": 0,
                    "request_bytes": 64, "runs_on": False} | changes)  # fmt: skip


def make(shape=SHAPES[0], *, wrap=lambda inner: inner, can_alias=True, more_pages=0, **said):
    backend = wrap(FakeBackend(PAGE, can_alias=can_alias))
    block, planes, blocks = shape
    geometry = Geometry(block, planes, blocks, PAGE)
    return Region(backend, geometry, facts(**said), more_pages=more_pages)


def is_mapped(region, block):
    g, start = region.geometry, region.reservation.address
    for plane in range(g.num_planes):
        region.backend.read(start + plane * g.plane_bytes + block * g.block_bytes, g.block_bytes)
    return True


# --- warm-up ----------------------------------------------------------------------------------


@pytest.mark.parametrize("can_alias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("warm", [1, 2, 7, 29, 1000])
def test_the_first_blocks_are_backed_in_all_planes_until_cool(shape, can_alias, warm):
    region = make(shape, can_alias=can_alias)
    region.warm(warm)
    assert all(is_mapped(region, block) for block in range(min(warm, shape[2])))
    region.backend.check()
    region.cool()
    region.cool()
    assert region.backend.resident_bytes() == 0
    with pytest.raises(InvalidInput, match="is not mapped"):
        is_mapped(region, 0)
    region.close()


def test_few_pages_stand_behind_many_where_a_handle_may_appear_often():
    region = make((64, 3, 1000))
    region.warm(1000)
    assert region.backend.resident_bytes() == 32 * PAGE  # 8,000 pages a plane: no remainder
    region.close()
    alone = make((64, 3, 50), can_alias=False)
    alone.warm(50)
    assert alone.backend.resident_bytes() == 3 * 50 * 64
    alone.close()


@pytest.mark.parametrize("can_alias", [True, False])
@pytest.mark.parametrize("call", ["create", "map"])
def test_a_warm_up_that_fails_at_any_call_leaves_nothing_mapped(call, can_alias):
    shape = (20, 2, 60)
    region = make(shape, wrap=CountingBackend, can_alias=can_alias)
    region.warm(60)
    calls = region.backend.calls[call]
    region.close()
    assert calls > 1
    for at in range(1, calls + 1):
        failing = make(shape, wrap=lambda i, at=at: FailingBackend(i, fail_at=at, only={call}),
                       can_alias=can_alias)  # fmt: skip
        with pytest.raises((OutOfPages, DriverError)):
            failing.warm(60)
        assert failing.backend.resident_bytes() == 0
        failing.backend.check()
        failing.warm(60)  # it can be tried again
        assert is_mapped(failing, 59)
        failing.close()


@pytest.mark.parametrize("call", ["unmap", "release"])
def test_what_cannot_be_given_back_can_be_tried_again(call):
    shape = (20, 2, 60)
    region = make(shape, wrap=CountingBackend)
    region.warm(60)
    region.cool()
    calls = region.backend.calls[call]
    region.close()
    for at in range(1, calls + 1):
        failing = make(shape, wrap=lambda i, at=at: FailingBackend(i, fail_at=at, only={call}))
        failing.warm(60)
        with pytest.raises(DriverError):
            failing.cool()
        failing.cool()
        assert failing.backend.resident_bytes() == 0
        failing.close()


def test_a_warm_up_that_can_neither_be_done_nor_undone_says_what_came_first():
    region = make((20, 2, 60), wrap=lambda inner: FailingBackend(
        inner, fail_at=6, sticky=True, only={"map", "unmap"}))  # fmt: skip
    with pytest.raises(OutOfPages, match="map failed"):
        region.warm(60)
    region.backend.sticky = False
    region.cool()  # what is left is known
    assert region.backend.resident_bytes() == 0
    region.close()


def test_a_range_that_cannot_be_closed_stays_until_it_can():
    region = make(wrap=lambda inner: FailingBackend(inner, fail_at=1, only={"close"}))
    region.warm(3)
    with pytest.raises(DriverError):
        region.close()
    region.close()


# --- the scheduler takes over -----------------------------------------------------------------


def pool_over(backend, region, limit=1 << 30):
    g = region.geometry
    return BlockPool(PagePool(backend, g, LocalBudget(limit), 4, 0))


@pytest.mark.parametrize("shape", SHAPES)
def test_in_the_same_process_the_pool_gets_the_range_empty(shape):
    region = make(shape)
    region.warm(5)
    pool = pool_over(region.take_over(), region)
    assert pool.pages.address_of(0, 0) == region.reservation.address
    assert region.backend.resident_bytes() == pool.pages.backed_bytes
    ids = pool.alloc(6)
    assert all(is_mapped(region, block) for block in ids.tolist())
    with pytest.raises(KvcachedError):  # the pool's mappings are in it
        region.close()
    pool.close()
    assert region.backend.resident_bytes() == 0
    again = pool_over(region.take_over(), region)  # the range is still reserved
    again.close()
    region.close()


def test_a_pool_that_cannot_be_made_leaves_the_range_for_the_next():
    region = make(wrap=lambda inner: FailingBackend(inner, fail_at=2, only={"unmap"}))
    region.warm(200)
    with pytest.raises(DriverError):
        pool_over(region.take_over(), region)
    pool_over(region.take_over(), region).close()
    region.close()


@pytest.fixture
def served(monkeypatch):
    """A region that is served to "its parent": this process."""
    monkeypatch.setattr(os, "getppid", os.getpid)
    region = make((20, 3, 60))
    region.warm(9)
    region.serve()
    yield region
    region.close()


def test_from_another_process_all_goes_through_the_server(served):
    worker = Worker(os.getpid(), 0)
    said = worker.hello()
    g = served.geometry
    assert (said["block_bytes"], said["num_planes"], said["num_blocks"], said["page_bytes"]) == (
        g.block_bytes, g.num_planes, g.num_blocks, g.page_bytes)  # fmt: skip
    assert regions.facts_in(said) == served.facts
    remote = RemoteBackend([worker])
    pool = pool_over(remote, served)
    assert pool.pages.address_of(0, 0) == served.reservation.address
    ids = pool.alloc(20)
    assert all(is_mapped(served, block) for block in ids.tolist())
    start = served.reservation.address
    served.backend.write(start + int(ids[3]) * g.block_bytes, b"k" * g.block_bytes)
    pool.copy(int(ids[3]), int(ids[7]))
    copied = start + int(ids[7]) * g.block_bytes
    assert served.backend.read(copied, g.block_bytes) == b"k" * g.block_bytes
    pool.free(ids)
    pool.trim()
    assert served.backend.resident_bytes() == pool.pages.backed_bytes
    remote.settle()
    pool.close()
    assert served.backend.resident_bytes() == 0
    remote.check()
    remote.shutdown()


def test_who_takes_over_ends_the_server(served):
    pool = pool_over(served.take_over(), served)
    with pytest.raises(KvcachedError, match="does not listen"):
        Worker(os.getpid(), 0, patience=0)
    pool.close()


def test_addresses_beyond_the_tensors_are_for_who_asks_for_some_of_them():
    region = make((24, 1, 60), more_pages=3)
    tensors, whole = region.geometry.reserved_bytes, region.reservation.nbytes
    assert whole == region.describe()["reserved_bytes"] == tensors + 3 * PAGE
    for nbytes in range(tensors, whole + 1, PAGE):
        backend = region.take_over()
        given = backend.reserve(nbytes)
        assert given == region.reservation
        other = backend.reserve(nbytes)  # a second one is nobody's
        assert other.address != given.address
        backend.close(other)
        backend.close(given)
    for nbytes in (tensors - PAGE, whole + PAGE):
        other = region.take_over().reserve(nbytes)
        assert other.address != region.reservation.address
        region.backend.close(other)
    region.close()


# --- the region of a process ------------------------------------------------------------------


@pytest.fixture
def alone(monkeypatch):
    monkeypatch.setattr(regions, "_current", None)


def test_the_last_region_is_the_one_of_the_process(alone):
    assert regions.current(60) is None
    old, new = make((20, 1, 60)), make((20, 1, 61))
    old.warm(3)
    regions.publish(old)
    assert regions.current(60) is old
    assert regions.current(61) is None
    regions.publish(new)
    assert regions.current(60) is None
    assert regions.current(61) is new
    assert old.backend.resident_bytes() == 0
    new.close()


def test_a_region_that_is_in_use_stays_when_the_next_one_comes(alone):
    old, new = make((20, 1, 60)), make((20, 1, 61))
    regions.publish(old)
    pool = pool_over(old.take_over(), old)
    regions.publish(new)
    assert is_mapped(old, 0)
    pool.close()
    old.close()
    new.close()


# --- from the scheduler ------------------------------------------------------------------------


def test_a_worker_is_asked_once_what_it_is(served, monkeypatch):
    asked = []
    call = Worker.call
    monkeypatch.setattr(Worker, "call", lambda self, op, values=(): (
        asked.append(op), call(self, op, values))[1])  # fmt: skip
    (worker,) = attach._workers()
    remote = RemoteBackend([worker])
    assert asked == [Op.HELLO]
    assert regions.facts_in(remote.descriptions[0]) == served.facts
    remote.shutdown()


def test_who_else_listens_there_is_no_worker_of_ours(served, monkeypatch):
    def refuse(sock):
        raise NotAllowed("another user's")

    monkeypatch.setattr("kvcached.memory.remote.check_peer", refuse)
    assert attach._workers() is None


@pytest.fixture
def stages(monkeypatch, alone):
    """Workers of an engine with a stage of three layers and one of two, of two workers each."""
    monkeypatch.setattr(os, "getppid", os.getpid)
    monkeypatch.setattr(attach, "_attached", False)
    monkeypatch.setattr(attach, "engine_config", lambda: FOREVER)
    shapes = [(30, 1, 60, 3), (30, 1, 60, 3), (20, 1, 60, 2), (20, 1, 60, 2)]
    made = [
        make(shape[:3], more_pages=shape[3], rank=rank, world_size=4,
             limit_bytes=(6000, 6000, 900, 800)[rank], request_bytes=10 * shape[0])
        for rank, shape in enumerate(shapes)
    ]  # fmt: skip
    for region in made:
        region.warm(9)
        region.serve()
    yield made
    for region in made:
        region.close()


def test_the_scheduler_counts_what_each_stage_holds(stages, caplog, monkeypatch):
    caplog.set_level("INFO")
    monkeypatch.setenv("KVCACHED_GPU_UTILIZATION", "1.0")
    engine = attach.attach(60)
    stop_caretaker(engine)
    budget = engine._budget
    # All are on one device here, so its limit is all of theirs, in terms of a worker of three.
    assert budget.limit_bytes == 13_700 * 3 // (3 + 3 + 2 + 2)
    assert "(137 blocks of 100 B), " in caplog.text
    assert "KVCACHED_GPU_UTILIZATION is read as KVCACHED_LIMIT" in caplog.text
    assert engine.turns.part_extents == 8
    assert engine.secure(20)
    ids = engine.take(20)
    for region in stages:
        assert all(is_mapped(region, block) for block in ids.tolist())
    held = [region.backend.resident_bytes() for region in stages]
    assert held == [engine._blocks.pages.backed_bytes * layers // 3 for layers in (3, 3, 2, 2)]
    assert attach.attach(60) is None  # they serve one page pool
    engine.close()
    engine.backend.shutdown()
    assert not any(region.backend.resident_bytes() for region in stages)


def test_another_number_of_blocks_is_an_error_and_leaves_nobody_connected(stages):
    with pytest.raises(
        EngineUnsupported, match="the scheduler has 61 KV blocks and its workers 60"
    ):
        attach.attach(61)
    attach._attached = False
    engine = attach.attach(60)
    engine.close()
    engine.backend.shutdown()


@pytest.mark.parametrize(
    ("given", "replica", "name"),
    [
        ("chat", 0, "chat"),
        ("chat", 2, "chat-dp2"),
        ("c" * 64, 3, "c" * 56 + "-dp3"),
        ("", 1, ""),
    ],
)
def test_replicas_of_one_model_are_tenants_of_their_own(monkeypatch, alone, given, replica, name):
    region = make((30, 1, 60), replica=replica)
    regions.publish(region)
    config = replace(FOREVER, name=given)
    monkeypatch.setattr(attach, "engine_config", lambda: config)
    with attach.attach(60) as engine:
        assert engine.name == (name or f"m-{os.getpid()}")
        check_name(engine.name)
    region.close()
