"""What ``kvcached doctor`` says of a GPU is what torch says of it."""

from __future__ import annotations

import pytest
import torch

from kvcached.cli.probes import probe_driver

pytestmark = pytest.mark.gpu


@pytest.fixture
def facts():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return probe_driver()


def test_the_driver_and_its_devices_are_found(facts):
    assert facts.problem == ""
    assert len(facts.gpus) == torch.cuda.device_count()
    for gpu in facts.gpus:
        known = torch.cuda.get_device_properties(gpu.index)
        assert gpu.name == known.name
        assert gpu.memory_bytes >= known.total_memory
        assert gpu.uuid.removeprefix("GPU-") == str(known.uuid)


def test_virtual_memory_has_pages(facts):
    for gpu in facts.gpus:
        assert gpu.virtual_memory
        assert gpu.page_bytes >= 64 << 10
        assert gpu.page_bytes & (gpu.page_bytes - 1) == 0
