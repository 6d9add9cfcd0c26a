"""Fixtures of the fault tests."""

from __future__ import annotations

import pytest
from broker_tenant import CountingTenant


@pytest.fixture
def tenant(runtime_dir):
    one = CountingTenant("a")
    yield one
    one.close()
