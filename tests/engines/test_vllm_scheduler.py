"""A scheduler's process: it decides what workers map on a GPU, and never touches one itself."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from kvcached.engines.vllm import region as regions
from kvcached.engines.vllm.region import Facts, Region
from kvcached.layout import Geometry
from kvcached.testing import CountingBackend, FakeBackend

PAGE, BLOCKS = 8, 60
SCHEDULER = """
import sys

import numpy as np

sys.stdin.readline()  # until the workers listen


class Refused:
    asked = []

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"cuda", "pynvml", "torch", "triton"}:
            self.asked.append(name)
        return None


sys.meta_path.insert(0, Refused())
from kvcached.engines.vllm import attach

engine = attach.attach(60)
assert engine is not None and engine.backend.device == "cuda:0", engine
keep, drop = np.ones(9, np.bool_), np.zeros(9, np.bool_)
for hashed in (drop, keep):
    with engine.scheduling():
        assert engine.secure(9)
        ids = engine.take(9)
    with engine.updating(step=True):
        engine.give(ids, hashed)
engine.reclaim(1 << 20)
engine.check()
engine.close()
engine.backend.shutdown()
held = {"cuda", "cuda.bindings", "kvcached.memory.cuda", "torch", "triton"} & set(sys.modules)
libraries = [line.split()[-1] for line in open("/proc/self/maps") if "libcuda" in line]
print(sorted(held), Refused.asked, libraries)
"""


class OnGpu(CountingBackend):
    """Memory that says to be a GPU's."""

    device, uuid, total_bytes = "cuda:0", "00000000-1111-2222-3333-444444444444", 80 << 30


@pytest.mark.parametrize("workers", [1, 2])
def test_a_scheduler_of_workers_on_gpus_loads_no_driver(runtime_dir, monkeypatch, workers):
    settled = []
    monkeypatch.setattr(Region, "_settle", lambda self: settled.append(self.facts.rank))
    environ = os.environ | {"KVCACHED_RUNTIME_DIR": str(runtime_dir), "KVCACHED_BROKER": "0"}
    child = subprocess.Popen(
        [sys.executable, "-c", SCHEDULER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env=environ,
    )  # fmt: skip
    made = []
    try:
        monkeypatch.setattr(regions.os, "getppid", lambda: child.pid)
        for rank in range(workers):
            facts = Facts(rank, workers, "m", "vLLM", 0, 64, runs_on=True)
            backend = OnGpu(FakeBackend(PAGE))
            made.append(Region(backend, Geometry(24, 1, BLOCKS, PAGE), facts, more_pages=BLOCKS))
            made[-1].serve()
        output, errors = child.communicate("go\n", timeout=60)
    finally:
        child.kill()
        child.wait()
        for region in made:
            region.close()
    assert not child.returncode, errors
    assert output.split("\n")[0] == "[] [] []", output
    assert set(settled) == set(range(workers)), "the scheduler waited for their kernels"
    assert all(region.backend.calls["map"] for region in made)
