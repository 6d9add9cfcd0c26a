"""For tests, ours and yours: fakes, fault injection, the conformance suite, strategies.

Needs no test runner. ``kvcached.testing.strategies`` alone needs hypothesis.
"""

from kvcached.testing.conformance import CLAUSES, check_memory_backend
from kvcached.testing.fake import FakeBackend, ManualFence
from kvcached.testing.fake_cuda import FakeCudaDriver
from kvcached.testing.models import model_specs
from kvcached.testing.wrappers import (
    OPERATIONS,
    BackendWrapper,
    CountingBackend,
    FailingBackend,
    LimitedBackend,
    injected_error,
)

__all__ = [
    "CLAUSES",
    "OPERATIONS",
    "BackendWrapper",
    "CountingBackend",
    "FailingBackend",
    "FakeBackend",
    "FakeCudaDriver",
    "LimitedBackend",
    "ManualFence",
    "check_memory_backend",
    "injected_error",
    "model_specs",
]
