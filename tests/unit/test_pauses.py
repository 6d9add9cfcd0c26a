"""Pauses: who may split when, and who waits for the engine's next step."""

import threading
import time

from cache_rig import FOREVER, tiny_cache, tiny_spec

from kvcached.memory.fences import PassedFence
from kvcached.pauses import Pauses
from kvcached.testing import ManualFence


def test_a_pause_holds_until_its_end_and_is_expected_for_a_while_after():
    pauses = Pauses(threading.RLock())
    assert not pauses.now()
    assert not pauses.expected()
    outer = pauses.enter(PassedFence())
    inner = pauses.enter(PassedFence())
    pauses.leave(inner)
    assert pauses.now(), "the outer pause goes on"
    pauses.leave(outer)
    assert not pauses.now()
    assert pauses.expected()


def test_a_pause_begins_when_its_fence_has_passed():
    pauses, fence = Pauses(threading.RLock()), ManualFence()
    pauses.enter(fence)
    assert not pauses.now()
    fence.done = True
    assert pauses.now()


def test_nobody_waits_for_an_engine_that_never_pauses():
    lock = threading.RLock()
    pauses = Pauses(lock)
    with lock:
        start = time.monotonic()
        assert not pauses.wait()
        assert time.monotonic() - start < 0.2


def half_used(cache):
    """One extent of eight blocks of which one is in use."""
    gone, kept = cache.new_sequence(), cache.new_sequence()
    cache.extend(gone, 8 * cache.spec.block_size)
    cache.free(gone)
    cache.extend(kept, 1)
    return kept


def test_a_reclaim_is_met_at_the_engines_next_pause():
    with tiny_cache(page_bytes=32, spec=tiny_spec(), config=FOREVER) as cache:
        half_used(cache)
        assert cache.reclaim(7 * 32) == 0, "kernels may be running"
        with cache.idle():
            pass
        report = cache.report()
        assert (report.idle, report.pauses) == (False, True)
        freed = []
        peer = threading.Thread(target=lambda: freed.append(cache.reclaim(7 * 32, patient=True)))
        peer.start()
        time.sleep(0.02)
        with cache.idle():
            peer.join(2)
        assert freed == [7 * 32]
        assert cache.stats().counters.split == 1
        cache.check()


def test_whoever_is_not_patient_gets_what_there_is_at_once():
    with tiny_cache(page_bytes=32, config=FOREVER) as cache:
        half_used(cache)
        with cache.idle():
            assert cache.report().idle
        start = time.monotonic()
        assert cache.reclaim(7 * 32) == 0
        assert time.monotonic() - start < 0.2


def test_the_engines_own_thread_does_not_wait_for_itself():
    with tiny_cache(page_bytes=32, config=FOREVER) as cache:
        half_used(cache)
        with cache.idle():
            pass
        start = time.monotonic()
        cache.set_limit(32)  # reclaims on this thread
        assert time.monotonic() - start < 0.2
        assert cache.stats().counters.split == 0
