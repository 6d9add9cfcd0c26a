"""``SparePolicy``: a target that follows growth and is zero after ``decay`` seconds."""

import pytest

from kvcached.spares import SparePolicy


def test_without_growth_nothing_is_kept():
    assert SparePolicy().target(5.0) == 0


def test_the_target_follows_the_rate_of_growth():
    policy = SparePolicy(decay=1.0, horizon=0.25)
    for step in range(200):
        policy.grew(1_000, step * 0.01)  # 100 kB a second
    assert policy.target(1.99) == pytest.approx(25_000, rel=0.1)


def test_the_target_only_falls_in_idleness_and_ends_at_zero():
    policy = SparePolicy(decay=1.0)
    policy.grew(1 << 20, 10.0)
    targets = [policy.target(10.0 + t / 100) for t in range(100)]
    assert targets == sorted(targets, reverse=True)
    assert targets[0] > 0
    assert targets[99] < 0.02 * targets[0]
    assert policy.target(11.0) == 0


def test_no_decay_time_means_no_spares():
    policy = SparePolicy(decay=0.0)
    policy.grew(1 << 20, 1.0)
    assert policy.target(1.0) == 0
