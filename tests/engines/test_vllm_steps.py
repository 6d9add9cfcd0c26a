"""What the scheduler's hooks read of vLLM's scheduler."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace as Thing

from kvcached.engines.vllm.steps import _expected


def scheduler(*lengths, running=0, queue=deque, **more):
    waiting = queue(Thing(num_tokens=n, num_computed_tokens=done) for n, done in lengths)
    return Thing(waiting=waiting, running=[None] * running, max_num_running_reqs=4,
                 max_num_scheduled_tokens=100, block_size=16, **more)  # fmt: skip


def test_what_waits_is_counted_in_blocks_up_to_what_a_pass_takes():
    assert _expected(scheduler()) == 0
    assert _expected(scheduler((17, 0), (40, 24))) == 2 + 1
    assert _expected(scheduler((90, 0), (90, 0), (90, 0))) == 6 + 1  # ten tokens of the second


def test_no_more_requests_than_may_run():
    assert _expected(scheduler((16, 0), (16, 0), (16, 0), running=2)) == 2
    assert _expected(scheduler((16, 0), running=4)) == 0


def test_a_sorted_queue_or_a_scheduler_that_lacks_something_is_not_looked_at():
    assert _expected(scheduler((16, 0), queue=list)) == 0
    assert _expected(Thing(waiting=deque([1]))) == 0
