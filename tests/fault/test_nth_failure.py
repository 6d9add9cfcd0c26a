"""The N-th backend call fails, for every N, in every operation: nothing changes, nothing leaks.

``stats()`` is compared whole, but for the counters and times (they count attempts too) and for
operations of several steps (``trim``, ``evict_prefixes``), which keep the steps that are done.
"""

from dataclasses import dataclass, field
from functools import partial

import pytest
from cache_rig import FOREVER, stop_caretaker, tiny_spec, without_counters

from kvcached.broker.budget import LocalBudget
from kvcached.cache import KVCache
from kvcached.errors import ClosedError, KvcachedError, PoolBroken
from kvcached.testing import FailingBackend, FakeBackend

PAGE = 16
STEPWISE = {"trim", "evict", "reclaim"}
SILENT = {"set_limit"}  # what reclaim meets on the way is logged, and the limit record tells
SPECS = {
    "cross-layer": tiny_spec(),
    "per-layer": tiny_spec(layout="per_layer", head_dim=4),
    "odd": tiny_spec(head_dim=3, block_size=3),
}


@dataclass
class Stage:
    """A cache with a little of everything: shared and cached blocks, spares, a partial extent."""

    spec: object
    inner: FakeBackend = field(default_factory=lambda: FakeBackend(PAGE))
    budget: LocalBudget = field(default_factory=lambda: LocalBudget(1 << 20))

    def __post_init__(self):
        self.backend = FailingBackend(self.inner)

    def build(self):
        self.cache = KVCache(self.spec, name="stage", max_tokens=200, budget=self.budget,
                             backend=self.backend, config=FOREVER)  # fmt: skip
        stop_caretaker(self.cache)
        self.cache._blocks.clock = lambda: 0.0

    def furnish(self):
        cache, size = self.cache, self.spec.block_size
        self.kept = cache.new_sequence()
        self.gone = cache.new_sequence()
        for _ in range(4):  # blocks of the two alternate
            cache.extend(self.kept, size)
            cache.extend(self.gone, list(range(size)))
        self.big = cache.new_sequence()
        cache.extend(self.big, 6 * size)  # one extent
        self.rest = cache.new_sequence()
        cache.extend(self.rest, 1)
        cache.free(self.big)
        cache.free(self.gone)  # cached
        cache.extend(self.kept, size // 2 + 1)
        self.twin = cache.fork(self.kept)
        idle = cache.new_sequence()
        cache.extend(idle, 10 * size)  # the rest of that extent, and one more
        cache.free(idle)
        assert cache.stats().spare_bytes > 0, "nothing to shrink"
        self.mark()

    def places(self):
        g = self.cache.geometry
        base = self.cache._blocks.pages.address_of(0)
        for block in self.kept.block_ids:
            for plane in range(g.num_planes):
                yield base + plane * g.plane_bytes + block * g.block_bytes, g.block_bytes

    def mark(self):
        for i, (address, nbytes) in enumerate(self.places()):
            self.inner.write(address, bytes([i + 1]) * nbytes)

    def contents(self):
        return [self.inner.read(*place) for place in self.places()]

    def state(self):
        cache = self.cache
        sequences = [(s.num_tokens, s.block_ids) for s in (self.kept, self.twin, self.rest)]
        return without_counters(cache.stats()), sequences, self.contents()

    def finish(self):
        """The backend works again: everything goes back."""
        self.backend.fail_at = None
        self.cache.close()
        self.empty()

    def empty(self):
        assert self.budget.claimed_bytes == 0, "I8: claims left"
        assert self.inner.resident_bytes() == 0, "I4: handles left"
        self.inner.check()
        self.inner.shutdown()  # raises if handles or reservations are left


def _grow(s):
    s.cache.extend(s.rest, 30 * s.spec.block_size)


def _shrink(s):
    s.cache._blocks.drop_spares()


OPERATIONS = {
    "grow": _grow,
    "shrink": _shrink,
    "copy on write": lambda s: s.cache.extend(s.twin, 1),
    "copy on write and grow": lambda s: s.cache.extend(s.twin, 25 * s.spec.block_size),
    "fork": lambda s: s.cache.fork(s.kept),
    "new": lambda s: s.cache.new_sequence(list(range(s.spec.block_size)) * 2),
    "free": lambda s: s.cache.free(s.rest),
    "set_limit": lambda s: s.cache.set_limit(0),
    "evict": lambda s: s.cache.evict_prefixes(1 << 20),
    "trim": lambda s: s.cache.trim(),
    "reclaim": lambda s: s.cache._blocks.reclaim(1 << 20, may_split=True),
}
CALLS = {"grow": 2, "shrink": 2, "copy on write": 1, "copy on write and grow": 3, "set_limit": 2,
         "evict": 2, "trim": 12, "reclaim": 12}  # fmt: skip
"""The fewest backend calls of an operation; those that are left out need none."""


def error_of(call, *args):
    try:
        call(*args)
    except KvcachedError as error:
        return error
    return None


def sweep(spec, operation, *, sticky):
    """Run it with the first call failing, then the second, ... until none fails; how many did."""
    for fail_at in range(1, 500):
        stage = Stage(spec)
        stage.build()
        stage.furnish()
        before = stage.state()
        stage.backend.seen, stage.backend.fail_at, stage.backend.sticky = 0, fail_at, sticky
        yield stage, before, partial(error_of, OPERATIONS[operation], stage)
        failed = stage.backend.raised
        stage.finish()
        if not failed:
            least = CALLS.get(operation, 0)
            assert fail_at > least, f"{operation} makes {fail_at - 1} calls, not {least}: no sweep"
            return
    raise AssertionError("the sweep has no end")


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_one_failure_leaves_the_cache_as_it_was(spec, operation):
    errors = 0
    for stage, before, run in sweep(spec, operation, sticky=False):
        error = run()
        errors += error is not None
        assert not isinstance(error, PoolBroken)
        if error is not None:
            assert "injected" in str(error)
            if operation not in STEPWISE:
                assert stage.state() == before, f"I6: call {stage.backend.fail_at} changed it"
        stage.backend.fail_at = None
        stage.cache.check()
        assert stage.contents() == before[2]
        run_after = stage.cache.new_sequence()
        stage.cache.extend(run_after, 5)  # it goes on working
        stage.cache.check()
    forgiven = {"grow", *SILENT}  # it tries once more after a reclaim
    assert bool(errors) == (operation in CALLS and operation not in forgiven)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_backend_that_stays_broken_costs_no_memory_in_the_end(spec, operation):
    errors = 0
    for stage, before, run in sweep(spec, operation, sticky=True):
        error = run()
        errors += error is not None
        if isinstance(error, PoolBroken):
            assert error.hint
            with pytest.raises(PoolBroken):
                stage.cache.extend(stage.rest, 1)
            stage.cache._blocks.pages.check()
            continue
        if error is not None:
            assert "injected" in str(error)
            if operation == "copy on write and grow":  # what was backed stays, as a spare
                assert stage.state()[1:] == before[1:]
            elif operation not in STEPWISE:
                assert stage.state() == before
        stage.cache.check()
    assert bool(errors) == (operation in CALLS and operation not in SILENT)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("sticky", [False, True], ids=["once", "sticky"])
def test_close_can_be_called_again_until_all_is_back(spec, sticky):
    failed = True
    fail_at = 0
    while failed:
        fail_at += 1
        stage = Stage(spec)
        stage.build()
        stage.furnish()
        stage.backend.seen, stage.backend.fail_at, stage.backend.sticky = 0, fail_at, sticky
        failed = False
        try:
            stage.cache.close()
        except KvcachedError:
            failed = True
            with pytest.raises(ClosedError):
                stage.cache.stats()
        stage.finish()
    assert fail_at > 10


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_cache_that_cannot_be_made_leaves_nothing(spec):
    for fail_at in range(1, 50):
        stage = Stage(spec)
        stage.backend.fail_at = fail_at
        error = error_of(stage.build)
        if error is not None:
            assert "injected" in str(error)
            stage.empty()
            continue
        stage.finish()
        assert fail_at > 2
        return
