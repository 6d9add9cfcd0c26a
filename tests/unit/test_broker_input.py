"""What a budget refuses before it asks any broker."""

import os

import pytest

from kvcached.broker.client import BrokerBudget
from kvcached.errors import InvalidInput, UnsafeRuntimeDir


@pytest.mark.parametrize("bad", [-1, True, 1.5, "8G", 1 << 63])
def test_limits_and_floors_are_sizes(bad, runtime_dir):
    with pytest.raises(InvalidInput, match="limit"):
        BrokerBudget("a", device="cpu", limit_bytes=bad)
    with pytest.raises(InvalidInput, match="floor"):
        BrokerBudget("a", device="cpu", limit_bytes=1, floor_bytes=bad)
    assert os.listdir(runtime_dir) == []


def test_an_unsafe_directory_is_refused(runtime_dir):
    os.chmod(runtime_dir, 0o777)
    with pytest.raises(UnsafeRuntimeDir, match="others can write"):
        BrokerBudget("a", device="cpu", limit_bytes=1)
    os.chmod(runtime_dir, 0o700)
