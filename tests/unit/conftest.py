"""Fixtures of the unit tests."""

from __future__ import annotations

import pytest
from fake_nvml import FakeNvml


@pytest.fixture
def library():
    library = FakeNvml()
    yield library
    assert library.opened == 0
