"""What the tests of the core share: caches over fakes, and backends that cost nothing."""

from contextlib import contextmanager

from kvcached.blocks import BlockPool
from kvcached.broker.budget import LocalBudget
from kvcached.cache import KVCache
from kvcached.config import Config
from kvcached.layout import CacheSpec, Geometry
from kvcached.pages import PagePool
from kvcached.spares import SparePolicy
from kvcached.testing import FakeBackend

NO_ENV = Config(broker=False)
FOREVER = Config(broker=False, spare_seconds=1e5, ahead="0")


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class HollowBackend(FakeBackend):
    """A fake whose memory holds nothing, so that gigabytes are free. ``copy`` does nothing."""

    def __init__(self, page_bytes):
        super().__init__(page_bytes)

    def create(self, num_pages):
        self._books.create_plan(num_pages)
        return self._books.add_handle(num_pages).handle

    def map(self, reservation, page_index, handle):
        rng, state = self._books.map_plan(reservation, page_index, handle)
        self._books.add_map(rng, page_index, state)

    def unmap(self, reservation, page_index, handle):
        rng, state = self._books.unmap_plan(reservation, page_index, handle)
        self._books.drop_map(rng, page_index, state)

    def release(self, handle):
        self._books.drop_handle(self._books.release_plan(handle))

    def copy(self, dst, src, nbytes):
        pass

    def copy_many(self, copies):
        pass

    def check(self):
        self._books.check()


class YieldingBudget(LocalBudget):
    """As a broker's: while it waits for an answer others get the lock, and do something."""

    meanwhile = None

    def claim(self, nbytes, *, transient=False, seconds=None):
        if self.meanwhile is not None:
            do, self.meanwhile = self.meanwhile, None
            do()
        super().claim(nbytes, transient=transient)


def page_pool(
    backend, *, block_bytes=64, planes=1, num_blocks=16, limit=1 << 40, longest=4, bounce=0
):
    geometry = Geometry(block_bytes, planes, num_blocks, backend.page_bytes)
    return PagePool(backend, geometry, YieldingBudget(limit), longest, bounce)


def block_pool(backend, *, clock=None, decay=1.0, ahead=0, **geometry):
    pages = page_pool(backend, **geometry)
    return BlockPool(pages, clock=clock or Clock(), spares=SparePolicy(decay), most_ahead=ahead)


def tiny_spec(**changes):
    """Two layers, one head of two bytes: 4 tokens are 32 bytes."""
    return CacheSpec(**({"num_layers": 2, "num_kv_heads": 1, "head_dim": 2, "dtype": "int8",
                         "block_size": 4} | changes))  # fmt: skip


def stop_caretaker(cache):
    """From now on only the test's own calls change what is backed."""
    cache._caretaker.end()


@contextmanager
def tiny_cache(
    *, page_bytes=32, capacity_pages=None, limit=1 << 30, backend=None, caretaker=False, **options
):
    """A cache over a fake backend; everything must be back at the end."""
    backend = backend or FakeBackend(page_bytes, capacity_pages=capacity_pages)
    budget = LocalBudget(limit)
    options = {"spec": tiny_spec(), "max_tokens": 64, "name": "tiny", "config": FOREVER} | options
    cache = KVCache(options.pop("spec"), backend=backend, budget=budget, **options)
    if not caretaker:
        stop_caretaker(cache)
    try:
        yield cache
    finally:
        cache.close()
    assert budget.claimed_bytes == 0
    assert backend.resident_bytes() == 0
    backend.check()
    backend.shutdown()


def without_counters(stats):
    """Stats as a dict, less what only ever counts up."""
    row = stats.to_dict()
    del row["counters"]
    return row


def machine_settings(examples, steps):
    """Settings of a state machine: these numbers in CI, more in the nightly profile."""
    from hypothesis import settings

    scale = max(1, settings.default.max_examples // 200)
    return settings(max_examples=examples * scale, stateful_step_count=steps)
