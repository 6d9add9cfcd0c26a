"""A device with less memory than the budget thinks: somebody outside took it."""

import itertools
import time

import pytest
from broker_tenant import MIB
from cache_rig import stop_caretaker, without_counters
from fault.broker_rig import until

from kvcached import CacheSpec, Config, KVCache
from kvcached.broker.admin import list_tenants
from kvcached.broker.budget import LocalBudget
from kvcached.broker.client import BrokerBudget
from kvcached.errors import KvcachedError, OutOfPages
from kvcached.memory.cuda import CudaBackend
from kvcached.testing import FakeCudaDriver

NOTHING = dict.fromkeys(FakeCudaDriver().open_resources(), 0)
SPEC = CacheSpec(num_layers=2, num_kv_heads=1, head_dim=2, dtype="int8", block_size=8)
PLANES = CacheSpec(num_layers=2, num_kv_heads=1, head_dim=8, dtype="int8", block_size=8,
                   layout="per_layer")  # fmt: skip
BLOCK = SPEC.block_bytes
CONFIG = Config(broker=False, ahead="0", spare_seconds=1e5)


@pytest.fixture
def driver():
    driver = FakeCudaDriver()
    yield driver
    assert driver.open_resources() == NOTHING


def make(driver, budget=None, spec=SPEC, name="mine"):
    backend = CudaBackend(driver=driver, zero="never")
    cache = KVCache(spec, backend=backend, budget=budget or LocalBudget(1 << 20), name=name,
                    max_tokens=2048, config=CONFIG)  # fmt: skip
    cache._blocks.clock = lambda: 0.0
    return cache


def end(*caches):
    for cache in caches:
        cache.check()
        cache.close()
        cache.backend.shutdown()


def leave_cached(cache, blocks, salt=0):
    """A prefix of so many blocks that nobody uses."""
    sequence = cache.new_sequence()
    cache.extend(sequence, list(range(salt, salt + blocks * cache.spec.block_size)))
    cache.free(sequence)
    assert cache.stats().blocks_cached >= blocks


def leave_free(driver, blocks):
    """Somebody outside takes all of the device but so many blocks."""
    driver.capacity = driver.used + blocks * BLOCK


def state(cache):
    """What a failed call leaves alone; the lease is the broker's to change."""
    return {key: value for key, value in without_counters(cache.stats()).items()
            if key != "lease_bytes"}  # fmt: skip


# --- alone on the device ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("room", "cached", "wanted"), [(0, 6, 1), (0, 6, 6), (0, 6, 4), (2, 6, 8), (3, 6, 7)]
)
def test_cached_prefixes_serve_what_the_device_cannot(driver, room, cached, wanted):
    cache = make(driver)
    stop_caretaker(cache)
    leave_cached(cache, cached)
    leave_free(driver, room)
    sequence = cache.new_sequence()
    cache.extend(sequence, wanted * SPEC.block_size)
    assert sequence.num_blocks == wanted
    assert cache.stats().blocks_in_use == wanted
    end(cache)


def test_the_oldest_prefixes_go_and_no_more_than_is_needed(driver):
    cache = make(driver)
    stop_caretaker(cache)
    for salt in (0, 1000, 2000):
        leave_cached(cache, 2, salt)
    leave_free(driver, 0)
    cache.extend(cache.new_sequence(), 3 * SPEC.block_size)
    assert cache.stats().blocks_cached == 3
    old, new = (cache.new_sequence(list(range(salt, salt + 17))) for salt in (0, 2000))
    assert (old.num_cached_tokens, new.num_cached_tokens) == (0, 16)
    end(cache)


@pytest.mark.parametrize(("room", "cached"), [(0, 0), (3, 0), (0, 6), (2, 6)])
def test_nothing_is_evicted_unless_that_is_enough(driver, room, cached):
    cache = make(driver)
    stop_caretaker(cache)
    leave_cached(cache, cached)
    leave_free(driver, room)
    sequence, before = cache.new_sequence(), state(cache)
    with pytest.raises(OutOfPages, match="cuMemCreate says CUDA_ERROR_OUT_OF_MEMORY"):
        cache.extend(sequence, (room + cached + 1) * SPEC.block_size)
    assert state(cache) == before, "I6"
    assert cache.stats().counters.evicted_blocks == 0
    assert cache._budget.claimed_bytes == cache.stats().backed_bytes
    cache.extend(sequence, (room + cached) * SPEC.block_size)
    end(cache)


def test_what_could_not_be_released_before_is_tried_again(driver):
    cache = make(driver, spec=PLANES)
    stop_caretaker(cache)
    idle = cache.new_sequence()
    cache.extend(idle, 4 * PLANES.block_size)
    cache.free(idle)
    driver.fail("cuMemRelease", 2, sticky=True)  # the first of four is still undone if it fails
    cache._blocks.drop_spares()
    driver.heal()
    held = cache.stats().backed_bytes
    assert held > cache.stats().in_use_bytes + PLANES.block_bytes, "three handles are in limbo"
    driver.capacity = driver.used
    cache.extend(cache.new_sequence(), 3 * PLANES.block_size)
    assert cache.stats().blocks_in_use == 3
    end(cache)


@pytest.mark.parametrize("sticky", [False, True])
def test_the_nth_call_fails_while_the_device_is_full(sticky):
    """With a refusal on top, of any call, once and for good: served, or nothing has changed."""
    for fail_at in itertools.count(1):
        driver = FakeCudaDriver()
        cache = make(driver)
        stop_caretaker(cache)
        leave_cached(cache, 6)
        leave_free(driver, 2)
        sequence, before = cache.new_sequence(), state(cache)
        driver.fail("*", fail_at, sticky=sticky)
        driver.last_failed = ""
        try:
            cache.extend(sequence, 8 * SPEC.block_size)
        except KvcachedError:
            broken = not cache._blocks.pages.usable
            assert broken or state(cache) == before, f"I6: call {fail_at}"
            driver.heal()
            if not broken:
                cache.extend(sequence, 8 * SPEC.block_size)
        failed, _ = driver.last_failed, driver.heal()
        cache.close()
        cache.backend.shutdown()
        assert driver.open_resources() == NOTHING
        if not failed:
            assert fail_at > 3
            return


# --- with a broker ------------------------------------------------------------------------------


def shared(driver, name):
    budget = BrokerBudget(name, device="cpu", limit_bytes=None, capacity_bytes=MIB)
    return make(driver, budget, name=name)


def reported(name, **figures):
    """Wait until the broker knows so much of what a tenant holds."""

    def known():
        (device,) = list_tenants("cpu")
        report = next(tenant.report for tenant in device.tenants if tenant.name == name)
        return all(getattr(report, key) == value for key, value in figures.items())

    assert until(known)


@pytest.mark.usefixtures("runtime_dir")
def test_a_peers_prefixes_serve_what_the_device_cannot(driver):
    mine, peer = shared(driver, "mine"), shared(driver, "peer")
    leave_cached(peer, 40)
    reported("peer", cached_bytes=40 * BLOCK)
    leave_free(driver, 4)
    sequence = mine.new_sequence()
    mine.extend(sequence, 20 * SPEC.block_size)  # far below the capacity that the broker counts
    assert sequence.num_blocks == 20
    given = 40 - peer.stats().blocks_cached
    assert given >= 16
    assert driver.used <= driver.capacity
    end(mine, peer)


@pytest.mark.usefixtures("runtime_dir")
def test_when_no_peer_can_give_the_device_is_what_is_named_and_nothing_changes(driver):
    mine, peer = shared(driver, "mine"), shared(driver, "peer")
    stop_caretaker(mine)
    peer.extend(peer.new_sequence(), 40 * SPEC.block_size)
    reported("peer", in_use_bytes=41 * BLOCK)
    leave_cached(mine, 3)
    leave_free(driver, 4)
    sequence, before, started = mine.new_sequence(), state(mine), time.monotonic()
    with pytest.raises(OutOfPages, match="cuMemCreate"):
        mine.extend(sequence, 20 * SPEC.block_size)
    assert time.monotonic() - started < 10
    assert state(mine) == before, "I6"
    assert peer.stats().blocks_in_use == 40
    mine.extend(sequence, 3 * SPEC.block_size)  # what is cached can be had
    end(mine, peer)


@pytest.mark.usefixtures("runtime_dir")
def test_own_prefixes_serve_if_the_peer_has_nothing(driver):
    mine, peer = shared(driver, "mine"), shared(driver, "peer")
    stop_caretaker(mine)
    peer.extend(peer.new_sequence(), 10 * SPEC.block_size)
    reported("peer", in_use_bytes=11 * BLOCK)
    leave_cached(mine, 8)
    leave_free(driver, 0)
    sequence = mine.new_sequence()
    mine.extend(sequence, 8 * SPEC.block_size)
    assert mine.stats().blocks_in_use == 8
    end(mine, peer)
