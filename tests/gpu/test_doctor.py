"""What ``kvcached doctor`` says of a GPU is what torch says of it."""

from __future__ import annotations

import re
import time

import pytest
import torch

from kvcached.cli.costs import measure
from kvcached.cli.gpus import gpu_checks
from kvcached.cli.probes import probe_driver, version_of
from kvcached.memory.cuda import load_driver

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


def test_everything_is_said_in_a_moment(facts):
    version = version_of("cuda-bindings")
    started = time.monotonic()
    found = {check.name: check for check in gpu_checks(facts, bindings=version)}
    assert time.monotonic() - started < 4.0  # two seconds, and a context
    assert re.match(r"\d+\.\d+[.\d]*, CUDA \d+\.\d+", found["nvidia driver"].detail)
    assert " free" in found["gpu 0 memory"].detail
    assert "gpu 0 mode" not in found
    if version is not None:
        assert found["gpu 0 costs"].status == "ok"
        assert "KVCACHED_MAX_HANDLE" in found["gpu 0 advice"].detail


def test_costs_are_those_of_a_driver(facts):
    pytest.importorskip("cuda.bindings.driver")
    small, large = measure(facts.gpus[0].uuid, load_driver())
    assert (small.nbytes, large.nbytes) == (facts.gpus[0].page_bytes, 64 << 20)
    for one in (small, large):
        assert set(one.micros) == {"create", "map", "access", "unmap", "release"}
        assert all(0.1 < micros < 10_000 for micros in one.micros.values())
    assert large.grow_ms < small.grow_ms
