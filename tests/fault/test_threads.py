"""Threads that hammer one cache: the invariants hold, nothing is lost or shared wrongly."""

import random
import sys
import threading

import pytest
from cache_rig import FOREVER, block_pool, tiny_spec
from fault.broker_rig import until

from kvcached.broker.budget import LocalBudget
from kvcached.cache import KVCache
from kvcached.errors import BudgetExceeded, ClosedError, OutOfPages, OwnershipError
from kvcached.memory.cuda import CudaBackend
from kvcached.testing import FakeBackend, FakeCudaDriver

THREADS, OPERATIONS = 6, 400


class SlowBudget(LocalBudget):
    """Lets others in at every claim, as the broker's client does while it waits."""

    lock = None

    def attach(self, tenant, lock):
        super().attach(tenant, lock)
        self.lock = lock

    def claim(self, nbytes, *, transient=False, seconds=None):
        if self.lock is not None:
            self.between(nbytes, transient)
        super().claim(nbytes, transient=transient)

    def between(self, nbytes, transient):
        """With the owner's lock released: once is enough, the callers never nest it."""
        condition = threading.Condition(self.lock)
        condition.wait(0.0002)


@pytest.fixture
def eager_switches():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def run_threads(work):
    failures = []

    def guarded(number):
        try:
            work(number)
        except BaseException as error:  # noqa: BLE001 - raised again in the test's thread
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(n,)) for n in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "a deadlock"
    if failures:
        raise failures[0]


def hammer(cache, backend, number, operations):
    """Each thread has sequences of its own and writes its number into their slots."""
    rng, mine, size = random.Random(number), [], cache.spec.block_size
    width = cache.spec.token_bytes // (2 * cache.spec.num_layers)
    base = cache._blocks.pages.address_of(0)

    def address(slot):
        return base + slot // size * cache.spec.block_bytes + slot % size * width

    def take():
        mine.append((cache.new_sequence(), [], b""))
        slots = cache.extend(mine[-1][0], rng.randint(1, 3 * size)).tolist()
        mark = bytes([number + 1, rng.randrange(256)])
        for slot in slots:
            backend.write(address(slot), mark)
        mine[-1] = (mine[-1][0], slots, mark)

    def give():
        if mine:
            sequence, slots, mark = mine.pop(rng.randrange(len(mine)))
            assert all(backend.read(address(slot), 2) == mark for slot in slots), "other bytes"
            cache.free(sequence)

    calls = [
        take, give, lambda: cache.evict_prefixes(rng.randrange(200)),
        lambda: cache.set_limit(rng.randrange(40, 200) * 32), cache.check,
    ]  # fmt: skip
    for call in rng.choices(calls, [10, 7, 1, 1, 1], k=operations):
        try:
            call()
        except (BudgetExceeded, OutOfPages):  # limits go up to what there are addresses for
            give()
    while mine:
        give()


class LockedDriver(FakeCudaDriver):
    """What tests read and write holds the cache's lock, so that no split takes the memory away."""

    lock = None

    def read(self, address, nbytes):
        with self.lock:
            return super().read(address, nbytes)

    def write(self, address, data):
        with self.lock:
            super().write(address, data)


def cuda_backend(page_bytes):
    """Its growth is by the journal."""
    driver = LockedDriver(page_bytes)
    backend = CudaBackend(driver=driver, zero="never")
    backend.read, backend.write, backend.driver = driver.read, driver.write, driver
    return backend


@pytest.mark.slow
@pytest.mark.parametrize("make", [FakeBackend, cuda_backend])
@pytest.mark.parametrize("budget", [LocalBudget, SlowBudget])
def test_many_threads_on_one_cache(eager_switches, budget, make):
    backend, budget = make(32), budget(150 * 32)
    cache = KVCache(tiny_spec(), name="threads", max_tokens=800, budget=budget, backend=backend,
                    config=FOREVER)  # fmt: skip
    if make is cuda_backend:
        backend.driver.lock = cache._lock
        assert cache._blocks._grow.__name__ == "grow"
    run_threads(lambda number: hammer(cache, backend, number, OPERATIONS))
    cache.check()
    cache.trim()
    assert until(lambda: cache.stats().backed_bytes == 32)  # the null block, once the caretaker,
    stats = cache.stats()  # which may be giving back for a limit, is done
    assert (stats.blocks_in_use, stats.sequences) == (0, 0)
    cache.close()
    assert budget.claimed_bytes == 0
    backend.check()
    backend.shutdown()


@pytest.mark.parametrize("delay", [0.0, 0.01])
def test_close_waits_for_a_call_that_waits_for_the_budget(delay):
    backend = FakeBackend(32)
    entered, go_on = threading.Event(), threading.Event()

    class Waiting(SlowBudget):
        def between(self, nbytes, transient):
            entered.set()
            while not go_on.is_set():
                super().between(nbytes, transient)

    budget = Waiting(1 << 20)
    cache = KVCache(tiny_spec(), name="waits", budget=budget, backend=backend, config=FOREVER)
    got = []
    sequence = cache.new_sequence()
    worker = threading.Thread(target=lambda: got.append(cache.extend(sequence, 9)))
    worker.start()
    assert entered.wait(10)
    closer = threading.Thread(target=cache.close)
    closer.start()
    threading.Event().wait(delay)
    go_on.set()
    worker.join(10)
    closer.join(10)
    assert not worker.is_alive() and not closer.is_alive()
    assert len(got) == 1 and budget.claimed_bytes == 0
    with pytest.raises(ClosedError):
        cache.extend(sequence, 1)
    backend.shutdown()


def test_a_split_that_let_others_in_keeps_what_they_took():
    """The claim of a split releases the lock; blocks taken meanwhile must not lose their memory."""
    backend = FakeBackend(32)
    pool = block_pool(backend, block_bytes=32, num_blocks=20, longest=8)
    claim, taken = pool.pages.budget.claim, []

    def nosy(nbytes, *, transient=False):
        claim(nbytes, transient=transient)
        if transient and not taken:
            taken.extend(pool.alloc(3).tolist())
            for block in taken:
                backend.write(pool.pages.address_of(block), bytes([block]) * 32)

    ids = pool.alloc(8)
    pool.free(ids[2:])
    pool.pages.budget.claim = nosy
    pool.trim()
    pool.check()
    assert len(taken) == 3
    for block in taken:
        assert backend.read(pool.pages.address_of(block), 32) == bytes([block]) * 32
    pool.trim()
    assert pool.pages.backed_pages == 1 + 2 + 3
    pool.close()
    backend.shutdown()


def test_a_sequence_that_another_thread_ends_while_it_is_extended_takes_nothing_along():
    backend = FakeBackend(32)
    budget = LocalBudget(1 << 20)
    cache = KVCache(tiny_spec(), name="race", budget=budget, backend=backend, config=FOREVER)
    sequence, claim = cache.new_sequence(), budget.claim

    def slow(nbytes, *, transient=False, seconds=None):
        claim(nbytes, transient=transient)
        if sequence.alive:
            cache.free(sequence)

    budget.claim = slow
    with pytest.raises(OwnershipError, match="another thread"):
        cache.extend(sequence, 9)
    cache.check()
    assert cache.stats().blocks_in_use == 0
    cache.close()
    backend.shutdown()
