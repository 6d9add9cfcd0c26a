"""``FreeRuns`` against a plain set of free indices."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from kvcached.runs import FreeRuns


def runs_of(free):
    """The maximal runs of a set of indices, as (first, count)."""
    firsts = sorted(i for i in free if i - 1 not in free)
    ends = sorted(i + 1 for i in free if i + 1 not in free)
    return [(first, end - first) for first, end in zip(firsts, ends, strict=True)]


class RunsMachine(RuleBasedStateMachine):
    @initialize(total=st.integers(1, 80))
    def start(self, total):
        self.total, self.free, self.runs = total, set(range(total)), FreeRuns(total)

    @rule(data=st.data())
    def take(self, data):
        if not self.free:
            return
        first, count = data.draw(st.sampled_from(runs_of(self.free)))
        start = data.draw(st.integers(first, first + count - 1))
        taken = data.draw(st.integers(1, first + count - start))
        self.runs.take(start, taken)
        self.free -= set(range(start, start + taken))

    @rule(data=st.data())
    def give(self, data):
        used = set(range(self.total)) - self.free
        if not used:
            return
        first, count = data.draw(st.sampled_from(runs_of(used)))
        given = data.draw(st.integers(1, count))
        self.runs.give(first, given)
        self.free |= set(range(first, first + given))

    @rule(first=st.integers(0, 79), count=st.integers(1, 80))
    def what_is_not_free_cannot_be_taken(self, first, count):
        if not set(range(first, first + count)) <= self.free:
            with pytest.raises(AssertionError, match="not free"):
                self.runs.take(first, count)

    @rule(count=st.integers(1, 90))
    def candidates_are_all_the_runs_and_what_fits_comes_first(self, count):
        found = list(self.runs.candidates(count))
        assert sorted(found) == runs_of(self.free)
        class_of = [size.bit_length() for _, size in found]
        larger = [c for c in class_of if c >= count.bit_length()]
        assert class_of == sorted(larger) + sorted(class_of[len(larger) :], reverse=True)

    @invariant()
    def the_runs_are_those_of_the_set(self):
        self.runs.check()
        assert list(self.runs) == runs_of(self.free)
        assert self.runs.free == len(self.free)


def test_free_runs_are_the_runs_of_a_set():
    run_state_machine_as_test(
        RunsMachine, settings=settings(max_examples=60, stateful_step_count=50)
    )


def test_stale_entries_do_not_pile_up():
    runs = FreeRuns(64)
    for _ in range(2000):
        runs.take(3, 5)
        runs.give(3, 5)
    assert sum(map(len, runs._classes)) < 400
    runs.check()
