"""For tests, ours and yours: fakes, fault injection, the conformance suite, strategies.

Needs no test runner. ``kvcached.testing.strategies`` alone needs hypothesis.
"""

from kvcached.testing.fake import FakeBackend, ManualFence
from kvcached.testing.wrappers import (
    OPERATIONS,
    BackendWrapper,
    CountingBackend,
    FailingBackend,
    LimitedBackend,
    injected_error,
)

__all__ = [
    "OPERATIONS",
    "BackendWrapper",
    "CountingBackend",
    "FailingBackend",
    "FakeBackend",
    "LimitedBackend",
    "ManualFence",
    "injected_error",
]
