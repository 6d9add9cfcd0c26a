"""The caretaker's thread, on its own: no test here calls ``tend``."""

import time

from cache_rig import tiny_cache

from kvcached import Config


def test_growth_ahead_goes_on_though_no_step_asks_for_it():
    config = Config(broker=False, spare_seconds=100.0)
    with tiny_cache(config=config, caretaker=True, max_tokens=1 << 16) as cache:
        blocks = cache._blocks

        def await_growth_ahead(beyond):
            deadline = time.monotonic() + 10
            while cache.stats().counters.ahead <= beyond and time.monotonic() < deadline:
                time.sleep(0.002)
            assert cache.stats().counters.ahead > beyond

        with cache._lock:
            blocks.alloc(512)  # growth on demand wakes the caretaker
        await_growth_ahead(0)
        blocks.on_low = None  # nobody calls it from here on
        for _ in range(3):
            with cache._lock:
                seen = blocks.grower.ahead.count
                blocks.alloc(blocks.num_free)
            await_growth_ahead(seen)
