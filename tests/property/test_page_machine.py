"""``PagePool`` against a plain model: which pages are backed, and every byte on them."""

import os

import pytest
from cache_rig import machine_settings, page_pool
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from kvcached.errors import BudgetExceeded, DriverError, OutOfPages
from kvcached.testing import FailingBackend, FakeBackend

PAGE = 8
STEPS = {"run": 0}


class PageMachine(RuleBasedStateMachine):
    """The model: the bytes of each backed page in each plane, and which pages share an extent."""

    @initialize(
        pages=st.integers(1, 24), planes=st.integers(1, 3), longest=st.integers(1, 8),
        block=st.integers(1, 30), capacity=st.integers(8, 80), limit=st.integers(4, 80),
        bounce=st.integers(0, 12),
    )  # fmt: skip
    def start(self, pages, planes, longest, block, capacity, limit, bounce):
        self.inner = FakeBackend(PAGE, capacity_pages=capacity)
        self.backend = FailingBackend(self.inner)
        self.capacity, self.planes = capacity, planes
        self.pool = page_pool(
            self.backend, block_bytes=block, planes=planes, longest=longest,
            num_blocks=max(1, pages * PAGE // block), limit=limit * PAGE, bounce=bounce,
        )  # fmt: skip
        self.total = self.pool.geometry.num_pages
        self.bytes = {}  # (plane, page) -> contents

    def free_runs(self):
        runs = []
        for page in range(self.total):
            if (0, page) in self.bytes:
                continue
            if runs and sum(runs[-1]) == page:
                runs[-1] = (runs[-1][0], runs[-1][1] + 1)
            else:
                runs.append((page, 1))
        return runs

    def address(self, plane, page):
        return self.pool.address_of(page, plane)

    def fill(self, page):
        for plane in range(self.planes):
            assert self.inner.read(self.address(plane, page), PAGE) == bytes(PAGE), "not fresh"
            self.bytes[plane, page] = os.urandom(PAGE)
            self.inner.write(self.address(plane, page), self.bytes[plane, page])

    @rule(data=st.data())
    def grow(self, data):
        if not self.free_runs():
            return
        runs = []
        chosen = data.draw(st.lists(st.sampled_from(self.free_runs()), min_size=1, max_size=3,
                                    unique=True))  # fmt: skip
        for first, count in chosen:
            start = data.draw(st.integers(first, first + count - 1))
            runs.append((start, data.draw(st.integers(1, first + count - start))))
        nbytes = self.pool.bytes_of(runs)
        pages = sum(count for _, count in runs)
        try:
            self.pool.budget.claim(nbytes)
        except BudgetExceeded:
            assert self.pool.backed_bytes + nbytes > self.pool.budget.limit_bytes
            return
        try:
            extents = self.pool.grow(runs)
        except OutOfPages:
            assert len(self.bytes) + pages * self.planes > self.capacity
            self.pool.refund(nbytes)
            return
        got = sorted(p for e in extents for p in range(e.first, e.first + e.pages))
        assert got == sorted(p for first, count in runs for p in range(first, first + count))
        assert all(e.pages <= self.pool.max_extent_pages for e in extents)
        for page in got:
            self.fill(page)

    def drop(self, extent):
        for page in range(extent.first, extent.first + extent.pages):
            for plane in range(self.planes):
                del self.bytes[plane, page]

    def draw_extents(self, data, most):
        extents = sorted(self.pool.extents.values(), key=lambda e: e.first)
        places = data.draw(st.sets(st.integers(0, len(extents) - 1), min_size=1, max_size=most))
        return [extents[i] for i in sorted(places)]

    @rule(data=st.data())
    def shrink(self, data):
        if self.pool.extents:
            extents = self.draw_extents(data, 3)
            size = sum(e.pages for e in extents) * self.planes * PAGE
            assert self.pool.shrink(extents) == size
            for extent in extents:
                self.drop(extent)

    @rule(data=st.data())
    def split(self, data):
        if not self.pool.extents:
            return
        extents = self.draw_extents(data, 3)
        kept = [data.draw(st.sets(st.integers(e.first, e.first + e.pages - 1))) for e in extents]
        jobs = [(e, [(page, 1) for page in sorted(k)]) for e, k in zip(extents, kept, strict=True)]
        keep = sorted(run for _, runs in jobs for run in runs)
        copied = len(keep) * self.planes
        bounce = 0 < copied <= self.pool.bounce_pages and data.draw(st.booleans())
        claim = self.pool.bytes_of(keep) * (1 + bounce)
        self.pool.budget.claim(claim, transient=True)
        try:
            pieces = self.pool.split(jobs, bounce=bounce)
        except OutOfPages:
            assert len(self.bytes) + copied * (1 + bounce) > self.capacity
            self.pool.refund(claim)
            return
        assert [(e.first, e.pages) for e in sorted(pieces, key=lambda e: e.first)] == keep
        for extent, stays in zip(extents, kept, strict=True):
            for page in set(range(extent.first, extent.first + extent.pages)) - stays:
                for plane in range(self.planes):
                    del self.bytes[plane, page]

    @rule(data=st.data(), at=st.integers(1, 12), what=st.sampled_from(["grow", "shrink", "split"]))
    def a_failure_changes_nothing(self, data, at, what):
        """Contents and pages stay; only an ``unmap`` may already have been followed by a step."""
        if self.inner.available() < self.total * self.planes * PAGE:
            return  # a second failure, while the first is undone, would break the pool
        before = self.shape()
        self.backend.seen, self.backend.fail_at = 0, at
        self.backend.only = frozenset({"create", "map", "unmap", "copy", "copy_many", "reserve"})
        try:
            done = self.attempt(data, what)
        finally:
            self.backend.fail_at = None
        if not done:
            assert self.shape() == before

    def attempt(self, data, what):
        runs, extents = self.free_runs(), list(self.pool.extents.values())
        raised = self.backend.raised
        try:
            if what == "grow" and runs:
                self.pool.budget.claim(self.pool.bytes_of(runs), transient=True)
                try:
                    extents = self.pool.grow(runs)
                except BaseException:
                    self.pool.refund(self.pool.bytes_of(runs))
                    raise
                for page in (p for first, count in runs for p in range(first, first + count)):
                    self.fill(page)
            elif what == "shrink" and extents:
                self.pool.shrink(extents[:1])
                self.drop(extents[0])
            elif what == "split" and extents:
                keep = [(extents[0].first, 1)]
                bounce = self.planes <= self.pool.bounce_pages and data.draw(st.booleans())
                claim = self.pool.bytes_of(keep) * (1 + bounce)
                self.pool.budget.claim(claim, transient=True)
                try:
                    self.pool.split([(extents[0], keep)], bounce=bounce)
                except BaseException:
                    self.pool.refund(claim)
                    raise
                for page in range(extents[0].first + 1, extents[0].first + extents[0].pages):
                    for plane in range(self.planes):
                        del self.bytes[plane, page]
        except (OutOfPages, DriverError):
            assert self.backend.raised > raised
            return False
        return True

    def shape(self):
        extents = sorted((e.first, e.pages) for e in self.pool.extents.values())
        return extents, self.pool.backed_bytes, self.pool.budget.claimed_bytes

    @rule(limit=st.integers(0, 100))
    def move_the_limit(self, limit):
        self.pool.budget.set_limit(limit * PAGE)

    @invariant()
    def contents_are_those_of_the_model(self):
        STEPS["run"] += 1
        self.pool.check()
        self.inner.check()
        assert self.pool.backed_bytes == len(self.bytes) * PAGE == self.inner.resident_bytes()
        assert self.pool.budget.claimed_bytes == self.pool.backed_bytes
        for (plane, page), data in self.bytes.items():
            assert self.inner.read(self.address(plane, page), PAGE) == data

    def teardown(self):
        if hasattr(self, "pool"):
            self.pool.close()
            self.pool.close()
            assert self.pool.budget.claimed_bytes == 0
            self.inner.check()
            self.inner.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_page_pool_is_a_dict_of_pages():
    run_state_machine_as_test(PageMachine, settings=machine_settings(270, 50))
    assert STEPS["run"] > 10_500, f"only {STEPS['run']} steps"
